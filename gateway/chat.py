"""The main path: one chat request, from bytes to an answer. See the diagram in the README."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from urllib.parse import quote

import orjson
from starlette.responses import Response

from gateway import answer as answers
from gateway import conversation, overrides, policy
from gateway.answer import Answer
from gateway.cache import Cache, CacheUnavailable, Entry, Origin
from gateway.cacheable import uncacheable
from gateway.call import Call, Found, Relay, Route
from gateway.config import NAMED_RULE, Config, Model, Overrides
from gateway.dial import Dials
from gateway.dialects import CHAT, Form
from gateway.errors import ApiError, UnknownModel
from gateway.feedback import Feedback
from gateway.flights import Flights
from gateway.matching import NO_MATCH, Match, Matcher, Proposal
from gateway.metrics import Metrics
from gateway.online import Checks
from gateway.reader import Reader
from gateway.request import FORM_FIELDS, ChatRequest, parse, upstream_body
from gateway.streams import Follower, LeftBehind, Listeners, Stream
from gateway.tenants import Admission
from gateway.triton import Reading, Router
from gateway.upstream import Upstream, UpstreamBroken
from gateway.usage import by_kind, usage

log = logging.getLogger("fingerpost")

MAX_VERDICT_TOKENS = 8


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
        matcher: Matcher,
        checks: Checks | None = None,
    ) -> None:
        self._config = config
        self._reader = Reader(router, metrics)
        self._cache = cache
        self._upstream = upstream
        self._dials = dials
        self._feedback = feedback
        self._metrics = metrics
        self._matcher = matcher
        self._checks = checks
        self._flights: Flights[Found] = Flights()

    async def answer(self, call: Call) -> Response:
        """Replay the answer to the same question, else to one that means the same, else have a model generate it.

        Where rules change what is asked, it is known after the decision only what the question is.
        """
        policy_asked = self._config.aliases.get(call.request.model)
        route: Route | None = None
        if policy_asked is not None and policy_asked.has_overrides:
            route = await self.route(call)
            call = _changed(call, route.overrides)
        if exact := await self._same_question(call):
            return self._replay(call, "hit-exact", exact)
        if self._cache is None or not call.may_be_shared:
            return self._own(call, await self._find(call, route))
        if (flight := self._flights.find(call.key)) is None:
            flight = self._flights.start(call.key, self._find(call, route))
            with flight.boarded() as found:
                return self._own(call, await found)
        with flight.boarded() as found:
            response = await self._joined(call, found)
        return response or self._own(call, await self._find(call, route))

    def cacheable(self, request: ChatRequest) -> str | None:
        """Why the answer is neither replayed nor stored."""
        if self._cache is None:
            return "the cache is not enabled"
        return uncacheable(request, self._config.semantic_cache)

    async def _find(self, call: Call, route: Route | None) -> Found:
        """The answer to a question that means the same, else that of a model."""
        route = route or await self.route(call)
        match = await self._same_meaning(call, route)
        if match.served is not None:
            if self._checks is not None:
                self._checks.of_hit(call.request.question, match.served, partial(self._anew, call, route), self._say)
            return Found(route, match.served)
        self._dials.observe(call.request.model, route.pulls)
        return await self._generate(call, route, match.best)

    async def route(self, call: Call) -> Route:
        """Decide who answers; asks no LLM. The model asked for is known, see `check_model`."""
        request, uncacheable = call.request, call.uncacheable
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
        decision = self._decide(request, call.admission.tenant, call.form, turns, readings or {})
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
            decision.cache_ttl_seconds,
        )

    def publish(self) -> None:
        """Bring the gauges up to date."""
        self._upstream.publish()
        self._dials.publish()
        self._matcher.publish()
        self._metrics.tasks.set(len(asyncio.all_tasks()))

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
        if self._cache is None or call.uncacheable or not call.control.lookup:
            return None
        try:
            with self._metrics.lookup_seconds.labels("exact").time():
                return await self._cache.get(call.key)
        except CacheUnavailable:
            self._metrics.degradations.labels("cache").inc()
            return None

    async def _same_meaning(self, call: Call, route: Route) -> Match:
        if self._cache is None or route.uncacheable or route.reading is None or not call.control.lookup:
            return NO_MATCH
        try:
            with self._metrics.lookup_seconds.labels("semantic").time():
                near = await self._cache.search(call.scope, route.reading.embedding, self._matcher.floor)
        except CacheUnavailable:
            self._metrics.degradations.labels("cache").inc()
            return NO_MATCH
        return await self._matcher.match(call.request.question, near)

    def _own(self, call: Call, found: Found) -> Response:
        """What was found, for the one that it was found for."""
        if found.match is not None:
            return self._replay(call, found.outcome, found.match.entry, found.match)
        assert found.reply is not None
        if found.stream is not None:
            return self._relay(call, found, found.stream, dict(found.headers))
        return Response(found.reply.body, status_code=found.reply.status, headers=dict(found.headers))

    async def _joined(self, call: Call, flight: asyncio.Future[Found]) -> Response | None:
        """What another request for the same has led to; None when that is nothing to share."""
        try:
            found = await flight
            if found.match is not None:
                return self._replay(call, found.outcome, found.match.entry, found.match)
            if found.stream is None:
                answer = found.answer
            elif call.request.stream and found.options == _options(call.request, wants_usage=found.wants_usage):
                return self._relay(call, found, found.stream, self._joins(call, found))
            else:
                answer = self._kept(await found.stream.read_all())
        except (ApiError, UpstreamBroken):
            return None
        return self._replay(call, "joined", self._entry(call, found.route, answer)) if answer else None

    def _joins(self, call: Call, found: Found) -> dict[str, str]:
        """Count it; its headers."""
        call.admission.spent(0)
        self._metrics.cache.labels("joined").inc()
        self._metrics.first_byte_seconds.labels("joined").observe(time.perf_counter() - call.started)
        self._remember(
            call, found.stream.id if found.stream else None, found.route.model.name, call.key, for_training=False
        )
        passed_on = found.reply.headers if found.reply else {}
        told = {"x-fingerpost-upstream-tokens": "0"}
        return {**passed_on, **_headers(call, "joined", found.route.origin), **told}

    def _replay(self, call: Call, outcome: str, entry: Entry, match: Proposal | None = None) -> Response:
        """A stored answer, as JSON or as a stream, whichever is asked for."""
        request = call.request
        self._count_hit(call, outcome, entry)
        call.admission.spent(0)
        headers = _headers(call, outcome, entry.origin)
        if match is not None:
            headers["x-fingerpost-similarity"] = f"{match.similarity:.4f}"
            headers["x-fingerpost-confidence"] = f"{match.probability:.4f}"
            assert self._cache is not None
            self._cache.used(entry.key)
        headers["x-fingerpost-upstream-tokens"] = "0"
        new = answers.Identity(call.form.id_prefix + call.id, int(time.time()))
        same = match is None  # how good another question's answer is here tells nothing of the model
        self._remember(call, new.id, entry.origin.model, entry.key, for_training=same)
        if request.stream:
            body = call.form.stream(entry.answer, new, request.include_usage)
            return Response(body, headers=headers, media_type="text/event-stream")
        return Response(call.form.replay(entry.answer, new), headers=headers, media_type="application/json")

    async def _generate(self, call: Call, route: Route, near: Proposal | None) -> Found:
        """`near`: the best that the cache had, which was not good enough."""
        outcome = "bypass" if route.uncacheable or not call.control.lookup else "miss"
        store = route.uncacheable is None and call.control.store and route.cache_ttl_seconds != 0
        want_usage = (store or call.admission.meters_tokens) and call.form.asks_usage

        def body(model: Model) -> bytes:
            return upstream_body(call.request, model.name, want_usage=want_usage)

        models, stream = self._models(call, route), call.request.stream
        reply = await self._upstream.send(models, body, call.id, path=call.form.path, stream=stream)
        chosen, route = route.model, replace(route, model=reply.model)
        if policy.size(route.model) < policy.size(chosen):
            store = False  # the answer would be given when the larger model is back
        self._metrics.routed.labels(route.rule, route.model.name).inc()
        self._metrics.cache.labels(outcome).inc()
        self._metrics.first_byte_seconds.labels(outcome).observe(time.perf_counter() - call.started)
        headers = {**reply.headers, **_headers(call, outcome, route.origin)}
        if route.uncacheable:
            headers["x-fingerpost-cache-reason"] = route.uncacheable
        if chosen is not route.model:
            headers["x-fingerpost-fallback-for"] = chosen.name
        if reply.is_stream:
            assembly = call.form.assembly() if store else answers.Unread()
            opened = Stream(reply, assembly, self._listeners(call, route, near))
            options = _options(call.request, wants_usage=want_usage)
            return Found(route, None, outcome, reply, opened, None, headers, want_usage, options)
        reply.close()
        call.admission.read(reply.body)
        answer: Answer | None = None
        if reply.status == 200:
            answer = self._kept(call.form.whole(reply.body)) if store else None
            self._count_tokens(route.model, call.admission.usage)
            self._settle(call)
            key = self._store(call, route, answer, near)
            self._remember(call, answers.response_id(reply.body), route.model.name, key)
        return Found(route, None, outcome, reply, None, answer, headers)

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

    def _listeners(self, call: Call, route: Route, near: Proposal | None) -> Listeners:
        """What becomes of a stream while it is read."""
        is_counted = False

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                self._count_tokens(route.model, call.admission.usage)

        def named(id: str) -> None:
            self._remember(call, id, route.model.name, None)

        def whole(answer: Answer | None, id: str | None) -> None:
            count()
            self._remember(call, id, route.model.name, self._store(call, route, answer, near))

        def over() -> None:
            count()
            self._settle(call)

        return Listeners(call.admission.read, named, whole, over)

    def _settle(self, call: Call) -> None:
        """Charge what was generated after the request had ended, for others that joined it."""
        late = call.admission.over()
        if call.admission.tenant is not None:
            self._metrics.tenant_tokens.labels(call.admission.tenant).inc(max(0, late))  # a counter takes nothing back

    def _relay(self, call: Call, found: Found, stream: Stream, headers: dict[str, str]) -> Relay:
        reader = stream.join()
        keep_usage = call.request.include_usage or not found.wants_usage
        content = self._passed_on(call, stream, reader, keep_usage=keep_usage)
        return Relay(content, reader, stream.reply.status, headers)

    async def _passed_on(
        self, call: Call, stream: Stream, reader: Follower, *, keep_usage: bool
    ) -> AsyncIterator[bytes]:
        """The stream as it comes, event by event; a usage chunk that only the gateway asked for is left out."""
        passing = answers.Passing(keep_usage=keep_usage)
        try:
            async for events in reader:
                if kept := b"".join([passing.feed(event.frame, event.payload) for event in events]):
                    yield kept
        except (UpstreamBroken, LeftBehind) as error:
            broken = f"model {stream.reply.model.name} broke off a stream"
            what = broken if isinstance(error, UpstreamBroken) else "the client of a stream is left behind"
            log.warning("%s: %s: %s", call.id, what, error)
            yield passing.flush()
            raise
        yield passing.flush() + stream.rest

    def _entry(self, call: Call, route: Route, answer: Answer) -> Entry:
        assert route.reading is not None
        settings, now = self._config.semantic_cache, time.time()
        ttl = settings.ttl_seconds if route.cache_ttl_seconds is None else route.cache_ttl_seconds
        if call.control.ttl_seconds is not None:
            ttl = min(ttl, call.control.ttl_seconds)
        return Entry(
            key=call.key,
            scope=call.scope,
            tenant=call.tenant,
            question=call.request.question,
            embedding=route.reading.embedding,
            answer=answer,
            origin=route.origin,
            created_at=now,
            expires_at=now + ttl,
        )

    def _kept(self, answer: Answer | None) -> Answer | None:
        """The answer, if it may be replayed to others."""
        calls_tools = answer is not None and answer.finish_reason == answers.CALLS
        return None if calls_tools and not self._config.semantic_cache.store_tool_calls else answer

    def _store(self, call: Call, route: Route, answer: Answer | None, near: Proposal | None) -> str | None:
        """Store a generated answer if there is one that may be; its key in the cache if so."""
        answer = self._kept(answer)
        if answer is None or self._cache is None or route.reading is None:
            return None
        self._cache.put(self._entry(call, route, answer))
        if self._checks is not None and near is not None:
            self._checks.of_miss(call.request.question, near, answer, self._say)
        return call.key

    async def _anew(self, call: Call, route: Route) -> Answer | None:
        """The model's own answer to what was answered from the cache."""
        body = {key: value for key, value in call.request.body.items() if key not in FORM_FIELDS}
        request = replace(call.request, body=body, stream=False)
        return await self._generated(route.model, request, call.form)

    async def _say(self, name: str, text: str) -> str | None:
        """What a model says to a text."""
        model = self._config.model(name)
        assert model is not None  # the configuration was checked
        asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": MAX_VERDICT_TOKENS}
        request = parse(orjson.dumps({"model": name, **asked}))
        answer = await self._generated(model, request, CHAT)
        return str(answer.message.get("content")) if answer else None

    async def _generated(self, model: Model, request: ChatRequest, form: Form) -> Answer | None:
        """For the gateway itself. Raises what `Upstream.send` does."""

        def body(model: Model) -> bytes:
            return upstream_body(request, model.name, want_usage=False)

        reply = await self._upstream.send([model], body, f"check-{uuid.uuid4().hex}", path=form.path)
        reply.close()
        self._count_tokens(model, usage(reply.body))
        return form.whole(reply.body) if reply.status == 200 else None

    def _remember(self, call: Call, id: str | None, model: str, key: str | None, *, for_training: bool = True) -> None:
        """The answer may be judged by this id or that of the call; `for_training`: the verdict may be recorded."""
        for_training = for_training and self._feedback.records and self._config.model(model) is not None
        turns = conversation.turns(call.request.messages) if for_training else ()
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


def _options(request: ChatRequest, *, wants_usage: bool) -> dict[str, object]:
    """What a stream is asked for, but for its usage where that is asked for anyway and left out where it must be."""
    options = request.body.get("stream_options") or {}
    others = {key: value for key, value in options.items() if key != "include_usage" and request.include_usage}
    return others if wants_usage else {**others, "include_usage": request.include_usage}


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
