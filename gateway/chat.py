"""The main path: one chat request, from bytes to an answer. See the diagram in the README."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway import answer as answers
from gateway import conversation, overrides, policy, sse
from gateway.answer import Answer
from gateway.cache import Cache, CacheUnavailable, Entry, Hit, Origin
from gateway.config import NAMED_RULE, Config, Model, Overrides
from gateway.dial import Dials
from gateway.dialects import CHAT, Form
from gateway.errors import UnknownModel
from gateway.feedback import Feedback
from gateway.metrics import Metrics
from gateway.reader import Reader
from gateway.request import CacheControl, ChatRequest, question_key, upstream_body
from gateway.tenants import Admission
from gateway.triton import Reading, Router
from gateway.upstream import Reply, Upstream, UpstreamBroken
from gateway.usage import by_kind

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
    admission: Admission  # of the tenant that asks
    tenant: str  # who asks: its name, or a digest of the credential where there are no tenants
    form: Form = CHAT

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
    overrides: Overrides = policy.NO_OVERRIDES  # what the rule changes in the request
    pulls: Mapping[str, policy.Pull] = field(default_factory=dict)  # what the request tells the dials, by rule

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
        self,
        config: Config,
        router: Router,
        cache: Cache | None,
        upstream: Upstream,
        dials: Dials,
        feedback: Feedback,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._reader = Reader(router, metrics)
        self._cache = cache
        self._upstream = upstream
        self._dials = dials
        self._feedback = feedback
        self._metrics = metrics

    async def answer(self, call: Call) -> Response:
        """Replay the answer to the same question, else to one that means the same, else have a model generate it.

        Where rules change what is asked, it is known after the decision only what the question is.
        """
        policy_asked = self._config.aliases.get(call.request.model)
        changes = policy_asked is not None and policy_asked.has_overrides
        if not changes and (exact := await self._same_question(call)):
            return self._replay(call, "hit-exact", Hit(exact, 1.0))
        route = await self.route(call.request, call.admission.tenant, call.form)
        if changes:
            call = _changed(call, route.overrides)
            if exact := await self._same_question(call):
                return self._replay(call, "hit-exact", Hit(exact, 1.0))
        if hit := await self._same_meaning(call, route):
            return self._replay(call, "hit-semantic", hit)
        self._dials.observe(call.request.model, route.pulls)
        return await self._generate(call, route)

    async def route(self, request: ChatRequest, tenant: str | None = None, form: Form = CHAT) -> Route:
        """Decide who answers; asks no LLM. The model asked for is known, see `check_model`."""
        uncacheable = request.uncacheable if self._cache is not None else "the cache is not enabled"
        is_alias = request.model in self._config.aliases
        turns = conversation.turns(request.messages) if is_alias else ()
        texts = {turn.read for turn in turns if turn.read}
        if request.question and uncacheable is None:
            texts.add(request.question)
        readings = await self._reader.read(texts) if texts else {}
        if uncacheable is None and readings is None:
            uncacheable = "the prompt could not be read: Triton is down"
        elif uncacheable is None and readings and readings[request.question].truncated:
            uncacheable = "the prompt is longer than the models read"
        reading = _reading(request, turns, readings or {})
        if reading is not None:
            self._metrics.categories.labels(reading.category).inc()
        decision = self._decide(request, tenant, form, turns, readings or {})
        model = self._config.model(decision.model)
        assert model is not None  # rules name known models, and so does the request
        return Route(
            model,
            decision.rule,
            decision.reason,
            reading,
            self._quality(reading),
            uncacheable,
            decision.overrides,
            decision.pulls,
        )

    def _quality(self, reading: Reading | None) -> dict[str, float]:
        """Predicted quality by model, of those whose ability is known."""
        known = reading.quality if reading else {}
        return {model.name: known[model.ability_name] for model in self._config.models if model.ability_name in known}

    def _decide(
        self,
        request: ChatRequest,
        tenant: str | None,
        form: Form,
        turns: Sequence[conversation.Turn],
        readings: Mapping[str, Reading],
    ) -> policy.Decision:
        """Who answers the newest of the turns; a prompt that says nothing when there are none."""
        policy_asked = self._config.aliases.get(request.model)
        if policy_asked is None:
            return policy.Decision(request.model, NAMED_RULE, "the request names it")
        base = policy.Prompt(
            text="",
            prompt_tokens=request.prompt_tokens,
            category=None,
            complexity=None,
            tenant=tenant,
            alias=request.model,
            has_tools=conversation.has_tools(request.body),
            has_images=conversation.has_images(request.messages),
            context_tokens=conversation.context_tokens(request.body),
            output_tokens=overrides.output_tokens(request.body, form.path),
        )
        *earlier, newest = [self._prompt(base, turn, readings.get(turn.read)) for turn in turns] or [base]
        bars = self._dials.bars(request.model)
        return policy.decide(policy_asked, self._config.models, newest, earlier, bars)

    def _prompt(self, base: policy.Prompt, turn: conversation.Turn, reading: Reading | None) -> policy.Prompt:
        said = replace(base, text=turn.text, prompt_tokens=turn.prompt_tokens)
        if reading is None:
            return said
        return replace(
            said,
            category=reading.category,
            complexity=reading.complexity,
            quality=self._quality(reading),
            confidence=reading.category_scores[reading.category],
        )

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
        call.admission.spent(0)
        headers = _headers(call, outcome, entry.origin)
        if outcome == "hit-semantic":
            headers["x-fingerpost-similarity"] = f"{hit.similarity:.4f}"
        headers["x-fingerpost-upstream-tokens"] = "0"
        new = answers.Identity(call.form.id_prefix + call.id, int(time.time()))
        same = outcome == "hit-exact"  # how good another question's answer is here tells nothing of the model
        self._remember(call, new.id, entry.origin.model, entry.key, for_training=same)
        if request.stream:
            body = call.form.stream(entry.answer, new, request.include_usage)
            return Response(body, headers=headers, media_type="text/event-stream")
        return Response(call.form.replay(entry.answer, new), headers=headers, media_type="application/json")

    async def _generate(self, call: Call, route: Route) -> Response:
        outcome = "bypass" if route.uncacheable or not call.control.lookup else "miss"
        store = route.uncacheable is None and call.control.store
        want_usage = (store or call.admission.meters_tokens) and call.form.asks_usage

        def body(model: Model) -> bytes:
            return upstream_body(call.request, model.name, want_usage=want_usage)

        models, stream = self._models(call, route), call.request.stream
        reply = await self._upstream.send(models, body, call.id, path=call.form.path, stream=stream)
        chosen, route = route.model, replace(route, model=reply.model)
        store = store and policy.size(route.model) >= policy.size(
            chosen
        )  # else a smaller one's answer would outlast it
        self._metrics.routed.labels(route.rule, route.model.name).inc()
        self._metrics.cache.labels(outcome).inc()
        self._metrics.first_byte_seconds.labels(outcome).observe(time.perf_counter() - call.started)
        headers = {**reply.headers, **_headers(call, outcome, route.origin)}
        if route.uncacheable:
            headers["x-fingerpost-cache-reason"] = route.uncacheable
        if chosen is not route.model:
            headers["x-fingerpost-fallback-for"] = chosen.name
        if reply.is_stream:
            keep_usage = call.request.include_usage or not want_usage
            return Relay(self._tee(call, route, reply, store=store, keep_usage=keep_usage), reply, headers)
        reply.close()
        call.admission.read(reply.body)
        if reply.status == 200:
            self._count_tokens(route.model, call.admission.usage)
            key = self._finish(call, route, call.form.whole(reply.body) if store else None, store=store)
            self._remember(call, answers.response_id(reply.body), route.model.name, key)
        return Response(reply.body, status_code=reply.status, headers=headers)

    def _models(self, call: Call, route: Route) -> list[Model]:
        """The chosen model and those of its fallbacks that the conversation fits into, with its answer.

        A tenant that names a model gets no other that it may not name.
        """
        fallbacks = self._config.fallbacks(route.model)
        if not fallbacks:
            return [route.model]
        body, is_named = call.request.body, route.rule == NAMED_RULE
        tokens = conversation.context_tokens(body) + (overrides.output_tokens(body, call.form.path) or 0)
        fitting = [model for model in fallbacks if tokens <= model.context_window]
        return [route.model, *(model for model in fitting if not is_named or call.admission.allows(model.name))]

    async def _tee(
        self, call: Call, route: Route, reply: Reply, *, store: bool, keep_usage: bool
    ) -> AsyncIterator[bytes]:
        """The stream as it comes, event by event; the answer is kept only when it is whole.

        A usage chunk that the gateway asked for and the client did not is left out.
        """
        splitter, finished = sse.FrameSplitter(), False
        assembly = call.form.assembly() if store else answers.Unread()
        passing = answers.Passing(keep_usage=keep_usage)
        response_id: str | None = None
        try:
            async for chunk in reply.chunks():
                frames = splitter.feed(chunk)
                if splitter.pending > MAX_FRAME_BYTES:
                    raise UpstreamBroken(f"an event is longer than {MAX_FRAME_BYTES} bytes")
                if response_id is None and (response_id := answers.response_id(b"".join(frames))):
                    self._remember(call, response_id, route.model.name, None)
                kept = b"".join([_read(call, frame, assembly, passing) for frame in frames])
                if assembly.done and not finished:  # before the client sees it, who may leave or ask again at once
                    finished = True
                    self._count_tokens(route.model, call.admission.usage)
                    key = self._finish(call, route, assembly.answer(), store=store)
                    self._remember(call, response_id, route.model.name, key)
                if kept:
                    yield kept
        except UpstreamBroken as error:
            log.warning("%s: model %s broke off a stream: %s", call.id, route.model.name, error)
            yield passing.flush()
            raise
        finally:
            if not finished:
                self._count_tokens(route.model, call.admission.usage)
        yield passing.flush() + splitter.flush()

    def _finish(self, call: Call, route: Route, answer: Answer | None, *, store: bool) -> str | None:
        """Store a generated answer if it is whole and may be; its key in the cache if so."""
        if answer is None or self._cache is None or route.reading is None or not store:
            return None
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
        return call.key

    def _remember(self, call: Call, id: str | None, model: str, key: str | None, *, for_training: bool = True) -> None:
        """The answer may be judged by this id or that of the call; `for_training`: the verdict may be recorded."""
        turns = conversation.turns(call.request.messages) if for_training and self._feedback.records else ()
        text = turns[-1].read if turns else ""
        self._feedback.remember(call.tenant, (call.id, id), model=model, key=key, text=text)

    def _count_tokens(self, model: Model, usage: Mapping[str, int]) -> None:
        for kind, count, price in _bill(model, usage):
            self._metrics.tokens.labels(model.name, kind).inc(count)
            self._metrics.cost.labels(model.name).inc(count * price / 1e6)

    def _count_hit(self, call: Call, outcome: str, entry: Entry) -> None:
        self._metrics.cache.labels(outcome).inc()
        self._metrics.first_byte_seconds.labels(outcome).observe(time.perf_counter() - call.started)
        if model := self._config.model(entry.origin.model):
            saved = sum(count * price for _, count, price in _bill(model, entry.answer.usage or {}))
            self._metrics.saved.labels(model.name).inc(saved / 1e6)


def _read(call: Call, frame: bytes, assembly: answers.Assembly, passing: answers.Passing) -> bytes:
    """Read an event of the stream; what goes to the client now."""
    payload = sse.data(frame)
    call.admission.read(payload)
    assembly.add(payload)
    return passing.feed(frame, payload)


def _changed(call: Call, changes: Overrides) -> Call:
    """The call that a rule makes of one: another body, whose answers are for calls that were changed alike."""
    body = overrides.applied(call.request.body, changes, call.form.path)
    return replace(call, request=replace(call.request, body=body), scope=overrides.scope(call.scope, changes))


def _reading(
    request: ChatRequest, turns: Sequence[conversation.Turn], readings: Mapping[str, Reading]
) -> Reading | None:
    """What was read: in the conversation what the policy looks at, in the question what the cache does."""
    of_question = readings.get(request.question)
    of_turn = readings.get(turns[-1].read) if turns else None
    if of_turn is None or of_question is None:
        return of_turn or of_question
    return replace(of_turn, embedding=of_question.embedding, truncated=of_question.truncated)


def check_model(config: Config, name: str, admission: Admission) -> None:
    """Raises `UnknownModel` when `name` is neither an alias nor a configured model, `ModelNotAllowed`."""
    known = [*config.aliases, *(model.name for model in config.models)]
    if name not in known:
        allowed = ", ".join(filter(admission.allows, known))
        raise UnknownModel(f"the model {name[:100]!r} does not exist (known: {allowed})", param="model")
    admission.check_model(name)


def _bill(model: Model, usage: Mapping[str, object]) -> list[tuple[str, int, float]]:
    """(kind, tokens, price of a million) of an answer, as far as its usage is known."""
    prices = {"prompt": model.price_per_million_tokens.input, "completion": model.price_per_million_tokens.output}
    return [(kind, count, prices[kind]) for kind, count in by_kind(usage).items()]


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
