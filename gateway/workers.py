"""Several processes that serve one address, and the one that starts them and starts another when one dies.

Each worker listens on a socket of its own at the same address (SO_REUSEPORT), among which the kernel divides the
connections; that of a worker that has died gets none. What this process is told (TERM, INT, HUP) it passes on. The
configuration is read here alone and sent to all workers, so that no two have different ones, and one that is started
later has the one that is in force, whatever the file says by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import shutil
import signal
import struct
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway import metrics
from gateway.config import Config
from gateway.listening import CannotStart, listening
from gateway.reload import Reloads, Settings, Source
from gateway.tally import Board

log = logging.getLogger("fingerpost")

PARENT = "parent"  # among the names of processes that have metrics; those of workers are numbers
FIRST_PAUSE_SECONDS = 0.5  # before another worker is started
MOST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a worker that has lived so long did not die of what its predecessor died of
GRACE_SECONDS = 10.0  # beyond `listen.drain_seconds`, to write what is to be written
LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is sent: the configuration to serve in."""

    settings: Settings
    rows: Mapping[str, int]  # of the tenants, on the board
    meeting: Path  # folder of the sockets by which the workers ask each other


def packed(order: Order) -> bytes:
    body = pickle.dumps(order)
    return LENGTH.pack(len(body)) + body


async def received(orders: asyncio.StreamReader) -> Order | None:
    """The next order; None when there will be no other."""
    try:
        (length,) = LENGTH.unpack(await orders.readexactly(LENGTH.size))
        order = pickle.loads(await orders.readexactly(length))  # noqa: S301 (of the process that started this one)
    except asyncio.IncompleteReadError:
        return None
    assert isinstance(order, Order)
    return order


def metrics_folder(config: Config) -> Path:
    """The gateway's own: another one with the same data folder has another address."""
    return config.data_dir / "metrics" / f"{config.listen.host}-{config.listen.port}"


def pause(before: float, lived: float) -> float:
    """Seconds until another worker is started, when it was `before` the last time, and this one has `lived` so long."""
    if lived >= STEADY_SECONDS:
        return FIRST_PAUSE_SECONDS
    return min(max(2 * before, FIRST_PAUSE_SECONDS), MOST_PAUSE_SECONDS)


def serve(source: Source, settings: Settings) -> int:
    """The exit status. Raises `CannotStart`."""
    listen, folder = settings.config.listen, metrics_folder(settings.config)
    for each in listening(listen.model_copy(update={"workers": 1})):
        each.close()  # nobody has the address, not even somebody who would share it
    with contextlib.ExitStack() as held:
        for each in listening(listen):
            held.enter_context(each)
        _empty(folder)
        meeting = held.enter_context(tempfile.TemporaryDirectory(prefix="fingerpost-"))
        return asyncio.run(Workers(source, settings, folder, Path(meeting)).run())


def _empty(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CannotStart(f"data_dir: cannot write {folder}: {error.strerror}") from error


class Workers:
    def __init__(self, source: Source, settings: Settings, folder: Path, meeting: Path) -> None:
        """`folder`: of the figures, `meeting`: of the workers' sockets."""
        self._metrics = metrics.shared(folder, PARENT)
        self._folder = folder
        self._meeting = meeting
        self._reloads = Reloads(source, settings, self._metrics, self._send)
        self._board = Board(settings.config.listen.workers)
        self._running: dict[int, Process] = {}
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Until told to stop; the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        async with asyncio.TaskGroup() as keeping:
            for number in range(self._config.listen.workers):
                keeping.create_task(self._keep(number))
        log.info("all workers have ended")
        return self._status

    @property
    def _config(self) -> Config:
        return self._reloads.settings.config

    def _order(self, settings: Settings) -> bytes:
        rows = self._board.place(tenant.name for tenant in settings.config.tenants)
        return packed(Order(settings, rows, self._meeting))

    async def _keep(self, number: int) -> None:
        """Have a worker of this number, and another one when it ends, until told to stop."""
        seconds = 0.0
        while not self._stopping.is_set():
            started = time.monotonic()
            end = await self._live(number)
            if self._stopping.is_set():
                return
            seconds = pause(seconds, time.monotonic() - started)
            log.error("worker %d %s; another one is started in %g s", number, end, seconds)
            self._metrics.restarts.inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _live(self, number: int) -> str:
        """Start a worker, and say how it ended."""
        command = (sys.executable, "-m", "gateway.worker", str(number), str(self._board.fileno()))
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, pass_fds=(self._board.fileno(),))
        except OSError as error:
            return f"cannot be started: {error.strerror}"
        assert process.stdin is not None
        log.info("worker %d is process %d", number, process.pid)
        self._running[number] = process
        self._metrics.workers.set(len(self._running))
        process.stdin.write(self._order(self._reloads.settings))
        if self._stopping.is_set():
            _signal(process, signal.SIGTERM)
        status = await process.wait()
        del self._running[number]
        self._metrics.workers.set(len(self._running))
        metrics.forget(self._folder, str(number))
        self._board.forget(number)
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    async def _send(self, settings: Settings) -> None:
        order = self._order(settings)
        for process in self._running.values():
            assert process.stdin is not None
            process.stdin.write(order)  # one that has just died takes it, too, and nothing comes of it

    def _reload(self) -> None:
        if not self._stopping.is_set():
            self._reloads.ask()

    def _stop(self) -> None:
        """Have all workers end; when asked to once more, at once."""
        if self._stopping.is_set():
            log.warning("told to stop once more, ending now")
            self._kill()
            return
        log.info("told to stop")
        self._stopping.set()
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._config.listen.drain_seconds + GRACE_SECONDS, self._kill)

    def _kill(self) -> None:
        self._status = 1
        for number, process in self._running.items():
            log.warning("worker %d is killed", number)
            _signal(process, signal.SIGKILL)


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        process.send_signal(number)
