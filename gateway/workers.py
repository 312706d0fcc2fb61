"""Several processes that serve one address, and the one that starts them and starts another when one dies.

Each worker listens on a socket of its own at the same address (SO_REUSEPORT), among which the kernel divides the
connections; that of a worker that has died gets none. What this process is told (TERM, INT, HUP) it passes on. The
configuration is read here alone and sent to one worker after the other. It is in force when all of them say that they
serve in it; when one cannot, those before it go back, so that no two have different ones for long. One that is started
later has the one that is in force, whatever the file says by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from asyncio.subprocess import Process
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
FOLLOWED, STAYED = b"+", b"-"  # what a worker says of an order: it serves in it, or still in the one before


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is sent: the configuration to serve in."""

    settings: Settings
    rows: Mapping[str, int]  # of the tenants, on the board
    meeting: Path  # folder of the sockets by which the workers ask each other


class CannotFollow(Exception):
    """A worker cannot serve in a configuration."""


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


@dataclass(eq=False, slots=True)
class Worker:
    """A process that serves, and the socket on which it is sent orders and says what came of each."""

    number: int
    process: Process
    said: asyncio.StreamReader
    orders: asyncio.StreamWriter
    serves: bool = False  # it has begun to, and has not ended

    async def follows(self, order: bytes) -> bool:
        """Send it an order; whether it serves in this configuration then."""
        self.orders.write(order)
        try:
            return await self.said.read(1) == FOLLOWED
        except ConnectionError:  # it has ended
            return False

    def tell(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            self.process.send_signal(number)


class Workers:
    def __init__(self, source: Source, settings: Settings, folder: Path, meeting: Path) -> None:
        """`folder`: of the figures, `meeting`: of the workers' sockets."""
        self._metrics = metrics.shared(folder, PARENT)
        self._folder = folder
        self._meeting = meeting
        self._reloads = Reloads(source, settings, self._metrics, self._send)
        self._board = Board(settings.config.listen.workers)
        self._running: dict[int, Worker] = {}
        self._changing = asyncio.Lock()  # held while one of them is asked to follow
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
        try:
            worker = await self._started(number)
        except OSError as error:
            return f"cannot be started: {error.strerror}"
        log.info("worker %d is process %d", number, worker.process.pid)
        self._running[number] = worker
        self._metrics.workers.set(len(self._running))
        beginning = asyncio.create_task(self._begin(worker))
        if self._stopping.is_set():
            worker.tell(signal.SIGTERM)
        status = await worker.process.wait()
        beginning.cancel()
        worker.serves = False
        worker.orders.close()
        del self._running[number]
        self._metrics.workers.set(len(self._running))
        metrics.forget(self._folder, str(number))
        self._board.forget(number)
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    async def _started(self, number: int) -> Worker:
        """Raises `OSError`."""
        board = self._board.fileno()
        command = (sys.executable, "-m", "gateway.worker", str(number), str(board))
        ours, theirs = socket.socketpair()
        said, orders = await asyncio.open_unix_connection(sock=ours)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(*command, stdin=theirs.fileno(), pass_fds=(board,))
        except OSError:
            orders.close()
            raise
        return Worker(number, process, said, orders)

    async def _begin(self, worker: Worker) -> None:
        """Send it its first order; from when it serves it follows with the others."""
        settings = self._reloads.settings
        if not await worker.follows(self._order(settings)):
            return  # it ends
        async with self._changing:
            worker.serves = True
            if settings is not self._reloads.settings:  # another one is in force by now
                await self._follow_or_end(worker)

    async def _send(self, settings: Settings) -> None:
        """Have all that serve follow. Raises `CannotFollow`, and then all serve as before."""
        order, followed = self._order(settings), list[Worker]()
        async with self._changing:
            for worker in list(self._running.values()):
                if not worker.serves:
                    continue  # it has ended, or is sent what is in force when it begins
                if not await worker.follows(order):
                    for each in followed:
                        await self._follow_or_end(each)
                    raise CannotFollow(f"worker {worker.number} cannot use it, or has ended")
                followed.append(worker)

    async def _follow_or_end(self, worker: Worker) -> None:
        """Have a worker serve in what is in force; where it cannot, another one will."""
        if worker.serves and not await worker.follows(self._order(self._reloads.settings)):
            log.error("worker %d cannot use the configuration that is in force, and is told to stop", worker.number)
            worker.serves = False
            worker.tell(signal.SIGTERM)

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
        for worker in self._running.values():
            worker.tell(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._config.listen.drain_seconds + GRACE_SECONDS, self._kill)

    def _kill(self) -> None:
        self._status = 1
        for number, worker in self._running.items():
            log.warning("worker %d is killed", number)
            worker.tell(signal.SIGKILL)
