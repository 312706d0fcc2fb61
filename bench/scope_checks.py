"""What a client of `bench.scopes` makes of what it gets: is it whole, and may it be an answer to it; no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.scope_requests import ALIASES, Asked
from bench.scope_stub import Label, digest, opened, scope, usage

TTL_SECONDS = 120  # of the cache, where a request does not say less
SLACK_SECONDS = 1.0
GENERATED, REPLAYED = ("miss", "bypass"), ("hit-exact", "hit-semantic", "joined")
Violation = tuple[str, str]  # its kind, and words


class Broken(Exception):
    """What came is no answer, or ended before it did, as every client can tell."""


class Unavailable(Exception):
    """The gateway says that it has no answer now. It is told, and asked again: nobody got what is not his."""


@dataclass(slots=True)
class Sent:
    """A request that was sent, and to which gateway."""

    id: str
    asked: Asked
    gateway: str
    started: float  # seconds since the epoch
    finished: float | None = None  # when its answer, a whole one, had been read


@dataclass(frozen=True, slots=True)
class Received:
    """An answer, as JSON or put together from a stream."""

    content: str
    model: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    headers: Mapping[str, str]

    @property
    def outcome(self) -> str:
        return self.headers.get("x-fingerpost-cache", "none")

    @property
    def served_by(self) -> str:
        return self.headers.get("x-fingerpost-model", "none")


def received(raw: bytes, headers: Mapping[str, str], *, streams: bool) -> Received:
    """Raises `Broken`."""
    try:
        return _put_together(raw, headers) if streams else _read(raw, headers)
    except (ValueError, KeyError, TypeError) as error:
        raise Broken(f"not of its form: {type(error).__name__}") from error


def _read(raw: bytes, headers: Mapping[str, str]) -> Received:
    body = json.loads(raw)
    [choice] = body["choices"]
    return Received(choice["message"]["content"], body["model"], choice["finish_reason"], body["usage"], headers)


def _put_together(raw: bytes, headers: Mapping[str, str]) -> Received:
    *payloads, last = [part.removeprefix(b"data: ") for part in raw.split(b"\n\n") if part] or [b""]
    if last != b"[DONE]":
        raise Broken("no [DONE]")
    chunks = [json.loads(payload) for payload in payloads]
    if any("error" in chunk for chunk in chunks):
        raise Broken("an error in the stream")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    used = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    models = {chunk["model"] for chunk in chunks}
    return Received(content, "+".join(models), "+".join(reasons) or None, used[0] if used else None, headers)


def refused(sent: Sent, status: int) -> Iterator[Violation]:
    """What is wrong with an answer that is none. Raises `Unavailable`."""
    told = {"failed": 500, "error": 500, "break": 503, "unended": 503}
    if told.get(sent.asked.kind) == status:
        return
    if status in (502, 503, 504):
        raise Unavailable(f"status {status}")
    yield "refused", f"status {status}, and nothing was wrong with it"


def judged(sent: Sent, got: Received, origins: Mapping[str, Sent]) -> Iterator[Violation]:
    """What is wrong with an answer of status 200. `origins`: all that was sent so far, by id."""
    label = opened(got.content)
    if label is None:
        yield "partial", f"{len(got.content)} characters that end with {got.content[-40:]!r}"
        return
    yield from _not_whole(sent, got, label)
    yield from _not_as_asked(sent, got, label)
    origin = origins.get(label.by)
    if origin is None:
        yield "foreign", f"an answer to {label.by}, which nobody sent"
    elif origin is not sent:
        yield from _not_for(sent, got, label, origin)


def _not_whole(sent: Sent, got: Received, label: Label) -> Iterator[Violation]:
    """Of the envelope: what is not of this answer, or of no whole one."""
    reason = "length" if label.by.endswith("-length") else "stop"
    if got.finish_reason != reason:
        yield "partial", f"finish_reason is {got.finish_reason}, not {reason}"
    if got.usage not in (None, usage(got.content)) or (got.usage is None and sent.asked.wants_usage):
        yield "partial", f"usage is {got.usage}, not {usage(got.content)}"
    if got.model != label.model:
        yield "foreign", f"model is {got.model}, not {label.model}"
    if got.headers.get("x-request-id") != sent.id:
        yield "foreign", f"x-request-id is {got.headers.get('x-request-id')}"


def _not_as_asked(sent: Sent, got: Received, label: Label) -> Iterator[Violation]:
    """What the request does not allow, whoever's answer it is."""
    asked, is_own = sent.asked, label.by == sent.id
    if got.outcome not in GENERATED + REPLAYED or is_own != (got.outcome in GENERATED):
        yield "foreign", "the answer is the request's own" if is_own else "the answer is another's"
    if (asked.is_timely or asked.is_hot) and got.outcome != "bypass":
        yield "replayed", "and is not to be: it depends on when it is given, or is drawn by lot"
    if "no-cache" in asked.directives and got.outcome != "bypass":
        yield "replayed", "to a request that says no-cache"
    if label.scope != scope(asked.upstream(got.served_by)):
        yield "scope", f"the answer is of scope {label.scope}, asked was {scope(asked.upstream(got.served_by))}"
    expected = ALIASES[asked.body["model"]]
    if is_own and expected not in (got.served_by, got.headers.get("x-fingerpost-fallback-for")):
        yield "scope", f"{got.served_by} answers, not {expected}"


def _not_for(sent: Sent, got: Received, label: Label, origin: Sent) -> Iterator[Violation]:
    """Why the answer to another request may not be one to this."""
    asked, theirs = sent.asked, origin.asked
    if asked.tenant != theirs.tenant:
        yield "tenant", f"generated for {theirs.tenant}"
    if asked.body["model"] != theirs.body["model"]:
        yield "scope", f"generated for one that asked for {theirs.body['model']}"
    if got.outcome == "hit-semantic" and asked.meaning != theirs.meaning:
        yield "question", f"generated for {theirs.question!r}, which is not the same"
    if got.outcome != "hit-semantic" and label.question != digest(asked.question):
        yield "question", f"generated for {theirs.question!r}, which is not it"
    # Who reads another's stream while it comes cannot know how it will end, and can tell when it has.
    is_live = got.outcome == "joined" and asked.streams
    is_cut = theirs.kind == "length" or label.model != ALIASES[theirs.body["model"]]
    rest = replace(theirs, kind="plain") if theirs.kind == "length" else theirs
    if not rest.may_be_replayed or (is_cut and not is_live):
        yield "replayed", f"generated for a request of kind {theirs.kind}, {theirs.control or 'no control'}"
    ttl = min(TTL_SECONDS, theirs.ttl_seconds if theirs.ttl_seconds is not None else TTL_SECONDS)
    if origin.finished is not None and (age := sent.started - origin.finished) > ttl + SLACK_SECONDS:
        yield "expired", f"{age:.1f} s after it was there, of {ttl} s"
