"""Whether a cached answer serves a new question: what is near enough is verified, what is only near is not served.

A similarity alone cannot tell: "renewable" and "non-renewable" are nearer to each other than two wordings of one
question. So the `verifier` reads both questions and gives the log-odds that one answer serves both; the less similar
they are, the more it takes. From which score on an answer is served was fitted, for each error rate, on labelled pairs
that nothing was trained on, and stands in the manifest of the verifier's weights. Questions of the same words need no
verifier; what is far from one is worth none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway.cache import Entry, Hit, Vector
from gateway.cache.curves import ErrorEstimate
from gateway.config import SemanticCache
from gateway.contract import Verification
from gateway.degradation import Breaker
from gateway.metrics import Metrics
from gateway.triton import TritonUnavailable

SURE = 12.0  # the score of a question in the same words


class Verifier(Protocol):
    async def verify(self, question: str, cached: Sequence[str]) -> list[float]:
        """The log-odds that the answer to each cached question serves the question. Raises `TritonUnavailable`."""


class Decides(Protocol):
    @property
    def threshold_now(self) -> float:
        """The score from which an entry is served that nothing is known of."""

    def error(self) -> ErrorEstimate | None:
        """What share of the hits is wrong; None when nobody looks."""

    def decide(self, keys: Sequence[str], scores: Vector) -> NDArray[np.bool_]:
        """Which of the answers of these keys might be served to a question that has these scores."""

    def serves(self, key: str, score: float) -> bool:
        """Whether the one that is proposed is."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """An entry that may serve a question."""

    entry: Entry
    similarity: float  # cosine
    score: float  # log-odds that its answer serves

    @property
    def probability(self) -> float:
        return 0.5 * (1 + math.tanh(0.5 * self.score))


@dataclass(frozen=True, slots=True)
class Match:
    served: Proposal | None = None
    best: Proposal | None = None  # that is not good enough to be served


NO_MATCH = Match()


@dataclass(frozen=True, slots=True)
class Threshold:
    """Decides by the score alone."""

    threshold_now: float

    def error(self) -> None:
        return None

    def decide(self, keys: Sequence[str], scores: Vector) -> NDArray[np.bool_]:
        return np.asarray(scores >= self.threshold_now)

    def serves(self, key: str, score: float) -> bool:
        return score >= self.threshold_now


class Matcher:
    def __init__(
        self,
        verifier: Verifier,
        settings: SemanticCache,
        verification: Verification,
        metrics: Metrics,
        decides: Decides | None = None,
    ) -> None:
        """`decides`: instead of the threshold for `settings.max_error_rate` alone."""
        self._verifier = verifier
        self._metrics = metrics
        self._alike = verification.alike
        self._score = verification.score
        self._decides = decides or Threshold(verification.threshold(settings.max_error_rate))
        self._breaker = Breaker("verifier", metrics)
        self.floor = max(verification.floor, settings.similarity_threshold or 0.0)  # of similarity

    @property
    def threshold(self) -> float:
        """The score from which an entry is served that nothing is known of."""
        return self._decides.threshold_now

    def publish(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.hit_threshold.set(self.threshold)
        error = self._decides.error()
        self._metrics.hit_error.set(error.rate if error else math.nan)
        self._metrics.hit_error_low.set(error.low if error else math.nan)
        self._metrics.hit_error_high.set(error.high if error else math.nan)

    async def match(self, question: str, near: Sequence[Hit]) -> Match:
        """The best of the entries that are `near` a question, most similar first."""
        for hit in near:
            if self._is_same(question, hit):
                return Match(Proposal(hit.entry, hit.similarity, SURE))
        proposals = await self._counted(question, near) if near else []
        if not proposals:
            return NO_MATCH
        best, _ = self.best(proposals)
        is_served = self._decides.serves(best.entry.answer_key, best.score)
        self._metrics.verified.labels("served" if is_served else "refused").inc()
        if math.isinf(best.score):  # the verifier cannot read it
            return NO_MATCH
        return Match(best) if is_served else Match(best=best)

    async def propose(self, question: str, near: Sequence[Hit]) -> list[Proposal]:
        """The entries that are near a question, the likeliest to serve first. Raises `TritonUnavailable`."""
        said = await self._verifier.verify(question, [hit.entry.question for hit in near])
        scores = [
            SURE if self._is_same(question, hit) else self._score(log_odds, hit.similarity)
            for hit, log_odds in zip(near, said, strict=True)
        ]
        found = [Proposal(hit.entry, hit.similarity, score) for hit, score in zip(near, scores, strict=True)]
        return sorted(found, key=lambda proposal: -proposal.score)

    def best(self, proposals: Sequence[Proposal]) -> tuple[Proposal, bool]:
        """The one to serve rather than the others, and whether it might be."""
        keys = [each.entry.answer_key for each in proposals]
        scores = np.array([each.score for each in proposals], np.float32)
        may_serve = self._decides.decide(keys, scores) | (scores >= SURE)
        return proposals[int(may_serve.argmax())], bool(may_serve.any())

    def _is_same(self, question: str, hit: Hit) -> bool:
        return hit.similarity >= self._alike and same_words(question, hit.entry.question)

    async def _counted(self, question: str, near: Sequence[Hit]) -> list[Proposal]:
        """None of them, counted, when the verifier does not answer."""
        if not self._breaker.allows:
            self._breaker.skipped()
            return []
        try:
            with self._metrics.verifier_seconds.time():
                proposals = await self.propose(question, near)
        except TritonUnavailable as error:
            self._breaker.failed(error)
            self._breaker.skipped()
            return []
        self._breaker.worked()
        return proposals


# Of a word, what may be written otherwise without changing what is asked: a quotation mark, and how a sentence ends.
_EDGES = re.compile(r"^[\"'\u2018-\u201f«»(]+|[\"'\u2018-\u201f«»).,;:?…]+$")
_GREETING = re.compile(r"(hi|hello|hey)[,.!]", re.IGNORECASE)
_THANKS = re.compile(r"(thanks|thx)[.!]*", re.IGNORECASE)
_PLEASE = re.compile(r"(please|pls|plz|kindly)[,.!?]*", re.IGNORECASE)


def same_words(one: str, other: str) -> bool:
    """Whether two questions differ in no more than case, spacing, closing punctuation and politeness around them."""
    return _words(one) == _words(other)


def _words(text: str) -> list[str]:
    """In order. Only plain words of three letters and more are case-folded: `-i` is not `-I`, and US is not us."""
    words = [_EDGES.sub("", word) or word for word in _asked(text.split())]
    return [word.casefold() if word.isalpha() and len(word) > 2 else word for word in words]


def _asked(words: list[str]) -> list[str]:
    """Without the politeness around it, and without question marks that stand alone at the end."""
    start, end = 0, len(words)
    while end > 1 and not words[end - 1].strip("?"):
        end -= 1
    if end > 2 and _THANKS.fullmatch(words[end - 1]) and words[end - 2][-1] in ",.!?":
        end -= 1
    if end > 1 and _GREETING.fullmatch(words[0]):
        start = 1
    while end - start > 1 and _PLEASE.fullmatch(words[start]):
        start += 1
    while end - start > 1 and _PLEASE.fullmatch(words[end - 1]):
        end -= 1
    return words[start:end]
