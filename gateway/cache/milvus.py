"""The cache in Milvus, shared by all gateways, with what this one stored last also kept in its own memory.

A background task opens the collection, and opens it again after any failure; until it is open every lookup is
`CacheUnavailable` at once, so that no request waits for a Milvus that is down. Writes go through a bounded queue, in
batches, off the request path, and are never flushed: Milvus seals segments by itself. A search with bounded consistency
may miss what was just stored, which `_recent` has, or find what was just deleted, which `_purges` knows. A purge leaves
a mark in the collection, for which every gateway, and every worker of one, looks all the time; one that could not look
for EVERYWHERE_SECONDS, after which the purge counts as done, finds nothing until it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import cachetools
import grpc
from pymilvus import AsyncMilvusClient
from pymilvus.exceptions import MilvusException

from gateway.cache import CacheUnavailable, Entry, Hit, Selection, Vector
from gateway.cache.collection import (
    FORM,
    TTL_PROPERTY,
    Purge,
    Row,
    Rows,
    SchemaMismatch,
    Unreadable,
    check_schema,
    connection_arguments,
    live,
    milliseconds,
    parts_of,
    purge_of,
    quoted,
    schema,
)
from gateway.cache.memory import EvictionPolicy, MemoryCache
from gateway.config import Milvus
from gateway.metrics import Metrics
from gateway.tasks import end

log = logging.getLogger("fingerpost")

RECENT_ENTRIES = 512
RECENT_SECONDS = 5.0  # by which bounded consistency may be late
QUEUED_ENTRIES = 1024
BATCH_ENTRIES = 64
LOOKUP_SECONDS = 1.0  # a request does not wait longer, whatever connection.timeout allows for the rest
REOPEN_SECONDS = 1.0
DRAIN_SECONDS = 3.0
PURGE_SECONDS = 5.0  # that the caller of a purge waits for it
FOLLOW_SECONDS = 0.5  # between two looks at what others have purged
EVERYWHERE_SECONDS = 2.0  # after which they have seen it, or find nothing
STALE_SECONDS = 60.0  # for which a search may, at the worst, find what was deleted
SWEEP_SECONDS = 60.0  # between two times that what has expired is deleted
MARK_SECONDS = 3600.0  # that a purge can be seen by those who were cut off
PAGE_ROWS = 16_384  # Milvus' limit
READ_ROWS = 256  # at once, since each may hold an answer of VARCHAR_BYTES

_FAILURES = (MilvusException, grpc.RpcError, TimeoutError, OSError)


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """A purge that somebody waits for."""

    purge: Purge
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
        """`ttl_seconds`: the longest that any entry is kept."""
        self._settings = settings
        self.collection = f"{settings.collection.name}_{namespace}_v{FORM}"
        self._rows = Rows(settings.collection.vector_field.name, dimension)
        self._dimension = dimension
        self._ttl_seconds = ttl_seconds
        self._metrics = metrics
        self._recent = MemoryCache(RECENT_ENTRIES, eviction_policy, dimension, candidates=settings.search.topk)
        self._purges: cachetools.TTLCache[Purge, None] = cachetools.TTLCache(PAGE_ROWS, MARK_SECONDS)
        self._wide: cachetools.TTLCache[Purge, None] = cachetools.TTLCache(QUEUED_ENTRIES, MARK_SECONDS)  # of many keys
        self._purged: cachetools.TTLCache[str, int] = cachetools.TTLCache(PAGE_ROWS, MARK_SECONDS)  # key -> until when
        self._queue: asyncio.Queue[Entry | _Order] = asyncio.Queue(QUEUED_ENTRIES)
        self._again: asyncio.Queue[str] = asyncio.Queue()  # filters of what may have been written after its purge
        self.client = AsyncMilvusClient(**connection_arguments(settings))
        self._open = asyncio.Event()
        self._broken = asyncio.Event()
        self._broken.set()
        self._why = "is being opened"
        self._looked_at = -math.inf  # time.monotonic() when it began to see all that others had purged until then
        background = (self._keep_open(), self._write(), self._follow(), self._delete_again(), self._sweep())
        self._tasks = tuple(map(asyncio.create_task, background))
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def get(self, key: str) -> Entry | None:
        self._must_be_current()
        if recent := await self._recent.get(key):
            return recent
        wanted = f"key == {quoted(key)} and {live(time.time())}"
        rows = await self._ask(self.client.query, filter=wanted, output_fields=self._rows.fields)
        entry = await self._newest(rows[0]) if rows else None
        if entry is not None:
            self._keep(entry)
        return entry

    def used(self, key: str) -> None:
        self._recent.used(key)

    async def search(self, scope: str, embedding: Vector, floor: float) -> list[Hit]:
        self._must_be_current()
        recent = await self._recent.search(scope, embedding, floor)
        try:
            found = await self._nearest(embedding, f"scope == {quoted(scope)} and expires_at > {int(time.time())}")
        except CacheUnavailable:
            if recent:
                return recent
            raise
        hits = {hit.entry.key: hit for hit in recent}
        for candidate in found:
            row, similarity = candidate["entity"], float(candidate["distance"])
            if similarity >= floor and row["key"] not in hits and (entry := await self._newest(row)):
                hits[entry.key] = Hit(entry, similarity)
        best = sorted(hits.values(), key=lambda hit: -hit.similarity)
        return best[: self._settings.search.topk]

    def _must_be_current(self) -> None:
        if time.monotonic() - self._looked_at > EVERYWHERE_SECONDS:
            raise CacheUnavailable("has not told in time what others have purged" if self._open.is_set() else self._why)

    def _keep(self, entry: Entry) -> None:
        self._recent.put(replace(entry, expires_at=min(entry.expires_at, time.time() + RECENT_SECONDS)))

    async def _newest(self, row: Row) -> Entry | None:
        """The entry in a row, or the process's own version of it, which is the newer one; None when it is deleted."""
        if recent := await self._recent.get(row["key"]):
            return replace(recent, expires_at=row["expires_at"])  # which was cut to RECENT_SECONDS
        try:
            keys = parts_of(row)
            entry = self._rows.entry(row, await self._ask_keys(keys) if keys else ())
        except Unreadable:
            self._count("unreadable", 1)
            return None
        return None if self._is_purged(entry) else entry

    async def _ask_keys(self, keys: list[str]) -> list[Row]:
        wanted = f"key in [{', '.join(map(quoted, keys))}]"
        return list(await self._ask(self.client.query, filter=wanted, output_fields=["key", "answer"]))

    def _is_purged(self, entry: Entry) -> bool:
        latest = self._purged.get(entry.key, -1)
        return milliseconds(entry.created_at) <= latest or any(entry in purge for purge in self._wide)

    def put(self, entry: Entry) -> None:
        self._keep(entry)
        try:
            self._queue.put_nowait(entry)
        except asyncio.QueueFull:
            self._count("dropped", 1)

    async def delete(self, key: str) -> None:
        await self.purge(Selection(key=key))

    async def purge(self, which: Selection) -> None:
        order = _Order(Purge(which, milliseconds(time.time())))
        await self._forget(order.purge)
        try:
            self._queue.put_nowait(order)  # after what is still being written
            async with asyncio.timeout(PURGE_SECONDS if self._open.is_set() else 0):
                is_done = await order.done
        except (asyncio.QueueFull, TimeoutError) as error:
            raise CacheUnavailable(self._why) from error
        if not is_done:
            raise CacheUnavailable(self._why)
        await asyncio.sleep(EVERYWHERE_SECONDS)

    async def _forget(self, purge: Purge) -> None:
        self._purges[purge] = None
        if purge.which.key is None:
            self._wide[purge] = None
        else:
            self._purged[purge.which.key] = max(purge.at, self._purged.get(purge.which.key, -1))
        await self._recent.purge(purge.which)

    async def count(self, which: Selection) -> int:
        wanted = f"{Purge(which, milliseconds(time.time()) + 1).filter} and {live(time.time())}"
        return await self._counted(wanted)

    async def entries(self, prefix: str) -> list[Entry]:
        begins = f"key like {quoted(prefix + '%')} and " if prefix else ""
        wanted = begins + live(time.time())
        rows = await self._ask_patiently(self.client.query, filter=wanted, output_fields=["key"], limit=PAGE_ROWS)
        keys = [quoted(row["key"]) for row in rows]
        found: list[Entry] = []
        for i in range(0, len(keys), READ_ROWS):
            these = f"key in [{', '.join(keys[i : i + READ_ROWS])}]"
            rows = await self._ask_patiently(self.client.query, filter=these, output_fields=self._rows.fields)
            found += [entry for row in rows if (entry := await self._newest(row))]
        return found

    async def check(self) -> None:
        try:
            await self._nearest(self._rows.nowhere, 'scope == "-"')
        except CacheUnavailable:
            raise CacheUnavailable(f"{self._settings.connection.address}: {self._why}") from None

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS if self._open.is_set() else 0):
                await self._queue.join()
        if left := self._queue.qsize():
            log.warning("milvus: %d answers were not written or deleted", left)
        await end(self._tasks)
        await self.client.close()

    async def _nearest(self, embedding: Vector, wanted: str) -> list[dict[str, Any]]:
        """The `search.topk` nearest rows that the filter `wanted` leaves, best first."""
        return list((await self._ask(self.client.search, filter=wanted, **self._search_for(embedding)))[0])

    def _search_for(self, embedding: Vector) -> dict[str, Any]:
        """A search as configured."""
        field, search = self._settings.collection.vector_field, self._settings.search
        return {
            "data": [embedding.tolist()],
            "anns_field": field.name,
            "limit": search.topk,
            "search_params": {"metric_type": field.metric_type, "params": search.params},
            "output_fields": self._rows.fields,
        }

    async def _ask(self, call: Callable[..., Awaitable[Any]], **given: Any) -> Any:
        """One lookup, bounded in time; any failure closes the cache until `_keep_open` has opened it again."""
        try:
            return await self._asked(call, LOOKUP_SECONDS, given)
        except _FAILURES as error:
            self._fail(error)
            raise CacheUnavailable(self._why) from error

    async def _ask_patiently(self, call: Callable[..., Awaitable[Any]], **given: Any) -> Any:
        """What may take long, since it is about many entries; its failure tells nothing of lookups."""
        try:
            return await self._asked(call, self._settings.connection.timeout, given)
        except _FAILURES as error:
            raise CacheUnavailable(f"does not answer: {_words(error)}") from error

    async def _asked(self, call: Callable[..., Awaitable[Any]], seconds: float, given: dict[str, Any]) -> Any:
        if not self._open.is_set():
            raise CacheUnavailable(self._why)
        self._must_be_current()
        given = {"consistency_level": self._settings.search.consistency_level, **given}
        async with asyncio.timeout(seconds):
            return await call(self.collection, timeout=seconds, **given)

    async def _counted(self, wanted: str) -> int:
        rows = await self._ask_patiently(self.client.query, filter=wanted, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def _fail(self, error: BaseException) -> None:
        self._why = f"does not answer: {_words(error)}"
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
                await self._catch_up(MARK_SECONDS)
            except (*_FAILURES, SchemaMismatch) as error:
                if self._why != (why := _words(error)):
                    log.warning("milvus: cannot be opened, going on without it: %s", why)
                self._why = why
                await asyncio.sleep(REOPEN_SECONDS)
            else:
                self._broken.clear()
                self._open.set()
                log.info("milvus: collection %s is open", self.collection)

    async def _open_collection(self) -> None:
        """Create what is not there, load it, and see that it can be searched as configured."""
        seconds = self._settings.connection.timeout
        async with asyncio.timeout(seconds):
            if not await self.client.has_collection(self.collection, timeout=seconds):
                await self._create_collection()
            description = await self.client.describe_collection(self.collection, timeout=seconds)
            check_schema(description, self._settings.collection.vector_field.name, self._dimension)
            await self._keep_ttl(description)
            await self.client.load_collection(self.collection, timeout=seconds)
            await self.client.search(self.collection, timeout=seconds, **self._search_for(self._rows.nowhere))

    async def _keep_ttl(self, description: dict[str, Any]) -> None:
        """Milvus drops rows by the collection's own time to live, which may be that of an earlier configuration."""
        found, wanted = description.get("properties", {}).get(TTL_PROPERTY), str(self._ttl_seconds)
        if found not in (wanted, None):  # Milvus Lite has none: there, rows only stop being found
            await self.client.alter_collection_properties(self.collection, {TTL_PROPERTY: wanted})

    async def _create_collection(self) -> None:
        wanted = self._settings.collection
        fields, index = schema(wanted, self._dimension)
        partitions = {"num_partitions": wanted.partitions} if wanted.partitions else {}
        await self.client.create_collection(
            self.collection,
            schema=fields,
            index_params=index,
            properties={TTL_PROPERTY: str(self._ttl_seconds)},  # Milvus drops what has expired when it compacts
            consistency_level=self._settings.search.consistency_level,
            timeout=self._settings.connection.timeout,
            **partitions,
        )

    async def _write(self) -> None:
        while True:
            batch: list[Entry | _Order] = [await self._queue.get()]
            while len(batch) < BATCH_ENTRIES and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._open.wait()
            await self._write_batch(batch)
            for _ in batch:
                self._queue.task_done()

    async def _write_batch(self, batch: Iterable[Entry | _Order]) -> None:
        """In order, the entries between two purges at once."""
        waiting: dict[str, Entry] = {}
        for item in batch:
            if isinstance(item, Entry):
                waiting[item.key] = item
                continue
            await self._upsert(waiting.values())
            waiting.clear()
            is_done = await self._delete(item.purge.filter) and await self._send([self._rows.of_purge(item.purge)])
            if not item.done.done():
                item.done.set_result(is_done)
        await self._upsert(waiting.values())

    async def _upsert(self, entries: Iterable[Entry]) -> None:
        kept = [entry for entry in entries if not self._is_purged(entry)]
        found = [self._rows.of_entry(entry) for entry in kept]
        fitting = [rows for rows in found if rows is not None]
        self._count("too_large", len(found) - len(fitting))
        for rows in fitting:
            if len(rows) > 1:  # a megabyte, perhaps, and whole before its entry can be found
                await self._send(rows[1:])
        is_sent = await self._send([rows[0] for rows in fitting])
        self._count("stored" if is_sent else "failed", len(fitting))
        for entry in filter(self._is_purged, kept):  # in the meantime, and perhaps before the row was there
            self._again.put_nowait(Purge(Selection(key=entry.key), milliseconds(entry.created_at)).filter)

    async def _send(self, rows: list[Row]) -> bool:
        """Whether Milvus has taken the rows, in the place of those with their keys."""
        return not rows or await self._change(self.client.upsert, data=rows)

    async def _delete(self, wanted: str) -> bool:
        """Whether Milvus has deleted what the filter leaves."""
        return await self._change(self.client.delete, filter=wanted)

    async def _change(self, call: Callable[..., Awaitable[Any]], **given: Any) -> bool:
        try:
            seconds = self._settings.connection.timeout
            async with asyncio.timeout(seconds):
                await call(self.collection, timeout=seconds, **given)
        except _FAILURES as error:
            self._fail(error)
            return False
        return True

    async def _follow(self) -> None:
        """Forget what others purge."""
        while True:
            await self._open.wait()
            try:
                await self._catch_up(STALE_SECONDS)
            except _FAILURES as error:
                self._fail(error)
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _catch_up(self, seconds: float) -> None:
        """See what was purged in so many seconds."""
        looked_at = time.monotonic()
        for mark in await self._marks(seconds):
            try:
                purge = purge_of(mark)
            except Unreadable:
                continue
            if purge not in self._purges:
                await self._forget(purge)
                self._again.put_nowait(purge.filter)
        self._looked_at = looked_at

    async def _delete_again(self) -> None:
        """What was purged, whoever wrote it since; what fails is done again."""
        while True:
            wanted = await self._again.get()
            await self._open.wait()
            if not await self._delete(wanted):
                self._again.put_nowait(wanted)

    async def _marks(self, seconds: float) -> list[Row]:
        """Those that were made in so many seconds."""
        wanted = f'scope == "" and expires_at < -{int(time.time() - seconds)}'
        limit = self._settings.connection.timeout
        async with asyncio.timeout(limit):
            rows = await self.client.query(
                self.collection,
                filter=wanted,
                output_fields=["answer", "created_at"],
                limit=PAGE_ROWS,
                consistency_level="Strong",
                timeout=limit,
            )
        return list(rows)

    async def _sweep(self) -> None:
        """Delete what has expired, marks that all have seen, and the oldest of too many entries."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self._open.wait()
            now = int(time.time())
            await self._delete(f"expires_at > 0 and expires_at <= {now}")
            await self._delete(f"expires_at < 0 and expires_at > -{int(now - MARK_SECONDS)}")
            with contextlib.suppress(CacheUnavailable):
                await self.shrink()

    async def shrink(self) -> None:
        """Delete the oldest of more than `collection.max_entries`. Raises `CacheUnavailable`."""
        most = self._settings.collection.max_entries
        if most is None or (count := await self._counted(live(time.time()))) <= most:
            return
        low, high = 0, milliseconds(time.time()) + 1  # more than `most` are newer than low, as many or fewer than high
        while high - low > 1:
            middle = (low + high) // 2
            newer = await self._counted(f"{live(time.time())} and created_at > {middle}")
            low, high = (middle, high) if newer > most else (low, middle)
        await self._delete(f"expires_at > 0 and created_at <= {high}")
        self._count("evicted", count - most)

    def _count(self, outcome: str, entries: int) -> None:
        if entries:
            self._metrics.stores.labels(outcome).inc(entries)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
