"""The cache in memory: what is found, what is forgotten and when."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from gateway.answer import Answer
from gateway.cache import Cache, Entry, Hit, Origin, Selection, Vector
from gateway.cache.memory import EvictionPolicy, MemoryCache

ORIGIN = Origin(model="small", rule="default", category=None, complexity=None)
POLICIES: tuple[EvictionPolicy, ...] = ("fifo", "lru", "lfu")


@dataclass
class Clock:
    """Turned by hand."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def at(degrees: float) -> Vector:
    """A unit vector in the plane: the cosine of two is that of the angle between them."""
    angle = math.radians(degrees)
    return np.array([math.cos(angle), math.sin(angle)], dtype=np.float32)


def entry(key: str, degrees: float = 0, scope: str = "scope", expires_at: float = 100, tenant: str = "tenant") -> Entry:
    answer = Answer("small", {"role": "assistant", "content": f"about {key}"}, "stop", None)
    return Entry(key, scope, tenant, f"what is {key}?", at(degrees), answer, ORIGIN, 0, expires_at)


def get(cache: Cache, key: str) -> Entry | None:
    return asyncio.run(cache.get(key))


def search(cache: Cache, degrees: float, threshold: float = 0.9, scope: str = "scope") -> Hit | None:
    """The nearest, which is served."""
    hits = asyncio.run(cache.search(scope, at(degrees), threshold))
    if hits:
        cache.used(hits[0].entry.key)
    return hits[0] if hits else None


def found(cache: Cache, degrees: float, threshold: float = 0.9, scope: str = "scope") -> str | None:
    hit = search(cache, degrees, threshold, scope)
    return hit.entry.key if hit else None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> MemoryCache:
    return MemoryCache(max_entries=3, policy="fifo", dimension=2, clock=clock)


def kept(cache: MemoryCache, keys: str) -> str:
    return "".join(key for key in keys if get(cache, key))


def test_nothing_is_in_an_empty_cache(cache: MemoryCache) -> None:
    assert get(cache, "a") is None
    assert search(cache, 0, threshold=-1) is None
    assert len(cache) == 0


def test_an_entry_is_found_by_its_key(cache: MemoryCache) -> None:
    a, b = entry("a"), entry("b", 90)
    cache.put(a)
    cache.put(b)
    assert get(cache, "a") is a
    assert get(cache, "b") is b
    assert get(cache, "c") is None


def test_an_entry_is_found_by_its_meaning(cache: MemoryCache) -> None:
    cache.put(entry("a", 0))
    cache.put(entry("b", 40))
    hit = search(cache, 30)
    assert hit is not None
    assert hit.entry.key == "b"
    assert hit.similarity == pytest.approx(math.cos(math.radians(10)), abs=1e-6)


@pytest.mark.parametrize(("threshold", "expected"), [(0.49, "a"), (0.51, None), (-1, "a"), (1, None)])
def test_only_what_is_similar_enough_is_found(cache: MemoryCache, threshold: float, expected: str | None) -> None:
    cache.put(entry("a", 60))
    assert found(cache, 0, threshold) == expected


def test_what_is_exactly_at_the_threshold_is_found(cache: MemoryCache) -> None:
    cache.put(entry("a", 0))
    assert found(cache, 0, threshold=1) == "a"


def test_scopes_never_mix(cache: MemoryCache) -> None:
    cache.put(entry("a", 0, scope="ada"))
    cache.put(entry("b", 0, scope="bob"))
    assert found(cache, 0, scope="ada") == "a"
    assert found(cache, 0, scope="bob") == "b"
    assert found(cache, 0, threshold=-1, scope="eve") is None


def test_another_scopes_better_match_does_not_hide_ones_own(cache: MemoryCache) -> None:
    cache.put(entry("theirs", 0, scope="bob"))
    cache.put(entry("mine", 10, scope="ada"))
    assert found(cache, 0, scope="ada") == "mine"


def test_an_entry_expires(cache: MemoryCache, clock: Clock) -> None:
    cache.put(entry("a", expires_at=10))
    clock.now = 9.999
    assert (get(cache, "a") is not None, found(cache, 0)) == (True, "a")
    clock.now = 10
    assert found(cache, 0) is None
    assert get(cache, "a") is None
    assert len(cache) == 0


def test_an_expired_entry_is_forgotten_when_it_is_asked_for(cache: MemoryCache, clock: Clock) -> None:
    cache.put(entry("a", expires_at=10))
    clock.now = 10
    assert get(cache, "a") is None
    assert len(cache) == 0


def test_an_expired_entry_does_not_hide_one_that_is_not(cache: MemoryCache, clock: Clock) -> None:
    cache.put(entry("old", 0, expires_at=10))
    cache.put(entry("new", 10, expires_at=20))
    clock.now = 15
    assert found(cache, 0) == "new"


def test_the_room_of_what_has_expired_is_used_again(cache: MemoryCache, clock: Clock) -> None:
    for key, degrees in (("a", 0), ("b", 120), ("c", 240)):
        cache.put(entry(key, degrees, expires_at=10))
    clock.now = 10
    assert found(cache, 0) is None
    for key, degrees in (("d", 60), ("e", 180), ("f", 300)):
        cache.put(entry(key, degrees, expires_at=20))
    assert [found(cache, degrees) for degrees in (0, 60, 120, 180, 240, 300)] == [None, "d", None, "e", None, "f"]


def test_an_entry_is_replaced_by_one_with_its_key(cache: MemoryCache, clock: Clock) -> None:
    cache.put(entry("a", 0, expires_at=10))
    newer = entry("a", 90, expires_at=20)
    cache.put(newer)
    clock.now = 15
    assert get(cache, "a") is newer
    assert (found(cache, 90), found(cache, 0)) == ("a", None)
    assert len(cache) == 1


def test_replacing_evicts_nothing(cache: MemoryCache) -> None:
    for key in "abc":
        cache.put(entry(key))
    cache.put(entry("b"))
    assert kept(cache, "abc") == "abc"


@pytest.mark.parametrize("policy", POLICIES)
def test_there_are_never_too_many(policy: EvictionPolicy) -> None:
    cache = MemoryCache(max_entries=2, policy=policy, dimension=2, clock=Clock())
    for i in range(10):
        cache.put(entry(str(i), 36 * i))
        assert len(cache) == min(i + 1, 2)
        assert found(cache, 36 * i) == str(i)


def test_what_was_evicted_is_not_found_by_meaning(cache: MemoryCache) -> None:
    for key, degrees in (("a", 0), ("b", 90), ("c", 180), ("d", 270)):
        cache.put(entry(key, degrees))
    assert [found(cache, degrees) for degrees in (0, 90, 180, 270)] == [None, "b", "c", "d"]


def test_fifo_evicts_what_came_first(cache: MemoryCache) -> None:
    for key in "abc":
        cache.put(entry(key))
    get(cache, "a")
    cache.put(entry("d"))
    assert kept(cache, "abcd") == "bcd"


def test_fifo_counts_from_when_an_entry_was_last_stored(cache: MemoryCache) -> None:
    for key in "abcad":
        cache.put(entry(key))
    assert kept(cache, "abcd") == "acd"


@pytest.mark.parametrize("by", ["key", "meaning"])
def test_lru_evicts_what_was_not_used_longest(clock: Clock, by: str) -> None:
    cache = MemoryCache(max_entries=3, policy="lru", dimension=2, clock=clock)
    for key, degrees in (("a", 0), ("b", 90), ("c", 180)):
        cache.put(entry(key, degrees))
    assert get(cache, "a") if by == "key" else search(cache, 0)
    cache.put(entry("d", 270))
    assert kept(cache, "abcd") == "acd"


@pytest.mark.parametrize("by", ["key", "meaning"])
def test_lfu_evicts_what_was_used_least(clock: Clock, by: str) -> None:
    cache = MemoryCache(max_entries=3, policy="lfu", dimension=2, clock=clock)
    for key, degrees in (("a", 0), ("b", 90), ("c", 180)):
        cache.put(entry(key, degrees))
    for degrees in (0, 0, 90, 180, 180):
        assert get(cache, "abc"[degrees // 90]) if by == "key" else search(cache, degrees)
    cache.put(entry("d", 270))
    assert kept(cache, "abcd") == "acd"


def test_being_compared_is_not_being_used(clock: Clock) -> None:
    cache = MemoryCache(max_entries=2, policy="lru", dimension=2, clock=clock)
    cache.put(entry("a", 0))
    cache.put(entry("b", 90))
    assert search(cache, 45, threshold=0.9) is None
    assert search(cache, 10) is not None
    cache.put(entry("c", 180))
    assert kept(cache, "abc") == "ac"


def test_the_nearest_few_come_best_first(clock: Clock) -> None:
    cache = MemoryCache(max_entries=100, policy="fifo", dimension=2, candidates=3, clock=clock)
    for degrees in (50, 10, 40, 20, 30, 80):
        cache.put(entry(f"at {degrees}", degrees))
    hits = asyncio.run(cache.search("scope", at(0), 0.7))
    assert [hit.entry.key for hit in hits] == ["at 10", "at 20", "at 30"]
    assert [hit.similarity for hit in hits] == pytest.approx(
        [math.cos(math.radians(d)) for d in (10, 20, 30)], abs=1e-6
    )


def test_what_has_expired_goes_without_being_asked_for(cache: MemoryCache, clock: Clock) -> None:
    cache.put(entry("a", expires_at=10, scope="ada"))
    clock.now = 11
    cache.put(entry("b", scope="bob"))
    assert len(cache) == 1


def test_what_was_written_anew_expires_by_its_new_time(cache: MemoryCache, clock: Clock) -> None:
    for expires_at in range(1, 500):
        cache.put(entry("a", expires_at=expires_at))
    clock.now = 498.5
    assert get(cache, "a")
    clock.now = 499
    assert get(cache, "a") is None


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (Selection(), ""),
        (Selection(tenant="ada"), "cd"),
        (Selection(scope="one"), "bd"),
        (Selection(tenant="ada", scope="one"), "bcd"),
        (Selection(model="small"), ""),
        (Selection(model="large"), "abcd"),
        (Selection(key="b"), "acd"),
    ],
)
def test_a_purge_forgets_what_is_selected_and_nothing_else(clock: Clock, which: Selection, left: str) -> None:
    cache = MemoryCache(max_entries=9, policy="fifo", dimension=2, clock=clock)
    for key, tenant, scope in (("a", "ada", "one"), ("b", "ada", "two"), ("c", "bob", "one"), ("d", "bob", "two")):
        cache.put(entry(key, 10, scope, tenant=tenant))
    assert asyncio.run(cache.count(which)) == 4 - len(left)
    asyncio.run(cache.purge(which))
    assert kept(cache, "abcd") == left
    assert sum(len(asyncio.run(cache.search(scope, at(10), 0.9))) for scope in ("one", "two")) == len(left)


def test_entries_by_the_beginning_of_their_keys(cache: MemoryCache, clock: Clock) -> None:
    for key, expires_at in (("aa", 100), ("ab", 5), ("b", 100)):
        cache.put(entry(key, expires_at=expires_at))
    clock.now = 6
    assert [each.key for each in asyncio.run(cache.entries("a"))] == ["aa"]
    assert [each.key for each in asyncio.run(cache.entries(""))] == ["aa", "b"]


def test_more_than_the_machine_could_hold_is_refused_at_once() -> None:
    with pytest.raises(MemoryError):
        MemoryCache(max_entries=10**12, policy="fifo", dimension=384)


def test_it_is_always_ready(cache: MemoryCache) -> None:
    asyncio.run(cache.check())
    asyncio.run(cache.close())


@dataclass
class Reference:
    """The same cache, written to be obviously right: lists and dictionaries of plain Python."""

    policy: EvictionPolicy
    max_entries: int
    entries: dict[str, Entry] = field(default_factory=dict)  # in the order in which they were stored
    used: dict[str, list[int]] = field(default_factory=dict)  # key -> when it was stored and used
    tick: int = 0

    def get(self, key: str, now: float) -> Entry | None:
        self._sweep(now)
        return self._use(key) if key in self.entries else None

    def search(self, scope: str, vector: Vector, threshold: float, now: float) -> tuple[Entry, float] | None:
        self._sweep(now)
        mine = [each for each in self.entries.values() if each.scope == scope]
        similar = [
            (sum(a * b for a, b in zip(each.embedding.tolist(), vector.tolist(), strict=True)), each.key)
            for each in mine
        ]
        similarity, key = max(similar, default=(-2.0, ""))
        return (self._use(key), similarity) if similarity >= threshold else None

    def put(self, new: Entry, now: float) -> None:
        self._sweep(now)
        self._drop([new.key] if new.key in self.entries else [])
        if len(self.entries) == self.max_entries:
            self._drop([min(self.entries, key=self._worth)])
        self.entries[new.key], self.used[new.key] = new, []
        self._use(new.key)

    def _worth(self, key: str) -> tuple[int, ...]:
        used = self.used[key]
        return {"fifo": (used[0],), "lru": (used[-1],), "lfu": (len(used), used[-1])}[self.policy]

    def _use(self, key: str) -> Entry:
        self.tick += 1
        self.used[key].append(self.tick)
        return self.entries[key]

    def _sweep(self, now: float) -> None:
        self._drop([each.key for each in self.entries.values() if each.expires_at <= now])

    def _drop(self, keys: list[str]) -> None:
        for key in keys:
            del self.entries[key], self.used[key]


@pytest.mark.parametrize("policy", POLICIES)
def test_two_thousand_operations_as_the_reference_does_them(policy: EvictionPolicy) -> None:
    random = np.random.default_rng(7)
    meanings = random.normal(size=(12, 4)).astype(np.float32)
    meanings /= np.linalg.norm(meanings, axis=1, keepdims=True)
    clock, reference = Clock(), Reference(policy, max_entries=8)
    cache = MemoryCache(max_entries=8, policy=policy, dimension=4, clock=clock)
    seen = {"hit by key": 0, "hit by meaning": 0, "miss": 0, "full": 0}

    async def operate() -> None:
        question, scope = int(random.integers(12)), str(random.choice(["ada", "bob"]))
        key, near = f"{scope}-{question}", meanings[question] + 0.15 * random.normal(size=4).astype(np.float32)
        near /= np.linalg.norm(near)
        match random.choice(["get", "search", "put", "wait"], p=[0.3, 0.3, 0.35, 0.05]):
            case "get":
                expected = reference.get(key, clock.now)
                assert await cache.get(key) is expected
                seen["hit by key" if expected else "miss"] += 1
            case "search":
                wanted = reference.search(scope, near, 0.8, clock.now)
                hits = await cache.search(scope, near, 0.8)
                hit = hits[0] if hits else None
                if hit is not None:
                    cache.used(hit.entry.key)
                assert (hit.entry if hit else None) is (wanted[0] if wanted else None)
                assert (hit.similarity if hit else 0) == pytest.approx(wanted[1] if wanted else 0, abs=1e-6)
                seen["hit by meaning" if wanted else "miss"] += 1
            case "put":
                new = replace(
                    entry(key, scope=scope, expires_at=clock.now + float(random.uniform(1, 20))),
                    embedding=meanings[question],
                )
                seen["full"] += len(cache) == 8
                reference.put(new, clock.now)
                cache.put(new)
            case "wait":
                clock.now += float(random.uniform(0, 5))

    for _ in range(2_000):
        asyncio.run(operate())
        assert len(cache) == len(reference.entries) <= 8
    assert min(seen.values()) > 100, seen


def test_what_is_deleted_is_gone(cache: MemoryCache) -> None:
    for key, degrees in (("a", 0), ("b", 5), ("c", 90)):
        cache.put(entry(key, degrees))
    asyncio.run(cache.delete("a"))
    asyncio.run(cache.delete("nobody"))
    assert kept(cache, "abc") == "bc"
    assert found(cache, 0) == "b"
    assert len(cache) == 2
    cache.put(entry("a"))
    cache.put(entry("d", 120))
    assert len(cache) == 3
