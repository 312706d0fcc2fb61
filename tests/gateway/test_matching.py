"""Which near misses are served: what needs no verifier, what it says, and what happens without it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answer import Answer
from gateway.cache import Entry, Hit, Origin
from gateway.config import SemanticCache
from gateway.contract import Threshold, Verification
from gateway.matching import NO_MATCH, SURE, Match, Matcher, same_words
from gateway.metrics import Metrics
from gateway.triton import TritonUnavailable

VERIFICATION = Verification(
    floor=0.6,
    alike=0.95,
    thresholds=(Threshold(max_error_rate=0.001, score=4.0), Threshold(max_error_rate=0.01, score=2.0)),
)


class Verifier:
    """Says what it is told to."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)
        self.asked: list[tuple[str, list[str]]] = []

    async def verify(self, question: str, cached: Sequence[str]) -> list[float]:
        self.asked.append((question, list(cached)))
        if not self.scores:
            raise TritonUnavailable("is down")
        return self.scores[: len(cached)]


def hit(question: str, similarity: float) -> Hit:
    answer = Answer("small", {"role": "assistant", "content": "An answer."}, "stop", None)
    vector, origin = np.zeros(2, dtype=np.float32), Origin("small", "default", None, None)
    return Hit(Entry(question, "scope", "ada", question, vector, answer, origin, 0, 1e12), similarity)


def match(question: str, near: Sequence[Hit], verifier: Verifier, settings: SemanticCache | None = None) -> Match:
    matcher = Matcher(verifier, settings or SemanticCache(), VERIFICATION, Metrics())
    return asyncio.run(matcher.match(question, near))


def test_nothing_near_needs_no_verifier() -> None:
    verifier = Verifier(9.0)
    assert match("Why?", [], verifier) is NO_MATCH
    assert verifier.asked == []


def test_the_same_words_need_no_verifier() -> None:
    verifier = Verifier(-9.0)
    found = match("please name a river", [hit("Name a lake.", 0.97), hit("Name a river?", 0.96)], verifier)
    assert found.served is not None
    assert (found.served.entry.question, found.served.similarity, found.served.score) == ("Name a river?", 0.96, SURE)
    assert verifier.asked == []


def test_the_same_words_that_are_not_near_are_verified() -> None:
    verifier = Verifier(-9.0)
    assert match("name a river", [hit("Name a river?", 0.94)], verifier).served is None
    assert len(verifier.asked) == 1


def test_the_best_by_the_verifier_is_served_and_all_are_read_at_once() -> None:
    verifier = Verifier(-1.0, 3.0, 2.5)
    near = [hit("a", 0.9), hit("b", 0.8), hit("c", 0.7)]
    found = match("d", near, verifier)
    assert found.served is not None
    assert found.served.entry.question == "b"
    assert found.served.probability == pytest.approx(1 / (1 + math.exp(-3)))
    assert found.best is None
    assert verifier.asked == [("d", ["a", "b", "c"])]


@pytest.mark.parametrize(
    ("rate", "score", "served"),
    [(0.01, 2.0, True), (0.01, 1.99, False), (0.001, 3.9, False), (0.001, 4.0, True), (0.0005, 50.0, False)],
)
def test_what_is_served_depends_on_the_error_rate_that_is_allowed(rate: float, score: float, served: bool) -> None:
    found = match("d", [hit("a", 0.9)], Verifier(score), SemanticCache(max_error_rate=rate))
    assert (found.served is not None) == served
    assert (found.best is None) == served


def test_what_is_less_similar_needs_more_of_the_verifier() -> None:
    verification = VERIFICATION.model_copy(update={"similarity_weight": 10.0})
    for similarity, served in ((1.0, "b"), (0.95, "b"), (0.8, "c")):
        matcher = Matcher(Verifier(3.0, 3.5), SemanticCache(), verification, Metrics())
        found = asyncio.run(matcher.match("d", [hit("c", 0.9), hit("b", similarity)]))
        best = found.served or found.best
        assert best is not None
        assert best.entry.question == served
        assert best.score == pytest.approx(3.5 - 10 * (1 - similarity) if served == "b" else 3.0 - 10 * 0.1)
        assert (found.served is None) == (best.score < 2.0)


def test_a_threshold_of_similarity_is_a_floor() -> None:
    for threshold, floor in ((None, 0.6), (0.5, 0.6), (0.8, 0.8)):
        settings = SemanticCache(similarity_threshold=threshold)
        assert Matcher(Verifier(), settings, VERIFICATION, Metrics()).floor == floor


def test_without_the_verifier_nothing_is_served_and_it_is_left_alone_for_a_while() -> None:
    verifier, metrics = Verifier(), Metrics()
    matcher = Matcher(verifier, SemanticCache(), VERIFICATION, metrics)
    for _ in range(3):
        assert asyncio.run(matcher.match("d", [hit("a", 0.99)])) is NO_MATCH
    assert len(verifier.asked) == 1
    assert 'fingerpost_degradations_total{part="verifier"} 3.0' in metrics.exposition().decode()


def test_what_the_verifier_cannot_read_is_proposed_to_nobody() -> None:
    assert match("d", [hit("a", 0.9)], Verifier(-math.inf)) is NO_MATCH


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "what is the capital of france"),
        ("What  is the\ncapital of France ??", "What is the capital of France"),
        ('What does "serendipity" mean?', "what does serendipity mean"),
        ("Please name a river, thanks", "name a river"),
        ("Hi, name a river.", "Name a river"),
        ("Hello! Please name a river please.", "name a river ?"),
    ],
)
def test_the_same_words(one: str, other: str) -> None:
    assert same_words(one, other)
    assert same_words(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What are the main renewable energy sources?", "What are the main non-renewable energy sources?"),
        ("from Paris to London", "from London to Paris"),
        ("What is C?", "What is C#?"),
        ("What is C", "What is C++"),
        ("What is 5!", "What is 5"),
        ("grep -i foo", "grep -I foo"),
        ("Is it bad for us?", "Is it bad for US?"),
        ("turn it on", "turn it off"),
        ("2 - 3", "2 + 3"),
        ("1.5", "15"),
        ("x > 3", "x < 3"),
        ("why", "why not"),
        ("$HOME", "HOME"),
        ("What does . mean in regex?", "What does ? mean in regex?"),
        ("What does this match: .", "What does this match: ?"),
        ("What does :) mean?", "What does ;) mean?"),
        ("Write a program that prints hello", "Write a program that prints hi"),
        ("How do you say thanks in Thai", "How do you say hello in Thai"),
        ("What is Thai for please", "What is Thai for thanks"),
        (".", "?"),
    ],
)
def test_other_words(one: str, other: str) -> None:
    assert not same_words(one, other)
    assert not same_words(other, one)


@given(st.text(max_size=50))
def test_every_text_has_its_own_words(text: str) -> None:
    assert same_words(text, text)
    assert same_words(f" {text}\t", text)
