"""The cache in Milvus: rows, long answers, purges, size bounds and what another embedder's collection means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gateway.answer import Answer
from gateway.cache import CacheUnavailable, Entry, Origin, Selection, Vector
from gateway.cache import milvus as backend
from gateway.cache.collection import VARCHAR_BYTES, Purge, Rows, Unreadable, milliseconds, parts_of
from gateway.cache.milvus import MilvusCache
from gateway.config import Milvus
from gateway.metrics import Metrics
from tests.conftest import Part, Tree, merged

DIMENSION = 8
FLAT = {"type": "FLAT", "params": {}}


def vector(seed: int) -> Vector:
    made = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made), dtype=np.float32)


def entry(key: str, seed: int = 1, *, content: str = "An answer.", **fields: Any) -> Entry:
    now = time.time()
    answer = Answer("small", {"role": "assistant", "content": content}, "stop", {"total_tokens": 3})
    made = Entry(
        key=key,
        scope="scope",
        tenant="ada",
        question=f"what is {key}?",
        embedding=vector(seed),
        answer=answer,
        origin=Origin("small", "default", "math", 0.25),
        created_at=now,
        expires_at=now + 600,
    )
    return replace(made, **fields)


@pytest.fixture(scope="module", params=["lite", "server"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Milvus]:
    """Of a real Milvus, each time with a collection of its own, as a file or as a server."""
    count = 0
    folder = tmp_path_factory.mktemp("milvus")
    place: Tree
    if request.param == "lite":
        place = {"uri": str(folder / "cache.db")}
    else:
        _, port = request.getfixturevalue("killable_milvus")
        place = {"port": port}

    def of(**changes: Any) -> Milvus:
        nonlocal count
        count += 1
        tree = {"connection": place, "collection": {"name": f"test_{count}", "index": FLAT}, "search": {"topk": 3}}
        return Milvus.model_validate(merged(tree, changes))

    return of


def scenario(settings: Milvus, *steps: Callable[..., Awaitable[None]], caches: int = 1, metrics: Any = None) -> None:
    """Run the steps with so many caches before the same collection."""

    async def run() -> None:
        opened = [await opened_cache(settings, metrics or Metrics()) for _ in range(caches)]
        try:
            for step in steps:
                await step(*opened)
        finally:
            for cache in opened:
                await cache.close()

    asyncio.run(run())


async def opened_cache(settings: Milvus, metrics: Metrics, namespace: str = "test") -> MilvusCache:
    cache = MilvusCache(
        settings,
        namespace=namespace,
        dimension=DIMENSION,
        ttl_seconds=600,
        eviction_policy="fifo",
        metrics=metrics,
    )
    async with asyncio.timeout(60):
        while True:
            try:
                await cache.check()
            except CacheUnavailable:
                await asyncio.sleep(0.1)
            else:
                return cache


async def until(what: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(30):
        while not await what():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def test_what_is_stored_is_found_at_once_and_by_others_soon(settings: Callable[..., Milvus]) -> None:
    stored = entry("a" * 64)

    async def step(one: MilvusCache, other: MilvusCache) -> None:
        one.put(stored)
        found = await one.get(stored.key)
        assert found is not None
        assert (found.answer, found.tenant, found.origin) == (stored.answer, "ada", stored.origin)
        (hit,) = await one.search("scope", vector(1), 0.9)
        assert hit.entry.key == stored.key
        assert await one.search("another scope", vector(1), 0.9) == []
        await until(lambda: other.get(stored.key))
        (hit,) = await other.search("scope", vector(1), 0.9)
        assert hit.entry.question == stored.question
        assert hit.entry.created_at == pytest.approx(stored.created_at, abs=0.01)
        assert hit.similarity == pytest.approx(1, abs=1e-5)

    scenario(settings(), step, caches=2)


def test_the_nearest_few_come_best_first_from_memory_and_milvus_together(settings: Callable[..., Milvus]) -> None:
    near = [vector(0)]
    for i in range(1, 5):
        mixed = near[0] + 0.1 * i * vector(i)
        near.append(np.asarray(mixed / np.linalg.norm(mixed), dtype=np.float32))

    async def step(cache: MilvusCache) -> None:
        for i in (3, 1, 4):
            cache.put(entry(str(i), embedding=near[i]))
        await until(lambda: cache.count(Selection()))
        await asyncio.sleep(backend.RECENT_SECONDS + 0.5)
        cache.put(entry("2", embedding=near[2]))
        hits = await cache.search("scope", near[0], 0.5)
        assert [hit.entry.key for hit in hits] == ["1", "2", "3"]

    scenario(settings(), step)


@pytest.mark.parametrize("size", [VARCHAR_BYTES - 400, VARCHAR_BYTES, 3 * VARCHAR_BYTES])
def test_an_answer_longer_than_a_field_is_whole_when_it_comes_back(settings: Callable[..., Milvus], size: int) -> None:
    content = np.random.default_rng(size).bytes(size // 2).hex()  # compresses by half

    async def step(one: MilvusCache, other: MilvusCache) -> None:
        one.put(entry("long", content=content))
        await until(lambda: other.get("long"))
        found = await other.get("long")
        assert found is not None
        assert found.answer.message["content"] == content
        (hit,) = await other.search("scope", vector(1), 0.9)
        assert hit.entry.answer.message["content"] == content
        assert await other.count(Selection()) == 1
        assert [each.key for each in await other.entries("lo")] == ["long"]

    scenario(settings(), step, caches=2)


@pytest.mark.parametrize(
    ("which", "left"),
    [
        (Selection(), ""),
        (Selection(tenant="ada"), "cd"),
        (Selection(scope="one"), "bd"),
        (Selection(model="small"), ""),
        (Selection(model="large"), "abcd"),
        (Selection(key="b"), "acd"),
    ],
)
def test_a_purge_is_everybody_s_at_once(settings: Callable[..., Milvus], which: Selection, left: str) -> None:
    made = {
        key: entry(key, tenant=tenant, scope=scope)
        for key, tenant, scope in (("a", "ada", "one"), ("b", "ada", "two"), ("c", "bob", "one"), ("d", "bob", "two"))
    }

    async def step(one: MilvusCache, other: MilvusCache) -> None:
        for each in made.values():
            one.put(each)
        for key in made:
            await until(lambda key=key: other.get(key))  # type: ignore[misc]
        await one.purge(which)
        for cache in (one, other):
            assert "".join([key for key in made if await cache.get(key)]) == left
            found = [hit.entry.key for scope in ("one", "two") for hit in await cache.search(scope, vector(1), 0.5)]
            assert sorted(found) == list(left)
        await until(lambda: counted(other, len(left)))
        one.put(replace(made["a"], created_at=time.time()))  # asked again
        assert await one.get("a") is not None
        await until(lambda: other.get("a"))

    scenario(settings(), step, caches=2)


def test_what_a_slow_writer_writes_after_its_purge_is_deleted_again(
    settings: Callable[..., Milvus], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def step(one: MilvusCache, other: MilvusCache) -> None:
        upsert, writes, purged = one.client.upsert, asyncio.Event(), asyncio.Event()

        async def slow(*given: Any, **named: Any) -> Any:
            writes.set()
            await purged.wait()
            return await upsert(*given, **named)

        monkeypatch.setattr(one.client, "upsert", slow)
        one.put(entry("a"))
        await writes.wait()
        await other.purge(Selection(tenant="ada"))
        assert await one.get("a") is None
        purged.set()
        await until(lambda: has_rows(one, "expires_at > 0", 0))
        await asyncio.sleep(1)
        assert await has_rows(one, "expires_at > 0", 0)

    scenario(settings(), step, caches=2)


def test_what_could_not_be_deleted_is_deleted_later(
    settings: Callable[..., Milvus], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    async def step(cache: MilvusCache) -> None:
        delete = cache.client.delete

        async def failing(*given: Any, **named: Any) -> Any:
            nonlocal failures
            failures += 1
            if failures <= 2:
                raise TimeoutError
            return await delete(*given, **named)

        cache.put(entry("a"))
        await until(lambda: has_rows(cache, "expires_at > 0", 1))
        monkeypatch.setattr(cache.client, "delete", failing)
        mark = Rows("embedding", DIMENSION).of_purge(Purge(Selection(key="a"), milliseconds(time.time())))
        await cache.client.upsert(cache.collection, data=[mark])  # as if another gateway had purged
        await until(lambda: has_rows(cache, "expires_at > 0", 0))
        assert failures == 3

    scenario(settings(), step)


def test_an_export_that_fails_closes_the_cache_to_nobody(
    settings: Callable[..., Milvus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "READ_ROWS", 3)

    async def step(cache: MilvusCache) -> None:
        for i in range(8):
            cache.put(entry(str(i), seed=i))
        await until(lambda: counted(cache, 8))
        assert sorted(each.key for each in await cache.entries("")) == list("01234567")
        query = cache.client.query

        async def failing(*given: Any, **named: Any) -> Any:
            if named["filter"].startswith("key in"):
                raise TimeoutError
            return await query(*given, **named)

        monkeypatch.setattr(cache.client, "query", failing)
        with pytest.raises(CacheUnavailable):
            await cache.entries("")
        assert await cache.get("1") is not None
        await cache.check()

    scenario(settings(), step)


async def counted(cache: MilvusCache, entries: int) -> bool:
    return await cache.count(Selection()) == entries


def test_a_name_that_could_break_a_filter_breaks_none(settings: Callable[..., Milvus]) -> None:
    name = 'a" or scope != "'

    async def step(cache: MilvusCache) -> None:
        cache.put(entry("one"))
        await until(lambda: cache.count(Selection()))
        await cache.purge(Selection(tenant=name))
        assert await cache.get("one") is not None
        assert await cache.count(Selection(tenant=name)) == 0

    scenario(settings(), step)


def test_what_has_expired_is_not_found_and_then_swept(
    settings: Callable[..., Milvus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "SWEEP_SECONDS", 0.5)

    async def step(cache: MilvusCache) -> None:
        cache.put(entry("short", expires_at=time.time() + 3))
        cache.put(entry("long", seed=2))
        await until(lambda: counted(cache, 2))
        await asyncio.sleep(3)
        assert await cache.get("short") is None
        assert await cache.search("scope", vector(1), 0.99) == []
        rows = "expires_at > 0"
        await until(lambda: has_rows(cache, rows, 1))

    scenario(settings(), step)


async def has_rows(cache: MilvusCache, wanted: str, number: int) -> bool:
    found = await cache.client.query(cache.collection, filter=wanted, output_fields=["key"], consistency_level="Strong")
    return len(found) == number


def test_the_oldest_of_too_many_go(settings: Callable[..., Milvus]) -> None:
    metrics = Metrics()

    async def step(cache: MilvusCache) -> None:
        began = time.time() - 100
        for i in range(20):
            cache.put(entry(f"{i:02}", seed=i, created_at=began + i))
        await until(lambda: counted(cache, 20))
        await cache.shrink()
        await until(lambda: counted(cache, 5))
        assert sorted(each.key for each in await cache.entries("")) == ["15", "16", "17", "18", "19"]

    scenario(settings(collection={"max_entries": 5}), step, metrics=metrics)
    assert 'fingerpost_cache_stores_total{outcome="evicted"} 15.0' in metrics.exposition().decode()


def test_partitions_change_nothing_that_is_found(
    killable_milvus: tuple[Part, int], settings: Callable[..., Milvus]
) -> None:
    tree = {
        "connection": {"port": killable_milvus[1]},
        "collection": {"name": "parted", "partitions": 4, "index": FLAT},
    }

    async def step(one: MilvusCache, other: MilvusCache) -> None:
        for i in range(12):
            one.put(entry(str(i), seed=i, scope=f"scope {i}", content="x" * (200_000 if i == 3 else 9)))
        await until(lambda: counted(other, 12))
        for i in range(12):
            (hit,) = await other.search(f"scope {i}", vector(i), 0.9)
            assert hit.entry.key == str(i)
            assert await other.search(f"scope {i}", vector(i + 1), 0.99) == []
        await one.delete("3")
        assert await other.get("3") is None
        assert await other.search("scope 3", vector(3), 0.9) == []

    scenario(Milvus.model_validate(tree), step, caches=2)


def test_two_embedders_never_share_a_collection(settings: Callable[..., Milvus]) -> None:
    async def run() -> None:
        same = settings()
        one, other = [await opened_cache(same, Metrics(), name) for name in ("one", "other")]
        one.put(entry("a"))
        await until(lambda: counted(one, 1))
        assert await other.get("a") is None
        assert await other.search("scope", vector(1), 0.5) == []
        await one.close()
        await other.close()

    asyncio.run(run())


def test_a_second_start_drops_nothing(settings: Callable[..., Milvus]) -> None:
    same = settings()

    async def store(cache: MilvusCache) -> None:
        cache.put(entry("kept"))

    async def find(cache: MilvusCache) -> None:
        await until(lambda: cache.get("kept"))

    scenario(same, store)  # what is still queued is written when it is closed
    scenario(same, find)


# Rows


def test_rows_of_a_long_answer_of_another_writing_are_not_put_together() -> None:
    rows, long = Rows("embedding", DIMENSION), np.random.default_rng(1).bytes(VARCHAR_BYTES).hex()
    one, other = (rows.of_entry(entry("a", content=long)) for _ in range(2))
    assert one is not None
    assert other is not None
    assert [row["key"] for row in one[1:]] == parts_of(one[0])
    assert rows.entry(one[0], one[1:]).answer.message["content"] == long
    for parts in (other[1:], one[1:-1], []):
        with pytest.raises(Unreadable):
            rows.entry(one[0], parts)


@pytest.mark.parametrize("answer", ["", "{", "[]", "{}", '{"answer": 1, "origin": 2}', '{"parts": 1, "writing": "x"}'])
def test_a_row_of_another_form_is_unreadable(answer: str) -> None:
    rows = Rows("embedding", DIMENSION)
    (row,) = rows.of_entry(entry("a")) or []
    with pytest.raises(Unreadable):
        rows.entry({**row, "answer": answer})


def test_what_fits_into_no_row_is_not_stored() -> None:
    rows = Rows("embedding", DIMENSION)
    assert rows.of_entry(entry("a", question="x" * (VARCHAR_BYTES + 1))) is None
    assert rows.of_entry(entry("a", tenant="t" * 513)) is None
