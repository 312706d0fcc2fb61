"""One size in the memory backend, in a process of its own: how long each call holds the event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bench.figures import percentile
from bench.scale.entries import DIMENSION, Population, key
from bench.servers import resident_mb
from gateway.cache import Entry, Selection
from gateway.cache.memory import MemoryCache

FLOOR = 0.8
MOST_PUTS = 1_100_000
SLOW_MS = 50.0  # of a search: no larger size is tried then

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Times:
    calls: int
    p50_ms: float
    p99_ms: float
    most_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    entries: int
    scopes: int
    largest_scope: int
    fill_seconds: float
    entry_bytes: float  # resident, for each entry
    resident_mb: float
    get: Times
    searches: dict[str, Times]
    scope_entries: dict[str, float]
    put: Times  # into a full cache: each evicts the oldest
    count_ms: float
    garbage_ms: float  # a full collection


def measured(count: int, scopes: int | None, queries: int) -> Result:
    return asyncio.run(_measured(count, scopes, queries))


async def _measured(count: int, scopes: int | None, queries: int) -> Result:
    population = Population(count, scopes)
    cache = MemoryCache(count, "fifo", DIMENSION)
    gc.collect()
    before = resident_mb(os.getpid())
    fill_seconds, pool = filled(cache, population)
    resident = resident_mb(os.getpid())
    dice = np.random.default_rng(7)
    keys = [key(int(number)) for number in dice.integers(count, size=queries)]
    got = await timed(keys, cache.get)
    tiers = population.tiers()
    searches, sizes = {}, {}
    for tier, members in tiers.items():
        asked = population.vectors(np.array([members[i % len(members)] for i in range(queries)]))
        # The vectors are new ones: how long a search takes does not depend on what it finds.
        questions = [(population.entry(0, v, scope=members[i % len(members)]).scope, v) for i, v in enumerate(asked)]
        searches[tier] = await timed(questions, lambda one: cache.search(*one, FLOOR))
        sizes[tier] = float(np.mean(population.sizes[members]))
    counting = await timed([Selection(model="small")], cache.count)
    began = time.perf_counter()
    gc.collect()
    garbage_ms = 1000 * (time.perf_counter() - began)
    return Result(
        entries=count,
        scopes=len(population.sizes),
        largest_scope=int(population.sizes[0]),
        fill_seconds=fill_seconds,
        entry_bytes=1e6 * (resident - before) / count,
        resident_mb=resident,
        get=got,
        searches=searches,
        scope_entries=sizes,
        put=put_more(cache, pool, count),
        count_ms=counting.most_ms,
        garbage_ms=garbage_ms,
    )


def filled(cache: MemoryCache, population: Population) -> tuple[float, list[Entry]]:
    """Seconds for all puts, and some of the entries."""
    seconds, pool = 0.0, list[Entry]()
    for start, piece in population.pieces(f"memory, {population.count:,}"):
        entries = [population.entry(start + i, vector.copy()) for i, vector in enumerate(piece)]
        began = time.perf_counter()
        for entry in entries:
            cache.put(entry)
        seconds += time.perf_counter() - began
        pool = pool or entries[:1000]
    return seconds, pool


def put_more(cache: MemoryCache, pool: list[Entry], count: int) -> Times:
    """As many as there are and a few, so that what comes once in so many puts is among them."""
    times = []
    for number in range(min(count + 100, MOST_PUTS)):
        entry = replace(pool[number % len(pool)], key=key(count + number))
        began = time.perf_counter()
        cache.put(entry)
        times.append(1000 * (time.perf_counter() - began))
    return summed(times)


async def timed(given: Iterable[T], call: Callable[[T], Awaitable[object]]) -> Times:
    times = []
    for one in given:
        began = time.perf_counter()
        await call(one)
        times.append(1000 * (time.perf_counter() - began))
    return summed(times)


def summed(times: list[float]) -> Times:
    return Times(len(times), percentile(times, 0.5), percentile(times, 0.99), max(times))
