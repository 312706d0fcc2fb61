"""One request on its way through the gateway: what is asked, where it goes, and what was found for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway import policy
from gateway.answer import Answer
from gateway.cache import Origin
from gateway.config import Model, Overrides
from gateway.dialects import CHAT, Form
from gateway.matching import Proposal
from gateway.request import CacheControl, ChatRequest, question_key
from gateway.streams import Follower, Stream
from gateway.tenants import Admission
from gateway.triton import Reading
from gateway.upstream import Reply


@dataclass(frozen=True, slots=True)
class Call:
    """A request and what is asked of the gateway beside it."""

    id: str
    request: ChatRequest
    scope: str
    control: CacheControl
    uncacheable: str | None  # why the answer is neither replayed nor stored, as far as the request tells
    started: float  # time.perf_counter() when it came in
    admission: Admission  # of the tenant that asks
    tenant: str  # who asks: its name, or a digest of the credential where there are no tenants
    form: Form = CHAT

    @property
    def key(self) -> str:
        return question_key(self.scope, self.request.question)

    @property
    def may_be_shared(self) -> bool:
        """Whether its answer may be another's, and another's its own."""
        return self.uncacheable is None and self.control.lookup and self.control.store


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
    cache_ttl_seconds: int | None = None  # that the rule gives the answer

    @property
    def origin(self) -> Origin:
        category, complexity = (self.reading.category, self.reading.complexity) if self.reading else (None, None)
        return Origin(self.model.name, self.rule, category, complexity)


@dataclass(frozen=True, slots=True)
class Found:
    """An answer that was found in the cache, or that a model gives: what those share who ask the same at once."""

    route: Route
    match: Proposal | None = None
    outcome: str = "hit-semantic"
    reply: Reply | None = None  # where there is no match
    stream: Stream | None = None  # of a reply that is one
    answer: Answer | None = None  # of one that is not, where it may be kept
    headers: Mapping[str, str] = field(default_factory=dict)
    wants_usage: bool = False  # a stream was asked for its usage, whether the client wants it or not
    options: Mapping[str, object] = field(default_factory=dict)  # that the stream was asked for beside

    @property
    def is_open(self) -> bool:
        return self.stream is not None and self.stream.is_open

    def when_over(self, call: Callable[[], None]) -> None:
        if self.stream is not None:
            self.stream.when_over(call)

    def abandon(self) -> None:
        if self.stream is not None and not self.stream.has_readers:
            self.stream.close()


class Relay(StreamingResponse):
    """A stream whose reader leaves however it ends, also when the client leaves before the first byte."""

    def __init__(self, content: AsyncIterator[bytes], reader: Follower, status: int, headers: dict[str, str]) -> None:
        super().__init__(content, status_code=status, headers=headers)
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reader.close()
