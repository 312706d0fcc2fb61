"""A gateway whose vLLMs and Triton are killed and come back: real processes, stubs of their protocols."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from gateway.tenants import digest
from tests.conftest import (
    PATIENCE_SECONDS,
    Server,
    StartGateway,
    Tree,
    answers,
    chat,
    content,
    free_port,
    running,
    shipped,
    wait_until,
)
from tests.stub_triton import write_manifests

StartStub = Callable[..., Server]
CHECK = {"interval_seconds": 0.2, "timeout_seconds": 1}
CLIENTS = 50
CLIENT_SECONDS = 60


@pytest.fixture
def start_stub(tmp_path: Path) -> Iterator[StartStub]:
    with contextlib.ExitStack() as stack:

        def start(port: int | None = None) -> Server:
            port = port or free_port()
            log = tmp_path / f"stub-{port}.log"
            process = stack.enter_context(running([sys.executable, "tests/stub_vllm.py", str(port)], log))
            url = f"http://127.0.0.1:{port}"
            wait_until("the stub", lambda: answers(f"{url}/health"), PATIENCE_SECONDS)
            return Server(url, process, log)

        yield start


def stub_triton(port: int, log: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return running([sys.executable, "tests/stub_triton.py", str(port)], log)


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[Tree]:
    """The `triton` section for a stub of it."""
    port, repository = free_port(), write_manifests(tmp_path / "repository")
    with stub_triton(port, tmp_path / "triton.log"):
        yield {"address": f"127.0.0.1:{port}", "model_repository": str(repository)}


def small_and_large(small: list[str], large: list[str]) -> Tree:
    """Both models, the large one as the fallback of the small one, to which everything goes."""
    first, second = shipped()["models"]
    return {
        "models": [
            {**first, "endpoints": small, "fallback": [second["name"]]},
            {**second, "endpoints": large},
        ],
        "policy": {"rules": [], "default": first["name"]},
    }


def fail(stub: Server, fault: str, **more: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault, **more}).raise_for_status()


def received(stub: Server) -> int:
    return len(httpx.get(f"{stub.url}/stub").json()["received"])


def kill(stub: Server) -> None:
    os.killpg(stub.process.pid, signal.SIGKILL)
    stub.process.wait()


def described(gateway: Server) -> Any:
    """What the gateway says of a prompt that nobody has read before."""
    body = {"model": "auto", "messages": [{"role": "user", "content": f"Hi, I am {uuid.uuid4()}"}]}
    return httpx.post(f"{gateway.url}/v1/route", json=body).json()


def states(gateway: Server) -> list[str]:
    return [endpoint["state"] for endpoint in described(gateway)["endpoints"]]


def test_a_fallback_answers_and_its_answers_are_stored_as_its_own(
    triton: Tree, start_stub: StartStub, start_gateway: StartGateway
) -> None:
    small, large = start_stub(), start_stub()
    gateway = start_gateway(
        {
            **small_and_large([small.url], [large.url]),
            "triton": triton,
            "semantic_cache": {"backend_type": "memory"},
            "upstream": {"health_check": CHECK},
        }
    )
    assert "x-fingerpost-fallback-for" not in chat(gateway.url, "Before").headers
    fail(small, "status-503")
    for stream in (False, True):
        question = f"After, {stream}"
        fallback, hit = chat(gateway.url, question, stream=stream), chat(gateway.url, question, stream=stream)
        for response in (fallback, hit):
            assert "by smollm2-large" in content(response)
            assert response.headers["x-fingerpost-model"] == "smollm2-large"
        assert fallback.headers["x-fingerpost-fallback-for"] == "smollm2-small"
        assert hit.headers["x-fingerpost-cache"] == "hit-exact"
    named = chat(gateway.url, "By its name", model="smollm2-small")
    assert named.headers["x-fingerpost-model"] == "smollm2-large"
    text = httpx.get(f"{gateway.url}/metrics").text
    assert 'fallbacks_total{fallback="smollm2-large",model="smollm2-small"} 3.0' in text
    assert 'tokens_total{kind="completion",model="smollm2-large"} 60.0' in text
    fail(large, "status-503")
    assert chat(gateway.url, "Nobody").status_code == 503


def test_a_fallback_must_fit_and_be_allowed(triton: Tree, start_stub: StartStub, start_gateway: StartGateway) -> None:
    large = start_stub()
    gateway = start_gateway(
        {
            **small_and_large([f"http://127.0.0.1:{free_port()}"], [large.url]),
            "triton": triton,
            "semantic_cache": {"enabled": False},
            "tenants": [
                {"name": "all", "key_sha256": [digest("key-1")]},
                {"name": "small", "key_sha256": [digest("key-2")], "models": ["auto", "smollm2-small"]},
            ],
        }
    )
    assert chat(gateway.url, tenant="key-1", model="smollm2-small").status_code == 200
    assert chat(gateway.url, tenant="key-2", model="auto").status_code == 200  # the policy's choice, not the tenant's
    assert chat(gateway.url, tenant="key-2", model="smollm2-small").status_code == 503
    assert chat(gateway.url, "many words " * 2000, tenant="key-1", model="smollm2-small").status_code == 503
    assert chat(gateway.url, tenant="key-1", model="smollm2-small", max_tokens=2000).status_code == 200
    assert chat(gateway.url, tenant="key-1", model="smollm2-small", max_tokens=3000).status_code == 503
    assert received(large) == 3


def test_figures_are_shown(triton: Tree, start_stub: StartStub, start_gateway: StartGateway) -> None:
    first, second = start_stub(), start_stub()
    endpoints: list[Any] = [{"url": first.url, "weight": 3}, second.url]
    gateway = start_gateway(
        {
            **small_and_large(endpoints, [second.url]),
            "triton": triton,
            "semantic_cache": {"enabled": False},
            "upstream": {"health_check": CHECK},
        }
    )
    for i in range(8):
        assert chat(gateway.url, f"Question {i}", stream=bool(i % 2)).status_code == 200
    assert (received(first), received(second)) == (6, 2)
    told = described(gateway)
    assert told["fallback"] == ["smollm2-large"]
    assert [(endpoint["url"], endpoint["weight"]) for endpoint in told["endpoints"]] == [
        (first.url, 3),
        (second.url, 1),
    ]
    assert told["endpoint"] in (first.url, second.url)
    for endpoint in told["endpoints"]:
        assert (endpoint["state"], endpoint["outstanding"], endpoint["error_rate"]) == ("up", 0, 0)
    assert 0 < told["endpoints"][0]["first_byte_seconds"] < 5
    assert 0 < told["endpoints"][0]["answer_seconds"] < 5
    kill(second)
    wait_until("the check to find it", lambda: states(gateway) == ["up", "down"], 10)
    text = httpx.get(f"{gateway.url}/metrics").text
    labels = f'endpoint="{second.url}",model="smollm2-small"'
    for line in (
        f'endpoint_state{{{labels},state="down"}} 1.0',
        f'endpoint_state{{{labels},state="up"}} 0.0',
        f"endpoint_outstanding{{{labels}}} 0.0",
        f"endpoint_error_rate{{{labels}}} 0.0",
        f'health_checks_total{{endpoint="{second.url}",outcome="failed"}}',
        f'endpoint_first_byte_seconds{{endpoint="{first.url}",kind="stream",model="smollm2-small"}}',
    ):
        assert f"fingerpost_{line}" in text
    assert set(httpx.get(f"{gateway.url}/ready").json()["not_ready"]) == {"smollm2-large"}
    start_stub(int(second.url.rpartition(":")[2]))
    wait_until("it to be found again", lambda: states(gateway) == ["up", "up"], 10)
    assert httpx.get(f"{gateway.url}/ready").status_code == 200


async def asked(session: aiohttp.ClientSession, url: str, question: str) -> str:
    """What became of a question: its own answer, a stream that was broken off, or else what came."""
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], "stream": True}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            text = await response.text()
    except aiohttp.ClientPayloadError:
        return "broken off"
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk.get("choices", ()))
    is_own = response.status == 200 and f": {question} —" in said and text.endswith("data: [DONE]\n\n")
    return "own" if is_own else f"{response.status} {text[:200]}"


async def under_load(url: str, outcomes: list[str], story: Callable[[], None]) -> None:
    """While the story is told, CLIENTS ask for one stream after another; none may take CLIENT_SECONDS."""
    over = asyncio.Event()
    timeout, connector = aiohttp.ClientTimeout(total=CLIENT_SECONDS), aiohttp.TCPConnector(limit=0)

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as clients:

        async def client(number: int) -> None:
            while not over.is_set():
                outcomes.append(await asked(session, url, f"client {number}, question {len(outcomes)}"))

        for i in range(CLIENTS):
            clients.create_task(client(i))
        try:
            await asyncio.to_thread(story)
        finally:
            over.set()


def test_parts_are_killed_under_load_and_come_back(
    tmp_path: Path, start_stub: StartStub, start_gateway: StartGateway
) -> None:
    stubs, outcomes, port = [start_stub(), start_stub()], list[str](), free_port()
    repository = write_manifests(tmp_path / "repository")
    gateway = start_gateway(
        {
            **small_and_large([stub.url for stub in stubs], [stubs[1].url]),
            "triton": {"address": f"127.0.0.1:{port}", "model_repository": str(repository)},
            "semantic_cache": {"enabled": False},
            "upstream": {"health_check": CHECK},
        }
    )
    for stub in stubs:
        fail(stub, "slow")

    def more_answers() -> None:
        until = len(outcomes) + 2 * CLIENTS
        wait_until("answers", lambda: len(outcomes) >= until, PATIENCE_SECONDS)

    def vllm() -> None:
        kill(stubs[0])
        wait_until("it to be found down", lambda: states(gateway) == ["down", "up"], PATIENCE_SECONDS)
        more_answers()
        stubs[0] = start_stub(int(stubs[0].url.rpartition(":")[2]))
        fail(stubs[0], "slow")
        wait_until("it to be found again", lambda: states(gateway) == ["up", "up"], PATIENCE_SECONDS)
        wait_until("it to be asked", lambda: received(stubs[0]) > CLIENTS, PATIENCE_SECONDS)

    def triton() -> None:
        with stub_triton(port, tmp_path / "triton.log") as process:
            wait_until("texts to be read", lambda: described(gateway)["category"], PATIENCE_SECONDS)
            more_answers()
            process.kill()
        wait_until("them not to be read", lambda: described(gateway)["category"] is None, PATIENCE_SECONDS)
        more_answers()

    def story() -> None:
        triton()
        vllm()
        broken.append(outcomes.count("broken off"))
        triton()
        broken.append(outcomes.count("broken off"))

    broken: list[int] = []
    asyncio.run(under_load(gateway.url, outcomes, story))
    assert set(outcomes) <= {"own", "broken off"}
    assert broken[0] == broken[1] <= CLIENTS  # those that had begun there
    wait_until("all to be ended", lambda: {each["outstanding"] for each in described(gateway)["endpoints"]} == {0})


def test_all_are_killed_and_come_back(triton: Tree, start_stub: StartStub, start_gateway: StartGateway) -> None:
    stubs = [start_stub(), start_stub()]
    gateway = start_gateway(
        {
            **small_and_large([stubs[0].url], [stubs[1].url]),
            "triton": triton,
            "semantic_cache": {"enabled": False},
            "upstream": {"health_check": CHECK},
        }
    )
    for stub in stubs:
        kill(stub)
    for stream in (False, True):
        response = chat(gateway.url, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "upstream_unavailable")
    wait_until("them to be found down", lambda: states(gateway) == ["down"])
    assert chat(gateway.url).status_code == 503
    for stub in stubs:
        start_stub(int(stub.url.rpartition(":")[2]))
    assert chat(gateway.url).status_code == 200


def test_an_answer_of_a_smaller_fallback_is_not_stored(
    triton: Tree, start_stub: StartStub, start_gateway: StartGateway
) -> None:
    """The larger model gives its own as soon as it is back."""
    small, large = start_stub(), start_stub()
    first, second = shipped()["models"]
    gateway = start_gateway(
        {
            "models": [
                {**first, "endpoints": [small.url]},
                {**second, "endpoints": [large.url], "fallback": [first["name"]]},
            ],
            "policy": {"rules": [], "default": second["name"]},
            "triton": triton,
            "semantic_cache": {"backend_type": "memory"},
            "upstream": {"health_check": CHECK},
        }
    )
    fail(large, "status-503")
    for stream in (False, True):
        asked = chat(gateway.url, "Who answers?", stream=stream)
        assert (asked.headers["x-fingerpost-model"], asked.headers["x-fingerpost-cache"]) == ("smollm2-small", "miss")
    fail(large, "none")
    wait_until("the large model", lambda: chat(gateway.url, "Who?").headers["x-fingerpost-model"] == "smollm2-large")
    asked = chat(gateway.url, "Who answers?")
    assert (asked.headers["x-fingerpost-model"], asked.headers["x-fingerpost-cache"]) == ("smollm2-large", "miss")


def test_a_stopped_vllm_is_left(triton: Tree, start_stub: StartStub, start_gateway: StartGateway) -> None:
    """It takes connections, as its kernel does, and says nothing."""
    stubs = [start_stub(), start_stub()]
    gateway = start_gateway(
        {
            **small_and_large([stub.url for stub in stubs], [stubs[1].url]),
            "triton": triton,
            "semantic_cache": {"enabled": False},
            "upstream": {"first_byte_timeout_seconds": 0.5, "health_check": {**CHECK, "timeout_seconds": 0.3}},
        }
    )
    os.killpg(stubs[0].process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert [chat(gateway.url, f"Question {i}", stream=True).status_code for i in range(6)] == [200] * 6
        assert time.monotonic() - started < 15
        wait_until("it to be found down", lambda: states(gateway) == ["down", "up"], 10)
    finally:
        os.killpg(stubs[0].process.pid, signal.SIGCONT)
    wait_until("it to be found again", lambda: states(gateway) == ["up", "up"], 10)
