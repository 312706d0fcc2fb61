"""Observations in Milvus: all gateways write theirs and read those of the others, now and when they start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import cachetools
import grpc
from pymilvus import AsyncMilvusClient, DataType
from pymilvus.exceptions import MilvusException

from gateway.cache.collection import TTL_PROPERTY, Row, connection_arguments, milliseconds
from gateway.cache.curves import Observation
from gateway.config import Milvus
from gateway.metrics import Metrics
from gateway.tasks import end

log = logging.getLogger("fingerpost")

FORM = 1
KEPT_SECONDS = 30 * 24 * 3600
READ_SECONDS = 5.0  # between two times that those of others are read
LATE_SECONDS = 60.0  # by which a row may be seen after its time
READ_ROWS = 16_384  # Milvus' limit
LEARNT_ROWS = 50  # at once: a few milliseconds
QUEUED = 1024
MOST_REFUSALS = 3  # of the same rows, by a Milvus that can be read
DRAIN_SECONDS = 2.0
VECTOR = "nothing"  # Milvus wants one in every collection

_FAILURES = (MilvusException, grpc.RpcError, TimeoutError, OSError)


class Observations:
    """`namespace` names the embedder and the verifier: scores of two verifiers never mix."""

    def __init__(
        self, settings: Milvus, namespace: str, learn: Callable[[Observation], None], metrics: Metrics
    ) -> None:
        """`learn` is told what others, and those before this process, have observed."""
        self.collection = f"{settings.collection.name}_{namespace}_observations_v{FORM}"
        self._settings = settings
        self._learn = learn
        self._metrics = metrics
        self._queue: asyncio.Queue[Row] = asyncio.Queue(QUEUED)
        self._known: cachetools.FIFOCache[str, bool] = cachetools.FIFOCache(4 * READ_ROWS)
        self._read_to = milliseconds(time.time() - KEPT_SECONDS)
        self._refusals = 0  # in a row
        self._client = AsyncMilvusClient(**connection_arguments(settings))
        self._task = asyncio.create_task(self._keep())

    def write(self, observation: Observation) -> None:
        if not math.isfinite(observation.score):  # Milvus takes none
            self._metrics.checks.labels("not_kept").inc()
            return
        row: Row = {
            "id": uuid.uuid4().hex,
            "key": observation.key,
            "score": observation.score,
            "right": observation.right,
            "served": observation.served,
            "weight": observation.weight,
            "at": milliseconds(observation.at),
            VECTOR: [0.0, 1.0],
        }
        self._known[str(row["id"])] = True
        try:
            self._queue.put_nowait(row)
        except asyncio.QueueFull:
            self._metrics.checks.labels("not_kept").inc()

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError, *_FAILURES):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._write()
        await end([self._task])
        await self._client.close()

    async def _keep(self) -> None:
        """Read and write, again and again; what fails is done again."""
        is_open = False
        while True:
            try:
                if not is_open:
                    await self._open()
                    is_open = True
                await self._read()
                await self._write()
            except _FAILURES as error:
                log.warning("milvus: observations wait: %s", str(error) or type(error).__name__)
                is_open = False
            await asyncio.sleep(READ_SECONDS)

    async def _ask(self, call: Callable[..., Awaitable[Any]], *given: Any, **named: Any) -> Any:
        seconds = self._settings.connection.timeout
        async with asyncio.timeout(seconds):
            return await call(self.collection, *given, timeout=seconds, **named)

    async def _open(self) -> None:
        if not await self._ask(self._client.has_collection):
            await self._create()
        await self._ask(self._client.load_collection)

    async def _create(self) -> None:
        fields = AsyncMilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        fields.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
        fields.add_field("key", DataType.VARCHAR, max_length=64)
        fields.add_field("score", DataType.FLOAT)
        fields.add_field("right", DataType.BOOL)
        fields.add_field("served", DataType.BOOL)
        fields.add_field("weight", DataType.FLOAT)
        fields.add_field("at", DataType.INT64)
        fields.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=2)
        index = AsyncMilvusClient.prepare_index_params()
        index.add_index(VECTOR, index_type="FLAT", metric_type="L2")
        properties = {TTL_PROPERTY: str(KEPT_SECONDS)}
        await self._ask(self._client.create_collection, schema=fields, index_params=index, properties=properties)

    async def _write(self) -> None:
        rows: list[Row] = []
        while not self._queue.empty():
            rows.append(self._queue.get_nowait())
        if not rows:
            return
        try:
            await self._ask(self._client.insert, rows)
        except _FAILURES:
            self._refusals += 1
            kept = [] if self._refusals == MOST_REFUSALS else rows[: self._queue.maxsize - self._queue.qsize()]
            for row in kept:
                self._queue.put_nowait(row)
            self._metrics.checks.labels("not_kept").inc(len(rows) - len(kept))
            self._refusals = self._refusals if kept else 0
            raise
        self._refusals = 0

    async def _read(self) -> None:
        """Up to now, in pieces that Milvus gives at once; rows may come late, so the last minute is read again."""
        now = milliseconds(time.time())
        end = now
        while self._read_to < now:
            rows = await self._between(self._read_to, end)
            if len(rows) >= READ_ROWS and end - self._read_to > 1:
                end = (self._read_to + end) // 2
                continue
            await self._learn_all(rows)
            self._read_to, end = end, now
        self._read_to = now - milliseconds(LATE_SECONDS)

    async def _between(self, after: int, until: int) -> list[Row]:
        fields = ["id", "key", "score", "right", "served", "weight", "at"]
        wanted = f"at > {after} and at <= {until}"
        return list(await self._ask(self._client.query, filter=wanted, output_fields=fields, limit=READ_ROWS))

    async def _learn_all(self, rows: list[Row]) -> None:
        """Requests have their turns in between."""
        new = sorted((row for row in rows if row["id"] not in self._known), key=lambda row: int(row["at"]))
        for i, row in enumerate(new, 1):
            self._known[row["id"]] = True
            told = {name: row[name] for name in ("key", "score", "right", "served", "weight")}
            self._learn(Observation(**told, at=row["at"] / 1000))
            if i % LEARNT_ROWS == 0:
                await asyncio.sleep(0)
