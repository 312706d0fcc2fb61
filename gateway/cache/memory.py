"""The cache in this process: exact by key, by meaning with one matrix product over the entries of a scope."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Literal

import cachetools
import numpy as np

from gateway.cache import Entry, Hit, Selection, Vector

EvictionPolicy = Literal["fifo", "lru", "lfu"]
_POLICIES: dict[EvictionPolicy, type[cachetools.Cache[str, None]]] = {
    "fifo": cachetools.FIFOCache,
    "lru": cachetools.LRUCache,
    "lfu": cachetools.LFUCache,
}
CANDIDATES = 5  # that a search gives at the most


class MemoryCache:
    """At most `max_entries`, evicted by policy; what has expired goes with the next call of any kind.

    Only entries that are served count as used for lru and lfu (`get`, `used`): being compared is not being used.
    """

    def __init__(
        self,
        max_entries: int,
        policy: EvictionPolicy,
        dimension: int,
        *,
        candidates: int = CANDIDATES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises `MemoryError` when this machine could never hold so many."""
        np.empty((max_entries, dimension), dtype=np.float32)
        self._entries: dict[str, Entry] = {}
        self._order = _POLICIES[policy](maxsize=max_entries)  # of their keys: which one goes first
        self._scopes: dict[str, _Scope] = {}
        self._expiries: list[tuple[float, str]] = []  # a heap; also of entries that are no longer there
        self._dimension = dimension
        self._candidates = candidates
        self._clock = clock

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str) -> Entry | None:
        self._sweep()
        self.used(key)
        return self._entries.get(key)

    def used(self, key: str) -> None:
        self._order.get(key)

    async def search(self, scope: str, embedding: Vector, floor: float) -> list[Hit]:
        self._sweep()
        found = self._scopes.get(scope)
        return found.nearest(embedding, floor, self._candidates) if found else []

    def put(self, entry: Entry) -> None:
        self._sweep()
        self._remove(entry.key)
        if len(self._order) == self._order.maxsize:
            self._forget(self._order.popitem()[0])
        self._entries[entry.key] = entry
        self._order[entry.key] = None
        self._scopes.setdefault(entry.scope, _Scope(self._dimension)).add(entry)
        heapq.heappush(self._expiries, (entry.expires_at, entry.key))
        if len(self._expiries) > 64 + 2 * len(self._entries):
            self._expiries = [(entry.expires_at, key) for key, entry in self._entries.items()]
            heapq.heapify(self._expiries)

    async def delete(self, key: str) -> None:
        self._remove(key)

    async def purge(self, which: Selection) -> None:
        for entry in [entry for entry in self._entries.values() if entry in which]:
            self._remove(entry.key)

    async def count(self, which: Selection) -> int:
        self._sweep()
        return sum(entry in which for entry in self._entries.values())

    async def entries(self, prefix: str) -> list[Entry]:
        self._sweep()
        return [entry for key, entry in self._entries.items() if key.startswith(prefix)]

    async def check(self) -> None:
        return None

    async def close(self) -> None:
        return None

    def _sweep(self) -> None:
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, key = heapq.heappop(self._expiries)
            if key in self._entries and self._entries[key].expires_at <= now:
                self._remove(key)

    def _remove(self, key: str) -> None:
        if key in self._entries:
            del self._order[key]
            self._forget(key)

    def _forget(self, key: str) -> None:
        entry = self._entries.pop(key)
        scope = self._scopes[entry.scope]
        scope.remove(key)
        if not scope:
            del self._scopes[entry.scope]


class _Scope:
    """The entries of one scope, their vectors side by side."""

    def __init__(self, dimension: int) -> None:
        self._entries: list[Entry] = []
        self._rows: dict[str, int] = {}  # by key
        self._vectors = np.empty((1, dimension), dtype=np.float32)  # (capacity, dimension)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        row = len(self._entries)
        if row == len(self._vectors):
            self._resize(2 * row)
        self._vectors[row] = entry.embedding
        self._rows[entry.key] = row
        self._entries.append(entry)

    def remove(self, key: str) -> None:
        """The last entry takes the row of the one that goes."""
        row, last = self._rows.pop(key), self._entries.pop()
        if last.key != key:
            self._entries[row], self._vectors[row] = last, self._vectors[len(self._entries)]
            self._rows[last.key] = row
        if 4 * len(self._entries) < len(self._vectors):
            self._resize(max(len(self._vectors) // 2, 1))

    def nearest(self, embedding: Vector, floor: float, most: int) -> list[Hit]:
        similarities = self._vectors[: len(self._entries)] @ embedding  # (entries,)
        near = np.flatnonzero(similarities >= floor)
        if len(near) > most:
            near = near[np.argpartition(-similarities[near], most - 1)[:most]]
        best = near[np.argsort(-similarities[near], kind="stable")]
        return [Hit(self._entries[row], float(similarities[row])) for row in best]

    def _resize(self, capacity: int) -> None:
        kept = self._vectors[: len(self._entries)]
        self._vectors = np.empty((capacity, self._vectors.shape[1]), dtype=np.float32)
        self._vectors[: len(kept)] = kept
