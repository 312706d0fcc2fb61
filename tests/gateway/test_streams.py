"""One stream, several readers: who sets its pace, who is left behind, and when nobody may join it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gateway.answer import ChunkAssembly
from gateway.streams import SHARED_BYTES, Follower, LeftBehind, Listeners, Stream
from tests.gateway.test_resilience import model, scenario, serving, upstream
from tests.stub_vllm import Stub, chunk, create_app, sse

BODY = {"model": "m"}
BEGIN, END = (sse(chunk(BODY, {"content": "Glomma"}, None)), sse(chunk(BODY, {}, "stop")) + b"data: [DONE]\n\n")
PADDING = b": " + b"x" * 65_536 + b"\n\n"
SHORT, LONG = [BEGIN, END], [BEGIN, *[PADDING] * (3 * SHARED_BYTES // len(PADDING)), END]


def ignored(*_: object) -> None:
    pass


@contextlib.asynccontextmanager
async def streaming(pieces: list[bytes]) -> AsyncIterator[Stream]:
    """A stream of a model that says this."""
    stub = Stub()
    stub.script = {"content_type": "text/event-stream", "pieces": pieces}
    async with serving(create_app(stub)) as url:
        m = model(url)
        async with upstream(m) as up:
            reply = await up.send([m], lambda model: b"{}", "test", stream=True)
            stream = Stream(reply, ChunkAssembly(), Listeners(ignored, ignored, ignored, ignored))
            try:
                yield stream
            finally:
                stream.close()


async def read(reader: Follower, *, pause: float = 0.0) -> bytes:
    """All that this reader gets."""
    found = b""
    async for events in reader:
        found += b"".join(event.frame for event in events)
        await asyncio.sleep(pause)
    return found


async def whole(stream: Stream) -> str:
    """The text of the answer, for one who waits for all of it."""
    answer = await stream.read_all()
    assert answer is not None
    return str(answer.message["content"])


@scenario
async def test_one_who_waits_for_the_whole_leaves_no_reader_behind() -> None:
    async with streaming(LONG) as stream:
        slow, waiting = stream.join(), asyncio.create_task(whole(stream))
        await asyncio.sleep(0.3)
        assert await read(slow, pause=0.005) == b"".join(LONG)
        assert await waiting == "Glomma"


@scenario
async def test_one_who_waits_for_the_whole_goes_on_when_the_readers_have_left() -> None:
    async with streaming(LONG) as stream:
        slow, waiting = stream.join(), [asyncio.create_task(whole(stream)) for _ in range(2)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        slow.close()
        assert await asyncio.wait_for(asyncio.gather(*waiting), 10) == ["Glomma", "Glomma"]


@scenario
async def test_one_who_waits_for_a_short_answer_is_not_held_up() -> None:
    async with streaming(SHORT) as stream:
        slow = stream.join()
        assert await asyncio.wait_for(whole(stream), 10) == "Glomma"
        assert await read(slow) == b"".join(SHORT)


@scenario
async def test_a_slow_reader_is_left_behind_by_another() -> None:
    async with streaming(LONG) as stream:
        slow, quick = stream.join(), stream.join()
        assert await read(quick) == b"".join(LONG)
        with pytest.raises(LeftBehind):
            await read(slow)


@scenario
async def test_when_the_last_leaves_it_is_over_and_not_open() -> None:
    async with streaming(LONG) as stream:
        reader, waiting = stream.join(), asyncio.create_task(whole(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert stream.is_open
        reader.close()
        assert not stream.is_open


@scenario
async def test_who_asks_to_be_told_of_an_end_that_has_been_is_told_at_once() -> None:
    async with streaming(SHORT) as stream:
        told: list[str] = []
        stream.when_over(lambda: told.append("before"))
        stream.close()
        stream.when_over(lambda: told.append("after"))
        assert told == ["before", "after"]
