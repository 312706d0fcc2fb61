"""What of a configuration runs on this machine: the parts, each with its command, its ports and when it is ready.

A server is started here if `local` has a section for it and the gateway's address for it is on this machine. Any
other address is somebody else's server, and left alone. The gateway itself is always a part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local.smollm2 import FOLDER, WEIGHTS
from gateway.config import Config

LOOPBACK = frozenset({"127.0.0.1", "localhost"})  # where the local servers listen
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (nothing is bound here)
TRITON_PYTHON = ".venv-triton/bin/python"
VLLM_PYTHON = ".venv-vllm/bin/python"
DRAIN_SECONDS = 2  # of the five after which the supervisor kills what it has told to stop


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the local stack."""

    name: str
    command: tuple[str, ...]
    host: str  # that `ports` are bound on
    ports: dict[str, int]  # key of the configuration -> port
    ready: tuple[str, ...]  # URLs that all answer 200 once the part is ready
    needs: dict[Path, str]  # file without which it cannot start -> command that makes it


def parts(config: Config) -> list[Part]:
    """What to start, in the order in which to show it; the gateway last."""
    return [*_triton(config), *_milvus(config), *_vllm(config), _gateway(config)]


def _triton(config: Config) -> Iterator[Part]:
    local = config.local.triton
    url = urlsplit(f"//{config.triton.address}")
    if local is None or url.hostname not in LOOPBACK or url.port is None:
        return
    repository = config.triton.model_repository
    networks = (repository / model / "weights/model.onnx" for model in ("embedder", "classifier", "verifier"))
    command = (
        *(TRITON_PYTHON, "-m", "deploy.local.triton", "--repository", str(repository)),
        *("--grpc-port", str(url.port), "--http-port", str(local.http_port), "--metrics-port", str(local.metrics_port)),
        *("--data", str(config.data_dir / "triton")),
    )
    ports = {
        "triton.address": url.port,
        "local.triton.http_port": local.http_port,
        "local.triton.metrics_port": local.metrics_port,
    }
    needs = {Path(TRITON_PYTHON): "make triton", **dict.fromkeys(networks, f"make train ARGS='--out {repository}'")}
    yield Part("triton", command, "127.0.0.1", ports, (f"http://127.0.0.1:{local.http_port}/v2/health/ready",), needs)


def _milvus(config: Config) -> Iterator[Part]:
    local, cache = config.local.milvus, config.semantic_cache
    url = urlsplit(config.milvus.connection.address)
    if local is None or not cache.enabled or cache.backend_type != "milvus" or url.hostname not in LOOPBACK:
        return
    port = url.port or 19530
    command = (
        *(sys.executable, "-m", "deploy.local.milvus", "--data", str(config.data_dir / "milvus")),
        *("--port", str(port), "--metrics-port", str(local.metrics_port)),
    )
    ports = {"connection.port": port, "local.milvus.metrics_port": local.metrics_port}
    ready = (f"http://127.0.0.1:{local.metrics_port}/healthz", f"http://127.0.0.1:{port}/v1/vector/collections")
    yield Part("milvus", command, "0.0.0.0", ports, ready, {})  # noqa: S104 (Milvus knows no other, see milvus.py)


def _vllm(config: Config) -> Iterator[Part]:
    local = config.local.vllm
    if local is None:
        return
    urls = {model.name: [urlsplit(endpoint.url) for endpoint in model.endpoints] for model in config.models}
    names = [name for name, at in urls.items() if any(u.hostname in LOOPBACK and u.port == local.port for u in at)]
    if not names:
        return
    command = (
        *(VLLM_PYTHON, "-m", "deploy.local.vllm", "--port", str(local.port), "--names", *names),
        *("--data", str(config.data_dir / "vllm")),
    )
    needs = {Path(VLLM_PYTHON): "make vllm", FOLDER / WEIGHTS: "make vllm"}
    ready = (f"http://127.0.0.1:{local.port}/health",)
    yield Part("vllm", command, "127.0.0.1", {"local.vllm.port": local.port}, ready, needs)


def _gateway(config: Config) -> Part:
    drain = ("--drain-seconds", str(DRAIN_SECONDS))
    command = (sys.executable, "-m", "gateway", "--config", str(config.source), *drain)
    ports = {"listen.port": config.listen.port}
    listen = config.listen
    is_told = listen.admin_key_sha256 is None and (
        listen.allow_anonymous or listen.is_local or listen.host in WILDCARDS
    )
    told = "ready" if is_told else "health"  # see gateway.admission
    return Part("gateway", command, config.listen.host, ports, (f"{address(config)}/{told}",), {})


def address(config: Config) -> str:
    """The gateway's URL for a client on this machine."""
    host = WILDCARDS.get(config.listen.host, config.listen.host)
    scheme = "https" if config.listen.tls else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.listen.port}"
