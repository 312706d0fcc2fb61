"""`python -m bench.soak [--minutes 30]`: mixed load on one gateway for a long time. Whatever keeps growing is told.

The gateway stands before the real Triton and Milvus and two stub upstreams. Clients ask in all forms, ask again, in
other words, for streams, leave in the middle, send what is wrong. Once in each interval one of the stubs is killed and
comes back, and the gateway is told to read its configuration again. At the end of an interval nothing is asked for a
while, and then it is looked at: what memory, tasks and sockets the gateway holds when it has nothing to do.

The first third is for caches to fill. Exit status 1: in the last third the gateway held more than in the second, by
more than `ALLOWED`, or a request failed though one stub and both other servers were there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import yaml

from bench import prompts
from bench.cases import AUTO, NAMED
from bench.servers import (
    CannotStart,
    Plan,
    Server,
    Tree,
    await_ready,
    emptied,
    free_ports,
    gateway_plan,
    gateway_tree,
    resident_mb,
    running,
    started,
    write,
)
from deploy.local.parts import parts
from gateway.config import load

FOLDER = Path("data/soak")  # configurations and logs
CLIENTS = 12
PAUSE_SECONDS = 0.1  # of a client, between two requests
REST_SECONDS = 8.0  # longer than any connection is kept that nobody uses
START_SECONDS = 180
HANG_SECONDS = 60
ALLOWED = {"memory_mb": 4.0, "tasks": 3.0, "sockets": 4.0}  # a health check may be under way
LEAST_LOOKS = 6

CHAT = "/v1/chat/completions"
_TASKS = re.compile(r"^fingerpost_tasks (\S+)$", re.MULTILINE)
Session = aiohttp.ClientSession


@dataclass(frozen=True, slots=True)
class Look:
    """What the gateway held at rest."""

    minute: float
    requests: int  # so far
    memory_mb: float  # resident, of 10^6 bytes
    tasks: float
    sockets: float

    def __str__(self) -> str:
        held = f"{self.memory_mb:9.1f} MB {self.tasks:5.0f} tasks {self.sockets:5.0f} sockets"
        return f"minute {self.minute:5.1f} {self.requests:8d} requests {held}"


def growth(looks: Sequence[Look]) -> Iterator[str]:
    """What there is more of in the last third of the looks than in the second, in words."""
    third = len(looks) // 3
    second, last = looks[third : 2 * third], looks[len(looks) - third :]
    for name, allowed in ALLOWED.items():
        before, after = (median(getattr(look, name) for look in part) for part in (second, last))
        if after - before > allowed:
            yield f"{name} grew from {before:g} to {after:g}: by more than {allowed:g}"


class Asker:
    """What the clients share: where they ask, and what became of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests = 0
        self.failed: Counter[str] = Counter()
        self.random = random.Random(4)  # noqa: S311 (nothing is secret)
        self.texts = prompts.new_texts(seed=4)
        self.wordings = prompts.wordings()
        self.judged: str | None = None  # the id of the latest answer

    async def post(self, session: Session, path: str, body: bytes | Tree, *, all_of_it: bool = True) -> None:
        """Ask, and read the answer, or only its beginning."""
        self.requests += 1
        given: Any = {"json": body} if isinstance(body, dict) else {"data": body}
        async with session.post(self.url + path, **given) as response:
            self._note(path, response.status)
            self.judged = response.headers.get("x-request-id", self.judged)
            if all_of_it:
                with contextlib.suppress(aiohttp.ClientPayloadError):  # its stub was killed
                    await response.read()
            else:
                await response.content.readany()
                response.close()

    async def get(self, session: Session, path: str) -> str:
        self.requests += 1
        async with session.get(self.url + path) as response:
            self._note(path, response.status)
            return await response.text()

    def _note(self, path: str, status: int) -> None:
        if status >= 500:
            self.failed[f"{path} {status}"] += 1


async def new_question(asker: Asker, session: Session) -> None:
    await asker.post(session, CHAT, prompts.body(AUTO, next(asker.texts), stream=asker.random.random() < 0.5))


async def same_question(asker: Asker, session: Session) -> None:
    question = asker.random.choice(prompts.PAIRS)[0]
    await asker.post(session, CHAT, prompts.body(AUTO, question, stream=asker.random.random() < 0.5))


async def same_meaning(asker: Asker, session: Session) -> None:
    await asker.post(session, CHAT, prompts.body(AUTO, next(asker.wordings)))


async def leaves(asker: Asker, session: Session) -> None:
    """In the middle of a stream."""
    await asker.post(session, CHAT, prompts.body(NAMED, next(asker.texts), stream=True), all_of_it=False)


async def vanishes(asker: Asker, session: Session) -> None:
    """In the middle of its own request, or before the answer."""
    asker.requests += 1
    host, _, port = asker.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = prompts.body(AUTO, next(asker.texts), stream=True)
    sent = body[: asker.random.randrange(len(body) + 1)]
    writer.write(b"POST %b HTTP/1.1\r\nHost: gateway\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + sent)
    await writer.drain()
    await asyncio.sleep(asker.random.random() / 20)
    writer.close()


async def other_form(asker: Asker, session: Session) -> None:
    text = next(asker.texts)
    asked: tuple[tuple[str, Tree], ...] = (
        ("/v1/completions", {"model": AUTO, "prompt": text}),
        ("/v1/responses", {"model": AUTO, "input": text}),
        ("/v1/messages", {"model": AUTO, "max_tokens": 9, "messages": [{"role": "user", "content": text}]}),
    )
    await asker.post(session, *asker.random.choice(asked))


async def wrong(asker: Asker, session: Session) -> None:
    bodies = (b"{", b"[" * 9999, b"{}", prompts.body("unknown", "Why?"), b'{"model": "auto", "messages": [1]}')
    await asker.post(session, asker.random.choice((CHAT, "/v1/responses", "/nowhere")), asker.random.choice(bodies))


async def batch(asker: Asker, session: Session) -> None:
    texts = [next(asker.texts) for _ in range(asker.random.randrange(1, 12))]
    path, fields = asker.random.choice((("/v1/embeddings", {"model": "embedder"}), ("/v1/classify", {})))
    await asker.post(session, path, {"input": texts, **fields})


async def verdict(asker: Asker, session: Session) -> None:
    if asker.judged is not None:
        await asker.post(session, "/v1/feedback", {"id": asker.judged, "good": asker.random.random() < 0.5})


async def looks_around(asker: Asker, session: Session) -> None:
    await asker.get(session, asker.random.choice(("/v1/models", "/metrics", "/health", "/ready", "/openapi.json")))


async def decision(asker: Asker, session: Session) -> None:
    await asker.post(session, "/v1/route", prompts.body(AUTO, next(asker.texts)))


ACTIONS: Mapping[Callable[[Asker, Session], Awaitable[None]], int] = {  # how often each is chosen
    new_question: 8,
    same_question: 6,
    same_meaning: 4,
    leaves: 3,
    vanishes: 2,
    other_form: 3,
    wrong: 2,
    batch: 1,
    verdict: 1,
    looks_around: 1,
    decision: 1,
}


async def load_for(asker: Asker, seconds: float) -> None:
    """Clients at work, one action of each after the other. What is under way at the end goes on to its own."""
    until = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=HANG_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with Session(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client(asker, session, until))


async def client(asker: Asker, session: Session, until: float) -> None:
    while time.monotonic() < until:
        [action] = asker.random.choices([*ACTIONS], [*ACTIONS.values()])
        try:
            await action(asker, session)
        except TimeoutError:
            asker.failed[f"{action.__name__} took more than {HANG_SECONDS} s"] += 1
        except (aiohttp.ClientError, OSError) as error:
            asker.failed[f"{action.__name__} {type(error).__name__}"] += 1
        await asyncio.sleep(PAUSE_SECONDS)


class Mortal:
    """A server that is killed and comes back."""

    def __init__(self, plan: Plan, log: Path) -> None:
        self._plan = plan
        self._log = log
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        self._server = self._running.enter_context(started(self._plan, self._log))
        await_ready(self._server, time.monotonic() + START_SECONDS)

    def kill(self) -> None:
        os.kill(self._server.process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        self._running.close()


async def interval(asker: Asker, gateway: Server, mortal: Mortal, seconds: float) -> None:
    """Load, in the middle of which one upstream is gone for a while, then another reading of the configuration."""
    async with asyncio.TaskGroup() as group:
        group.create_task(load_for(asker, seconds))
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(mortal.kill)
        await asyncio.sleep(seconds / 6)
        await asyncio.to_thread(mortal.start)
    gateway.process.send_signal(signal.SIGHUP)


async def soak(asker: Asker, gateway: Server, mortal: Mortal, minutes: float, every: float) -> list[Look]:
    """What was seen at the end of each interval of `every` seconds."""
    began, looks = time.monotonic(), list[Look]()
    while len(looks) < round(minutes * 60 / every):
        await interval(asker, gateway, mortal, every - REST_SECONDS)
        await asyncio.sleep(REST_SECONDS)
        looks.append(await look(asker, gateway, (time.monotonic() - began) / 60))
        print(looks[-1], flush=True)
    return looks


async def look(asker: Asker, gateway: Server, minute: float) -> Look:
    async with Session() as session:
        exposition = await asker.get(session, "/metrics")
    found = _TASKS.search(exposition)
    pid = gateway.process.pid
    tasks = float(found[1]) if found else 0.0
    return Look(minute, asker.requests, resident_mb(pid), tasks, sockets(pid))


def sockets(pid: int) -> int:
    """That a process has open."""
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(descriptor).startswith("socket:")
    return found


def plans(folder: Path) -> tuple[Plan, list[Plan]]:
    """The upstream that is killed, and all the other servers, the gateway last."""
    first, second, port, milvus, milvus_metrics, *triton = free_ports(8)
    upstreams = [f"http://127.0.0.1:{each}" for each in (first, second)]
    tree = gateway_tree(folder / "data", port, upstreams[0], triton, caching=True)
    settings = yaml.safe_load(Path("config/cache/milvus.yaml").read_text())
    settings["connection"]["port"] = milvus
    file = write(folder / "milvus.yaml", settings)
    tree["models"] = [{**model, "endpoints": upstreams} for model in tree["models"]]
    tree["semantic_cache"] = {"backend_type": "milvus", "backend_config_path": str(file)}
    tree["local"]["milvus"] = {"metrics_port": milvus_metrics}
    tree["feedback"] = {"record": True}
    config = write(folder / "gateway.yaml", tree)
    stub, mortal = (
        Plan(f"stub-{i}", (sys.executable, "-m", "bench.stub", url.rpartition(":")[2]), url, (url,))
        for i, url in enumerate(upstreams)
    )
    beside = [Plan(part.name, part.command, "", part.ready) for part in parts(load(config)) if part.name != "gateway"]
    return mortal, [stub, *beside, gateway_plan("gateway", config, port, "/ready")]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between two looks")
    options = parser.parse_args()
    if options.every < 2 * REST_SECONDS or options.minutes * 60 < LEAST_LOOKS * options.every:
        parser.error(f"takes at least {LEAST_LOOKS} looks, at least {2 * REST_SECONDS:g} s apart")
    try:
        problems = list(run(emptied(FOLDER), options.minutes, options.every))
    except CannotStart as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(*(problems or ["nothing grew, nothing failed"]), sep="\n")
    return 1 if problems else 0


def run(folder: Path, minutes: float, every: float) -> Iterator[str]:
    """What is wrong. Raises `CannotStart`."""
    plan, others = plans(folder)
    mortal = Mortal(plan, folder / f"{plan.name}.log")
    with contextlib.closing(mortal), running(others, folder) as servers:
        mortal.start()
        gateway = servers["gateway"]
        print(f"the gateway is process {gateway.process.pid}, {gateway.address}; logs are in {folder}/", flush=True)
        asker = Asker(gateway.address)
        looks = asyncio.run(soak(asker, gateway, mortal, minutes, every))
        yield from growth(looks)
        yield from (f"{count} times: {what}" for what, count in asker.failed.items())


if __name__ == "__main__":
    sys.exit(main())
