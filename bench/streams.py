"""Times the first token of streams: `python -m bench.streams URL BODY_FILE --streams 64 --seconds 8 [--burst]`.

wrk times whole answers only, other public tools the first byte of the answer's head, or they cost more than what is
measured here (docs/dependencies.md). So this does as little as can be done: one socket a stream, no parsing but three
searches in what has just come. It prints its figures as JSON, its own use of the processor among them.

Without `--burst`, `--streams` are open at all times: they begin evenly spread over the length of one, and a new one
begins when one has ended. With it, all begin at the same moment, and again when the last has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import uvloop

from bench.figures import percentile
from bench.stub import STREAM_SECONDS

FIRST = b"\ndata: {"
DONE = b"[DONE]"
END = b"\r\n0\r\n\r\n"  # of a body in chunks
KEPT_BYTES = 16  # of what has come, in case one of the above is cut in two
OK = b"HTTP/1.1 200 "
BURST_SECONDS = 30  # a burst that takes longer has failed


@dataclass(slots=True)
class Tally:
    """What all streams came to."""

    counts_from: float  # time.perf_counter(); streams that began earlier do not count
    first_ms: list[float] = field(default_factory=list)
    ended: int = 0
    errors: int = 0

    def first(self, begun: float, now: float) -> None:
        if begun >= self.counts_from:
            self.first_ms.append(1000 * (now - begun))


class Client(asyncio.Protocol):
    """One connection; one stream at a time."""

    def __init__(self, request: bytes, tally: Tally, on_end: Callable[[Client], None]) -> None:
        self._request = request
        self._tally = tally
        self._on_end = on_end
        self._begun: float | None = None  # None: no stream is open

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def begin(self) -> None:
        if self._transport.is_closing():
            return
        self._tail, self._waiting, self._done = b"", True, False
        self._begun = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._begun is None:
            return
        seen = self._tail + data
        if self._waiting:
            if not self._tail and not seen.startswith(OK):
                self._fail()
                return
            if FIRST in seen:
                self._waiting = False
                self._tally.first(self._begun, now)
        self._done = self._done or DONE in seen
        self._tail = seen[-KEPT_BYTES:]
        if self._done and seen.endswith(END):
            self._begun = None
            self._tally.ended += 1
            self._on_end(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._begun is not None:
            self._fail()

    def close(self) -> None:
        """An open stream is given up, which is no error."""
        self._begun = None
        self._transport.abort()

    def _fail(self) -> None:
        self._begun = None
        self._tally.errors += 1
        self._transport.abort()
        self._on_end(self)


def request_bytes(url: str, body: bytes) -> bytes:
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer bench\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def connect(url: str, count: int, make: Callable[[], Client]) -> list[Client]:
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    return [(await loop.create_connection(make, host, port))[1] for _ in range(count)]


async def steady(url: str, body: bytes, streams: int, seconds: float) -> Tally:
    """Streams count once as many are open as shall be."""
    tally = Tally(time.perf_counter() + STREAM_SECONDS)
    request = request_bytes(url, body)
    clients = await connect(url, streams, lambda: Client(request, tally, Client.begin))
    for i, client in enumerate(clients):
        asyncio.get_running_loop().call_later(i * STREAM_SECONDS / streams, client.begin)
    await asyncio.sleep(STREAM_SECONDS + seconds)
    for client in clients:
        client.close()
    return tally


async def burst(url: str, body: bytes, streams: int, seconds: float) -> Tally:
    """As many bursts as begin within `seconds`, each until its last stream has ended."""
    tally, all_ended, left = Tally(time.perf_counter()), asyncio.Event(), 0
    until = time.perf_counter() + seconds

    def ended(_: Client) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            all_ended.set()

    request = request_bytes(url, body)
    clients = await connect(url, streams, lambda: Client(request, tally, ended))
    while time.perf_counter() < until and not tally.errors:
        left = streams
        all_ended.clear()
        for client in clients:
            client.begin()
        try:
            await asyncio.wait_for(all_ended.wait(), BURST_SECONDS)
        except TimeoutError:
            tally.errors += left
    for client in clients:
        client.close()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("body", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--burst", action="store_true")
    options = parser.parse_args()
    measure = burst if options.burst else steady
    started, used = time.perf_counter(), time.process_time()
    tally = uvloop.run(measure(options.url, options.body.read_bytes(), options.streams, options.seconds))
    figures = {
        "streams": len(tally.first_ms),
        "ended": tally.ended,
        "p50_ms": percentile(tally.first_ms, 0.5),
        "p99_ms": percentile(tally.first_ms, 0.99),
        "errors": tally.errors,
        "generator_cores": (time.process_time() - used) / (time.perf_counter() - started),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
