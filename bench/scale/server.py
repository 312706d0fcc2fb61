"""A real Milvus in a folder of its own, and what it holds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pymilvus import MilvusClient
from tqdm import tqdm

from bench.servers import Plan, Server, await_ready, free_ports, started

UNINDEXED_ROWS = 1024  # smaller segments are never indexed (`indexCoord.segment.minSegmentNumRowsToEnableIndex`)
STILL_SECONDS = 25.0  # without any change of the segments after which nothing more is expected
SETTLE_SECONDS = 1500.0  # at the most


@dataclass(frozen=True, slots=True)
class Held:
    """What Milvus has loaded of a collection."""

    segments: int
    rows: int
    indexed_segments: int
    indexed_rows: int
    growing_rows: int  # that are in no segment which Milvus lists: it lists sealed ones only

    @property
    def words(self) -> str:
        growing = f", {self.growing_rows:,} rows still growing" if self.growing_rows else ""
        return f"{self.segments} with {self.rows:,} rows, {self.indexed_segments} indexed{growing}"


@contextlib.contextmanager
def milvus(folder: Path) -> Iterator[tuple[Server, int]]:
    """The server, ready, and its port. Raises `CannotStart`."""
    port, metrics = free_ports(2)
    address = f"http://127.0.0.1:{port}"
    command = (
        *(sys.executable, "-m", "deploy.local.milvus", "--data", str(folder / "data")),
        *("--port", str(port), "--metrics-port", str(metrics)),
    )
    ready = (f"http://127.0.0.1:{metrics}/healthz", f"{address}/v1/vector/collections")
    (folder / "data").mkdir()
    with started(Plan("milvus", command, address, ready), folder / "milvus.log") as server:
        await_ready(server, time.monotonic() + 180)
        yield server, port


def held(client: MilvusClient, collection: str, rows: int) -> Held:
    """`rows`: how many were inserted."""
    sealed = client.list_loaded_segments(collection)
    indexed = [segment for segment in sealed if segment.index_name]
    found = sum(segment.num_rows for segment in sealed)
    in_index = sum(segment.num_rows for segment in indexed)
    return Held(len(sealed), found, len(indexed), in_index, max(rows - found, 0))


def settled(client: MilvusClient, collection: str, rows: int) -> tuple[Held, float]:
    """Wait until all that can be is sealed, compacted and indexed.

    What is held then, and the seconds until it last changed. Gives up after `SETTLE_SECONDS`.
    """
    began = changed = time.monotonic()
    client.flush(collection, timeout=600)
    seen: tuple[object, ...] = ()
    now = held(client, collection, rows)
    with tqdm(total=rows, desc="indexed", unit="entry", unit_scale=True, mininterval=1) as bar:
        while time.monotonic() - began < SETTLE_SECONDS:
            loaded = client.list_loaded_segments(collection)
            if seen != (seen := tuple(sorted((s.segment_id, s.state_name, s.index_name) for s in loaded))):
                changed = time.monotonic()
            now = held(client, collection, rows)
            bar.n = min(now.indexed_rows, rows)
            bar.refresh()
            is_done = not now.growing_rows and all(s.index_name for s in loaded if s.num_rows >= UNINDEXED_ROWS)
            if is_done and time.monotonic() - changed > STILL_SECONDS:
                break
            time.sleep(0.5)
    return now, changed - began


def folder_mb(folder: Path) -> float:
    """Of all files in it, in megabytes of 10^6 bytes as they lie on disk."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            total += file.stat().st_blocks * 512 if file.is_file() else 0
    return total / 1e6
