"""What the tests run against: the real stack, started once by `make serve`, and gateways and stubs of a test's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.stub_triton import write_manifests

ROOT = Path(__file__).parent.parent
START_SECONDS = 900  # the first start converts weights, and trains them when none are there
PATIENCE_SECONDS = 300  # a machine that is busy with something else starts a process slowly

Tree = dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def merged(tree: Tree, changes: Tree) -> Tree:
    """`tree` with `changes`, mapping by mapping; an empty mapping replaces."""
    result = dict(tree)
    for key, value in changes.items():
        both = bool(value) and isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def shipped(name: str = "config.yaml") -> Tree:
    tree = yaml.safe_load((ROOT / "config" / name).read_text())
    assert isinstance(tree, dict)
    return tree


def wait_until(what: str, condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def answers(url: str, status: int = 200) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == status
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own group, its output in `log`; ended, all of it, when the block is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass(frozen=True)
class Stack:
    """The whole of `make serve`, on ports and in a data folder of its own."""

    url: str
    config: Path
    config_tree: Tree
    milvus_tree: Tree
    log: Path
    ports: dict[str, int]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    names = ("gateway", "triton", "triton_http", "triton_metrics", "milvus", "milvus_metrics", "vllm")
    ports = {name: free_port() for name in names}
    milvus = merged(shipped("cache/milvus.yaml"), {"connection": {"port": ports["milvus"]}})
    config = merged(
        shipped(),
        {
            "listen": {"port": ports["gateway"]},
            "data_dir": str(folder / "data"),
            "triton": {"address": f"127.0.0.1:{ports['triton']}"},
            "models": [{**model, "endpoints": [f"http://127.0.0.1:{ports['vllm']}"]} for model in shipped()["models"]],
            "semantic_cache": {"backend_config_path": str(folder / "milvus.yaml")},
            "local": {
                "triton": {"http_port": ports["triton_http"], "metrics_port": ports["triton_metrics"]},
                "milvus": {"metrics_port": ports["milvus_metrics"]},
                "vllm": {"port": ports["vllm"]},
            },
        },
    )
    (folder / "milvus.yaml").write_text(yaml.safe_dump(milvus))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    url, log = f"http://127.0.0.1:{ports['gateway']}", folder / "serve.log"
    with running(["make", "serve", f"CONFIG={folder / 'config.yaml'}"], log) as process:
        wait_until(
            f"make serve, see {log}",
            lambda: process.poll() is not None or log.read_text().endswith("0.7}'\n\n"),  # the end of its last words
            START_SECONDS,
        )
        assert process.poll() is None, log.read_text()[-4000:]
        assert answers(f"{url}/ready")
        yield Stack(url, folder / "config.yaml", config, milvus, log, ports)


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A stub vLLM, see tests/stub_vllm.py."""
    port, log = free_port(), tmp_path_factory.mktemp("stub") / "stub.log"
    with running([sys.executable, "tests/stub_vllm.py", str(port)], log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until("the stub", lambda: answers(f"{url}/health"), PATIENCE_SECONDS)
        yield Server(url, process, log)


@pytest.fixture(scope="session")
def stub_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """The `triton` section for a stub of it, see tests/stub_triton.py."""
    port, folder = free_port(), tmp_path_factory.mktemp("triton")
    repository = write_manifests(folder / "repository")
    with running([sys.executable, "tests/stub_triton.py", str(port)], folder / "triton.log"):
        yield {"address": f"127.0.0.1:{port}", "model_repository": str(repository)}


class Part:
    """A server of the tests' own that can be killed and started again on the same ports and data."""

    def __init__(self, command: list[str], log: Path, ready_url: str) -> None:
        self._command = command
        self._log = log
        self._ready_url = ready_url
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        self._process = self._running.enter_context(running(self._command, self._log))
        wait_until("a part to be ready", lambda: answers(self._ready_url), PATIENCE_SECONDS)

    def kill(self) -> None:
        """Kill -9, the whole process group."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._running.close()

    def close(self) -> None:
        self._running.close()


@pytest.fixture(scope="session")
def killable_triton(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Part, str]]:
    """A real Triton beside the one of `make serve`, which made its weights, and its gRPC address."""
    folder, grpc, http, metrics = tmp_path_factory.mktemp("triton"), free_port(), free_port(), free_port()
    command = [str(ROOT / ".venv-triton/bin/python"), "-m", "deploy.local.triton", "--data", str(folder)]
    command += ["--grpc-port", str(grpc), "--http-port", str(http), "--metrics-port", str(metrics)]
    part = Part(command, folder / "triton.log", f"http://127.0.0.1:{http}/v2/health/ready")
    part.start()
    yield part, f"127.0.0.1:{grpc}"
    part.close()


@pytest.fixture(scope="session")
def killable_milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Part, int]]:
    """A real Milvus and its port."""
    folder, port, metrics = tmp_path_factory.mktemp("milvus"), free_port(), free_port()
    command = [sys.executable, "-m", "deploy.local.milvus", "--data", str(folder)]
    command += ["--port", str(port), "--metrics-port", str(metrics)]
    part = Part(command, folder / "milvus.log", f"http://127.0.0.1:{metrics}/healthz")
    part.start()
    yield part, port
    part.close()


StartGateway = Callable[..., Server]


@pytest.fixture(scope="module")
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Starts gateways with the shipped configuration and a test's changes; ends them after the test's module."""
    tmp_path = tmp_path_factory.mktemp("gateways")
    with contextlib.ExitStack() as stack:

        def start(changes: Tree, milvus: Tree | None = None, *, env: dict[str, str] | None = None) -> Server:
            port = free_port()
            folder = tmp_path / f"gateway-{port}"
            folder.mkdir()
            tree = merged(merged(shipped(), {"listen": {"port": port}, "data_dir": str(folder)}), changes)
            if milvus is not None:
                (folder / "milvus.yaml").write_text(yaml.safe_dump(merged(shipped("cache/milvus.yaml"), milvus)))
                tree["semantic_cache"]["backend_config_path"] = str(folder / "milvus.yaml")
            (folder / "config.yaml").write_text(yaml.safe_dump(tree))
            log = folder / "gateway.log"
            command = [sys.executable, "-m", "gateway", "--config", str(folder / "config.yaml")]
            process = stack.enter_context(running(command, log, env={**os.environ, **(env or {})}))
            url = f"http://127.0.0.1:{port}"
            wait_until("the gateway", lambda: process.poll() is not None or answers(f"{url}/health"), PATIENCE_SECONDS)
            assert process.poll() is None, log.read_text()
            return Server(url, process, log)

        yield start


def before_stubs(url: str, triton: Tree) -> Tree:
    """A gateway before stubs of vLLM and Triton: everything goes to the small model, the cache is in memory."""
    return {
        "triton": triton,
        "models": models(url),
        "policy": {"rules": [], "default": "smollm2-small"},
        "semantic_cache": {"backend_type": "memory"},
    }


def models(*endpoints: str) -> list[Tree]:
    """A small and a large model at the same endpoints."""
    return [{**model, "endpoints": list(endpoints)} for model in shipped()["models"]]


def chat(url: str, text: str = "What is the capital of Norway?", **fields: Any) -> httpx.Response:
    """One chat completion; `headers` and `tenant` are the request's, other fields go into the body."""
    headers = {"Authorization": f"Bearer {fields.pop('tenant', 'test-token')}", **fields.pop("headers", {})}
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)


def content(response: httpx.Response) -> str:
    """The text of an answer, whichever form it has."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        return str(response.json()["choices"][0]["message"]["content"])
    return "".join(choice["delta"].get("content") or "" for event in events(response) for choice in event["choices"])


def events(response: httpx.Response) -> list[Tree]:
    """The chunks of a stream that ended as it should."""
    payloads = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert payloads[-1] == "[DONE]", response.text
    return [json.loads(payload) for payload in payloads[:-1]]
