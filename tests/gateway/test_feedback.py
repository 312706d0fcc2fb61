"""Feedback: what is taken, what it evicts, and what is written down."""

from __future__ import annotations

import asyncio
import json
import stat
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway.answer import Answer
from gateway.cache import Entry, Origin
from gateway.cache.memory import MemoryCache
from gateway.config import Feedback as Settings
from gateway.errors import BadRequest, UnknownAnswer
from gateway.feedback import ENTRY_SIZE, FILE, LEDGER_SIZE, Feedback, Given, Ledger, Verdict, parse
from gateway.metrics import Metrics
from tests.conftest import Server, StartGateway, Tree, before_stubs, chat, content, models
from training.rows import read_rows

GOOD, BAD = Verdict("id-1", True, None), Verdict("id-1", False, "wrong river")

# What is taken


def test_a_verdict() -> None:
    assert parse(b'{"id": "id-1", "good": true}') == GOOD
    assert parse(b'{"id": "id-1", "good": false, "comment": "wrong river"}') == BAD


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "id"),
        (b'{"id": 3, "good": true}', "id"),
        (b'{"id": "a"}', "good"),
        (b'{"id": "a", "good": 1}', "good"),
        (b'{"id": "a", "good": "yes"}', "good"),
        (b'{"id": "a", "good": true, "comment": 3}', "comment"),
        (b'{"id": "a", "good": true, "rating": 3}', "rating"),
        (json.dumps({"id": "a" * 301, "good": True}).encode(), "id"),
        (json.dumps({"id": "a", "good": True, "comment": "a" * 4001}).encode(), "comment"),
    ],
)
def test_what_is_not_taken_is_named(raw: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        parse(raw)
    assert raised.value.param == param


# What is remembered


def test_an_answer_is_known_to_its_tenant_alone() -> None:
    ledger, given = Ledger(), Given("small", "key", None)
    ledger.enter("alice", "id-1", given)
    ledger.enter("alice", None, given)
    assert ledger.find("alice", "id-1") is given
    for tenant, each in (("bob", "id-1"), ("alice", "id-2")):
        with pytest.raises(UnknownAnswer):
            ledger.find(tenant, each)


@pytest.mark.parametrize("text", [None, "x" * 30_000])
def test_what_is_remembered_is_bounded(text: str | None) -> None:
    ledger = Ledger()
    for i in range(20_000 if text is None else 500):
        ledger.enter("t", str(i), Given("small", None, text))
    size = ENTRY_SIZE + len(text or "")
    assert len(ledger) == LEDGER_SIZE // size
    with pytest.raises(UnknownAnswer):
        ledger.find("t", "0")


def feedback(tmp_path: Path, cache: Any = None, **settings: Any) -> Feedback:
    return Feedback(Settings(**settings), tmp_path, cache, Metrics())


def take(told: Feedback, verdict: Verdict, tenant: str = "alice") -> dict[str, Any]:
    return asyncio.run(told.take(tenant, verdict))


def entry(key: str) -> Entry:
    answer = Answer("small", {"role": "assistant", "content": "Glomma"}, "stop", None)
    vector = np.array([1, 0], dtype=np.float32)
    origin = Origin("small", "default", None, None)
    return Entry(key, "scope", "alice", "Name a river.", vector, answer, origin, 0, 1e12)


def test_only_a_bad_answer_is_evicted(tmp_path: Path) -> None:
    cache = MemoryCache(3, "fifo", 2)
    told = feedback(tmp_path, cache)
    cache.put(entry("key"))
    told.remember("alice", ("id-1",), model="small", key="key", text="Name a river.")
    assert take(told, GOOD) == {"id": "id-1", "good": True, "evicted": False, "recorded": False}
    assert asyncio.run(cache.get("key")) is not None
    assert take(told, BAD) == {"id": "id-1", "good": False, "evicted": True, "recorded": False}
    assert asyncio.run(cache.get("key")) is None
    assert asyncio.run(cache.search("scope", np.array([1, 0], dtype=np.float32), 0.5)) == []
    assert len(cache) == 0
    assert take(told, BAD)["evicted"] is True  # said twice
    assert not (tmp_path / FILE).exists()


def test_what_is_not_in_the_cache_is_not_evicted(tmp_path: Path) -> None:
    told = feedback(tmp_path, MemoryCache(3, "fifo", 2))
    told.remember("alice", ("id-1",), model="small", key=None, text="")
    assert take(told, BAD)["evicted"] is False
    without = feedback(tmp_path)
    without.remember("alice", ("id-1",), model="small", key="key", text="")
    assert take(without, BAD)["evicted"] is False


def test_what_is_remembered_outlives_a_configuration(tmp_path: Path) -> None:
    ledger = Ledger()
    before, after = (Feedback(Settings(), tmp_path, None, Metrics(), ledger) for _ in range(2))
    before.remember("alice", ("id-1",), model="small", key=None, text="")
    assert take(after, GOOD)["good"] is True


# What is written


def test_rows_are_those_that_training_reads(tmp_path: Path) -> None:
    told = feedback(tmp_path / "new", record=True)
    told.remember("alice", ("id-1",), model="small", key=None, text="Name a river.\nIn Norway — 😀")
    assert take(told, GOOD)["recorded"] is True
    assert take(told, BAD)["recorded"] is True
    right, wrong = read_rows(tmp_path / "new" / FILE)
    assert right.text == wrong.text == "Name a river.\nIn Norway — 😀"
    assert (right.correct, wrong.correct) == ({"small": 1.0}, {"small": 0.0})
    assert right.source == "feedback"
    lines = [json.loads(line) for line in (tmp_path / "new" / FILE).read_text().splitlines()]
    assert [line.get("comment") for line in lines] == [None, "wrong river"]
    assert stat.S_IMODE((tmp_path / "new" / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "x" * 32_769], ids=["none", "long"])
def test_a_text_that_cannot_be_a_row_is_not_recorded(tmp_path: Path, text: str) -> None:
    told = feedback(tmp_path, record=True)
    told.remember("alice", ("id-1",), model="small", key=None, text=text)
    assert take(told, GOOD)["recorded"] is False


def test_the_file_grows_to_its_limit_and_no_further(tmp_path: Path) -> None:
    told = feedback(tmp_path, record=True, max_bytes=250)
    told.remember("alice", ("id-1",), model="small", key=None, text="Name a river.")
    recorded = [take(told, GOOD)["recorded"] for _ in range(5)]
    assert recorded == sorted(recorded, reverse=True)
    assert recorded[0] is True
    assert recorded[-1] is False
    assert (tmp_path / FILE).stat().st_size <= 250
    assert len(read_rows(tmp_path / FILE)) == sum(recorded)


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    told = feedback(tmp_path, record=True)
    told.remember("alice", ("id-1",), model="small", key=None, text="Name a river.")
    assert take(told, GOOD)["recorded"] is False


# Over HTTP


@pytest.fixture(scope="module", params=[False, True], ids=["off", "recording"])
def gateway(request: pytest.FixtureRequest, stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        {
            **before_stubs(stub.url, stub_triton),
            "feedback": {"record": request.param},
        }
    )


def judge(gateway: Server, id: str, good: bool, tenant: str = "test-token") -> httpx.Response:
    headers = {"Authorization": f"Bearer {tenant}"}
    return httpx.post(f"{gateway.url}/v1/feedback", json={"id": id, "good": good}, headers=headers)


def outcome(response: httpx.Response) -> str:
    return str(response.headers["x-fingerpost-cache"])


@pytest.mark.parametrize("by", ["body", "header"])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_a_bad_answer_leaves_the_cache(gateway: Server, by: str, stream: bool) -> None:
    ask = partial(chat, gateway.url, f"Name a river, {by}, {stream}.", stream=stream)
    first, hit = ask(), ask()
    assert [outcome(first), outcome(hit)] == ["miss", "hit-exact"]
    name = hit.headers["x-request-id"] if by == "header" else id_of(hit)
    assert judge(gateway, name, True).json()["evicted"] is False
    assert outcome(ask()) == "hit-exact"
    told = judge(gateway, name, False)
    assert (told.status_code, told.json()["evicted"]) == (200, True)
    again = ask()
    assert outcome(again) == "miss"
    assert content(again) != content(first)


def id_of(response: httpx.Response) -> str:
    text = response.text.removeprefix("data: ").split("\n")[0]
    return str(json.loads(text)["id"])


def test_a_generated_answer_is_judged_too(gateway: Server) -> None:
    answer = chat(gateway.url, "Name a mountain.")
    assert judge(gateway, answer.headers["x-request-id"], False).json()["evicted"] is True
    assert outcome(chat(gateway.url, "Name a mountain.")) == "miss"
    assert judge(gateway, chat(gateway.url, "Two.", n=2).headers["x-request-id"], False).json()["evicted"] is False


@pytest.mark.parametrize(("fault", "stream"), [("tool-call", False), ("no-done", True)])
def test_an_answer_that_was_not_stored_evicts_no_other(gateway: Server, stub: Server, fault: str, stream: bool) -> None:
    ask = partial(chat, gateway.url, f"Name a glacier, {fault}.", stream=stream)
    ask()
    httpx.post(f"{stub.url}/stub", json={"fault": fault}).raise_for_status()
    other = ask(headers={"x-fingerpost-cache-control": "no-cache"})
    httpx.post(f"{stub.url}/stub", json={"fault": "none"}).raise_for_status()
    assert judge(gateway, other.headers["x-request-id"], False).json()["evicted"] is False
    assert outcome(ask()) == "hit-exact"


def test_a_bad_answer_by_meaning_leaves_the_cache(gateway: Server) -> None:
    first = chat(gateway.url, "What is the name of the highest mountain?")
    close = chat(gateway.url, "What is the highest mountain the name of?")
    assert outcome(close) == "hit-semantic"
    told = judge(gateway, close.headers["x-request-id"], False).json()
    assert (told["evicted"], told["recorded"]) == (True, False)
    assert outcome(chat(gateway.url, "What is the name of the highest mountain?")) == "miss"
    assert content(first) == content(close)


def test_another_tenant_judges_nothing(gateway: Server) -> None:
    answer = chat(gateway.url, "Name a lake.")
    stranger = judge(gateway, answer.headers["x-request-id"], False, tenant="somebody-else")
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "answer_not_found")
    assert outcome(chat(gateway.url, "Name a lake.")) == "hit-exact"


def test_a_cache_that_is_down_is_told(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> None:
    changes = {
        "triton": stub_triton,
        "models": models(stub.url),
        "policy": {"rules": [], "default": "smollm2-small"},
        "feedback": {"record": True},
    }
    gateway = start_gateway(changes, {"connection": {"port": 9}})
    answer = chat(gateway.url, "Name a glacier.")
    assert judge(gateway, answer.headers["x-request-id"], True).json()["recorded"] is True
    told = judge(gateway, answer.headers["x-request-id"], False)
    assert (told.status_code, told.json()["error"]["code"]) == (503, "part_unavailable")
    assert len(read_rows(gateway.log.parent / FILE)) == 1


def test_bad_feedback_gets_a_clear_400(gateway: Server) -> None:
    response = httpx.post(f"{gateway.url}/v1/feedback", json={"id": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "good")


def test_prompts_are_written_only_where_that_is_wanted(gateway: Server) -> None:
    answer = chat(gateway.url, "Name a waterfall.")
    recorded = judge(gateway, answer.headers["x-request-id"], True).json()["recorded"]
    path = gateway.log.parent / FILE
    assert path.exists() == recorded
    if recorded:
        assert read_rows(path)[-1].text == "Name a waterfall."
    assert "waterfall" not in gateway.log.read_text()
    assert 'feedback_total{verdict="good"}' in httpx.get(f"{gateway.url}/metrics").text
