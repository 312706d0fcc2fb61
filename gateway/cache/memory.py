"""The cache in this process: exact by key, by meaning with one matrix product over the entries of a scope."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

import cachetools
import numpy as np

from gateway.cache import Entry, Hit, Vector

EvictionPolicy = Literal["fifo", "lru", "lfu"]
_POLICIES: dict[EvictionPolicy, type[cachetools.Cache[str, Entry]]] = {
    "fifo": cachetools.FIFOCache,
    "lru": cachetools.LRUCache,
    "lfu": cachetools.LFUCache,
}


class MemoryCache:
    """At most `max_entries`, evicted by policy; expired entries are dropped when met.

    Only entries that are served count as used for lru and lfu: being compared is not being used.
    """

    def __init__(
        self, max_entries: int, policy: EvictionPolicy, dimension: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._entries = _POLICIES[policy](maxsize=max_entries)
        self._vectors = np.zeros((max_entries, dimension), dtype=np.float32)  # (max_entries, dimension)
        self._free = list(range(max_entries - 1, -1, -1))
        self._row: dict[str, int] = {}
        self._scopes: dict[str, dict[int, Entry]] = {}  # scope -> row -> entry
        self._soonest: dict[str, float] = {}  # scope -> when the first of its entries expires, or before
        self._clock = clock

    def __len__(self) -> int:
        return len(self._row)

    async def get(self, key: str) -> Entry | None:
        if key not in self._row:
            return None
        entry = self._entries[key]
        if entry.expires_at > self._clock():
            return entry
        self._remove(entry)
        return None

    async def search(self, scope: str, embedding: Vector, threshold: float) -> Hit | None:
        self._drop_expired(scope)
        entries = self._scopes.get(scope)
        if not entries:
            return None
        rows = np.fromiter(entries, np.intp, len(entries))
        similarities = self._vectors.take(rows, axis=0) @ embedding  # (len(rows),)
        best = int(np.argmax(similarities))
        if similarities[best] < threshold:
            return None
        entry = self._entries[entries[int(rows[best])].key]  # through the cache, so that it counts as used
        return Hit(entry, float(similarities[best]))

    def put(self, entry: Entry) -> None:
        if (old := self._row.get(entry.key)) is not None:
            self._remove(self._scopes[entry.scope][old])
        elif not self._free:
            self._forget(self._entries.popitem()[1])
        row = self._free.pop()
        self._entries[entry.key] = entry
        self._vectors[row] = entry.embedding
        self._row[entry.key] = row
        self._scopes.setdefault(entry.scope, {})[row] = entry
        self._soonest[entry.scope] = min(entry.expires_at, self._soonest.get(entry.scope, math.inf))

    async def delete(self, key: str) -> None:
        if key in self._row:
            self._remove(self._entries[key])

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def _drop_expired(self, scope: str) -> None:
        now = self._clock()
        if now < self._soonest.get(scope, math.inf):
            return
        for entry in [entry for entry in self._scopes[scope].values() if entry.expires_at <= now]:
            self._remove(entry)
        if left := self._scopes.get(scope):
            self._soonest[scope] = min(entry.expires_at for entry in left.values())

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        row = self._row.pop(entry.key)
        self._free.append(row)
        rows = self._scopes[entry.scope]
        del rows[row]
        if not rows:
            del self._scopes[entry.scope], self._soonest[entry.scope]
