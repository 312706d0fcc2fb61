"""A stream of a model that several clients may read, each from its beginning.

Nobody owns it: whichever reader has passed on all that has come asks the model for more, so that one reader that is
slow, or leaves, holds up and fails no other. One that falls far behind another is left behind: what it has not read
would have to be held. Who waits for the whole answer leaves nobody behind: once what is held has an end, it asks for
more only when no such reader is left. When the last one leaves, the model is told to stop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from gateway import answer as answers
from gateway import sse
from gateway.answer import Answer, Assembly
from gateway.upstream import Reply, UpstreamBroken

MAX_FRAME_BYTES = 8 * 1024 * 1024
SHARED_BYTES = 1024 * 1024  # of a stream that has sent more, no more than this is held


@dataclass(frozen=True, slots=True)
class Event:
    frame: bytes  # as it came
    payload: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """What came at once."""

    events: Sequence[Event]
    end: int  # bytes of the stream until here


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who wants to know what of a stream, as soon as it is known."""

    read: Callable[[bytes], None]  # the payload of each event
    named: Callable[[str], None]  # the id of the response
    whole: Callable[[Answer | None, str | None], None]  # the model has ended its answer: it, if it is kept, and its id
    over: Callable[[], None]  # nothing more comes, or nobody reads it any more


class LeftBehind(Exception):
    """A reader is too far behind another."""


class Stream:
    """`assembly` puts the answer together."""

    def __init__(self, reply: Reply, assembly: Assembly, listeners: Listeners) -> None:
        self.reply = reply
        self.rest = b""  # what came after the last whole event
        self.broken: UpstreamBroken | None = None
        self._assembly = assembly
        self._listeners = listeners
        self._over = [listeners.over]
        self._splitter = sse.FrameSplitter()
        self.id: str | None = None  # of the response
        self._batches: list[Batch] = []  # that are held
        self._size = 0
        self._gone = 0  # batches that are no longer held
        self._readers: dict[int, int] = {}  # how many batches each has read
        self._numbers = itertools.count()  # for readers
        self._waiting = 0  # for the whole answer
        self._unpaced = asyncio.Event()  # it is over, or only those who wait for the whole answer are left
        self._pulling = asyncio.Lock()
        self._is_whole = self._is_over = False

    @property
    def is_open(self) -> bool:
        """Whether it can still be read from its beginning."""
        return not self._is_over and not self._gone and self._size <= SHARED_BYTES

    @property
    def has_readers(self) -> bool:
        return bool(self._readers or self._waiting)

    @property
    def answer(self) -> Answer | None:
        """Of a stream that is whole."""
        return self._assembly.answer()

    def join(self) -> Follower:
        """A new reader, at the beginning of a stream that is open."""
        number = next(self._numbers)
        self._readers[number] = 0
        return Follower(self, number)

    def when_over(self, call: Callable[[], None]) -> None:
        """Call this when nothing more comes; at once when it is over."""
        if self._is_over:
            call()
        else:
            self._over.append(call)

    async def read_all(self) -> Answer | None:
        """Of a stream that is open the answer, once it has ended. Raises `UpstreamBroken`."""
        self._waiting += 1
        try:
            while not self._is_over:
                if self._readers and self._size > SHARED_BYTES:
                    self._unpaced.clear()
                    await self._unpaced.wait()
                else:
                    await self._more(self._size)
            if self.broken is not None:
                raise self.broken
            return self.answer
        finally:
            self._waiting -= 1
            self._left()

    def close(self) -> None:
        """Let go of the model; nobody reads it."""
        if not self._is_over:
            self._is_over = True
            self._unpaced.set()
            for call in self._over:
                call()
        self.reply.close()

    async def after(self, number: int) -> Sequence[Event] | None:
        """The events that follow what this reader has read; None at the end. Raises `UpstreamBroken`, `LeftBehind`."""
        at = self._place(number)
        if at == self._gone + len(self._batches):
            await self._more(self._size)
        if at < self._gone + len(self._batches):
            batch = self._batches[at - self._gone]
            self._readers[number] = at + 1
            return batch.events
        if self.broken is not None:
            raise self.broken
        return None

    def leave(self, number: int) -> None:
        if self._readers.pop(number, None) is not None:
            self._left()

    def _left(self) -> None:
        """Somebody has: nobody reads it any more, or nobody sets the pace."""
        if not self.has_readers:
            self.close()
        elif not self._readers:
            self._unpaced.set()

    async def _more(self, size: int) -> None:
        """Have more come than so many bytes, unless it is over."""
        async with self._pulling:
            if self._size == size and not self._is_over:
                await self._pull()

    async def _pull(self) -> None:
        """Take what the model sends next; safe to be cancelled."""
        try:
            piece = await self.reply.piece()
            frames = self._splitter.feed(piece)
            if self._splitter.pending > MAX_FRAME_BYTES:
                raise UpstreamBroken(f"an event is longer than {MAX_FRAME_BYTES} bytes")
        except UpstreamBroken as error:
            self.broken = error
            self.close()
            return
        if not piece:
            self.rest = self._splitter.flush()
            self.close()
            return
        self._size += len(piece)
        self._batches.append(Batch([self._event(frame) for frame in frames], self._size))
        self._let_go()
        if self.id is None and (found := answers.response_id(b"".join(frames))):
            self.id = found
            self._listeners.named(found)
        if self._assembly.done and not self._is_whole:  # before a client sees it, who may leave or ask again at once
            self._is_whole = True
            self._listeners.whole(self.answer, self.id)

    def _event(self, frame: bytes) -> Event:
        payload = sse.data(frame)
        self._listeners.read(payload)
        self._assembly.add(payload)
        return Event(frame, payload)

    def _place(self, number: int) -> int:
        if number not in self._readers:
            raise LeftBehind("it reads too slowly, others are far ahead")
        return self._readers[number]

    def _let_go(self) -> None:
        """Hold no more of a long stream than its readers need, and leave behind who would need too much."""
        if self._size <= SHARED_BYTES:
            return
        needed = next(i for i, batch in enumerate(self._batches) if batch.end > self._size - SHARED_BYTES)
        end = self._gone + len(self._batches)
        least = min(max(self._readers.values(), default=end), self._gone + needed)
        self._readers = {number: at for number, at in self._readers.items() if at >= least}
        read = min(self._readers.values(), default=end) - self._gone
        del self._batches[:read]
        self._gone += read


class Follower:
    """One of those who read a stream."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self._number = number

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        """What comes, in order. Raises `UpstreamBroken`, `LeftBehind`."""
        while (events := await self._stream.after(self._number)) is not None:
            yield events

    def close(self) -> None:
        """It reads no more."""
        self._stream.leave(self._number)
