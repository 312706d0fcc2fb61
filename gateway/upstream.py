"""Talking to vLLM: a request to the endpoints of one model after another until one answers, and its answer as it comes.

Nothing has been sent to the client until `Upstream.send` returns. Until then an endpoint that cannot be reached, breaks
off before its first byte, or answers with one of `upstream.retry_statuses` is passed over for another one. After a
time-out the request may be half generated there (closing the connection tells vLLM to stop), and another endpoint would
generate it a second time: `upstream.timeout_retry_share` of a model's requests at most get that, the others fail. An
answer that is too long is the request's doing: no other endpoint is asked, and none has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import get_args

import aiohttp
import orjson
from aiohttp.http_exceptions import HttpProcessingError

from gateway import config, sse
from gateway.endpoints import Address, Allowance, Endpoint, Endpoints, Figures, Kind, Lease, State
from gateway.errors import AnswerTooLong, ApiError, UpstreamTimeout, UpstreamUnavailable
from gateway.metrics import Metrics
from gateway.overrides import CHAT
from gateway.tasks import end

log = logging.getLogger("fingerpost")

KEEP_ALIVE_SECONDS = 4  # less than vLLM's 5, so that no request meets a connection that is just being closed
WAIT_SECONDS = 1.0  # for an endpoint that is busy and does not say for how long
# What an answer's header may tell the client; the rest describes this connection, not the answer.
PASSED_ON = ("content-type", "retry-after")
OK, BUSY, NOT_IMPLEMENTED = 200, 429, 501
STATUSES = range(200, 600)
KEY_REFUSED = (401, 403)  # of the model's `api_key`, which is no business of the client's

Body = Callable[[config.Model], bytes]  # what a model is sent


class UpstreamBroken(Exception):
    """The endpoint ended its answer before it was whole."""


# What aiohttp raises. What is not HTTP is a ClientError in the head of an answer, an HttpProcessingError in its body.
FOREIGN = (aiohttp.ClientError, HttpProcessingError, TimeoutError)
UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class Reply:
    """An endpoint's answer: begun if it is a stream, else whole. Must be closed."""

    def __init__(
        self,
        model: config.Model,
        response: aiohttp.ClientResponse,
        lease: Lease,
        failed: Callable[[str, str], None],
    ) -> None:
        """`failed` is told the kind of a failure and its words."""
        self.model = model  # whose answer it is
        self.status = response.status
        found = {name: response.headers.get(name, "") for name in PASSED_ON}
        self.headers: Mapping[str, str] = {name: value for name, value in found.items() if value and value.isascii()}
        self.is_stream = response.status == OK and is_event_stream(found["content-type"])
        self.body = b""  # of an answer that is not a stream
        self._response = response
        self._lease = lease
        self._failed = failed
        self._first = b""
        self._end: asyncio.TimerHandle | None = None
        self._is_late = False

    async def begin(self, max_bytes: int) -> None:
        """Read the first piece of a stream, all of another answer.

        Raises `AnswerTooLong`, `UpstreamBroken` and what is FOREIGN.
        """
        content = self._response.content
        if self.status not in STATUSES:
            raise UpstreamBroken(f"status {self.status} is none that answers a request")
        if not self.is_stream:
            self.body = await self._all(content, max_bytes)
            return
        self._first = await content.readany()
        if not self._first:
            raise UpstreamBroken("the stream ended before it began")

    @property
    def fault(self) -> int:
        """The status, or the one in the first event of a stream: vLLM sends 200 before it knows."""
        return (self.is_stream and error_status(self._first)) or self.status

    async def piece(self) -> bytes:
        """The next piece of a stream, empty at its end; can be cancelled and called again. Raises `UpstreamBroken`."""
        if self._first:
            first, self._first = self._first, b""
            return first
        try:
            piece = await self._response.content.readany()
        except FOREIGN as error:
            if self._is_late:
                raise UpstreamBroken("it took longer than upstream.total_timeout_seconds") from error
            self._failed("broken", _words(error))
            raise UpstreamBroken(_words(error)) from None  # whose own words may repeat what the server sent
        if not piece:
            self._lease.whole()
        return piece

    def end_at(self, when: float) -> None:
        """Break the answer off at this time of the event loop's clock."""
        self._end = asyncio.get_running_loop().call_at(when, self._break_off)

    def close(self) -> None:
        """Let go of the connection; an unfinished answer is abandoned, which tells vLLM to stop generating."""
        if self._end is not None:
            self._end.cancel()
        self._response.close()
        self._lease.given_up()

    async def _all(self, content: aiohttp.StreamReader, max_bytes: int) -> bytes:
        body = bytearray()
        async for chunk in content.iter_any():
            body += chunk
            if len(body) > max_bytes:
                words = "is longer than upstream.max_answer_bytes"
                if self.status >= 500:  # the endpoint's own words, which no request asks for
                    raise UpstreamBroken(f"its answer {words}")
                raise AnswerTooLong(f"the answer of model {self.model.name!r} {words} ({max_bytes}); ask for less")
        return bytes(body)

    def _break_off(self) -> None:
        self._is_late = True
        self._response.close()


@dataclass(slots=True)
class _Search:
    """A request on its way, and what came of it so far."""

    body: Body
    request_id: str
    path: str
    stream: bool
    deadline: float  # of the event loop's clock
    patience: float  # seconds that it may still wait for endpoints that asked for it
    second_tries: Allowance  # of the model that was chosen
    tried: set[Endpoint] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)  # requests by model; where nobody can be reached none is sent
    refusal: Reply | None = None  # the last answer that another endpoint may better
    error: ApiError | None = None

    def time_left(self) -> float:
        """Raises `UpstreamTimeout` when there is none."""
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise UpstreamTimeout("no model answered within upstream.total_timeout_seconds")
        return left


class Upstream:
    """Client of the configured models' endpoints."""

    def __init__(self, models: Sequence[config.Model], settings: config.Upstream, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        urls = {endpoint.url for model in models for endpoint in model.endpoints}
        self._addresses = {url: Address(url) for url in sorted(urls)}
        self._endpoints = {model.name: Endpoints(model, settings, self._addresses, time.monotonic) for model in models}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=settings.tls.context() if settings.tls else True
            ),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=settings.connect_timeout_seconds, sock_read=settings.idle_timeout_seconds
            ),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def send(
        self, models: Sequence[config.Model], body: Body, request_id: str, *, path: str = CHAT, stream: bool = False
    ) -> Reply:
        """Post to the endpoints of the first model, then to those of the next, until one answers.

        An endpoint that is not well is asked when nothing else answers. When none does, the reply is the last refusal.
        Raises `UpstreamUnavailable` without one, `UpstreamTimeout` when an endpoint took the request and fell silent,
        `AnswerTooLong`.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.total_timeout_seconds
        second_tries = self._endpoints[models[0].name].second_tries
        second_tries.earn()
        search = _Search(body, request_id, path, stream, deadline, self._settings.max_wait_seconds, second_tries)
        for desperate in (False, True):
            for model in models:
                if (reply := await self._ask(search, model, desperate=desperate)) is not None:
                    if model is not models[0]:
                        self._metrics.fallbacks.labels(models[0].name, model.name).inc()
                    return reply
        if search.refusal is not None:
            return search.refusal
        raise search.error or self._unavailable(models)

    def next_endpoint(self, model: config.Model) -> str:
        """The one that the next request for the model is sent to first."""
        endpoints = self._endpoints[model.name]
        return (endpoints.choose() or endpoints.least_bad() or endpoints.all[0]).address.url

    def figures(self, model: config.Model) -> list[Figures]:
        return self._endpoints[model.name].figures()

    def publish(self) -> None:
        """Bring the gauges up to date."""
        for name, endpoints in self._endpoints.items():
            for figures in endpoints.figures():
                self._publish(name, figures)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Within this, every address is checked again and again."""
        watched = self._addresses.values() if self._settings.health_check.enabled else ()
        tasks = [asyncio.create_task(self._watch(address)) for address in watched]
        try:
            yield
        finally:
            await end(tasks)

    async def check(self, model: config.Model) -> bool:
        """Whether some endpoint of the model is healthy; without health checks, as far as requests have shown."""
        endpoints = self._endpoints[model.name]
        if not self._settings.health_check.enabled:
            return endpoints.choose() is not None
        return any(await asyncio.gather(*(self._is_healthy(endpoint.address.url) for endpoint in endpoints.all)))

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, search: _Search, model: config.Model, *, desperate: bool) -> Reply | None:
        """The answer of one of the model's endpoints that may be asked, or, if `desperate`, of any."""
        endpoints = self._endpoints[model.name]
        while search.sent[model.name] <= self._settings.retries:
            endpoint = endpoints.least_bad(search.tried) if desperate else await _rested(endpoints, search)
            if endpoint is None:
                return None
            if search.sent.total():
                self._metrics.retries.labels(model.name).inc()
            search.sent[model.name] += 1
            if (reply := await self._try(search, model, endpoint)) is not None:
                return reply
        return None

    async def _try(self, search: _Search, model: config.Model, endpoint: Endpoint) -> Reply | None:
        """The endpoint's answer; None when another one may be asked.

        Raises `UpstreamTimeout` and `AnswerTooLong` when none may.
        """
        endpoints, limit = self._endpoints[model.name], search.time_left()
        search.tried.add(endpoint)
        lease = endpoints.take(endpoint)
        failed = partial(self._failed, search, model, lease)
        with contextlib.ExitStack() as undo:
            undo.callback(lease.given_up)
            try:
                reply = await self._exchange(search, model, lease, failed, limit)
            except AnswerTooLong as error:
                log.warning("%s: %s: %s", search.request_id, endpoint.address.url, error)
                raise
            except (UpstreamBroken, *FOREIGN) as error:
                failed(_reason(error), _words(error))
                if isinstance(error, aiohttp.ClientConnectorError):
                    search.sent[model.name] -= 1
                if _reason(error) == "timeout":
                    search.error = UpstreamTimeout(f"model {model.name!r} was silent for too long")
                    if not search.second_tries.spend():
                        raise search.error from error
                return None
            undo.pop_all()
        return self._judged(search, reply, lease, failed)

    async def _exchange(
        self, search: _Search, model: config.Model, lease: Lease, failed: Callable[[str, str], None], limit: float
    ) -> Reply:
        """Post the request and await the beginning of its answer.

        Raises `AnswerTooLong`, `UpstreamBroken` and what is FOREIGN.
        """
        url, headers = lease.endpoint.address.url + search.path, _headers(model, search.request_id)
        if search.stream:
            limit = min(limit, self._settings.first_byte_timeout_seconds)
        with contextlib.ExitStack() as undo:
            async with asyncio.timeout(limit):
                response = await self._session.post(
                    url, data=search.body(model), headers=headers, allow_redirects=False
                )
                undo.callback(response.close)
                reply = Reply(model, response, lease, failed)
                await reply.begin(self._settings.max_answer_bytes)
            undo.pop_all()
        if reply.is_stream:
            reply.end_at(search.deadline)
        return reply

    def _judged(self, search: _Search, reply: Reply, lease: Lease, failed: Callable[[str, str], None]) -> Reply | None:
        """The reply; None when another endpoint may have a better one."""
        fault = reply.fault
        if fault in KEY_REFUSED:
            failed("status", f"status {fault}: it does not take the model's api_key")
            reply.close()
            search.error = UpstreamUnavailable(f"model {reply.model.name!r} does not let the gateway in")
            return None
        is_failure = fault >= 500 and fault != NOT_IMPLEMENTED
        if is_failure:
            failed("status", f"status {fault}")
        if fault == BUSY or (is_failure and "retry-after" in reply.headers):
            lease.asked_to_wait(retry_after(reply.headers.get("retry-after"), datetime.now(UTC)))
            search.tried.discard(lease.endpoint)  # it may be asked again, then
        if fault == BUSY or fault in self._settings.retry_statuses:
            reply.close()
            search.refusal = search.refusal if reply.is_stream else reply
            return None
        if not is_failure:
            lease.began(_kind(stream=reply.is_stream) if reply.status == OK else None)
        if not is_failure and not reply.is_stream:
            lease.whole()
        return reply

    def _failed(self, search: _Search, model: config.Model, lease: Lease, reason: str, words: str) -> None:
        url = lease.endpoint.address.url
        self._metrics.endpoint_errors.labels(model.name, url, reason).inc()
        log.warning("%s: model %s: %s: %s", search.request_id, model.name, url, words)
        seconds = lease.failed(_kind(stream=search.stream) if reason == "timeout" else None)
        if seconds is not None:
            self._metrics.ejections.labels(model.name, url).inc()
            failures = lease.endpoint.failures
            log.warning("model %s: %s is ejected for %g s: %d failures in a row", model.name, url, seconds, failures)

    def _unavailable(self, models: Sequence[config.Model]) -> UpstreamUnavailable:
        waits = [wait for model in models if (wait := self._endpoints[model.name].rest_left()) is not None]
        names = " or ".join(repr(model.name) for model in models)
        words = "wants a request now" if waits else "gives an answer"
        return UpstreamUnavailable(f"no endpoint of model {names} {words}", seconds=min(waits, default=None))

    async def _watch(self, address: Address) -> None:
        """Ask the server again and again whether it is healthy, and remember what it says."""
        while True:
            healthy = await self._is_healthy(address.url)
            self._metrics.health_checks.labels(address.url, "healthy" if healthy else "failed").inc()
            if address.checked(healthy=healthy):
                log.warning("%s %s", address.url, "answers its health checks again" if healthy else "is down")
            await asyncio.sleep(self._settings.health_check.interval_seconds)

    async def _is_healthy(self, url: str) -> bool:
        check = self._settings.health_check
        timeout = aiohttp.ClientTimeout(total=check.timeout_seconds)
        try:
            async with self._session.get(url + check.path, timeout=timeout, allow_redirects=False) as response:
                return response.status == OK
        except FOREIGN:
            return False

    def _publish(self, model: str, figures: Figures) -> None:
        metrics, labels = self._metrics, (model, figures.url)
        for state in get_args(State):
            metrics.endpoint_state.labels(*labels, state).set(state == figures.state)
        metrics.outstanding.labels(*labels).set(figures.outstanding)
        metrics.error_rate.labels(*labels).set(figures.error_rate)
        for kind, seconds in (("stream", figures.first_byte_seconds), ("whole", figures.answer_seconds)):
            if seconds is not None:
                metrics.endpoint_seconds.labels(*labels, kind).set(seconds)


async def _rested(endpoints: Endpoints, search: _Search) -> Endpoint | None:
    """The endpoint to ask next, after waiting for one that asked for it if this is not too long."""
    while (endpoint := endpoints.choose(search.tried)) is None:
        wait = endpoints.rest_left(search.tried)
        if wait is None or wait > min(search.patience, search.time_left()):
            return None
        search.patience -= wait
        await asyncio.sleep(wait)
    return endpoint


def is_event_stream(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"


def retry_after(value: str | None, now: datetime) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    if value is not None and re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, OverflowError):
        return WAIT_SECONDS
    left = (date if date.tzinfo else date.replace(tzinfo=UTC)) - now
    return max(left.total_seconds(), 0.0)


def error_status(chunk: bytes) -> int | None:
    """The status of an error that a stream begins with; None when it begins with something else."""
    frames = sse.FrameSplitter().feed(chunk)
    if not frames or b'"error"' not in frames[0]:
        return None
    try:
        payload = orjson.loads(sse.data(frames[0]))
    except orjson.JSONDecodeError:
        return None
    error = payload.get("error") if isinstance(payload, dict) else None
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def _kind(*, stream: bool) -> Kind:
    return "stream" if stream else "whole"


def _reason(error: Exception) -> str:
    if isinstance(error, UNREACHABLE):
        return "unreachable"
    return "timeout" if isinstance(error, TimeoutError) else "broken"


def _words(error: Exception) -> str:
    """For the log; what the server sent is not repeated."""
    name = type(error).__name__
    if isinstance(error, (*UNREACHABLE, TimeoutError, UpstreamBroken)):
        return str(error) or name
    return f"its answer broke off or is not HTTP ({name})"


def _headers(model: config.Model, request_id: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    if model.api_key is not None:
        headers["Authorization"] = f"Bearer {model.api_key.get_secret_value()}"
    return headers
