"""An upstream that costs next to nothing: `python -m bench.stub PORT`.

It answers each chat completion at once with constant bytes around an id of its own, as JSON or, when the body asks for
it, as a stream of `EVENTS` events, the first at once and the others `INTERVAL_SECONDS` apart. It reads no more of a
request than where it ends and whether it wants a stream. `GET`, whatever the path, is answered with the number of
completions so far.
"""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass
from typing import cast

import uvloop

EVENTS = 50  # of a stream, the end not counted
INTERVAL_SECONDS = 0.02  # 50 tokens a second
STREAM_SECONDS = EVENTS * INTERVAL_SECONDS
ID_BYTES = 16

_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WANTS_STREAM = re.compile(rb'"stream" *: *true')

_TEXT = (
    b"The main renewable energy sources are solar, wind, hydropower, geothermal energy and biomass. Sunlight and wind"
    b" are the fastest growing; hydropower still gives the most electricity. None of them burns fuel that is gone once"
    b" it is used, apart from biomass, which grows again."
)
_ENVELOPE = b'","object":"chat.completion%b","created":1760000000,"model":"stub",'
_USAGE = b'"usage":{"prompt_tokens":24,"total_tokens":84,"completion_tokens":60}}'


@dataclass(frozen=True, slots=True)
class Template:
    """Bytes with a place for an id of `ID_BYTES`."""

    before: bytes
    after: bytes

    def numbered(self, number: int) -> bytes:
        return b"%b%016x%b" % (self.before, number, self.after)

    def __len__(self) -> int:
        return len(self.before) + ID_BYTES + len(self.after)


def whole_answer() -> Template:
    choice = b'"choices":[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],' % _TEXT
    content = Template(b'{"id":"chatcmpl-', _ENVELOPE % b"" + choice + _USAGE)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content)
    return Template(head + content.before, content.after)


def event(delta: bytes, finish_reason: bytes = b"null", after: bytes = b"") -> Template:
    """One event of a stream, and what follows it, as one chunk of HTTP's."""
    choice = b'"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]}\n\n' % (delta, finish_reason)
    data = Template(b'data: {"id":"chatcmpl-', _ENVELOPE % b".chunk" + choice + after)
    return Template(b"%x\r\n" % len(data) + data.before, data.after + b"\r\n")


def with_head(first: Template) -> Template:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return Template(head + first.before, first.after)


def with_end(last: Template) -> Template:
    return Template(last.before, last.after + b"0\r\n\r\n")


WHOLE = whole_answer()
FIRST = with_head(event(b'{"role":"assistant","content":"The"}'))  # a role alone would not be a token
NEXT = event(b'{"content":" sun"}')
LAST = with_end(event(b"{}", b'"stop"', b"data: [DONE]\n\n"))


def request_length(buffer: bytes) -> int | None:
    """Bytes of the first request in `buffer`; None when it is not all there."""
    end = buffer.find(_HEAD_END)
    if end < 0:
        return None
    found = _LENGTH.search(buffer, 0, end)
    length = end + len(_HEAD_END) + (int(found[1]) if found else 0)
    return length if len(buffer) >= length else None


class Stub:
    """What its connections share."""

    def __init__(self) -> None:
        self.answered = 0

    def next_number(self) -> int:
        self.answered += 1
        return self.answered


class Connection(asyncio.Protocol):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (length := request_length(self._buffer)) is not None:
            request, self._buffer = self._buffer[:length], self._buffer[length:]
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET "):
            body = b'{"answered":%d}' % self._stub.answered
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)
        elif _WANTS_STREAM.search(request):
            number = self._stub.next_number()
            self._transport.write(FIRST.numbered(number))
            self._later(number, self._loop.time(), 1)
        else:
            self._transport.write(WHOLE.numbered(self._stub.next_number()))

    def _later(self, number: int, begun: float, done: int) -> None:
        self._loop.call_at(begun + done * INTERVAL_SECONDS, self._go_on, number, begun, done)

    def _go_on(self, number: int, begun: float, done: int) -> None:
        if self._transport.is_closing():
            return
        if done == EVENTS:
            self._transport.write(LAST.numbered(number))
            return
        self._transport.write(NEXT.numbered(number))
        self._later(number, begun, done + 1)


async def serve(port: int) -> None:
    stub = Stub()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(stub), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
