"""A gateway whose vLLMs are killed and come back: real processes, Triton as a stub of its protocol."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.tenants import digest
from tests.conftest import Server, StartGateway, Tree, answers, chat, content, free_port, running, shipped, wait_until
from tests.stub_triton import write_manifests

StartStub = Callable[..., Server]
CHECK = {"interval_seconds": 0.2, "timeout_seconds": 1}


@pytest.fixture
def start_stub(tmp_path: Path) -> Iterator[StartStub]:
    with contextlib.ExitStack() as stack:

        def start(port: int | None = None) -> Server:
            port = port or free_port()
            log = tmp_path / f"stub-{port}.log"
            process = stack.enter_context(running([sys.executable, "tests/stub_vllm.py", str(port)], log))
            url = f"http://127.0.0.1:{port}"
            wait_until("the stub", lambda: answers(f"{url}/health"))
            return Server(url, process, log)

        yield start


@pytest.fixture
def triton(tmp_path: Path) -> Iterator[Tree]:
    """The `triton` section for a stub of it."""
    port, log = free_port(), tmp_path / "triton.log"
    repository = write_manifests(tmp_path / "repository")
    with running([sys.executable, "tests/stub_triton.py", str(port)], log):
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
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}
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
    assert received(large) == 2


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


def test_a_vllm_is_killed_under_load_and_comes_back(
    triton: Tree, start_stub: StartStub, start_gateway: StartGateway
) -> None:
    stubs = [start_stub(), start_stub()]
    gateway = start_gateway(
        {
            **small_and_large([stub.url for stub in stubs], [stubs[1].url]),
            "triton": triton,
            "semantic_cache": {"enabled": False},
            "upstream": {"health_check": CHECK},
        }
    )
    for stub in stubs:
        fail(stub, "slow")
    stop = threading.Event()

    def client(number: int) -> list[str]:
        """What became of one request after another."""
        outcomes: list[str] = []
        stream = bool(number % 2)
        while not stop.is_set():
            question = f"client {number}, question {len(outcomes)}"
            try:
                response = chat(gateway.url, question, stream=stream)
                own = response.status_code == 200 and question in content(response)
                outcomes.append("own" if own else f"{response.status_code} {response.text[:200]}")
            except httpx.RemoteProtocolError:
                outcomes.append("broken stream" if stream else "broken")
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, i) for i in range(8)]
        try:
            time.sleep(2)
            kill(stubs[0])
            wait_until("it to be found down", lambda: states(gateway) == ["down", "up"], 20)
            time.sleep(1)
            back = start_stub(int(stubs[0].url.rpartition(":")[2]))
            wait_until("it to be found again", lambda: states(gateway) == ["up", "up"], 20)
            wait_until("it to be asked", lambda: received(back) > 4, 20)
        finally:
            stop.set()
        outcomes = [outcome for each in clients for outcome in each.result(60)]
    assert set(outcomes) <= {"own", "broken stream"}
    assert outcomes.count("broken stream") <= 4  # those that had begun there
    assert outcomes.count("own") > 20
    assert {endpoint["outstanding"] for endpoint in described(gateway)["endpoints"]} == {0}


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
