"""Requests that want the same at the same time are answered by one generation.

The first leads; those that come while it is under way join it. What leads is a task of its own: the client of the one
that began it may leave without failing the others. When all have left, it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar


class Shareable(Protocol):
    """What comes of a flight."""

    @property
    def is_open(self) -> bool:
        """Whether somebody may still join it."""

    def abandon(self) -> None:
        """Nobody waits for it: let go of it, unless somebody has taken it."""

    def when_over(self, call: Callable[[], None]) -> None:
        """Call this once nobody may join any more, at once where that is so already."""


T = TypeVar("T", bound=Shareable)


class Flight(Generic[T]):
    def __init__(self, task: asyncio.Task[T]) -> None:
        self._task = task
        self._waiting = 0

    @property
    def may_be_joined(self) -> bool:
        if not self._task.done():
            return self._waiting > 0
        return not self._task.cancelled() and self._task.exception() is None and self._task.result().is_open

    @contextlib.contextmanager
    def boarded(self) -> Iterator[asyncio.Future[T]]:
        """Within this, what comes of it is waited for and taken."""
        self._waiting += 1
        try:
            yield asyncio.shield(self._task)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._land()

    def _land(self) -> None:
        if not self._task.done():
            self._task.cancel()
        elif not self._task.cancelled() and self._task.exception() is None:
            self._task.result().abandon()


class Flights(Generic[T]):
    """Those under way, by what they are asked for."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight[T]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, key: str) -> Flight[T] | None:
        """One that may be joined."""
        flight = self._flights.get(key)
        return flight if flight is not None and flight.may_be_joined else None

    def start(self, key: str, lead: Coroutine[Any, Any, T]) -> Flight[T]:
        """A new one, that others find until it is over."""
        task = asyncio.create_task(lead)
        flight = self._flights[key] = Flight(task)
        task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    def _landed(self, key: str, flight: Flight[T], task: asyncio.Task[T]) -> None:
        if task.cancelled() or task.exception() is not None or not task.result().is_open:
            self._end(key, flight)
        else:
            task.result().when_over(lambda: self._end(key, flight))

    def _end(self, key: str, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
