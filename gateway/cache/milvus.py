"""The cache in Milvus, shared by all gateways, with what this one stored last also kept in its own memory.

A background task opens the collection, and opens it again after any failure; until it is open every lookup is
`CacheUnavailable` at once, so that no request waits for a Milvus that is down. Writes go through a bounded queue, in
batches, off the request path, and are never flushed: Milvus seals segments by itself. A search with bounded consistency
may miss what was just stored, which `_recent` has, or find what was just deleted, which `_deleted` knows. A deletion
leaves a mark in the entry's place, for which every gateway, and every worker of one, looks all the time; should Milvus
not answer then, what is recent is so for RECENT_SECONDS only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cachetools
import grpc
import numpy as np
import orjson
from pymilvus import AsyncMilvusClient, DataType
from pymilvus.exceptions import MilvusException

from gateway.answer import Answer
from gateway.cache import CacheUnavailable, Entry, Hit, Origin, Vector
from gateway.cache.memory import EvictionPolicy, MemoryCache
from gateway.config import RESERVED_FIELDS, Milvus, MilvusTls
from gateway.metrics import Metrics

log = logging.getLogger("fingerpost")

FORM = 1  # of what is stored; another form is another collection
TTL_PROPERTY = "collection.ttl.seconds"
RECENT_ENTRIES = 512
RECENT_SECONDS = 5.0  # by which bounded consistency may be late
QUEUED_ENTRIES = 1024
BATCH_ENTRIES = 64
VARCHAR_BYTES = 65_535  # Milvus' limit
LOOKUP_SECONDS = 1.0  # a request does not wait longer, whatever connection.timeout allows for the rest
REOPEN_SECONDS = 1.0
DRAIN_SECONDS = 3.0
DELETE_SECONDS = 5.0  # that the caller of a deletion waits for it
FOLLOW_SECONDS = 0.5  # between two looks at what others have deleted
EVERYWHERE_SECONDS = 1.0  # after which they have seen a deletion
STALE_SECONDS = 60.0  # for which a search may, at the worst, find what was deleted

_FAILURES = (MilvusException, grpc.RpcError, TimeoutError, OSError)


class SchemaMismatch(Exception):
    """The collection exists with other fields than this cache writes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Deletion:
    key: str
    at: int = field(default_factory=lambda: int(time.time()))
    done: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class MilvusCache:
    """`namespace` is the embedder's fingerprint: it is in the collection's name, so two embedders never share one."""

    def __init__(
        self,
        settings: Milvus,
        *,
        namespace: str,
        dimension: int,
        ttl_seconds: int,
        eviction_policy: EvictionPolicy,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._collection = f"{settings.collection.name}_{namespace}_v{FORM}"
        self._vector = settings.collection.vector_field.name
        self._dimension = dimension
        self._ttl_seconds = ttl_seconds
        self._metrics = metrics
        self._recent = MemoryCache(RECENT_ENTRIES, eviction_policy, dimension)
        self._deleted: cachetools.TTLCache[str, bool] = cachetools.TTLCache(QUEUED_ENTRIES, STALE_SECONDS)
        self._marks: cachetools.TTLCache[str, int] = cachetools.TTLCache(QUEUED_ENTRIES, 2 * STALE_SECONDS)  # seen
        self._queue: asyncio.Queue[Entry | _Deletion] = asyncio.Queue(QUEUED_ENTRIES)
        self._client = AsyncMilvusClient(**connection_arguments(settings))
        self._open = asyncio.Event()
        self._broken = asyncio.Event()
        self._broken.set()
        self._why = "is being opened"
        self._tasks = tuple(map(asyncio.create_task, (self._keep_open(), self._write(), self._follow())))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def get(self, key: str) -> Entry | None:
        if (recent := await self._recent.get(key)) or key in self._deleted:
            return recent
        wanted = f'key == "{key}" and expires_at > {int(time.time())}'
        rows = await self._ask(self._client.query, filter=wanted, output_fields=[*RESERVED_FIELDS, self._vector])
        entry = await self._newest(rows[0]) if rows else None
        if entry is not None:
            self._keep(entry)
        return entry

    async def search(self, scope: str, embedding: Vector, threshold: float) -> Hit | None:
        recent = await self._recent.search(scope, embedding, threshold)
        try:
            found = await self._nearest(embedding, f'scope == "{scope}" and expires_at > {int(time.time())}')
        except CacheUnavailable:
            if recent:
                return recent
            raise
        for candidate in found:
            if candidate["distance"] < max(threshold, recent.similarity if recent else threshold):
                break
            entry = await self._newest(candidate["entity"])
            if entry is not None:
                return Hit(entry, float(candidate["distance"]))
        return recent

    def _keep(self, entry: Entry) -> None:
        self._recent.put(replace(entry, expires_at=min(entry.expires_at, time.time() + RECENT_SECONDS)))

    async def _newest(self, row: dict[str, Any]) -> Entry | None:
        """The entry in a row, or the process's own version of it, which is the newer one; None when it is deleted."""
        if (recent := await self._recent.get(row["key"])) or row["key"] in self._deleted:
            return recent
        return self._entry(row)

    def put(self, entry: Entry) -> None:
        self._keep(entry)
        self._deleted.pop(entry.key, None)
        try:
            self._queue.put_nowait(entry)
        except asyncio.QueueFull:
            self._metrics.stores.labels("dropped").inc()

    async def delete(self, key: str) -> None:
        await self._forget(key)
        deletion = _Deletion(key)
        self._marks[key] = deletion.at
        try:
            self._queue.put_nowait(deletion)  # after what is still being written
            async with asyncio.timeout(DELETE_SECONDS if self._open.is_set() else 0):
                is_done = await deletion.done
        except (asyncio.QueueFull, TimeoutError) as error:
            raise CacheUnavailable(self._why) from error
        if not is_done:
            raise CacheUnavailable(self._why)
        await asyncio.sleep(EVERYWHERE_SECONDS)

    async def _forget(self, key: str) -> None:
        await self._recent.delete(key)
        self._deleted[key] = True

    async def check(self) -> None:
        try:
            await self._nearest(self._probe(), 'scope == ""')
        except CacheUnavailable:
            raise CacheUnavailable(f"{self._settings.connection.address}: {self._why}") from None

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS if self._open.is_set() else 0):
                await self._queue.join()
        if left := self._queue.qsize():
            log.warning("milvus: %d answers were not written or deleted", left)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def _nearest(self, embedding: Vector, wanted: str) -> list[dict[str, Any]]:
        """The `search.topk` nearest rows that the filter `wanted` leaves, best first."""
        return list((await self._ask(self._client.search, filter=wanted, **self._search_for(embedding)))[0])

    def _search_for(self, embedding: Vector) -> dict[str, Any]:
        """A search as configured."""
        field, search = self._settings.collection.vector_field, self._settings.search
        return {
            "data": [embedding.tolist()],
            "anns_field": field.name,
            "limit": search.topk,
            "search_params": {"metric_type": field.metric_type, "params": search.params},
            "output_fields": [*RESERVED_FIELDS, field.name],
        }

    async def _ask(self, call: Any, **arguments: Any) -> Any:
        """One lookup, bounded in time; any failure closes the cache until `_keep_open` has opened it again."""
        if not self._open.is_set():
            raise CacheUnavailable(self._why)
        arguments |= {"consistency_level": self._settings.search.consistency_level}
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return await call(self._collection, timeout=LOOKUP_SECONDS, **arguments)
        except _FAILURES as error:
            self._fail(error)
            raise CacheUnavailable(self._why) from error

    def _probe(self) -> Vector:
        """A vector to search with when only the searching matters."""
        return np.full(self._dimension, self._dimension**-0.5, dtype=np.float32)

    def _fail(self, error: BaseException) -> None:
        self._why = f"does not answer: {str(error) or type(error).__name__}"
        if self._open.is_set():
            log.warning("milvus: %s; going on without it", self._why)
        self._open.clear()
        self._broken.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("milvus: a background task ended, restart the gateway", exc_info=error)
            self._fail(error)

    async def _keep_open(self) -> None:
        while True:
            await self._broken.wait()
            try:
                await self._open_collection()
            except (*_FAILURES, SchemaMismatch) as error:
                if self._why != (why := str(error) or type(error).__name__):
                    log.warning("milvus: cannot be opened, going on without it: %s", why)
                self._why = why
                await asyncio.sleep(REOPEN_SECONDS)
            else:
                self._broken.clear()
                self._open.set()
                log.info("milvus: collection %s is open", self._collection)

    async def _open_collection(self) -> None:
        """Create what is not there, load it, and see that it can be searched as configured."""
        seconds = self._settings.connection.timeout
        async with asyncio.timeout(seconds):
            if not await self._client.has_collection(self._collection, timeout=seconds):
                await self._create_collection()
            description = await self._client.describe_collection(self._collection, timeout=seconds)
            check_schema(description, self._vector, self._dimension)
            await self._keep_ttl(description)
            await self._client.load_collection(self._collection, timeout=seconds)
            await self._client.search(self._collection, timeout=seconds, **self._search_for(self._probe()))

    async def _keep_ttl(self, description: dict[str, Any]) -> None:
        """Milvus drops rows by the collection's own time to live, which may be that of an earlier configuration."""
        found, wanted = description.get("properties", {}).get(TTL_PROPERTY), str(self._ttl_seconds)
        if found not in (wanted, None):  # Milvus Lite has none: there, rows only stop being found
            await self._client.alter_collection_properties(self._collection, {TTL_PROPERTY: wanted})

    async def _create_collection(self) -> None:
        wanted = self._settings.collection
        schema = AsyncMilvusClient.create_schema(
            auto_id=False, enable_dynamic_field=False, description=wanted.description
        )
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("scope", DataType.VARCHAR, max_length=64)
        schema.add_field("question", DataType.VARCHAR, max_length=VARCHAR_BYTES)
        schema.add_field("answer", DataType.VARCHAR, max_length=VARCHAR_BYTES)
        schema.add_field("expires_at", DataType.INT64)
        schema.add_field(self._vector, DataType.FLOAT_VECTOR, dim=self._dimension)
        index = AsyncMilvusClient.prepare_index_params()
        index.add_index(
            self._vector,
            index_type=wanted.index.type,
            metric_type=wanted.vector_field.metric_type,
            params=wanted.index.params,
        )
        await self._client.create_collection(
            self._collection,
            schema=schema,
            index_params=index,
            properties={TTL_PROPERTY: str(self._ttl_seconds)},  # Milvus drops what has expired when it compacts
            consistency_level=self._settings.search.consistency_level,
            timeout=self._settings.connection.timeout,
        )

    async def _write(self) -> None:
        while True:
            batch: list[Entry | _Deletion] = [await self._queue.get()]
            while len(batch) < BATCH_ENTRIES and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._open.wait()
            await self._write_batch(batch)
            for _ in batch:
                self._queue.task_done()

    async def _write_batch(self, batch: list[Entry | _Deletion]) -> None:
        last = {item.key: item for item in batch}.values()
        await self._upsert([item for item in last if isinstance(item, Entry)])
        await self._mark([item for item in last if isinstance(item, _Deletion)])
        for item in batch:
            if isinstance(item, _Deletion) and not item.done.done():
                item.done.set_result(self._open.is_set())

    async def _mark(self, deletions: list[_Deletion]) -> None:
        """Put marks in the place of entries: without an answer, expired since ever, and telling when they were made."""
        rows = [
            {
                "key": deletion.key,
                "scope": "",
                "question": "",
                "answer": "",
                "expires_at": -deletion.at,
                self._vector: self._probe().tolist(),
            }
            for deletion in deletions
        ]
        await self._send(rows)

    async def _follow(self) -> None:
        """Forget what others delete."""
        while True:
            await self._open.wait()
            for row in await self._marked():
                if self._marks.get(row["key"]) != -row["expires_at"]:
                    self._marks[row["key"]] = -row["expires_at"]
                    await self._forget(row["key"])
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _marked(self) -> list[dict[str, Any]]:
        """The marks that have been made of late."""
        seconds = self._settings.connection.timeout
        wanted = {
            "filter": f"expires_at < -{int(time.time() - STALE_SECONDS)}",
            "output_fields": ["key", "expires_at"],
            "limit": QUEUED_ENTRIES,
            "consistency_level": "Strong",
            "timeout": seconds,
        }
        try:
            async with asyncio.timeout(seconds):
                return list(await self._client.query(self._collection, **wanted))
        except _FAILURES as error:
            self._fail(error)
            return []

    async def _upsert(self, entries: list[Entry]) -> None:
        rows = [self._row(entry) for entry in entries]
        fitting = [row for row in rows if _fits(row)]
        self._count("too_large", len(rows) - len(fitting))
        self._count("stored" if await self._send(fitting) else "failed", len(fitting))

    async def _send(self, rows: list[dict[str, Any]]) -> bool:
        """Whether Milvus has taken the rows, in the place of those with their keys."""
        if not rows:
            return True
        try:
            seconds = self._settings.connection.timeout
            async with asyncio.timeout(seconds):
                await self._client.upsert(self._collection, rows, timeout=seconds)
        except _FAILURES as error:
            self._fail(error)
            return False
        return True

    def _count(self, outcome: str, entries: int) -> None:
        if entries:
            self._metrics.stores.labels(outcome).inc(entries)

    def _row(self, entry: Entry) -> dict[str, Any]:
        return {
            "key": entry.key,
            "scope": entry.scope,
            "question": entry.question,
            "answer": orjson.dumps({"answer": entry.answer, "origin": entry.origin}).decode(),
            "expires_at": int(entry.expires_at),
            self._vector: entry.embedding.tolist(),
        }

    def _entry(self, row: dict[str, Any]) -> Entry | None:
        """The entry in a row; None, counted, when it is not of this form."""
        try:
            payload = orjson.loads(row["answer"])
            return Entry(
                key=row["key"],
                scope=row["scope"],
                question=row["question"],
                embedding=np.asarray(row[self._vector], dtype=np.float32),
                answer=Answer(**payload["answer"]),
                origin=Origin(**payload["origin"]),
                expires_at=row["expires_at"],
            )
        except (KeyError, TypeError, ValueError):
            self._count("unreadable", 1)
            return None


def _fits(row: dict[str, Any]) -> bool:
    return all(len(row[field].encode()) <= VARCHAR_BYTES for field in ("question", "answer"))


def check_schema(description: dict[str, Any], vector_field: str, dimension: int) -> None:
    """Raises `SchemaMismatch` when a collection is not one this cache can use."""
    fields = {field["name"]: field for field in description["fields"]}
    if missing := {*RESERVED_FIELDS, vector_field} - fields.keys():
        raise SchemaMismatch(f"collection {description['collection_name']} lacks {', '.join(sorted(missing))}")
    if (found := int(fields[vector_field]["params"]["dim"])) != dimension:
        raise SchemaMismatch(f"collection {description['collection_name']} has dimension {found}, not {dimension}")


def connection_arguments(settings: Milvus) -> dict[str, Any]:
    """The `connection` section as pymilvus takes it."""
    connection = settings.connection
    if connection.is_file:
        Path(connection.address).parent.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {"uri": connection.address, "timeout": connection.timeout, "dedicated": True}
    arguments["grpc_options"] = {"grpc.max_reconnect_backoff_ms": 1000}  # gRPC's own limit is two minutes
    if not connection.is_file:
        arguments["db_name"] = connection.database
    if connection.auth.enabled:
        arguments["user"] = connection.auth.username
        arguments["password"] = connection.auth.password.get_secret_value()
    if connection.tls.enabled:
        arguments |= {"secure": True, **_certificates(connection.tls)}
    return arguments


def _certificates(tls: MilvusTls) -> dict[str, str]:
    if tls.cert_file:  # the server wants to know the client, too
        return {"ca_pem_path": tls.ca_file, "client_pem_path": tls.cert_file, "client_key_path": tls.key_file}
    return {"server_pem_path": tls.ca_file} if tls.ca_file else {}
