"""What clients say of answers: good or bad, by the id of a response.

The gateway remembers of each answer that went out of late where it came from, so that a bad one can leave the cache.
Nothing is written anywhere unless `feedback.record` says so, because what is written are prompts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cachetools
import orjson

from gateway import config
from gateway.cache import Cache, CacheUnavailable
from gateway.errors import BadRequest, PartUnavailable, UnknownAnswer
from gateway.metrics import Metrics
from gateway.request import check_fields, decode, typed

log = logging.getLogger("fingerpost")

FILE = "feedback.jsonl"
MAX_COMMENT_CHARACTERS = 4000
MAX_ID_CHARACTERS = 300
MAX_TEXT_CHARACTERS = 32_768  # of a prompt that is recorded: as long as the models read
ENTRY_SIZE = 256  # of an answer that is remembered, without its prompt
LEDGER_SIZE = 4 * 1024 * 1024  # 16,384 answers when no prompts are kept with them


@dataclass(frozen=True, slots=True)
class Verdict:
    id: str
    good: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that went out."""

    model: str
    key: str | None  # of its entry in the cache; None when it is not there
    text: str | None  # that was asked; None when it is not to be recorded

    def row(self, verdict: Verdict) -> dict[str, Any]:
        """A labelled prompt, as `make train` reads it: which model got it right or wrong."""
        said = {"comment": verdict.comment} if verdict.comment else {}
        return {"text": self.text, "correct": {self.model: int(verdict.good)}, "id": verdict.id, **said}


class Ledger:
    """The answers that went out of late, by tenant and id; what is over LEDGER_SIZE is forgotten, oldest first."""

    def __init__(self) -> None:
        self._given: cachetools.FIFOCache[tuple[str, str], Given] = cachetools.FIFOCache(LEDGER_SIZE, getsizeof=_size)

    def __len__(self) -> int:
        return len(self._given)

    def enter(self, tenant: str, id: str | None, given: Given) -> None:
        if id is not None:
            self._given[tenant, id] = given

    def find(self, tenant: str, id: str) -> Given:
        """Raises `UnknownAnswer`, also for the answer of another tenant."""
        given = self._given.get((tenant, id))
        if given is None:
            raise UnknownAnswer("no answer of this id is remembered here", param="id")
        return given


def _size(given: Given) -> int:
    return ENTRY_SIZE + len(given.text or "")


class Journal:
    """The file of verdicts, if they are to be recorded; it grows to `feedback.max_bytes` and no further."""

    def __init__(self, settings: config.Feedback, folder: Path, metrics: Metrics) -> None:
        self._settings = settings
        self._path = folder / FILE
        self._metrics = metrics

    @property
    def records(self) -> bool:
        return self._settings.record

    def wanted(self, text: str) -> str | None:
        """The text if a verdict on its answer would be recorded."""
        fits = 0 < len(text) <= MAX_TEXT_CHARACTERS
        return text if self.records and fits else None

    async def record(self, given: Given, verdict: Verdict) -> bool:
        """Append a row; False, counted, when it is not to be, or cannot be, recorded."""
        if given.text is None or not self.records:
            return False
        try:
            written = await asyncio.to_thread(_append, self._path, given.row(verdict), self._settings.max_bytes)
        except OSError as error:
            log.warning("%s: cannot be written: %s", self._path, error.strerror)
            written = False
        self._metrics.feedback_rows.labels("written" if written else "dropped").inc()
        return written


class Feedback:
    """What went out, and what its clients say of it."""

    def __init__(
        self,
        settings: config.Feedback,
        folder: Path,
        cache: Cache | None,
        metrics: Metrics,
        ledger: Ledger | None = None,
    ) -> None:
        """`ledger`: of what went out before, too."""
        self._ledger = Ledger() if ledger is None else ledger
        self._journal = Journal(settings, folder, metrics)
        self._cache = cache
        self._metrics = metrics

    @property
    def records(self) -> bool:
        return self._journal.records

    def remember(self, tenant: str, ids: Iterable[str | None], *, model: str, key: str | None, text: str) -> None:
        """An answer to `text` went out under these ids; `key` is that of its entry in the cache."""
        given = Given(model, key, self._journal.wanted(text))
        for each in ids:
            self._ledger.enter(tenant, each, given)

    async def take(self, tenant: str, verdict: Verdict) -> dict[str, Any]:
        """Evict a bad answer, record the verdict; says what was done. Raises `UnknownAnswer`, `PartUnavailable`."""
        given = self._ledger.find(tenant, verdict.id)
        evicted = not verdict.good and await self._evict(given)
        self._metrics.feedback.labels("good" if verdict.good else "bad").inc()
        recorded = await self._journal.record(given, verdict)
        return {"id": verdict.id, "good": verdict.good, "evicted": evicted, "recorded": recorded}

    async def _evict(self, given: Given) -> bool:
        if given.key is None or self._cache is None:
            return False
        try:
            await self._cache.delete(given.key)
        except CacheUnavailable as error:
            log.warning("feedback: the cache does not take a deletion: %s", error)
            raise PartUnavailable("the cache does not answer; send the feedback again") from error
        return True


def _append(path: Path, row: dict[str, Any], max_bytes: int) -> bool:
    """One line, whole, whoever else appends; False when the file is full. Raises `OSError`."""
    line = orjson.dumps({**row, "at": int(time.time()), "source": "feedback"}) + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        fits = os.fstat(descriptor).st_size + len(line) <= max_bytes
        return fits and os.write(descriptor, line) == len(line)
    finally:
        os.close(descriptor)


def parse(raw: bytes) -> Verdict:
    """Read the body of POST /v1/feedback; raises `BadRequest` naming the field."""
    body = decode(raw)
    check_fields(body, ("id", "good", "comment"), "feedback")
    verdict = Verdict(
        typed(body, "id", str, "a string", required=True),
        typed(body, "good", bool, "a boolean", required=True),
        typed(body, "comment", str, "a string"),
    )
    _check_length("id", verdict.id, MAX_ID_CHARACTERS)
    _check_length("comment", verdict.comment or "", MAX_COMMENT_CHARACTERS)
    return verdict


def _check_length(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise BadRequest(f"{field} is longer than {limit} characters", param=field)
