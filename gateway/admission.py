"""Who is let in to what: an ASGI middleware before all routes.

    /health, /openapi.json   everybody
    /ready, /metrics         who has the key of `listen.admin_key_sha256`; without one, this machine, and everybody
                             where `listen.allow_anonymous` says so
    /admin/...               who has that key; without one, this machine, and nobody else
    all else                 tenants, within their limits; everybody, where none are configured

An `Admission` is left in the request's state; what it holds is given back when the answer has ended, however it ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.config import Listen
from gateway.errors import ApiError, NotAllowed, Unauthenticated
from gateway.metrics import Metrics
from gateway.tenants import Account, Admission, Tenants, matches, offered_key
from gateway.values import is_loopback

PUBLIC = frozenset({"/health", "/openapi.json"})
OPERATORS = frozenset({"/ready", "/metrics"})
ADMIN = "/admin/"  # what all paths begin with that are for operators alone, whoever else may use the rest
# A proxy on this machine asks for somebody else, and a browser for a page of anywhere.
FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"origin"})

LEFT = 499  # the client did; the model may have been at work

Refuse = Callable[[Request, ApiError], Awaitable[Response]]


ANYBODY = Account(None)


class Admitted:
    """`refuse` makes the answer of an error."""

    def __init__(self, app: ASGIApp, tenants: Tenants, listen: Listen, metrics: Metrics, refuse: Refuse) -> None:
        self._app = app
        self._tenants = tenants
        self._listen = listen
        self._metrics = metrics
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = ANYBODY
        try:
            account = self._account(scope)
            admission = account.admit(counted=scope["method"] == "POST")
        except ApiError as error:
            self._count(account, error.code or error.type)
            response = await self._refuse(Request(scope), error)
            response.headers.update(account.headers())
            await response(scope, receive, send)
            return
        self._count(account, "admitted")
        scope["state"]["admission"] = admission
        await self._serve(account, admission, scope, receive, send)

    def _account(self, scope: Scope) -> Account:
        """Who the request is from. Raises `Unauthenticated`, `NotAllowed`."""
        if scope["path"] in PUBLIC:
            return ANYBODY
        if scope["path"] in OPERATORS or scope["path"].startswith(ADMIN):
            check_operator(scope, self._listen)
            return ANYBODY
        return self._tenants.account(scope["headers"])

    async def _serve(self, account: Account, admission: Admission, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500  # sent outside of this, when nothing is sent here

        async def telling(message: Message) -> None:
            """The answer says what is left to the tenant."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                left = [(name.encode(), value.encode()) for name, value in account.headers().items()]
                message["headers"] = [*message["headers"], *left]
            await send(message)

        try:
            await self._app(scope, receive, telling if account.tenant else send)
        finally:
            admission.end(failed=status >= 400 and status != LEFT)
            if account.tenant:
                self._metrics.tenant_tokens.labels(account.tenant.name).inc(admission.tokens)

    def _count(self, account: Account, outcome: str) -> None:
        if account.tenant or outcome != "admitted":
            name = account.tenant.name if account.tenant else "unknown"
            self._metrics.tenant_requests.labels(name, outcome).inc()


def check_operator(scope: Scope, listen: Listen) -> None:
    """Raises `Unauthenticated` or `NotAllowed` when this is not who runs the gateway."""
    if listen.admin_key_sha256 is not None:
        key = offered_key(scope["headers"])
        if key is None or not matches(key, listen.admin_key_sha256):
            raise Unauthenticated(f"{scope['path']} takes the key of listen.admin_key_sha256")
    elif not is_from_here(scope) and (scope["path"].startswith(ADMIN) or not listen.allow_anonymous):
        raise NotAllowed(f"{scope['path']} answers this machine only, unless listen.admin_key_sha256 is configured")


def is_from_here(scope: Scope) -> bool:
    """Whether a process of this machine asks, and for itself."""
    client = scope["client"]
    forwarded = any(name in FORWARDED for name, _ in scope["headers"])
    return client is not None and not forwarded and is_loopback(client[0])
