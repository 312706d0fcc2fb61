"""Learning from traffic: what is compared, what a judge says, and what is learnt from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gateway.answer import Answer
from gateway.cache import Entry, Origin
from gateway.cache.curves import Curves, Observation
from gateway.config import Online
from gateway.errors import UpstreamUnavailable
from gateway.matching import Proposal
from gateway.metrics import Metrics
from gateway.online import Checks, verdict
from gateway.triton import Embedded, TritonUnavailable


def answer(content: str) -> Answer:
    return Answer("small", {"role": "assistant", "content": content}, "stop", None)


def proposal(content: str = "Glomma", score: float = 2.0) -> Proposal:
    vector, origin = np.zeros(2, dtype=np.float32), Origin("small", "default", None, None)
    return Proposal(Entry("key", "scope", "ada", "Name a river.", vector, answer(content), origin, 0, 1e12), 0.9, score)


class Embedder:
    """Texts that begin alike are alike."""

    async def embed(self, texts: Sequence[str]) -> list[Embedded]:
        if "down" in texts[0]:
            raise TritonUnavailable("is down")
        return [Embedded(np.array([1, 0] if text[0] == "G" else [0, 1], dtype=np.float32), False) for text in texts]


class Journal:
    def __init__(self) -> None:
        self.written: list[Observation] = []

    def write(self, observation: Observation) -> None:
        self.written.append(observation)


def checked(
    *, model: str | Exception | None = "Glomma", cached: str = "Glomma", says: str | None = None, **settings: Any
) -> tuple[list[Observation], str]:
    """One hit that is checked: what was observed, and the metrics."""
    journal, metrics = Journal(), Metrics()

    async def generate() -> Answer | None:
        if isinstance(model, Exception):
            raise model
        return None if model is None else answer(model)

    async def ask(name: str, text: str) -> str | None:
        assert name == "judge"
        assert "Name a river." in text
        return says

    async def run() -> None:
        curves = Curves(threshold=1.0, floor=0.0, max_error_rate=0.01)
        checks = Checks(Online(check_share=0.5, **settings), curves, Embedder(), metrics, journal, draw=lambda: 0.4)
        checks.of_hit("Name a river.", proposal(cached), generate, ask)
        while checks.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert curves.error().observations == len(journal.written)

    asyncio.run(run())
    return journal.written, metrics.exposition().decode()


@pytest.mark.parametrize(("model", "right"), [("Glomma", True), ("Great Glomma", True), ("Thames", False)])
def test_the_embeddings_of_two_answers_are_compared(model: str, right: bool) -> None:
    (seen,), metrics = checked(model=model)
    assert (seen.key, seen.score, seen.right, seen.served, seen.weight) == ("key-0", 2.0, right, True, 2.0)
    assert f'fingerpost_cache_checks_total{{outcome="served_{"right" if right else "wrong"}"}} 1.0' in metrics


@pytest.mark.parametrize(("says", "right"), [("yes", True), ("No.", False), (" YES\n", True)])
def test_a_judge_is_asked_where_there_is_one(says: str, right: bool) -> None:
    (seen,), _ = checked(model="Thames", says=says, judge="judge")
    assert seen.right is right


@pytest.mark.parametrize(
    "failure",
    [
        {"model": None},
        {"model": UpstreamUnavailable("is down")},
        {"model": "Thames", "cached": "down"},
        {"model": "Thames", "judge": "judge", "says": "perhaps"},
        {"model": "Thames", "judge": "judge", "says": None},
    ],
)
def test_what_cannot_be_compared_is_counted_and_teaches_nothing(failure: dict[str, Any]) -> None:
    seen, metrics = checked(**failure)
    assert seen == []
    assert 'fingerpost_cache_checks_total{outcome="failed"} 1.0' in metrics


def test_the_same_words_need_no_judge() -> None:
    (seen,), _ = checked(judge="judge", says="no")
    assert seen.right


def test_only_a_share_of_the_hits_is_checked_and_never_too_many_at_once() -> None:
    metrics, generated = Metrics(), 0

    async def generate() -> Answer:
        nonlocal generated
        generated += 1
        await asyncio.sleep(0.01)
        return answer("Glomma")

    async def ask(name: str, text: str) -> str | None:
        return None

    async def run() -> None:
        draws = iter([0.1, 0.6, 0.2, 0.9, 0.3, 0.4])
        curves = Curves(threshold=1.0, floor=0.0, max_error_rate=0.01)
        settings = Online(check_share=0.5, concurrent_checks=2)
        checks = Checks(settings, curves, Embedder(), metrics, draw=lambda: next(draws))
        for _ in range(6):
            checks.of_hit("Name a river.", proposal(), generate, ask)
        while checks.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert generated == 2
    assert 'fingerpost_cache_checks_total{outcome="skipped"} 2.0' in metrics.exposition().decode()


def test_a_miss_is_compared_without_being_generated_again() -> None:
    journal = Journal()

    async def ask(name: str, text: str) -> str | None:
        return None

    async def run() -> None:
        curves = Curves(threshold=1.0, floor=0.0, max_error_rate=0.01)
        checks = Checks(Online(check_share=0.1), curves, Embedder(), Metrics(), journal)
        checks.of_miss("Name a river.", proposal(score=0.5), answer("Thames"), ask)
        while checks.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0)

    asyncio.run(run())
    (seen,) = journal.written
    assert (seen.right, seen.served, seen.weight, seen.score) == (False, False, 1.0, 0.5)


@pytest.mark.parametrize(
    ("said", "means"),
    [("yes", True), ("Yes.", True), ("**No**", False), ("maybe", None), ("", None), (None, None), ("yes and no", None)],
)
def test_what_a_judge_says(said: str | None, means: bool | None) -> None:
    assert verdict(said) is means
