"""What tenants have used of their limits, as one process counts it or as all workers do together.

Workers count in a file that each of them has in memory: a row for each tenant, locked while somebody counts in it. The
lock of a worker that dies is free, and its running requests are forgotten.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, cast

# Where a row has a bucket's level and its time, and where the workers' counts begin.
REQUESTS, TOKENS, RUNNING = 0, 2, 4
UNUSED = (0.0, -math.inf)  # of a bucket: by now it is full
NUMBER = struct.Struct("d")


@dataclass(frozen=True, slots=True)
class Tally:
    """A tenant's row."""

    cells: MutableSequence[float]  # (RUNNING + workers,)
    worker: int
    lock: Callable[[], AbstractContextManager[None]]

    @property
    def running(self) -> float:
        return sum(self.cells[RUNNING:])

    def run(self, more: int) -> None:
        """Count requests of this process that begin or, if negative, end."""
        self.cells[RUNNING + self.worker] += more


class Alone:
    """The tallies of the only process; a tenant that is configured anew goes on with what it has used."""

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}

    def __call__(self, tenant: str) -> Tally:
        return self._tallies.setdefault(tenant, Tally([*UNUSED, *UNUSED, 0.0], 0, contextlib.nullcontext))


class Board:
    """The file of the workers' rows; what is written once stays where it is."""

    def __init__(self, workers: int) -> None:
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (open as long as the gateway runs)
        self._row = (*UNUSED, *UNUSED, *(0.0 for _ in range(workers)))
        self._rows: dict[str, int] = {}

    def fileno(self) -> int:
        return self._file.fileno()

    def place(self, tenants: Iterable[str]) -> Mapping[str, int]:
        """Make room for these tenants; the number of every tenant's row."""
        for tenant in tenants:
            if tenant not in self._rows:
                self._rows[tenant] = len(self._rows)
                self._file.write(struct.pack(f"{len(self._row)}d", *self._row))
        self._file.flush()
        return dict(self._rows)

    def forget(self, worker: int) -> None:
        """Nothing is running any more in one that has died; nobody else writes its counts."""
        for row in range(len(self._rows)):
            cell = row * len(self._row) + RUNNING + worker
            os.pwrite(self.fileno(), NUMBER.pack(0), cell * NUMBER.size)


class Together:
    """The tallies of one worker among several."""

    def __init__(self, board: int, worker: int, workers: int) -> None:
        """`board`: the file's descriptor."""
        self._board = board
        self._worker = worker
        self._size = RUNNING + workers
        self._rows: Mapping[str, int] = {}
        self._cells: MutableSequence[float] = []

    def place(self, rows: Mapping[str, int]) -> None:
        """Learn where the rows are; there may be more of them than before."""
        self._rows = rows
        if rows:
            length = len(rows) * self._size * NUMBER.size
            self._cells = cast(MutableSequence[float], memoryview(mmap.mmap(self._board, length)).cast("d"))

    def __call__(self, tenant: str) -> Tally:
        begin = self._rows[tenant] * self._size
        row = self._cells[begin : begin + self._size]

        @contextlib.contextmanager
        def lock() -> Iterator[None]:
            where = (self._size * NUMBER.size, begin * NUMBER.size)
            fcntl.lockf(self._board, fcntl.LOCK_EX, *where)
            try:
                yield
            finally:
                fcntl.lockf(self._board, fcntl.LOCK_UN, *where)

        return Tally(row, self._worker, lock)
