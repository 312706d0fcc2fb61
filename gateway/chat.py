"""The main path: one chat request, from bytes to an answer. See the diagram in the README."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway import answer as answers
from gateway import policy, sse
from gateway.answer import Answer
from gateway.cache import Cache, CacheUnavailable, Entry, Hit, Origin
from gateway.config import AUTO, NAMED_RULE, Config, Model
from gateway.degradation import Breaker
from gateway.errors import UnknownModel, UpstreamUnavailable
from gateway.metrics import Metrics
from gateway.request import CacheControl, ChatRequest, question_key, upstream_body
from gateway.triton import Reading, Router, TritonUnavailable
from gateway.upstream import Reply, Upstream, UpstreamBroken

log = logging.getLogger("fingerpost")

MAX_FRAME_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """A request and what is asked of the gateway beside it."""

    id: str
    request: ChatRequest
    scope: str
    control: CacheControl
    started: float  # time.perf_counter() when it came in

    @property
    def key(self) -> str:
        return question_key(self.scope, self.request.question)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a prompt goes, and why."""

    model: Model
    rule: str
    reason: str  # why this model, in words
    reading: Reading | None  # None: not needed, or Triton is down
    quality: Mapping[str, float]  # model -> predicted probability that its answer is right, where it can be told
    uncacheable: str | None  # why the answer is neither replayed nor stored

    @property
    def origin(self) -> Origin:
        category, complexity = (self.reading.category, self.reading.complexity) if self.reading else (None, None)
        return Origin(self.model.name, self.rule, category, complexity)


class Relay(StreamingResponse):
    """A stream whose upstream is let go of however it ends, also when the client leaves before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], reply: Reply, headers: dict[str, str]) -> None:
        super().__init__(content, status_code=reply.status, headers=headers)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.close()


class Chat:
    """Answers chat completions. All its parts are opened, and closed, by the application's lifespan."""

    def __init__(
        self, config: Config, router: Router, cache: Cache | None, upstream: Upstream, metrics: Metrics
    ) -> None:
        self._config = config
        self._router = router
        self._cache = cache
        self._upstream = upstream
        self._metrics = metrics
        self._triton = Breaker("triton", metrics)

    async def answer(self, call: Call) -> Response:
        """Replay the answer to the same question, else to one that means the same, else have a model generate it."""
        if exact := await self._same_question(call):
            return self._replay(call, "hit-exact", Hit(exact, 1.0))
        route = await self.route(call.request)
        if hit := await self._same_meaning(call, route):
            return self._replay(call, "hit-semantic", hit)
        return await self._generate(call, route)

    async def route(self, request: ChatRequest) -> Route:
        """Decide who answers; asks no LLM. The model asked for is known, see `check_model`."""
        uncacheable = request.uncacheable if self._cache is not None else "the cache is not enabled"
        reading = None
        if request.question and (request.model == AUTO or uncacheable is None):
            reading = await self._read(request.question)
            if uncacheable is None and reading is None:
                uncacheable = "the prompt could not be read: Triton is down"
            elif uncacheable is None and reading is not None and reading.truncated:
                uncacheable = "the prompt is longer than the models read"
        quality = self._quality(reading)
        decision = self._decide(request, reading, quality)
        model = self._config.model(decision.model)
        assert model is not None  # rules name known models, and so does the request
        return Route(model, decision.rule, decision.reason, reading, quality, uncacheable)

    def _quality(self, reading: Reading | None) -> dict[str, float]:
        """Predicted quality by model, of those whose ability is known."""
        known = reading.quality if reading else {}
        return {model.name: known[model.ability_name] for model in self._config.models if model.ability_name in known}

    def _decide(self, request: ChatRequest, reading: Reading | None, quality: Mapping[str, float]) -> policy.Decision:
        if request.model != AUTO:
            return policy.Decision(request.model, NAMED_RULE, "the request names it")
        category, complexity = (reading.category, reading.complexity) if reading else (None, None)
        prompt = policy.Prompt(request.question, request.prompt_tokens, category, complexity, quality)
        return policy.decide(self._config.policy, self._config.models, prompt)

    async def _read(self, text: str) -> Reading | None:
        """Triton's reading of a text; None, counted, when Triton is down."""
        if self._triton.allows:
            try:
                with self._metrics.router_seconds.time():
                    reading = await self._router.read(text)
            except TritonUnavailable as error:
                self._triton.failed(error)
            else:
                self._triton.worked()
                self._metrics.categories.labels(reading.category).inc()
                return reading
        self._triton.skipped()
        return None

    async def _same_question(self, call: Call) -> Entry | None:
        if self._cache is None or call.request.uncacheable or not call.control.lookup:
            return None
        try:
            with self._metrics.lookup_seconds.labels("exact").time():
                return await self._cache.get(call.key)
        except CacheUnavailable:
            self._metrics.degradations.labels("cache").inc()
            return None

    async def _same_meaning(self, call: Call, route: Route) -> Hit | None:
        if self._cache is None or route.uncacheable or route.reading is None or not call.control.lookup:
            return None
        threshold = self._config.semantic_cache.similarity_threshold
        try:
            with self._metrics.lookup_seconds.labels("semantic").time():
                return await self._cache.search(call.scope, route.reading.embedding, threshold)
        except CacheUnavailable:
            self._metrics.degradations.labels("cache").inc()
            return None

    def _replay(self, call: Call, outcome: str, hit: Hit) -> Response:
        """A stored answer, as JSON or as a stream, whichever is asked for."""
        entry, request = hit.entry, call.request
        self._count_hit(call, outcome, entry)
        headers = _headers(call, outcome, entry.origin)
        if outcome == "hit-semantic":
            headers["x-fingerpost-similarity"] = f"{hit.similarity:.4f}"
        new = answers.Identity(f"chatcmpl-{call.id}", int(time.time()))
        if request.stream:
            body = answers.events(entry.answer, new, include_usage=request.include_usage)
            return Response(body, headers=headers, media_type="text/event-stream")
        return Response(answers.completion(entry.answer, new), headers=headers, media_type="application/json")

    async def _generate(self, call: Call, route: Route) -> Response:
        outcome = "bypass" if route.uncacheable or not call.control.lookup else "miss"
        store = route.uncacheable is None and call.control.store
        body = upstream_body(call.request, route.model.name, want_usage=store)
        reply = await self._upstream.send(route.model, body, call.id)
        self._metrics.routed.labels(route.rule, route.model.name).inc()
        self._metrics.cache.labels(outcome).inc()
        self._metrics.first_byte_seconds.labels(outcome).observe(time.perf_counter() - call.started)
        headers = {**reply.headers, **_headers(call, outcome, route.origin)}
        if route.uncacheable:
            headers["x-fingerpost-cache-reason"] = route.uncacheable
        if reply.is_stream and reply.status == 200:
            keep_usage = call.request.include_usage or not store
            return Relay(self._tee(call, route, reply, store=store, keep_usage=keep_usage), reply, headers)
        return await self._whole(call, route, reply, headers, store=store)

    async def _whole(self, call: Call, route: Route, reply: Reply, headers: dict[str, str], *, store: bool) -> Response:
        try:
            body = await reply.body()
        except UpstreamBroken as error:
            log.warning("%s: model %s broke off: %s", call.id, route.model.name, error)
            raise UpstreamUnavailable(f"model {route.model.name!r} broke off its answer") from error
        finally:
            reply.close()
        if reply.status == 200:
            self._finish(call, route, answers.from_completion(body), store=store)
        return Response(body, status_code=reply.status, headers=headers)

    async def _tee(
        self, call: Call, route: Route, reply: Reply, *, store: bool, keep_usage: bool
    ) -> AsyncIterator[bytes]:
        """The stream as it comes, event by event; the answer is kept only when it is whole.

        A usage chunk that the gateway asked for and the client did not is left out.
        """
        splitter, assembly, finished = sse.FrameSplitter(), answers.Assembly(), False
        try:
            async for chunk in reply.chunks():
                frames = splitter.feed(chunk)
                if splitter.pending > MAX_FRAME_BYTES:
                    raise UpstreamBroken(f"an event is longer than {MAX_FRAME_BYTES} bytes")
                kept = [frame for frame in frames if self._keep(frame, assembly, keep_usage=keep_usage)]
                if assembly.done and not finished:  # before the client sees it, who may leave or ask again at once
                    finished = True
                    self._finish(call, route, assembly.answer(), store=store)
                if kept:
                    yield b"".join(kept)
        except UpstreamBroken as error:
            log.warning("%s: model %s broke off a stream: %s", call.id, route.model.name, error)
            raise
        if rest := splitter.flush():
            yield rest

    @staticmethod
    def _keep(frame: bytes, assembly: answers.Assembly, *, keep_usage: bool) -> bool:
        payload = sse.data(frame)
        assembly.add(payload)
        return keep_usage or not answers.is_usage_only(payload)

    def _finish(self, call: Call, route: Route, answer: Answer | None, *, store: bool) -> None:
        """Account for a generated answer, and remember it if it is whole and may be."""
        if answer is None:
            return
        self._count_tokens(route.model, answer)
        if self._cache is None or route.reading is None or not store:
            return
        self._cache.put(
            Entry(
                key=call.key,
                scope=call.scope,
                question=call.request.question,
                embedding=route.reading.embedding,
                answer=answer,
                origin=route.origin,
                expires_at=time.time() + self._config.semantic_cache.ttl_seconds,
            )
        )

    def _count_tokens(self, model: Model, answer: Answer) -> None:
        for kind, count, price in _bill(model, answer):
            self._metrics.tokens.labels(model.name, kind).inc(count)
            self._metrics.cost.labels(model.name).inc(count * price / 1e6)

    def _count_hit(self, call: Call, outcome: str, entry: Entry) -> None:
        self._metrics.cache.labels(outcome).inc()
        self._metrics.first_byte_seconds.labels(outcome).observe(time.perf_counter() - call.started)
        if model := self._config.model(entry.origin.model):
            saved = sum(count * price for _, count, price in _bill(model, entry.answer))
            self._metrics.saved.labels(model.name).inc(saved / 1e6)


def check_model(config: Config, name: str) -> None:
    """Raises `UnknownModel` when `name` is neither the alias nor a configured model."""
    known = [AUTO, *(model.name for model in config.models)]
    if name not in known:
        words = f"the model {name[:100]!r} does not exist (known: {', '.join(known)})"
        raise UnknownModel(words, param="model")


def _bill(model: Model, answer: Answer) -> list[tuple[str, int, float]]:
    """(kind, tokens, price of a million) of an answer; empty when its usage is not known."""
    usage, price = answer.usage or {}, model.price_per_million_tokens
    prices = {"prompt": price.input, "completion": price.output}
    counts = {kind: usage.get(f"{kind}_tokens") for kind in prices}
    return [(kind, count, prices[kind]) for kind, count in counts.items() if isinstance(count, int)]


def _headers(call: Call, outcome: str, origin: Origin) -> dict[str, str]:
    headers = {
        "x-request-id": call.id,
        "x-fingerpost-cache": outcome,
        "x-fingerpost-model": origin.model,
        "x-fingerpost-rule": origin.rule,
    }
    if origin.category is not None:
        headers["x-fingerpost-category"] = quote(origin.category, safe=" ")  # a user's own may be in any script
    if origin.complexity is not None:
        headers["x-fingerpost-complexity"] = f"{origin.complexity:.3f}"
    return headers
