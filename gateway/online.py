"""Learning from traffic whether cached answers serve: some are generated anew and compared, off the request path.

Of the hits by meaning a share is also sent to the model. A near miss is sent to it anyway, and costs no more than the
comparison. Either way the curves learn whether the cached answer would have done.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol

import orjson

from gateway.answer import Answer
from gateway.cache.curves import Curves, Observation
from gateway.config import Online
from gateway.errors import ApiError
from gateway.matching import Proposal
from gateway.metrics import Metrics
from gateway.tasks import end
from gateway.triton import Embedded, TritonUnavailable
from gateway.upstream import UpstreamBroken

log = logging.getLogger("fingerpost")

JUDGED_CHARACTERS = 6000  # of each answer that a judge reads
QUESTION = """Two answers were given to the same question. Do they agree in all that matters to who asked, so that \
either could be given in place of the other? Wording, order and length do not matter; facts, numbers, advice and \
language do.

Question: {question}

Answer A: {one}

Answer B: {other}

Say yes or no, and nothing else."""


class Journal(Protocol):
    """Where observations outlive this process and reach others."""

    def write(self, observation: Observation) -> None:
        """Never waits."""


class Embedder(Protocol):
    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """Raises `TritonUnavailable`."""


Generate = Callable[[], Awaitable[Answer | None]]
Ask = Callable[[str, str], Awaitable[str | None]]  # a model and what it is asked; what it says


class Checks:
    """`ask`: how the judge is asked, where there is one."""

    def __init__(
        self,
        settings: Online,
        curves: Curves,
        embedder: Embedder,
        metrics: Metrics,
        journal: Journal | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._curves = curves
        self._embedder = embedder
        self._metrics = metrics
        self._journal = journal
        self._draw = draw
        self._tasks: set[asyncio.Task[None]] = set()

    def of_hit(self, question: str, served: Proposal, generate: Generate, ask: Ask) -> None:
        """An entry was served; perhaps see what the model says."""
        if self._draw() < self._settings.check_share:
            weight = 1 / self._settings.check_share
            self._start(self._check(question, served, generate, ask, is_served=True, weight=weight))

    def of_miss(self, question: str, near: Proposal, answer: Answer, ask: Ask) -> None:
        """An entry was not served, and the model has answered."""

        async def generated() -> Answer:
            return answer

        self._start(self._check(question, near, generated, ask, is_served=False, weight=1.0))

    @property
    def under_way(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        await end(self._tasks)

    def _start(self, check: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= self._settings.concurrent_checks:
            check.close()
            self._metrics.checks.labels("skipped").inc()
            return
        task = asyncio.create_task(check)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(
        self, question: str, proposal: Proposal, generate: Generate, ask: Ask, *, is_served: bool, weight: float
    ) -> None:
        try:
            answer = await generate()
            agrees = None if answer is None else await self._agree(question, proposal.entry.answer, answer, ask)
        except (ApiError, UpstreamBroken, TritonUnavailable) as error:
            log.warning("cache: an answer could not be checked: %s", error)
            agrees = None
        if agrees is None:
            self._metrics.checks.labels("failed").inc()
            return
        kind = "served" if is_served else "refused"
        self._metrics.checks.labels(f"{kind}_{'right' if agrees else 'wrong'}").inc()
        found = Observation(proposal.entry.answer_key, proposal.score, agrees, is_served, weight, time.time())
        self._curves.observe(found)
        if self._journal is not None:
            self._journal.write(found)

    async def _agree(self, question: str, one: Answer, other: Answer, ask: Ask) -> bool | None:
        """Whether two answers say the same; None when nobody can tell."""
        texts = [text_of(one), text_of(other)]
        if texts[0] == texts[1]:
            return True
        if self._settings.judge is not None:
            a, b = (text[:JUDGED_CHARACTERS] for text in texts)
            return verdict(await ask(self._settings.judge, QUESTION.format(question=question, one=a, other=b)))
        first, second = await self._embedder.embed(texts)
        return float(first.embedding @ second.embedding) >= self._settings.answer_similarity


def text_of(answer: Answer) -> str:
    """What an answer says, as text."""
    content = answer.message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(_texts(answer.message)) or orjson.dumps(answer.message, option=orjson.OPT_SORT_KEYS).decode()


def _texts(value: object) -> Iterator[str]:
    """All that stands under `text` in a message of another form than chat's."""
    if isinstance(value, dict):
        if isinstance(text := value.get("text"), str):
            yield text
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)


def verdict(said: str | None) -> bool | None:
    """A judge's yes or no; None when it says something else."""
    word = (said or "").strip().strip(".!*\"'").lower()
    return {"yes": True, "no": False}.get(word)
