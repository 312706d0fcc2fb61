"""Lookups through `MilvusCache`, timed, in a process of their own: a gateway that stored none of what it asks for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from bench.figures import percentile
from bench.scale.entries import DIMENSION, SEED, TTL_SECONDS
from bench.servers import resident_mb
from gateway.cache import CacheUnavailable, Entry, Vector
from gateway.cache.collection import quoted
from gateway.cache.milvus import MilvusCache
from gateway.config import Milvus
from gateway.metrics import Metrics

NAMESPACE = f"bench{SEED}"
OPEN_SECONDS = 120
SERIES_SECONDS = 10.0  # after which a series begins no further lookup
FLOOR = -1.0  # all that Milvus finds is read
WRITE_SECONDS = 60
STORED = "fingerpost_cache_stores_total"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is looked up. Keys are asked for once each: what a lookup finds is remembered for a few seconds."""

    keys: dict[int, list[str]]  # by how many are in flight
    raw_keys: list[str]  # none: only searches
    searches: dict[str, list[tuple[str, Vector]]]  # by tier: scopes and vectors
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Lookups of one kind, of which so many were always in flight."""

    kind: str
    in_flight: int
    lookups: int
    unanswered: int  # within the gateway's own second
    missing: int  # answered without what is there, by the filter that finds one key
    p50_ms: float
    p99_ms: float
    per_second: float


@dataclass(frozen=True, slots=True)
class Found:
    series: list[Series]
    keys: dict[str, list[list[str] | None]]  # by tier, for each search: what it found, best first; None: unanswered
    client_mb: float  # resident, of the process that asked
    empty_client_mb: float  # before it opened the cache


@dataclass(frozen=True, slots=True)
class Timed:
    series: Series
    results: dict[int, Any]  # by number of what was looked up; of those that were answered


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` gives in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def looked_up(settings: Milvus, asked: Asked) -> Found:
    return asyncio.run(_looked_up(settings, asked))


def created(settings: Milvus) -> str:
    """The name of the collection, created and loaded by the gateway's own code."""
    return asyncio.run(_created(settings))


def written(settings: Milvus, entries: Sequence[Entry]) -> float:
    """Entries a second that go from `put` into Milvus, as the gateway writes them."""
    return asyncio.run(_written(settings, entries))


async def _created(settings: Milvus) -> str:
    async with opened(settings) as (cache, _):
        return cache.collection


async def _written(settings: Milvus, entries: Sequence[Entry]) -> float:
    async with opened(settings) as (cache, metrics):
        began = time.perf_counter()
        for entry in entries:
            cache.put(entry)
        async with asyncio.timeout(WRITE_SECONDS):
            while (metrics.registry.get_sample_value(STORED, {"outcome": "stored"}) or 0) < len(entries):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return len(entries) / (time.perf_counter() - began)


@asynccontextmanager
async def opened(settings: Milvus) -> AsyncIterator[tuple[MilvusCache, Metrics]]:
    metrics = Metrics()
    cache = MilvusCache(
        settings,
        namespace=NAMESPACE,
        dimension=DIMENSION,
        ttl_seconds=TTL_SECONDS,
        eviction_policy="fifo",
        metrics=metrics,
    )
    try:
        await _ready(cache)
        yield cache, metrics
    finally:
        await cache.close()


async def _ready(cache: MilvusCache) -> None:
    """Raises `CacheUnavailable` when it cannot be opened."""
    began = time.monotonic()
    while True:
        try:
            return await cache.check()
        except CacheUnavailable:
            if time.monotonic() - began > OPEN_SECONDS:
                raise
            await asyncio.sleep(0.1)


async def _looked_up(settings: Milvus, asked: Asked) -> Found:
    before = resident_mb(os.getpid())
    async with opened(settings) as (cache, _):
        await _warm(cache, asked)
        series, keys = [], dict[str, list[list[str] | None]]()
        for tier, searches in asked.searches.items():
            for at_once in asked.in_flight:
                timed = await _searched(cache, tier, searches, at_once)
                series.append(timed.series)
                if at_once == 1:
                    keys[tier] = [_keys_of(timed.results.get(number)) for number in range(len(searches))]
        if asked.raw_keys:
            series += [(await _got(cache, asked.keys[at_once], at_once)).series for at_once in asked.in_flight]
            series.append((await _got_raw(cache, asked.raw_keys)).series)
            unfiltered = next(iter(asked.searches.values()))
            series.append((await _searched_raw(cache, unfiltered, settings)).series)
        return Found(series, keys, resident_mb(os.getpid()), before)


def _keys_of(hits: Any) -> list[str] | None:
    return None if hits is None else [hit.entry.key for hit in hits]


async def _warm(cache: MilvusCache, asked: Asked) -> None:
    for searches in asked.searches.values():
        await _timed(cache, "", searches[:20], 4, lambda one: cache.search(one[0], one[1], FLOOR))


async def _searched(cache: MilvusCache, tier: str, searches: list[tuple[str, Vector]], at_once: int) -> Timed:
    return await _timed(
        cache, f"search, {tier} scope", searches, at_once, lambda one: cache.search(one[0], one[1], FLOOR)
    )


async def _got(cache: MilvusCache, keys: list[str], at_once: int) -> Timed:
    timed = await _timed(cache, "get", keys, at_once, cache.get)
    missing = sum(entry is None for entry in timed.results.values())
    return replace(timed, series=replace(timed.series, missing=missing))


async def _got_raw(cache: MilvusCache, keys: list[str]) -> Timed:
    """The same row by the primary key alone, with a filter that Milvus answers from the key's own index."""

    async def get(key: str) -> Any:
        return await cache.client.query(cache.collection, filter=f"key in [{quoted(key)}]", output_fields=["answer"])

    return await _timed(cache, "raw client: query by primary key alone", keys, 1, get)


async def _searched_raw(cache: MilvusCache, searches: list[tuple[str, Vector]], settings: Milvus) -> Timed:
    """Without a filter: what the index alone takes."""
    field, search = settings.collection.vector_field, settings.search
    given: dict[str, Any] = {
        "anns_field": field.name,
        "limit": search.topk,
        "search_params": {"metric_type": field.metric_type, "params": search.params},
        "output_fields": ["answer"],
        "consistency_level": search.consistency_level,
    }

    async def find(one: tuple[str, Vector]) -> Any:
        return await cache.client.search(cache.collection, data=[one[1].tolist()], **given)

    return await _timed(cache, "raw client: search without a filter", searches, 1, find)


async def _timed(
    cache: MilvusCache, kind: str, given: Sequence[Any], at_once: int, look: Callable[[Any], Awaitable[Any]]
) -> Timed:
    """Each of `given` is looked up once, until the time of a series is over."""
    results = dict[int, Any]()
    times: list[float] = []
    unanswered = 0
    began = time.perf_counter()

    async def ask(waiting: Iterable[tuple[int, Any]]) -> None:
        nonlocal unanswered
        for number, one in waiting:
            if (start := time.perf_counter()) - began > SERIES_SECONDS:
                return
            try:
                results[number] = await look(one)
            except CacheUnavailable:
                unanswered += 1
                await _ready(cache)
            else:
                times.append(1000 * (time.perf_counter() - start))

    waiting = enumerate(given)  # shared: each takes the next one
    await asyncio.gather(*(ask(waiting) for _ in range(at_once)))
    seconds = time.perf_counter() - began
    figures = percentile(times, 0.5), percentile(times, 0.99), len(times) / seconds
    return Timed(Series(kind, at_once, len(times), unanswered, 0, *figures), results)
