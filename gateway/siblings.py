"""What a worker asks the others: each remembers answers that it gave, and may have a cache of its own.

Each listens on a socket of its own in a folder that only this gateway's user can enter. A question, which has a name,
and its answer are a line of JSON each.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gateway.errors import PartUnavailable, UnknownAnswer
from gateway.feedback import Verdict

ANSWER_SECONDS = 10.0  # for one of them, which may have to wait for the cache
VERDICT = "verdict"

Take = Callable[[str, Verdict], Awaitable[dict[str, Any]]]
Answer = Callable[[Any], Awaitable[Any]]  # to a question of one name; may raise PartUnavailable
Answers = Callable[[], Mapping[str, Answer]]


class Siblings:
    def __init__(self, folder: Path, number: int, workers: int) -> None:
        self._own = folder / str(number)
        self._others = [folder / str(other) for other in range(workers) if other != number]

    @contextlib.asynccontextmanager
    async def answering(self, answers: Answers) -> AsyncIterator[None]:
        """Within this, the others' questions are answered by what `answers` gives for their names at the time."""
        self._own.unlink(missing_ok=True)  # of a worker that has died
        async with await asyncio.start_unix_server(partial(_answer, answers), self._own):
            yield

    async def ask(self, name: str, given: Any = None) -> AsyncIterator[Any]:
        """What each of the others answers, asked one after the other. Raises `PartUnavailable`."""
        question = orjson.dumps({"name": name, "given": given}) + b"\n"
        for other in self._others:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    said = await _asked(other, question)
            except (FileNotFoundError, ConnectionRefusedError):
                continue  # it is just being replaced, and remembers nothing
            except OSError as error:
                raise PartUnavailable("another worker does not answer; send the request again") from error
            if said is None:
                raise PartUnavailable("another worker has ended or failed; send the request again")
            if "unavailable" in said:
                raise PartUnavailable(said["unavailable"])
            yield said["answer"]

    async def take(self, tenant: str, verdict: Verdict) -> dict[str, Any]:
        """What the one that remembers the answer says. Raises `UnknownAnswer`, `PartUnavailable`."""
        async for taken in self.ask(VERDICT, {"tenant": tenant, "verdict": verdict}):
            if taken is not None:
                return dict(taken)
        raise UnknownAnswer("no answer of this id is remembered here", param="id")


async def taken(take: Take, given: Any) -> dict[str, Any] | None:
    """The answer to a VERDICT: what `take` makes of it; None when the answer that it is about is not remembered."""
    try:
        return await take(given["tenant"], Verdict(**given["verdict"]))
    except UnknownAnswer:
        return None


async def _asked(path: Path, question: bytes) -> dict[str, Any] | None:
    """None when there is no whole answer. Raises `OSError`."""
    reader, writer = await asyncio.open_unix_connection(path)
    with contextlib.closing(writer):
        writer.write(question)
        writer.write_eof()
        line = await reader.read()  # however long it is, unlike `readline`
    return dict(orjson.loads(line)) if line.endswith(b"\n") else None


async def _answer(answers: Answers, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer):
        line = await reader.read()
        if not line.endswith(b"\n"):
            return
        question = orjson.loads(line)
        said: dict[str, Any] = {}
        try:
            said["answer"] = await answers()[question["name"]](question["given"])
        except PartUnavailable as error:
            said["unavailable"] = error.message
        writer.write(orjson.dumps(said) + b"\n")
