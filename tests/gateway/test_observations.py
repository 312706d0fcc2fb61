"""The journal of observations in Milvus: what outlives a process, what others learn, and what is not kept."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.cache import observations as journal
from gateway.cache.curves import Observation
from gateway.cache.observations import Observations
from gateway.config import Milvus
from gateway.metrics import Metrics
from tests.conftest import Part, Tree


@pytest.fixture(params=["lite", "server"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Milvus:
    """Of a real Milvus, as a file or as a server."""
    monkeypatch.setattr(journal, "READ_SECONDS", 0.2)
    place: Tree = {"uri": str(tmp_path / "cache.db")}
    if request.param == "server":
        part: tuple[Part, int] = request.getfixturevalue("killable_milvus")
        place = {"port": part[1]}
    return Milvus.model_validate({"connection": place, "collection": {"name": f"{request.param}_{time.time_ns()}"}})


class Gateway:
    """One that keeps what it learns."""

    def __init__(self, settings: Milvus, namespace: str = "one") -> None:
        self.learnt: list[Observation] = []
        self.metrics = Metrics()
        self.journal = Observations(settings, namespace, self.learnt.append, self.metrics)

    async def is_open(self) -> None:
        await until(lambda: self.journal._read_to > (time.time() - 3600) * 1000)

    async def has_learnt(self, number: int) -> None:
        await until(lambda: len(self.learnt) >= number)
        await asyncio.sleep(1)  # and is not told it again
        assert len(self.learnt) == number

    @property
    def not_kept(self) -> float:
        return float(self.metrics.checks.labels("not_kept")._value.get())


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def observation(key: str = "a" * 48 + "-1764000000000", *, score: float = 2.5, right: bool = True) -> Observation:
    return Observation(key, score, right, served=not right, weight=20.0, at=math.floor(time.time()))


def test_others_learn_it_and_so_does_who_comes_later(settings: Milvus) -> None:
    made = [observation(right=right) for right in (True, False)]

    async def run() -> None:
        one, other, stranger = Gateway(settings), Gateway(settings), Gateway(settings, "another")
        for each in made:
            one.journal.write(each)
        await other.has_learnt(2)
        assert sorted(other.learnt, key=lambda each: not each.right) == made
        one.journal.write(observation("at the end"))
        await one.journal.close()
        await other.has_learnt(3)
        later = Gateway(settings)
        await later.has_learnt(3)
        assert one.learnt == stranger.learnt == []  # nobody is told what it said itself, or what another scale says
        for gateway in (other, later, stranger):
            await gateway.journal.close()

    asyncio.run(run())


def test_who_reads_many_lets_requests_have_their_turn(settings: Milvus) -> None:
    async def run() -> None:
        one = Gateway(settings)
        await one.is_open()
        for i in range(400):
            one.journal.write(observation(str(i)))
        await one.journal.close()
        later = Gateway(settings)
        seen: set[int] = set()

        def look() -> bool:
            seen.add(len(later.learnt))
            return len(later.learnt) == 400

        async with asyncio.timeout(60):
            while not look():  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert len(seen) > 5
        await later.journal.close()

    asyncio.run(run())


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_not_kept(settings: Milvus, score: float) -> None:
    async def run() -> None:
        one, other = Gateway(settings), Gateway(settings)
        one.journal.write(observation("bad", score=score))
        one.journal.write(observation("good"))
        await other.has_learnt(1)
        assert (other.learnt[0].key, one.not_kept) == ("good", 1)
        await one.journal.close()
        await other.journal.close()

    asyncio.run(run())


@pytest.mark.parametrize("settings", ["server"], indirect=True)  # Milvus Lite refuses nothing
def test_what_milvus_refuses_holds_nothing_else_up(settings: Milvus) -> None:
    async def run() -> None:
        one, other = Gateway(settings), Gateway(settings)
        one.journal.write(observation("k" * 70_000))
        await until(lambda: one.not_kept)
        one.journal.write(observation("good"))
        await other.has_learnt(1)
        await one.journal.close()
        await other.journal.close()

    asyncio.run(run())


def test_a_milvus_that_is_away_for_a_while_loses_nothing(settings: Milvus, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        one, other = Gateway(settings), Gateway(settings)
        await one.is_open()
        ask: Any = one.journal._ask

        async def away(*given: Any, **named: Any) -> Any:
            raise OSError("away")

        monkeypatch.setattr(one.journal, "_ask", away)
        one.journal.write(observation())
        await asyncio.sleep(2)
        monkeypatch.setattr(one.journal, "_ask", ask)
        await other.has_learnt(1)
        assert one.not_kept == 0
        await one.journal.close()
        await other.journal.close()

    asyncio.run(run())
