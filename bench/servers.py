"""The servers of a run: the stub, LiteLLM, Triton and two gateways, each on a port and with a log of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.cases import CACHING, LITELLM, NAMED, PLAIN, STUB, TRITON
from deploy.local.parts import parts
from deploy.local.supervisor import ask, die_with_parent, last_words
from gateway.config import load

START_SECONDS = 180
STOP_SECONDS = 10
BIN = Path(".venv-bench/bin").absolute()

Tree = dict[str, Any]


class CannotStart(Exception):
    """A server of the run did not start."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a server is started, and what says that it is ready."""

    name: str
    command: tuple[str, ...]
    address: str  # that requests go to
    ready: tuple[str, ...]  # URLs that all answer 200
    environment: dict[str, str] | None = None  # None: as this process's


@dataclass(frozen=True, slots=True)
class Server:
    plan: Plan
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def address(self) -> str:
        return self.plan.address

    def cpu_seconds(self) -> float:
        """That it and all that it started have used so far."""
        return sum(cpu_seconds(pid) for pid in family(self.process.pid))

    def resident_mb(self) -> float:
        """Of it and all that it started, as `VmRSS` counts it, in megabytes of 10^6 bytes."""
        return sum(resident_mb(pid) for pid in family(self.process.pid))


def plans(folder: Path, wanted: Iterable[str]) -> list[Plan]:
    """The servers of these names and those that they need; their configurations are written to `folder`."""
    names = {*wanted, STUB, *((TRITON,) if CACHING in wanted else ())}
    stub, litellm, plain, caching, *triton = free_ports(7)
    upstream = f"http://127.0.0.1:{stub}"
    without = gateway_tree(folder / PLAIN, plain, upstream, triton, caching=False)
    with_cache = gateway_tree(folder / CACHING, caching, upstream, triton, caching=True)
    made = [
        Plan(STUB, (sys.executable, "-m", "bench.stub", str(stub)), upstream, (upstream,)),
        litellm_plan(write(folder / "litellm.yaml", litellm_tree(upstream)), litellm),
        gateway_plan(PLAIN, write(folder / f"{PLAIN}.yaml", without), plain, "/health"),
        gateway_plan(CACHING, write(folder / f"{CACHING}.yaml", with_cache), caching, "/ready"),
        triton_plan(folder / f"{CACHING}.yaml"),
    ]
    return [plan for plan in made if plan.name in names]


def gateway_tree(data: Path, port: int, upstream: str, triton: Sequence[int], *, caching: bool) -> Tree:
    """config/config.yaml with its models at the stub, and the cache in memory or none."""
    tree: Tree = yaml.safe_load(Path("config/config.yaml").read_text())
    grpc_port, http_port, metrics_port = triton
    return {
        **tree,
        "listen": {"port": port},
        "data_dir": str(data),
        # With 64 in flight on two cores a text waits for those before it; to give up would measure something else.
        "triton": {**tree["triton"], "address": f"127.0.0.1:{grpc_port}", "timeout_seconds": 10},
        "models": [{**model, "endpoints": [upstream]} for model in tree["models"]],
        "semantic_cache": {"enabled": caching, "backend_type": "memory"},
        "local": {"triton": {"http_port": http_port, "metrics_port": metrics_port}},
    }


def litellm_tree(upstream: str) -> Tree:
    """One model at the stub; no database, no cache, no callbacks, no retries."""
    parameters = {"model": f"openai/{NAMED}", "api_base": f"{upstream}/v1", "api_key": "none"}
    return {
        "model_list": [{"model_name": NAMED, "litellm_params": parameters}],
        "litellm_settings": {"num_retries": 0, "callbacks": []},
        "general_settings": {"disable_spend_logs": True},
    }


def litellm_plan(config: Path, port: int) -> Plan:
    """One worker of uvicorn and uvloop, as LiteLLM starts it itself; no access log, and nothing is fetched."""
    url = f"http://127.0.0.1:{port}"
    where = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TZ") if name in os.environ}
    quiet = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_OFFLINE_MODE": "true",  # the prices that it ships, no others
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # without keys it has the least to do
    }
    command = (str(BIN / "litellm"), *where, "--num_workers", "1")
    return Plan(LITELLM, command, url, (f"{url}/health/liveliness",), {**kept, **quiet})


def triton_plan(config: Path) -> Plan:
    """As `make serve` starts it."""
    found = load(config)
    part = next(part for part in parts(found) if part.name == "triton")
    return Plan(TRITON, part.command, found.triton.address, part.ready)


def gateway_plan(name: str, config: Path, port: int, ready: str) -> Plan:
    url = f"http://127.0.0.1:{port}"
    return Plan(name, (sys.executable, "-m", "gateway", "--config", str(config)), url, (f"{url}{ready}",))


@contextlib.contextmanager
def running(wanted: Sequence[Plan], folder: Path) -> Iterator[dict[str, Server]]:
    """The servers by name, all ready; ended, with all they started, when the block is left. Raises `CannotStart`."""
    with contextlib.ExitStack() as stack:
        servers = {plan.name: stack.enter_context(started(plan, folder / f"{plan.name}.log")) for plan in wanted}
        deadline = time.monotonic() + START_SECONDS
        for server in servers.values():
            await_ready(server, deadline)
        yield servers


@contextlib.contextmanager
def started(plan: Plan, log: Path) -> Iterator[Server]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            plan.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=plan.environment,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        )
    try:
        yield Server(plan, process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever is left of it
        process.wait()


def await_ready(server: Server, deadline: float) -> None:
    while not answers(server.plan.ready):
        if server.process.poll() is not None:
            raise CannotStart(f"{server.plan.name} ended; its log is {server.log}: {last_words(server.log)}")
        if time.monotonic() > deadline:
            raise CannotStart(f"{server.plan.name} is not ready after {START_SECONDS} s; its log is {server.log}")
        time.sleep(0.2)


def answers(urls: Sequence[str]) -> bool:
    try:
        for url in urls:
            ask(url)
    except (OSError, http.client.HTTPException):  # refused, closed, or another status
        return False
    return True


def write(path: Path, tree: Tree) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def free_ports(number: int) -> list[int]:
    """Ports that were free a moment ago, each a different one."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [one.getsockname()[1] for one in taken]


def family(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def cpu_seconds(pid: int) -> float:
    """In user and system mode; 0 for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmRSS:"))
