"""Ending background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_SECONDS = 1.0


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks until all have ended, whatever they raise.

    Once may not do: before Python 3.12 `asyncio.wait_for`, through which pymilvus makes every call, returns the result
    of a call that ends in the very turn in which it is cancelled (https://github.com/python/cpython/issues/86296).
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=AGAIN_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()
