"""The gateway's own matching: the nearest few are verified together; online, what was seen decides, too."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.cache.store import Store
from bench.cache.system import Request, Served, Work
from gateway.answer import Answer
from gateway.cache import Entry, Hit, Origin
from gateway.cache.curves import Curves, Observation
from gateway.cache.memory import CANDIDATES
from gateway.config import SemanticCache
from gateway.contract import Verification
from gateway.lasting import LOOSEST_ERROR_RATE
from gateway.matching import Match, Matcher, Proposal
from gateway.metrics import Metrics
from training.pairs import Pair
from training.verifier_served import ServedVerifier

WEIGHTS = Path("model_repository/verifier/weights")
CHECK_SHARE = 0.1  # of the hits, that online are also sent to the model
SEED = 1

T = TypeVar("T")


@cache
def served_verifier() -> ServedVerifier:
    return ServedVerifier(WEIGHTS)


class OnThisMachine:
    """As Triton runs it, without the way there and back."""

    async def verify(self, question: str, cached: Sequence[str]) -> list[float]:
        pairs = [Pair(question, other, same=False) for other in cached]
        return list(map(float, served_verifier().scores(pairs)))


class Verified:
    def __init__(self, work: Work, *, max_error_rate: float = 0.01, online: bool = False) -> None:
        self.name = f"verified, {max_error_rate:.0%}" + (" + online" if online else "")
        verification = Verification.model_validate(served_verifier().manifest["verification"])
        threshold, loosest = map(verification.threshold, (max_error_rate, LOOSEST_ERROR_RATE))
        self._curves: Curves | None = None
        if online:
            self._curves = Curves(threshold=threshold, floor=min(loosest, threshold), max_error_rate=max_error_rate)
        settings = SemanticCache(max_error_rate=max_error_rate)
        self._matcher = Matcher(OnThisMachine(), settings, verification, Metrics(), self._curves)
        self._store = Store(work)
        self._texts: dict[int, Request] = {}
        self._near: Proposal | None = None
        self._draw = random.Random(SEED)  # noqa: S311 (nothing secret)

    def ask(self, request: Request) -> Served | None:
        near = [self._hit(served) for served in self._store.nearest(request.embedding, self._matcher.floor, CANDIDATES)]
        match = now(self._matcher.match(request.text, near))
        self._near = match.best
        self._look(request, match)
        return Served(int(match.served.entry.key), match.served.similarity) if match.served else None

    def store(self, request: Request) -> None:
        if self._near is not None:
            self._observe(request, self._near, is_served=False, weight=1.0)
        self._store.add(request)
        self._texts[request.number] = request

    def clear(self) -> None:
        self._store.clear()
        self._texts.clear()

    def close(self) -> None:
        return None

    def _hit(self, served: Served) -> Hit:
        stored = self._texts[served.number]
        answer = Answer("model", {"role": "assistant", "content": stored.answer}, "stop", None)
        origin = Origin("model", "default", None, None)
        entry = Entry(str(served.number), "", "", stored.text, stored.embedding, answer, origin, 0, np.inf)
        return Hit(entry, served.similarity)

    def _look(self, request: Request, match: Match) -> None:
        if match.served is not None and self._draw.random() < CHECK_SHARE:
            self._observe(request, match.served, is_served=True, weight=1 / CHECK_SHARE)

    def _observe(self, request: Request, proposal: Proposal, *, is_served: bool, weight: float) -> None:
        """The model's answer is compared with the cached one."""
        if self._curves is not None:
            right = proposal.entry.answer.message["content"] == request.answer
            seen = Observation(proposal.entry.key, proposal.score, right, is_served, weight, float(request.number))
            self._curves.observe(seen)


def now(waiting: Coroutine[Any, Any, T]) -> T:
    """What comes of a coroutine that waits for nothing."""
    try:
        waiting.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise RuntimeError("it waits for something")
