"""Entries of the cache as rows of JSON, as they are written out and put back, and the rows of an FAQ; no I/O."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gateway import answer as answers
from gateway.answer import MAX_ANSWER_CHARACTERS, Answer
from gateway.cache import Entry, Origin, Vector
from gateway.config import AUTO
from gateway.errors import BadRequest
from gateway.request import Body, check_fields, question_key, typed

Row = dict[str, Any]

ENTRY_FIELDS = ("key", "scope", "tenant", "question", "answer", "origin", "created_at", "expires_at")
ANSWER_FIELDS = ("model", "message", "finish_reason", "usage")
ORIGIN_FIELDS = ("model", "rule", "category", "complexity")
FAQ_FIELDS = ("question", "answer", "request", "tenant", "ttl_seconds")
FAQ = "faq"  # the model that answers of an FAQ are said to be of
WARM_UP = "warm-up"  # and the rule
NOT_EMBEDDED: Vector = np.zeros(0, dtype=np.float32)
LAST_SECOND = 10**11  # later than any entry expires

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\x21-\x7e]{1,200}")  # as configured ones are: it stands in a header


def of_entry(entry: Entry) -> Row:
    """All of it but the embedding."""
    row = {name: getattr(entry, name) for name in ENTRY_FIELDS}
    return {**row, "answer": asdict(entry.answer), "origin": asdict(entry.origin)}


def with_embedding(entry: Entry) -> Row:
    """All of it, for another process of this gateway."""
    return {**of_entry(entry), "embedding": base64.b64encode(entry.embedding.astype("<f4").tobytes()).decode()}


def entry_of(row: Row) -> Entry:
    """The entry of which `with_embedding` has made the row."""
    embedding = np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4").astype(np.float32)
    return Entry(
        **{**row, "answer": Answer(**row["answer"]), "origin": Origin(**row["origin"]), "embedding": embedding}
    )


def restored(row: Row, now: float) -> Entry:
    """The entry of which `of_entry` has made the row, not embedded, and stored `now`. Raises `BadRequest`.

    When it was stored first does not matter: what purges forget is what was there before them.
    """
    check_fields(row, ENTRY_FIELDS, "an entry")
    key, scope, tenant, question = (typed(row, name, str, "a string", required=True) for name in ENTRY_FIELDS[:4])
    if not is_digest(scope) or key != question_key(scope, question):
        raise BadRequest("key is not that of scope and question", param="key")
    answer, origin = (typed(row, name, dict, "an object", required=True) for name in ("answer", "origin"))
    number(row, "created_at")
    expires_at = number(row, "expires_at")
    if expires_at <= now:
        raise BadRequest("it has expired", param="expires_at")
    return Entry(
        key=key,
        scope=scope,
        tenant=tenant,
        question=question,
        embedding=NOT_EMBEDDED,
        answer=_answer(answer),
        origin=_origin(origin),
        created_at=now,
        expires_at=min(expires_at, LAST_SECOND),
    )


def _answer(row: Body) -> Answer:
    check_fields(row, ANSWER_FIELDS, "an answer")
    return Answer(
        typed(row, "model", str, "a string", "answer.", required=True),
        typed(row, "message", dict, "an object", "answer.", required=True),
        typed(row, "finish_reason", str, "a string", "answer.", required=True),
        typed(row, "usage", dict, "an object", "answer."),
    )


def _origin(row: Body) -> Origin:
    check_fields(row, ORIGIN_FIELDS, "an origin")
    for name in ("model", "rule"):
        if not _NAME.fullmatch(typed(row, name, str, "a string", "origin.", required=True)):
            raise BadRequest(f"origin.{name} is not printable ASCII without blanks", param=f"origin.{name}")
    category = typed(row, "category", str, "a string", "origin.")
    complexity = None if row.get("complexity") is None else number(row, "complexity", "origin.")
    return Origin(row["model"], row["rule"], category, complexity)


@dataclass(frozen=True, slots=True)
class Pair:
    """A row of an FAQ."""

    question: str
    answer: Answer
    request: Body  # what clients send beside the question, which is the last message
    tenant: str | None
    ttl_seconds: int | None

    @property
    def body(self) -> Body:
        """What a client sends that asks the question."""
        earlier = typed(self.request, "messages", list, "an array", "request.") or []
        return {**self.request, "messages": [*earlier, {"role": "user", "content": self.question}]}


def pair(row: Row) -> Pair:
    """A row of an FAQ. Raises `BadRequest` naming the field."""
    check_fields(row, FAQ_FIELDS, "a row, which has these or those of an entry")
    question, text = (typed(row, name, str, "a string", required=True) for name in ("question", "answer"))
    answer = answers.whole(FAQ, {"content": text}, None)
    if answer is None or not text.strip():
        raise BadRequest(f"answer is empty or longer than {MAX_ANSWER_CHARACTERS} characters", param="answer")
    ttl_seconds = typed(row, "ttl_seconds", int, "a whole number")
    if ttl_seconds is not None and ttl_seconds < 1:
        raise BadRequest("ttl_seconds is less than 1", param="ttl_seconds")
    request = typed(row, "request", dict, "an object")
    tenant = typed(row, "tenant", str, "a string")
    return Pair(question, answer, {"model": AUTO} if request is None else request, tenant, ttl_seconds)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def number(row: Row, name: str, prefix: str = "") -> float:
    """Raises `BadRequest`."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadRequest(f"{prefix}{name} is not a number", param=prefix + name)
    return float(value)
