"""The Starlette application: routes, what is opened and closed with it, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import conversation, limits
from gateway.admin import ROUTES, Admin, Ask, Asked
from gateway.admission import Admitted
from gateway.cache import Cache, CacheUnavailable
from gateway.cache.curves import Curves
from gateway.call import Call
from gateway.chat import Chat, check_model
from gateway.config import EMBEDDER, Config, Listen, Model
from gateway.contract import Contract
from gateway.dialects import CHAT, FORMS, MESSAGES, Form
from gateway.embeddings import classification_list, embedding_list, parse_classify, parse_embeddings, tokens
from gateway.errors import ApiError, BodyTooLarge, PartUnavailable, UnknownAnswer, anthropic_form, openai_form
from gateway.feedback import Feedback
from gateway.feedback import parse as parse_feedback
from gateway.lasting import Lasting
from gateway.matching import Matcher
from gateway.metrics import CONTENT_TYPE, Metrics
from gateway.online import Checks
from gateway.openapi import DOCUMENT
from gateway.request import credential, is_request_id, owner, parse, parse_cache_control, scope_key
from gateway.siblings import VERDICT, taken
from gateway.triton import Router, TritonUnavailable
from gateway.upstream import Upstream

if TYPE_CHECKING:
    from gateway.cache.observations import Observations

log = logging.getLogger("fingerpost")

MAX_LOGGED_CHARACTERS = 2000  # of a prompt, where `log_prompts` wants them


def create_app(config: Config, contract: Contract, lasting: Lasting) -> Starlette:
    """The gateway for a configuration that was checked against the contract (`gateway.config.check_against`)."""
    metrics = lasting.metrics
    if config.log_prompts:
        log.warning("log_prompts is true: what clients ask, and which tenants they are, is written to this log")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        async with contextlib.AsyncExitStack() as stack:
            upstream = Upstream(config.models, config.upstream, metrics)
            stack.push_async_callback(upstream.close)
            await stack.enter_async_context(upstream.watching())
            router = Router(config.triton, contract)
            stack.push_async_callback(router.close)
            cache = open_cache(config, contract, lasting)
            if cache is not None:
                stack.push_async_callback(cache.close)
            dials = await lasting.dials(config, contract)
            online = config.semantic_cache.online
            curves = lasting.curves(config, contract) if cache is not None and online.check_share else None
            matcher = Matcher(router, config.semantic_cache, contract.verification, metrics, curves)
            checks: Checks | None = None
            if curves is not None:
                journal = open_journal(config, contract, curves, metrics)
                if journal is not None:
                    stack.push_async_callback(journal.close)
                checks = Checks(online, curves, router, metrics, journal)
                stack.push_async_callback(checks.close)
            verdicts = Feedback(config.feedback, config.data_dir, cache, metrics, lasting.ledger)
            chat = Chat(config, router, cache, upstream, dials, verdicts, metrics, matcher, checks)
            admin = Admin(config, router, cache, matcher, chat, metrics, lasting.siblings)
            yield {
                "lasting": lasting,
                "config": config,
                "contract": contract,
                "metrics": metrics,
                "chat": chat,
                "feedback": verdicts,
                "admin": admin,
                "answers": {VERDICT: partial(taken, verdicts.take), **admin.answers},
                "router": router,
                "cache": cache,
                "upstream": upstream,
                "created": int(time.time()),
            }

    return Starlette(
        routes=[
            *(Route(form.path, partial(answer, form), methods=["POST"]) for form in FORMS.values()),
            Route("/v1/route", route, methods=["POST"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
            Route("/v1/classify", classify, methods=["POST"]),
            Route("/v1/feedback", feedback, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", one_model, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/ready", ready, methods=["GET"]),
            Route("/metrics", exposition, methods=["GET"]),
            *(Route(path, partial(operate, asks), methods=list(asks)) for path, asks in ROUTES.items()),
        ],
        middleware=[
            Middleware(Counted, metrics=metrics),
            Middleware(
                Admitted,
                tenants=lasting.tenants(config.tenants),
                listen=config.listen,
                metrics=metrics,
                refuse=api_error,
            ),
        ],
        exception_handlers={
            ApiError: api_error,
            HTTPException: http_error,
            ClientDisconnect: client_gone,
            Exception: unexpected,
        },
        lifespan=lifespan,
    )


def open_cache(config: Config, contract: Contract, lasting: Lasting) -> Cache | None:
    """The configured backend; None when the cache is not enabled."""
    settings = config.semantic_cache
    if not settings.enabled:
        return None
    if settings.backend_type == "memory":
        return lasting.memory_cache(config, contract)
    from gateway.cache.milvus import MilvusCache  # with pymilvus comes pandas: 100 MB of each worker

    return MilvusCache(
        config.milvus,
        namespace=contract.embedder,
        dimension=contract.dimension,
        ttl_seconds=config.longest_ttl_seconds,
        eviction_policy=settings.eviction_policy,
        metrics=lasting.metrics,
    )


def open_journal(config: Config, contract: Contract, curves: Curves, metrics: Metrics) -> Observations | None:
    """What keeps observations and shares them; None when the cache is this process's own."""
    if config.semantic_cache.backend_type == "memory":
        return None
    from gateway.cache.observations import Observations

    return Observations(config.milvus, f"{contract.embedder}_{contract.verifier}", curves.observe, metrics)


async def answer(form: Form, request: Request) -> Response:
    """An answer in this form."""
    call = await _call(request, form)
    if call.admission.tenant is not None:
        call.admission.reserve(conversation.context_tokens(call.request.body))
    return await unless_gone(request, request.state.chat.answer(call))


async def route(request: Request) -> Response:
    """What `/v1/chat/completions` would do with this body, without asking an LLM."""
    call = await _call(request, CHAT)
    found = await request.state.chat.route(call)
    reading = found.reading
    return JSONResponse(
        {
            "model": found.model.name,
            "endpoint": request.state.upstream.next_endpoint(found.model),
            "endpoints": [asdict(figures) for figures in request.state.upstream.figures(found.model)],
            "fallback": found.model.fallback,
            "rule": found.rule,
            "reason": found.reason,
            "overrides": found.overrides.changes,
            "category": reading.category if reading else None,
            "category_scores": reading.category_scores if reading else None,
            "complexity": reading.complexity if reading else None,
            "quality": found.quality if reading else None,
            "truncated": reading.truncated if reading else None,
            "cache": {"eligible": found.uncacheable is None, "reason": found.uncacheable},
        },
        headers={"x-request-id": call.id},
    )


async def embed(request: Request) -> Response:
    """The embeddings of texts, by the embedder that the cache uses."""
    state = request.state
    state.admission.check_model(EMBEDDER)
    wanted = parse_embeddings(
        await _body(request, state.config.listen),
        dimension=state.contract.dimension,
        most=state.config.batch.max_inputs,
    )
    found = await unless_gone(request, _read(request, state.router.embed, wanted.texts))
    return Response(embedding_list(wanted, found), media_type="application/json", headers=_named(request))


async def classify(request: Request) -> Response:
    """What the classifier reads in texts."""
    state = request.state
    texts = parse_classify(await _body(request, state.config.listen), most=state.config.batch.max_inputs)
    readings = await unless_gone(request, _read(request, state.router.read_all, texts))
    return JSONResponse(classification_list(readings), headers=_named(request))


async def feedback(request: Request) -> Response:
    """A verdict on an answer that went out; a bad one leaves the cache."""
    state, who = request.state, _who(request)
    verdict = parse_feedback(await _body(request, state.config.listen))
    try:
        taken = await state.feedback.take(who, verdict)
    except UnknownAnswer:
        if state.lasting.siblings is None:
            raise
        taken = await state.lasting.siblings.take(who, verdict)
    return JSONResponse(taken, headers=_named(request))


async def operate(asks: Mapping[str, Ask], request: Request) -> Response:
    """What operators ask of the cache."""
    asked = Asked(await _body(request, request.state.config.listen), request.path_params, request.query_params)
    response = await asks["GET" if request.method == "HEAD" else request.method](request.state.admin, asked)
    response.headers.update(_named(request))
    return response


async def openapi(request: Request) -> Response:
    return JSONResponse(DOCUMENT)


T = TypeVar("T")


async def _read(request: Request, read: Callable[[Sequence[str]], Awaitable[T]], texts: Sequence[str]) -> T:
    """What Triton makes of the texts. Raises `PartUnavailable`."""
    request.state.admission.reserve(tokens(texts))
    try:
        found = await read(texts)
    except TritonUnavailable as error:
        log.warning("%s: %s", request.state.request_id, error)
        raise PartUnavailable("the models that read texts do not answer") from error
    request.state.metrics.texts.labels(request.scope["route"].path).inc(len(texts))
    return found


def _named(request: Request) -> dict[str, str]:
    return {"x-request-id": request.state.request_id}


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """The answer, given up when the client leaves before it begins: vLLM stops generating, Triton is asked no more.

    Raises `ClientDisconnect`. A stream has begun when this returns, and looks after itself.
    """
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def models(request: Request) -> Response:
    config, created = request.state.config, request.state.created
    described = [_alias(alias, created) for alias in config.aliases]
    described += [_described(model, created) for model in config.models]
    allowed = [model for model in described if request.state.admission.allows(model["id"])]
    return JSONResponse({"object": "list", "data": allowed})


async def one_model(request: Request) -> Response:
    name, created = request.path_params["name"], request.state.created
    check_model(request.state.config, name, request.state.admission)
    model = request.state.config.model(name)
    return JSONResponse(_described(model, created) if model else _alias(name, created))


async def health(request: Request) -> Response:
    """Alive: this process answers."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Ready: Triton, the cache and at least one endpoint of every model answer; otherwise 503 and what does not."""
    if request.state.lasting.draining:
        return JSONResponse({"status": "draining", "not_ready": {"gateway": "is about to end"}}, status_code=503)
    missing = {name: reason async for name, reason in _not_ready(request)}
    return JSONResponse(
        {"status": "not ready" if missing else "ready", "not_ready": missing}, status_code=503 if missing else 200
    )


async def exposition(request: Request) -> Response:
    request.state.chat.publish()
    return Response(request.state.metrics.exposition(), media_type=CONTENT_TYPE)


async def _not_ready(request: Request) -> AsyncIterator[tuple[str, str]]:
    state = request.state
    try:
        await state.router.check()
    except TritonUnavailable as error:
        yield "triton", str(error)
    if state.cache is not None:
        try:
            await state.cache.check()
        except CacheUnavailable as error:
            yield "cache", str(error)
    configured = state.config.models
    checks = await asyncio.gather(*map(state.upstream.check, configured))
    for model, is_healthy in zip(configured, checks, strict=True):
        if not is_healthy:
            yield model.name, f"no healthy endpoint among {', '.join(endpoint.url for endpoint in model.endpoints)}"


async def _call(request: Request, form: Form) -> Call:
    started = time.perf_counter()
    control = parse_cache_control(request.headers.get("x-fingerpost-cache-control"))
    listen, admission = request.state.config.listen, request.state.admission
    chat_request = parse(await _body(request, listen), form.view)
    limits.check(chat_request.body, listen)
    check_model(request.state.config, chat_request.model, admission)
    who = _who(request)
    if request.state.config.log_prompts:
        asked = chat_request.question[:MAX_LOGGED_CHARACTERS]
        log.info("%s: %s asks %r", request.state.request_id, admission.tenant or "somebody", asked)
    sharing = request.state.config.semantic_cache.scope
    scope = scope_key(chat_request, owner(chat_request, sharing, who, credential(request.headers)))
    reason = request.state.chat.cacheable(chat_request)
    return Call(request.state.request_id, chat_request, scope, control, reason, started, admission, who, form)


def _who(request: Request) -> str:
    """Who asks, in so many words or as a digest of the credential."""
    return request.state.admission.tenant or credential(request.headers)


async def _body(request: Request, listen: Listen) -> bytes:
    """All of the body, but never more of it than `listen` allows."""
    limit = listen.max_body_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(f"the body is longer than {limit} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(f"the body is longer than {limit} bytes")
    limits.check_raw(body, listen)
    return bytes(body)


def _alias(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "fingerpost"}


def _described(model: Model, created: int) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "max_model_len": model.context_window,
        "size": model.size,
        "price_per_million_tokens": model.price_per_million_tokens.model_dump(),
    }


class Counted:
    """Gives every request its id and counts its answer by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 0

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        theirs = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        scope["state"]["request_id"] = theirs if is_request_id(theirs) else uuid.uuid4().hex
        try:
            await self._app(scope, receive, counting)
        except Exception:
            status = status or 500  # sent outside of this
            raise
        finally:
            path = scope["route"].path if "route" in scope else "unknown"
            self._metrics.requests.labels(path, status or "none").inc()


async def api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(request, error.status, openai_form(error.message, error.type, error.param, error.code), error.headers)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {request.scope['path'][:200]}", 405: f"{request.method} is not allowed here"}
    message = words.get(error.status_code, error.detail)
    return _error(request, error.status_code, openai_form(message, "invalid_request_error"), error.headers)


async def client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def unexpected(request: Request, error: Exception) -> Response:
    return _error(request, 500, openai_form("the gateway failed; its log has the reason", "api_error"))


def _error(request: Request, status: int, body: dict[str, Any], headers: Any = None) -> Response:
    if request.scope["path"].startswith(MESSAGES.path):
        body = anthropic_form(status, body["error"]["message"], request.state.request_id)
    return JSONResponse(body, status, headers={**(headers or {}), "x-request-id": request.state.request_id})
