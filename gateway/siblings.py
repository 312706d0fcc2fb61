"""What a worker asks the others: an answer is remembered by the one that gave it, a verdict may come to any of them.

Each listens on a socket of its own in a folder that only this gateway's user can enter. A question and its answer are a
line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gateway.errors import PartUnavailable, UnknownAnswer
from gateway.feedback import Verdict

ANSWER_SECONDS = 10.0  # for one of them, which may have to wait for the cache

Take = Callable[[str, Verdict], Awaitable[dict[str, Any]]]


class Siblings:
    def __init__(self, folder: Path, number: int, workers: int) -> None:
        self._own = folder / str(number)
        self._others = [folder / str(other) for other in range(workers) if other != number]

    @contextlib.asynccontextmanager
    async def answering(self, take: Take) -> AsyncIterator[None]:
        """Within this, the others' verdicts are taken by `take`."""
        self._own.unlink(missing_ok=True)  # of a worker that has died
        async with await asyncio.start_unix_server(partial(_answer, take), self._own):
            yield

    async def take(self, tenant: str, verdict: Verdict) -> dict[str, Any]:
        """What the one that remembers the answer says. Raises `UnknownAnswer`, `PartUnavailable`."""
        question = orjson.dumps({"tenant": tenant, "verdict": verdict}) + b"\n"
        for other in self._others:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    said = await _asked(other, question)
            except TimeoutError as error:
                raise PartUnavailable("another worker does not answer; send the feedback again") from error
            except OSError:
                continue  # it is just being replaced, and remembers nothing
            if "unavailable" in said:
                raise PartUnavailable(said["unavailable"])
            if "taken" in said:
                return dict(said["taken"])
        raise UnknownAnswer("no answer of this id is remembered here", param="id")


async def _asked(path: Path, question: bytes) -> dict[str, Any]:
    """Empty when the other one does not know. Raises `OSError`."""
    reader, writer = await asyncio.open_unix_connection(path)
    with contextlib.closing(writer):
        writer.write(question)
        line = await reader.readline()
    return dict(orjson.loads(line)) if line.endswith(b"\n") else {}


async def _answer(take: Take, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer):
        line = await reader.readline()
        if not line.endswith(b"\n"):
            return
        question = orjson.loads(line)
        said: dict[str, Any] = {}
        try:
            said["taken"] = await take(question["tenant"], Verdict(**question["verdict"]))
        except UnknownAnswer:
            pass
        except PartUnavailable as error:
            said["unavailable"] = error.message
        writer.write(orjson.dumps(said) + b"\n")
