"""The same behaviour from every backend: in memory, a real Milvus server, a Milvus Lite file."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pymilvus import MilvusClient

from gateway.answer import Answer
from gateway.cache import CacheUnavailable, Entry, Origin
from gateway.cache.milvus import FOLLOW_SECONDS, MilvusCache
from gateway.config import Milvus
from gateway.metrics import Metrics
from tests.conftest import Server, Stack, StartGateway, chat, content, models, wait_until

BACKENDS = ["memory", "milvus", "milvus-lite"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(semantic_cache section, milvus.yaml) with a store of the test's own."""
    if request.param == "memory":
        return {"backend_type": "memory"}, {}
    collection = {"name": f"test_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")}
    if request.param == "milvus":
        return {"backend_type": "milvus"}, {"connection": stack.milvus_tree["connection"], "collection": collection}
    lite = {"connection": {"uri": str(tmp_path / "cache.db")}, "collection": {**collection, "index": FLAT}}
    return {"backend_type": "milvus"}, lite


FLAT = {"type": "FLAT", "params": {}}


def start(
    stack: Stack,
    stub: Server,
    start_gateway: StartGateway,
    backend: tuple[dict[str, Any], dict[str, Any]],
    **cache: Any,
) -> Server:
    section, milvus = backend
    changes = {
        "triton": stack.config_tree["triton"],
        "models": models(stub.url),
        "semantic_cache": {**section, **cache},
    }
    gateway = start_gateway(changes, milvus)
    wait_until("the cache", lambda: ready(gateway), 60)
    return gateway


def ready(gateway: Server) -> bool:
    return httpx.get(f"{gateway.url}/ready", timeout=10).status_code == 200


def test_hits_by_wording_and_by_meaning(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    gateway = start(stack, stub, start_gateway, backend)
    miss = chat(gateway.url, "How tall is the Eiffel Tower?")
    exact = chat(gateway.url, "How tall is the Eiffel Tower?", stream=True)
    close = chat(gateway.url, "What is the height of the Eiffel Tower?")
    far = chat(gateway.url, "Who painted the Mona Lisa?")
    stranger = chat(gateway.url, "How tall is the Eiffel Tower?", headers={"Authorization": "Bearer other"})
    outcomes = [response.headers["x-fingerpost-cache"] for response in (miss, exact, close, far, stranger)]
    assert outcomes == ["miss", "hit-exact", "hit-semantic", "miss", "miss"]
    assert content(miss) == content(exact) == content(close)


def test_entries_expire(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    gateway = start(stack, stub, start_gateway, backend, ttl_seconds=2)
    chat(gateway.url, "What is a fjord?")
    assert chat(gateway.url, "What is a fjord?").headers["x-fingerpost-cache"] == "hit-exact"
    time.sleep(2.5)
    assert chat(gateway.url, "What is a fjord?").headers["x-fingerpost-cache"] == "miss"


def test_a_bad_answer_leaves_the_cache(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    gateway = start(stack, stub, start_gateway, backend)
    question, close = "How long is the Sognefjord?", "What is the length of the Sognefjord?"
    first = chat(gateway.url, question)
    time.sleep(2)  # for the write, which is off the request path
    verdict = {"id": first.headers["x-request-id"], "good": False}
    told = httpx.post(f"{gateway.url}/v1/feedback", json=verdict, headers={"Authorization": "Bearer test-token"})
    assert told.json()["evicted"] is True
    kept = {"x-fingerpost-cache-control": "no-store"}
    outcomes = [chat(gateway.url, text, headers=kept).headers["x-fingerpost-cache"] for text in (question, close)]
    assert outcomes == ["miss", "miss"]
    second = chat(gateway.url, question)
    assert chat(gateway.url, question).headers["x-fingerpost-cache"] == "hit-exact"
    assert content(second) != content(first)


@pytest.mark.parametrize("backend", ["milvus", "milvus-lite"], indirect=True)
def test_a_second_start_keeps_the_cache(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    first = start(stack, stub, start_gateway, backend)
    answer = chat(first.url, "What is the deepest lake on Earth?")
    first.process.terminate()
    assert first.process.wait(10) in (0, -15)
    second = start(stack, stub, start_gateway, backend)

    def outcome(question: str) -> str:
        return str(
            chat(second.url, question, headers={"x-fingerpost-cache-control": "no-store"}).headers["x-fingerpost-cache"]
        )

    wait_until(
        "the stored answer to be searchable", lambda: outcome("Which lake is the deepest on Earth?") == "hit-semantic"
    )
    assert outcome("What is the deepest lake on Earth?") == "hit-exact"
    assert content(chat(second.url, "What is the deepest lake on Earth?")) == content(answer)


@pytest.mark.parametrize("backend", ["milvus"], indirect=True)
def test_a_longer_life_counts_for_an_existing_collection(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    for seconds in (3600, 86400):
        start(stack, stub, start_gateway, backend, ttl_seconds=seconds)
        client = MilvusClient(f"http://127.0.0.1:{stack.ports['milvus']}")
        (name,) = [name for name in client.list_collections() if name.startswith(backend[1]["collection"]["name"])]
        assert client.describe_collection(name)["properties"]["collection.ttl.seconds"] == str(seconds)


@pytest.mark.parametrize("backend", ["milvus"], indirect=True)
def test_a_collection_that_cannot_be_searched_as_configured_is_named(stack, stub, start_gateway, backend) -> None:  # type: ignore[no-untyped-def]
    start(stack, stub, start_gateway, backend)
    section, milvus = backend
    other = {**milvus, "collection": {**milvus["collection"], "vector_field": {"metric_type": "COSINE"}}}
    changes = {"triton": stack.config_tree["triton"], "models": models(stub.url), "semantic_cache": section}
    gateway = start_gateway(changes, other)
    wait_until("the log to say why", lambda: "cannot be opened" in gateway.log.read_text(), 30)
    assert set(httpx.get(f"{gateway.url}/ready").json()["not_ready"]) == {"cache"}
    assert chat(gateway.url, "Does it go on?").status_code == 200


def test_what_another_gateway_deletes_is_not_replayed_any_more(tmp_path: Path) -> None:
    settings = Milvus.model_validate({"connection": {"uri": str(tmp_path / "cache.db")}, "collection": {"index": FLAT}})
    answer = Answer("small", {"role": "assistant", "content": "200 km"}, "stop", None)
    vector = np.array([1, 0], dtype=np.float32)
    origin, now = Origin("small", "default", None, None), time.time()
    entry = Entry("key", "scope", "ada", "How long?", vector, answer, origin, now, now + 60)

    async def opened() -> MilvusCache:
        cache = MilvusCache(
            settings, namespace="test", dimension=2, ttl_seconds=60, eviction_policy="fifo", metrics=Metrics()
        )
        async with asyncio.timeout(60):
            while True:
                try:
                    await cache.check()
                except CacheUnavailable:
                    await asyncio.sleep(0.1)
                else:
                    return cache

    async def judged() -> None:
        first, second = await opened(), await opened()
        first.put(entry)
        async with asyncio.timeout(30):
            while await second.get("key") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await first.delete("key")
            assert await first.get("key") is None
            assert await second.get("key") is None
            assert await second.search("scope", vector, 0.5) == []
            second.put(replace(entry, created_at=time.time()))  # another answer, say
            await asyncio.sleep(2 * FOLLOW_SECONDS)
            assert await second.get("key") is not None
        await first.close()
        await second.close()

    asyncio.run(judged())
