"""`python -m bench.scopes [--requests 50000]`: does anybody ever get an answer that is not his?

Two gateways with the same configuration share a Milvus. Two tenants ask the same in many conversations that differ in
little, in several wordings, as streams and not, some at the same time. The upstream (`bench.scope_stub`) writes into
each answer what it is an answer to, and whether it is whole; some generations fail, break off or are cut. Meanwhile
parts are killed with -9 and come back. Each client (`bench.scope_clients`) checks what it gets (`bench.scope_checks`):
answers of another scope, question or tenant, parts of answers, replays of what must not be replayed. What cannot be had
because a part was just killed is asked again, at the other gateway.

With the real Triton where its weights are, else with `tests/stub_triton.py`. Exit status 1: a violation was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import yaml

from bench.__main__ import commit, machine
from bench.scope_checks import TTL_SECONDS
from bench.scope_clients import GATEWAYS, Clients, Pace, Tally
from bench.scope_requests import BRIEF, SMALL, TENANTS, Requests
from bench.scope_stub import LARGE
from bench.servers import (
    CannotStart,
    Plan,
    Tree,
    await_ready,
    emptied,
    free_ports,
    gateway_plan,
    started,
    write,
)
from deploy.local.parts import TRITON_PYTHON, parts
from gateway.config import load
from gateway.tenants import digest, new_key

FOLDER = Path("data/scopes")  # configurations, logs, Milvus' data
RESULTS = Path("bench/results/scopes.md")
START_SECONDS = 180
MILVUS_GONE_SECONDS = 3.0
PROGRESS_SECONDS = 5.0
MANY_REQUESTS = 10_000  # from which on each event comes three times

Event = tuple[str, Callable[[], Awaitable[None]]]


class Part:
    """A server that is killed and comes back, each time with a log of its own."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self._folder = folder
        self._lives = count(1)
        self._running = contextlib.ExitStack()

    def begin(self) -> None:
        """Start it, and do not wait."""
        log = self._folder / f"{self.plan.name}-{next(self._lives)}.log"
        self._server = self._running.enter_context(started(self.plan, log))

    def start(self) -> None:
        """Raises `CannotStart`."""
        self.begin()
        self.await_ready()

    def await_ready(self) -> None:
        """Raises `CannotStart`."""
        await_ready(self._server, time.monotonic() + START_SECONDS)

    def reload(self) -> None:
        self._server.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """With -9, and all that it started."""
        os.killpg(self._server.process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        self._running.close()


class Stage:
    """The servers, and what happens to them."""

    def __init__(self, servers: Mapping[str, Part]) -> None:
        self._servers = servers
        self._gateways = [servers[name] for name in GATEWAYS]
        self._turn = count()

    def events(self, times: int) -> list[Event]:
        """In the order in which they happen."""
        triton: list[Event] = [("kill -9 of Triton", self.triton)] if self._servers["triton"].plan.ready else []
        once: list[Event] = [
            ("kill -9 of a gateway", self.gateway),
            ("kill -9 of Milvus", self.milvus),
            ("reload", self.reload),
            ("kill -9 of both gateways", self.both),
        ]
        return [*(once * times)[: len(once) * (times - 1)], *once, *triton] if times > 1 else [*once, *triton]

    async def gateway(self) -> None:
        await self._again(self._gateways[next(self._turn) % len(self._gateways)])

    async def both(self) -> None:
        await self._again(*self._gateways)

    async def triton(self) -> None:
        await self._again(self._servers["triton"])
        await self._ready()

    async def milvus(self) -> None:
        await self._again(self._servers["milvus"], gone=MILVUS_GONE_SECONDS)
        await self._ready()

    async def reload(self) -> None:
        for gateway in self._gateways:
            gateway.reload()

    @staticmethod
    async def _again(*servers: Part, gone: float = 0.0) -> None:
        for each in servers:
            await asyncio.to_thread(each.kill)
        await asyncio.sleep(gone)
        for each in servers:
            await asyncio.to_thread(each.begin)
        await asyncio.gather(*(asyncio.to_thread(each.await_ready) for each in servers))

    async def _ready(self) -> None:
        """Until the gateways have found again what had gone."""
        await asyncio.gather(*(asyncio.to_thread(gateway.await_ready) for gateway in self._gateways))


async def happen(events: Sequence[Event], pace: Pace, tally: Tally) -> None:
    """One after the other, at even intervals of requests; the next interval begins only when all is there again."""
    share = pace.requests / (len(events) + 1)
    for number, (name, event) in enumerate(events, 1):
        await pace.reaches(number * share)
        pace.limit = (number + 1) * share
        began = time.monotonic()
        await event()
        tally.events[name] += 1
        print(
            f"scopes: {name} at request {number * share:,.0f}, over after {time.monotonic() - began:.1f} s", flush=True
        )
    pace.limit = pace.requests


@contextlib.asynccontextmanager
async def progress(clients: Clients, pace: Pace) -> AsyncIterator[None]:
    """Within this, a line every now and then."""

    async def tell() -> None:
        for seconds in count(1):
            await asyncio.sleep(PROGRESS_SECONDS)
            tally = clients.tally
            told = f"{pace.sent:,} sent, {tally.hits:.0%} hits, {tally.retries.total():,} retries"
            print(
                f"scopes: {seconds * PROGRESS_SECONDS:5.0f} s {told}, {tally.violations.total()} violations", flush=True
            )

    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()


async def soak(clients: Clients, pace: Pace, events: Sequence[Event], concurrency: int) -> None:
    async with progress(clients, pace), asyncio.TaskGroup() as group:
        group.create_task(clients.run(concurrency))
        group.create_task(happen(events, pace, clients.tally))


def plans(folder: Path, keys: Mapping[str, str], *, stub_triton: bool, wrong: bool) -> Iterator[Plan]:
    """The servers, the gateways last; their configurations are written to `folder`."""
    stub, milvus, milvus_metrics, triton, triton_http, triton_metrics, *gateways = free_ports(8)
    address = f"http://127.0.0.1:{stub}"
    command = (sys.executable, "-m", "bench.scope_stub", str(stub), *(("--wrong",) if wrong else ()))
    yield Plan("stub", command, address, (f"{address}/health",))
    settings = yaml.safe_load(Path("config/cache/milvus.yaml").read_text())
    settings["connection"]["port"] = milvus
    write(folder / "milvus.yaml", settings)
    tree = gateway_tree(folder, address, keys, triton)
    tree["local"] = {
        "triton": {"http_port": triton_http, "metrics_port": triton_metrics},
        "milvus": {"metrics_port": milvus_metrics},
    }
    if stub_triton:
        from tests.stub_triton import write_manifests

        tree["triton"]["model_repository"] = str(write_manifests(folder / "repository"))
        yield Plan("triton", (sys.executable, "tests/stub_triton.py", str(triton)), f"127.0.0.1:{triton}", ())
    files = [
        write(folder / f"{name}.yaml", {**tree, "listen": {"port": port}, "data_dir": str(folder / name)})
        for name, port in zip(GATEWAYS, gateways, strict=True)
    ]
    beside = {part.name: part for part in parts(load(files[0]))}
    for name in ("milvus",) if stub_triton else ("triton", "milvus"):
        yield Plan(name, beside[name].command, "", beside[name].ready)
    for name, file, port in zip(GATEWAYS, files, gateways, strict=True):
        yield gateway_plan(name, file, port, "/ready")


def gateway_tree(folder: Path, upstream: str, keys: Mapping[str, str], triton: int) -> Tree:
    """config/config.yaml with two models at the stub, three aliases, the tenants and the cache in Milvus."""
    tree: Tree = yaml.safe_load(Path("config/config.yaml").read_text())
    del tree["policy"]
    model = {"endpoints": [upstream], "price_per_million_tokens": {"input": 1, "output": 1}, "context_window": 100_000}
    return {
        **tree,
        "tenants": [{"name": name, "key_sha256": [digest(keys[name])]} for name in TENANTS],
        # Under this load on a few cores a text waits; without Triton nothing would be stored, and there is no hit.
        "triton": {**tree["triton"], "address": f"127.0.0.1:{triton}", "timeout_seconds": 10},
        "models": [
            {**model, "name": SMALL, "size": "small"},
            {**model, "name": LARGE, "size": "large", "fallback": [SMALL]},
        ],
        "policies": {
            "auto": {"default": SMALL},
            "auto-best": {"default": LARGE},
            "auto-brief": {"rules": [{"name": "brief", "model": SMALL, **BRIEF}], "default": SMALL},
        },
        "upstream": {**tree["upstream"], "ejection": {"consecutive_failures": 10**6}},  # the stub fails when told to
        "semantic_cache": {
            "backend_type": "milvus",
            "backend_config_path": str(folder / "milvus.yaml"),
            "ttl_seconds": TTL_SECONDS,
        },
    }


def has_triton() -> bool:
    """Whether there is what the real Triton needs."""
    networks = (Path("model_repository", name, "weights/model.onnx") for name in ("embedder", "classifier", "verifier"))
    return Path(TRITON_PYTHON).exists() and all(network.exists() for network in networks)


@dataclass(frozen=True, slots=True)
class Options:
    requests: int
    concurrency: int
    seed: int
    events: bool
    stub_triton: bool
    wrong: bool
    data: Path
    results: Path


def options() -> Options:
    parser = argparse.ArgumentParser(
        prog="bench.scopes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--concurrency", type=int, default=32, help="clients, some of whom ask several at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", choices=("on", "off"), default="on", help="whether parts are killed")
    parser.add_argument("--stub-triton", action="store_true", help="even where the real one could be started")
    parser.add_argument("--wrong", action="store_true", help="the upstream's answers are wrong: this has to be seen")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of configurations and logs; is emptied")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    given["stub_triton"] |= not has_triton()
    return Options(**{**given, "events": given["events"] == "on"})


def main() -> int:
    chosen = options()
    try:
        tally, seconds = run(chosen)
    except CannotStart as error:
        print(f"scopes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    told = report(chosen, tally, seconds)
    print(told)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.write_text(told)
    return 1 if tally.violations else 0


def run(chosen: Options) -> tuple[Tally, float]:
    """What was seen, and the seconds that it took. Raises `CannotStart`."""
    folder, keys = emptied(chosen.data), {name: new_key() for name in TENANTS}
    wanted = plans(folder, keys, stub_triton=chosen.stub_triton, wrong=chosen.wrong)
    servers = {plan.name: Part(plan, folder) for plan in wanted}
    with contextlib.ExitStack() as stack:
        for part in servers.values():
            stack.callback(part.close)
            part.begin()
        print(f"scopes: starting {', '.join(servers)}; logs and configurations are in {folder}/", flush=True)
        for part in servers.values():
            part.await_ready()
        stage = Stage(servers)
        events = stage.events(3 if chosen.requests >= MANY_REQUESTS else 1) if chosen.events else []
        pace = Pace(chosen.requests, 2 * chosen.requests / (len(events) + 1))
        addresses = {name: servers[name].plan.address for name in GATEWAYS}
        clients = Clients(addresses, keys, Requests(chosen.seed), pace)
        began = time.monotonic()
        asyncio.run(soak(clients, pace, events, chosen.concurrency))
        return clients.tally, time.monotonic() - began


def report(chosen: Options, tally: Tally, seconds: float) -> str:
    """In Markdown."""
    sent = tally.outcomes.total()
    about = {
        "command": "python -m bench.scopes " + " ".join(sys.argv[1:]),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        **machine(),
        "Triton": "tests/stub_triton.py" if chosen.stub_triton else "the real one",
        "pymilvus, starlette, uvicorn": ", ".join(
            map(importlib.metadata.version, ("pymilvus", "starlette", "uvicorn"))
        ),
    }
    rows: Iterable[tuple[str, str]] = (
        ("requests", f"{sent:,}"),
        *((f"… {name}", f"{number:,}") for name, number in sorted(tally.outcomes.items())),
        ("share of hits among the answers", f"{tally.hits:.1%}"),
        ("retries", f"{tally.retries.total():,}"),
        *((f"… {why}", f"{number:,}") for why, number in sorted(tally.retries.items())),
        ("events", f"{tally.events.total()}"),
        *((f"… {name}", f"{number}") for name, number in tally.events.items()),
        ("seconds", f"{seconds:.0f}"),
        ("**violations**", f"**{tally.violations.total():,}**"),
        *((f"… {kind}", f"{number:,}") for kind, number in sorted(tally.violations.items())),
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in (("what", "number"), ("---", "---"), *rows))
    told = "\n".join(f"- {name}: {words}" for name, words in about.items())
    shown = "".join(f"\n{number}. {words}" for number, words in enumerate(tally.shown, 1))
    return f"# Scopes\n\nWritten by `make soak-scopes`; see `bench/scopes.py`.\n\n{told}\n\n{table}\n{shown}\n"


if __name__ == "__main__":
    sys.exit(main())
