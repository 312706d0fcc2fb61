"""Each part killed (-9) and started again under 50 streams at a time: a gateway that is never restarted.

Triton and Milvus are the real servers. The models' endpoints are processes that speak vLLM's protocol, because the real
one, on two cores, is too slow for 50 streams; they are killed as truly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.conftest import PATIENCE_SECONDS, Part, Server, StartGateway, Tree, free_port, shipped
from tests.conftest import wait_until as wait_until_within

STREAMS = 50
HANG_SECONDS = 60.0  # a stream takes two, and the machine has other things to do
REFUSAL_SECONDS = 20.0  # in which a client is told that nobody answers
PADDING = "and would like to hear it said again, slowly, word for word, so that it takes a while to say"
ANSWER = re.compile(r"generation \d+ by [\w-]+: (.*)", re.DOTALL)

Milvus = tuple[Part, int]
Triton = tuple[Part, str]


def wait_until(what: str, condition: Callable[[], object]) -> None:
    wait_until_within(what, condition, PATIENCE_SECONDS)


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    began: float  # time.monotonic()
    seconds: float
    status: int | None  # None: no answer began
    cache: str
    fallback: bool
    end: str  # whole, broken or hang
    is_own: bool

    def __str__(self) -> str:
        whose, by = "own" if self.is_own else "ANOTHER", " fallback" if self.fallback else ""
        return f"{self.status} {self.cache}{by} {self.end} {whose} {self.seconds:.1f} s"


class Crowd:
    """Clients that ask for one stream after the other; each question is asked twice."""

    def __init__(self, url: str) -> None:
        self.outcomes: list[Outcome] = []
        self._url = f"{url}/v1/chat/completions"
        self._stop = threading.Event()

    def run(self) -> None:
        asyncio.run(self._run())

    def stop(self) -> None:
        self._stop.set()

    def since(self, when: float) -> list[Outcome]:
        """Those that began later."""
        return [outcome for outcome in self.outcomes if outcome.began > when]

    def goes_on(self) -> None:
        """Return when as many streams as there are clients have begun after this, and ended."""
        now = time.monotonic()
        wait_until("the streams to go on", lambda: len(self.since(now)) >= STREAMS)

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(self._client(session, number))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        for turn in count():
            if self._stop.is_set():
                return
            credential = f"client-{number}-{turn // 2}"  # of its own: what another one was told is no answer to it
            outcome = await ask(session, self._url, credential, f"{credential} asks {PADDING}")
            self.outcomes.append(outcome)
            if outcome.status != 200:
                await asyncio.sleep(0.2)


async def ask(session: aiohttp.ClientSession, url: str, credential: str, question: str) -> Outcome:
    body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": question}]}
    began, received, end = time.monotonic(), b"", "whole"
    status: int | None = None
    headers: Mapping[str, str] = {}
    try:
        async with (
            asyncio.timeout(HANG_SECONDS),
            session.post(url, json=body, headers={"Authorization": f"Bearer {credential}"}) as response,
        ):
            status, headers = response.status, response.headers
            async for piece in response.content.iter_any():
                received += piece
    except TimeoutError:
        end = "hang"
    except aiohttp.ClientError:
        end = "broken"
    return Outcome(
        began=began,
        seconds=time.monotonic() - began,
        status=status,
        cache=headers.get("x-fingerpost-cache", ""),
        fallback="x-fingerpost-fallback-for" in headers,
        end=end,
        is_own=status != 200 or is_own(received, question, is_whole=end == "whole"),
    )


def is_own(received: bytes, question: str, *, is_whole: bool) -> bool:
    """Whether a stream says what was asked, all of it if it is whole, and nothing else."""
    payloads = [frame.removeprefix(b"data: ") for frame in received.split(b"\n\n")[:-1]]
    if is_whole and (not payloads or payloads.pop() != b"[DONE]"):
        return False
    choices = [choice for payload in payloads if payload != b"[DONE]" for choice in json.loads(payload)["choices"]]
    found = ANSWER.fullmatch("".join(choice["delta"].get("content") or "" for choice in choices))
    said, expected = found[1] if found else "", f"{question} — naïve 😀"
    return said == expected if is_whole else expected.startswith(said)


@contextlib.contextmanager
def crowd(gateway: Server) -> Iterator[Crowd]:
    """Clients at work; when the block is left nothing of theirs is open any more, and nothing was wrong with it."""
    clients = Crowd(gateway.url)
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(clients.run)
        try:
            clients.goes_on()
            yield clients
        except AssertionError as error:
            error.add_note(f"the last that ended: {[str(outcome) for outcome in clients.outcomes[-STREAMS:]]}")
            error.add_note(f"the gateway: {gateway.process.poll()}, {gateway.log.read_text()[-4000:]}")
            raise
        finally:
            clients.stop()
            ran.result(2 * HANG_SECONDS)
    assert gateway.process.poll() is None
    assert [str(outcome) for outcome in clients.outcomes if outcome.end == "hang" or not outcome.is_own] == []
    wait_until("nothing to be outstanding", lambda: outstanding(gateway) == 0)


class Vllm(Part):
    """An endpoint that takes a tenth of a second for each piece of an answer."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        log = folder / f"vllm-{port}.log"
        super().__init__([sys.executable, "tests/stub_vllm.py", str(port)], log, f"{self.url}/health")

    def start(self) -> None:
        super().start()
        httpx.post(f"{self.url}/stub", json={"fault": "slow"}, timeout=60).raise_for_status()


@pytest.fixture
def vllms(tmp_path: Path) -> Iterator[list[Vllm]]:
    """Three: two of the small model, one of the large one."""
    with contextlib.ExitStack() as stack:
        started = [Vllm(tmp_path) for _ in range(3)]
        for vllm in started:
            stack.callback(vllm.close)
            vllm.start()
        yield started


Start = Callable[..., Server]


@pytest.fixture
def start(killable_triton: Triton, killable_milvus: Milvus, vllms: list[Vllm], start_gateway: StartGateway) -> Start:
    """Starts a gateway in front of all of it, whose small model falls back to the large one only if told so."""

    def started(*, falls_back: bool = False) -> Server:
        first, second, third = (vllm.url for vllm in vllms)
        small, large = shipped()["models"]
        changes: Tree = {
            "triton": {"address": killable_triton[1]},
            "models": [
                {**small, "endpoints": [first, second], "fallback": [large["name"]] if falls_back else []},
                {**large, "endpoints": [third]},
            ],
            "policy": {"rules": [], "default": small["name"]},
            "upstream": {"health_check": {"interval_seconds": 0.5}, "ejection": {"seconds": 2}},
        }
        gateway = start_gateway(changes, {"connection": {"port": killable_milvus[1]}})
        wait_until("the gateway to be ready", lambda: not_ready(gateway) == set())
        return gateway

    return started


@contextlib.contextmanager
def killed(*parts: Part) -> Iterator[float]:
    """Within this the parts are dead; when they were killed. After it they run again, whatever happened."""
    for part in parts:
        part.kill()
    try:
        yield time.monotonic()
    finally:
        for part in parts:
            part.start()


def not_ready(gateway: Server) -> set[str]:
    return set(httpx.get(f"{gateway.url}/ready", timeout=60).json()["not_ready"])


def endpoints(gateway: Server) -> list[Tree]:
    body = {"model": "smollm2-small", "messages": [{"role": "user", "content": "Hi"}]}
    return list(httpx.post(f"{gateway.url}/v1/route", json=body, timeout=60).json()["endpoints"])


def outstanding(gateway: Server) -> int:
    return sum(endpoint["outstanding"] for endpoint in endpoints(gateway))


def has_been_asked(vllm: Vllm) -> bool:
    return bool(httpx.get(f"{vllm.url}/stub", timeout=60).json()["received"])


def told(outcomes: list[Outcome]) -> set[tuple[Any, str]]:
    return {(outcome.status, outcome.end) for outcome in outcomes}


def test_triton(start: Start, killable_triton: Triton) -> None:
    with crowd(start()) as clients:
        with killed(killable_triton[0]) as when:
            clients.goes_on()
            wait_until("one that is not replayed", lambda: "bypass" in {each.cache for each in clients.since(when)})
        revived = time.monotonic()
        wait_until("Triton to be asked", lambda: "miss" in {outcome.cache for outcome in clients.since(revived)})
        clients.goes_on()
    assert told(clients.outcomes) == {(200, "whole")}
    assert {"miss", "hit-exact"} <= {outcome.cache for outcome in clients.outcomes}


def test_milvus(start: Start, killable_milvus: Milvus) -> None:
    gateway = start()
    with crowd(gateway) as clients:
        with killed(killable_milvus[0]):
            clients.goes_on()
            wait_until("the gateway to know", lambda: not_ready(gateway) == {"cache"})
        wait_until("the cache to be open again", lambda: not_ready(gateway) == set())
        clients.goes_on()
    assert told(clients.outcomes) == {(200, "whole")}


def test_an_endpoint_and_then_the_other(start: Start, vllms: list[Vllm]) -> None:
    with crowd(start()) as clients:
        for vllm in vllms[:2]:
            with killed(vllm) as when:
                clients.goes_on()
            wait_until("it to be asked", partial(has_been_asked, vllm))
            clients.goes_on()
            assert told(clients.since(when)) == {(200, "whole")}
    assert told(clients.outcomes) <= {(200, "whole"), (200, "broken")}  # those that had begun where it was killed
    assert sum(outcome.end == "broken" for outcome in clients.outcomes) <= 2 * STREAMS


def test_all_endpoints_of_a_model_that_has_a_fallback(start: Start, vllms: list[Vllm]) -> None:
    with crowd(start(falls_back=True)) as clients:
        with killed(*vllms[:2]) as when:
            clients.goes_on()  # some of them replays
            wait_until("the fallback", lambda: sum(each.fallback for each in clients.since(when)) >= STREAMS // 2)
        revived = time.monotonic()
        wait_until("the model itself", lambda: any(not outcome.fallback for outcome in clients.since(revived)))
        clients.goes_on()
        assert told(clients.since(when)) == {(200, "whole")}
    assert {outcome.status for outcome in clients.outcomes} == {200}


def test_all_endpoints(start: Start, vllms: list[Vllm]) -> None:
    with crowd(start()) as clients:
        with killed(*vllms[:2]) as when:
            clients.goes_on()  # some of them replays
            wait_until("refusals", lambda: sum(each.status != 200 for each in clients.since(when)) >= STREAMS // 2)
            refused = [outcome for outcome in clients.since(when) if outcome.status != 200]
        wait_until("an answer", lambda: any(outcome.cache == "miss" for outcome in clients.since(when)))
        clients.goes_on()
        recovered = time.monotonic()
        clients.goes_on()
        assert told(clients.since(recovered)) == {(200, "whole")}
    assert {outcome.status for outcome in refused} == {503}
    assert max(outcome.seconds for outcome in refused) < REFUSAL_SECONDS


def test_triton_milvus_and_an_endpoint_at_once(
    start: Start, killable_triton: Triton, killable_milvus: Milvus, vllms: list[Vllm]
) -> None:
    gateway = start()
    with crowd(gateway) as clients:
        with killed(killable_triton[0], killable_milvus[0], vllms[0]) as when:
            clients.goes_on()
        wait_until("the gateway to be ready", lambda: not_ready(gateway) == set())
        wait_until("the endpoint to be asked", partial(has_been_asked, vllms[0]))
        clients.goes_on()
        assert told(clients.since(when)) == {(200, "whole")}
    assert {outcome.status for outcome in clients.outcomes} == {200}
