"""Background tasks end, whatever becomes of their cancellation."""

from __future__ import annotations

import asyncio

import pytest

from gateway import tasks


async def deaf(times: int) -> None:
    """What `asyncio.wait_for` may make of a loop before Python 3.12."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if times == 0:
                raise
            times -= 1


async def failing() -> None:
    raise OSError("lost")


def test_a_task_that_has_lost_its_cancellation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_SECONDS", 0.05)

    async def run() -> None:
        made = [asyncio.create_task(each) for each in (deaf(0), deaf(1), deaf(3), failing())]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            await tasks.end(made)
        assert all(task.done() for task in made)
        await tasks.end([])

    asyncio.run(run())
