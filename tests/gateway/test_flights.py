"""Single flight: who joins, who leaves, and what a failure of the first does to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.flights import Flights


class Answer:
    """What comes of a flight, as `gateway.call.Found` is."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.is_open = is_open
        self.abandoned = 0
        self._over: list[Callable[[], None]] = []

    def abandon(self) -> None:
        self.abandoned += 1

    def when_over(self, call: Callable[[], None]) -> None:
        self._over.append(call)

    def end(self) -> None:
        self.is_open = False
        for call in self._over:
            call()


class Closing(Answer):
    """It is over when nobody waits for it."""

    def abandon(self) -> None:
        super().abandon()
        self.end()


class Model:
    """Counts how often it is asked; answers when it is told to."""

    def __init__(self, answer: Answer | None = None, error: Exception | None = None) -> None:
        self.asked = self.cancelled = 0
        self.go = asyncio.Event()
        self._answer, self._error = answer or Answer(), error

    async def __call__(self) -> Answer:
        self.asked += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error:
            raise self._error
        return self._answer


async def ask(flights: Flights[Answer], model: Model, key: str = "key") -> Answer:
    flight = flights.find(key) or flights.start(key, model())
    with flight.boarded() as found:
        return await found


def test_those_who_ask_at_once_share_one_answer() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        model = Model()
        asking = [asyncio.create_task(ask(flights, model)) for _ in range(20)]
        await asyncio.sleep(0)
        model.go.set()
        assert len(set(await asyncio.gather(*asking))) == 1
        assert (model.asked, len(flights)) == (1, 0)
        await ask(flights, model)
        assert model.asked == 2  # it was over

    asyncio.run(scenario())


def test_another_question_is_another_flight() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        one, other = Model(), Model()
        asking = [asyncio.create_task(ask(flights, one, "a")), asyncio.create_task(ask(flights, other, "b"))]
        await asyncio.sleep(0)
        one.go.set()
        other.go.set()
        assert len(set(await asyncio.gather(*asking))) == 2

    asyncio.run(scenario())


def test_the_first_may_leave() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        model = Model()
        first, second = (asyncio.create_task(ask(flights, model)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert model.cancelled == 0
        model.go.set()
        assert isinstance(await second, Answer)
        assert model.asked == 1

    asyncio.run(scenario())


def test_when_all_have_left_it_is_cancelled_and_nobody_joins_it_any_more() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        model = Model()
        asking = [asyncio.create_task(ask(flights, model)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert flights.find("key") is None
        await asyncio.sleep(0)
        assert (model.cancelled, len(flights)) == (1, 0)

    asyncio.run(scenario())


def test_a_failure_is_everybody_s_and_then_forgotten() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        model = Model(error=ValueError("no"))
        asking = [asyncio.create_task(ask(flights, model)) for _ in range(3)]
        await asyncio.sleep(0)
        model.go.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [str(error) for error in found] == ["no"] * 3
        assert (model.asked, len(flights)) == (1, 0)

    asyncio.run(scenario())


def test_what_is_still_open_may_be_joined_until_it_is_over() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        answer = Answer(is_open=True)
        model = Model(answer)
        model.go.set()
        assert await ask(flights, model) is answer
        assert await ask(flights, model) is answer
        assert (model.asked, len(flights)) == (1, 1)
        answer.end()
        assert len(flights) == 0

    asyncio.run(scenario())


def test_what_nobody_waited_for_is_let_go_of() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        answer = Answer(is_open=True)
        model = Model(answer)
        asking = asyncio.create_task(ask(flights, model))
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.sleep(0)
        asking.cancel()  # just when it has come
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert answer.abandoned == 1

    asyncio.run(scenario())


def test_what_is_let_go_of_before_it_has_landed_is_forgotten() -> None:
    async def scenario() -> None:
        flights: Flights[Answer] = Flights()
        answer = Closing(is_open=True)
        model = Model(answer)
        asking = asyncio.create_task(ask(flights, model))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        model.go.set()
        asking.cancel()  # in the same turn of the loop
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0)
        assert (model.asked, model.cancelled, answer.abandoned) == (1, 0, 1)
        assert flights.find("key") is None
        assert len(flights) == 0

    asyncio.run(scenario())
