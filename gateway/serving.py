"""A process that serves, and how it ends.

TERM, INT   no new connection is taken; what is under way goes on to its end, for `listen.drain_seconds` at most;
            what is to be written is written; exit status 0
once more   the end, at once; exit status 1
HUP         the configuration is read again, see `gateway.reload`
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import uvicorn
import uvloop

from gateway import certificates
from gateway.connection import Connection, connections
from gateway.generations import Generations
from gateway.lasting import Lasting
from gateway.listening import listening
from gateway.metrics import Metrics
from gateway.reload import Reloads, Settings, Source
from gateway.tally import Alone

log = logging.getLogger("fingerpost")

T = TypeVar("T")

TICK_SECONDS = 0.05
GARBAGE = 10_000  # objects more than before, after which the young are collected
GOODBYE_SECONDS = 1.0  # for a client to close its side, too, as TLS would have it
BREAK_OFF_SECONDS = 1.0  # for requests whose connection is closed to see it


class Server(uvicorn.Server):
    """uvicorn's, with an end of its own."""

    def __init__(self, application: Generations, lasting: Lasting) -> None:
        listen = application.config.listen
        config = uvicorn.Config(
            application,
            http=connections(lambda: application.config.listen, lambda: lasting.draining),  # type: ignore[arg-type]
            ws="none",
            lifespan="on",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            server_header=False,
        )
        config.load()
        if listen.tls is not None:  # not by uvicorn, which has ciphers of its own
            config.ssl = certificates.server(listen.tls.cert_file, listen.tls.key_file)
        super().__init__(config)
        self.handlers: Mapping[signal.Signals, Callable[[], object]] = {}  # while it runs
        self._application = application
        self._lasting = lasting

    async def change(self, settings: Settings) -> None:
        """Have a configuration in force; a certificate is read again, whether it is another one or not."""
        while not self.started:  # noqa: ASYNC110 (uvicorn has only this flag)
            await asyncio.sleep(TICK_SECONDS)
        tls = settings.config.listen.tls
        if tls is not None and self.config.ssl is not None:
            certificates.show(self.config.ssl, tls.cert_file, tls.key_file)
        await self._application.change(settings)

    def stop(self) -> None:
        """End when all that is under way has its answer."""
        if not self._lasting.draining:
            busy = sum(connection.is_busy for connection in self._connections)
            log.info("told to stop; %d requests are under way", busy)
        self._lasting.draining = self.should_exit = True
        for connection in self._connections:
            connection.shutdown()

    def stop_or_end(self) -> None:
        """Stop; when told so before, end now, whatever that breaks off."""
        if self._lasting.draining:
            log.warning("told to stop once more, ending now")
            os._exit(1)
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's: a process that was told to stop, and did, has not failed."""
        loop = asyncio.get_running_loop()
        for number, handler in self.handlers.items():
            loop.add_signal_handler(number, handler)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is there now stays: a full collection would walk all of it, and hold up whoever waits
        gc.set_threshold(GARBAGE)
        listen = self._application.config.listen
        log.info("listening on %s port %d", listen.host, listen.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for each in sockets or []:
            each.close()
        seconds = self._application.config.listen.drain_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._drain()
        except TimeoutError:
            await self._break_off(seconds)
        await self.lifespan.shutdown()

    @property
    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    async def _drain(self) -> None:
        """Until every request has its answer, and every answer is sent."""
        while any(connection.is_busy for connection in self._connections):
            for connection in self._connections:
                connection.shutdown()
            await asyncio.sleep(TICK_SECONDS)
        sent = time.monotonic()
        while self.server_state.connections or self.server_state.tasks:
            for connection in self._connections:
                connection.transport.close()
                if time.monotonic() - sent > GOODBYE_SECONDS and not connection.transport.get_write_buffer_size():
                    connection.transport.abort()
            await asyncio.sleep(TICK_SECONDS)

    async def _break_off(self, seconds: float) -> None:
        """To a request that is still under way this looks as if its client had left."""
        if busy := sum(connection.is_busy for connection in self._connections):
            log.warning("%d requests are still under way after %g s, and are broken off", busy, seconds)
        for connection in self._connections:
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=BREAK_OFF_SECONDS)


def serve(source: Source, settings: Settings) -> None:
    """Be the only process. Raises `CannotStart`."""
    lasting = Lasting(Metrics(), Alone())
    lasting.metrics.workers.set(1)
    server = Server(Generations(settings, lasting), lasting)
    reloads = Reloads(source, settings, lasting.metrics, server.change)
    server.handlers = {
        signal.SIGTERM: server.stop_or_end,
        signal.SIGINT: server.stop_or_end,
        signal.SIGHUP: lambda: None if lasting.draining else reloads.ask(),
    }
    run(server.serve(listening(settings.config.listen)))


def run(main: Coroutine[Any, Any, T]) -> T:
    """On the fastest event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
