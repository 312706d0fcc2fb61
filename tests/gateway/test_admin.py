"""What operators ask of the cache, over HTTP and by `warm` and `export`: of one worker, of two, of two gateways."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import orjson
import pytest
from starlette.types import Scope

from gateway import __main__
from gateway.admin import parse_selection
from gateway.admission import check_operator
from gateway.cache import Selection
from gateway.config import Listen
from gateway.errors import BadRequest, NotAllowed, PartUnavailable
from gateway.openapi import DOCUMENT
from gateway.request import question_key
from gateway.rows import entry_of, pair, restored, with_embedding
from gateway.siblings import Siblings
from gateway.tenants import digest
from gateway.transfer import CROWDED_ROWS, Line, batches, lines, main
from tests.conftest import (
    ROOT,
    Part,
    Server,
    StartGateway,
    Tree,
    before_stubs,
    content,
    free_port,
    merged,
    models,
    wait_until,
)
from tests.gateway.test_openapi import check

ADMIN = "/admin/cache"
KEY = "fp-of-operators"
SOMEBODY = hashlib.sha256(b"Bearer test-token").hexdigest()
NOBODY = {"x-fingerpost-cache-control": "no-store"}  # who asks leaves nothing behind
MOUNTAIN = "What is the name of the highest mountain?"
SAME_MOUNTAIN = "What is the highest mountain the name of?"
OTHER_MOUNTAIN = "What is not the name of the highest mountain?"
CONNECTIONS = 10  # of which, if there are two workers, each has one at least
CLIENT = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0), timeout=60)  # noqa: S501 (no TLS)

# Reading what is given


def test_a_selection() -> None:
    assert parse_selection(b'{"tenant": "a"}') == Selection(tenant="a")
    assert parse_selection(b'{"model": "m", "scope": "s", "tenant": null}') == Selection(model="m", scope="s")


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", None),
        (b'{"tenant": null}', None),
        (b'{"tenant": 1}', "tenant"),
        (b'{"key": "a"}', "key"),
        (b'{"tenant": "a", "all": true}', "all"),
    ],
)
def test_what_selects_nothing_is_refused(raw: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        parse_selection(raw)
    assert raised.value.param == param


SCOPE = "5" * 64
ROW: Tree = {
    "key": question_key(SCOPE, "How deep?"),
    "scope": SCOPE,
    "tenant": "t",
    "question": "How deep?",
    "answer": {
        "model": "m",
        "message": {"role": "assistant", "content": "1 m"},
        "finish_reason": "stop",
        "usage": None,
    },
    "origin": {"model": "m", "rule": "default", "category": None, "complexity": 0.5},
    "created_at": 1.0,
    "expires_at": 4e9,
}


def test_an_entry_is_put_back_as_it_was_but_anew() -> None:
    entry = restored(ROW, 2e9)
    assert (entry.created_at, entry.expires_at) == (2e9, 4e9)
    assert entry_of(orjson.loads(orjson.dumps(with_embedding(entry)))).answer == entry.answer
    assert (entry.key, entry.origin.complexity, entry.answer.message["content"]) == (ROW["key"], 0.5, "1 m")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"expires_at": 1e9}, "expires_at"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": True}, "expires_at"),
        ({"created_at": None}, "created_at"),
        ({"question": "How wide?"}, "key"),
        ({"scope": "5"}, "key"),
        ({"tenant": None}, "tenant"),
        ({"embedding": []}, "embedding"),
        ({"answer": {**ROW["answer"], "message": "1 m"}}, "answer.message"),
        ({"answer": {**ROW["answer"], "id": "1"}}, "id"),
        ({"origin": {**ROW["origin"], "model": "m\r\nx: y"}}, "origin.model"),
        ({"origin": {**ROW["origin"], "rule": ""}}, "origin.rule"),
        ({"origin": {**ROW["origin"], "complexity": "high"}}, "origin.complexity"),
    ],
)
def test_what_is_no_entry_is_not_put_back(changes: Tree, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        restored({**ROW, **changes}, 2e9)
    assert raised.value.param == param


def test_a_pair_asks_after_the_messages_that_it_is_given() -> None:
    system = {"role": "system", "content": "Be brief."}
    given = pair({"question": "Q", "answer": "A", "request": {"model": "m", "messages": [system]}})
    assert given.body == {"model": "m", "messages": [system, {"role": "user", "content": "Q"}]}
    assert pair({"question": "Q", "answer": "A"}).body["model"] == "auto"


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ({"answer": "A"}, "question"),
        ({"question": "Q"}, "answer"),
        ({"question": "Q", "answer": " "}, "answer"),
        ({"question": "Q", "answer": "A" * (1024 * 1024 + 1)}, "answer"),
        ({"question": "Q", "answer": "A", "ttl_seconds": 0}, "ttl_seconds"),
        ({"question": "Q", "answer": "A", "ttl": 1}, "ttl"),
        ({"question": "Q", "answer": "A", "request": []}, "request"),
        ({"question": "Q", "answer": "A", "tenant": 1}, "tenant"),
    ],
)
def test_what_is_no_pair_is_named(row: Tree, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        pair(row)
    assert raised.value.param == param


# Workers


def test_a_question_to_the_others_and_its_answers_may_be_long(tmp_path: Path) -> None:
    long = "ä" * 3_000_000

    async def doubled(given: str) -> str:
        return 2 * given

    async def down(given: None) -> None:
        raise PartUnavailable("it is down")

    async def broken(given: None) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        first, second, _ = (Siblings(tmp_path, i, 3) for i in range(3))  # of which the last does not run
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        answers: dict[str, Any] = {"doubled": doubled, "down": down, "broken": broken}
        async with second.answering(lambda: answers):
            assert [each async for each in first.ask("doubled", long)] == [2 * long]
            for name, words in (("down", "it is down"), ("broken", "another worker has ended or failed")):
                with pytest.raises(PartUnavailable, match=words):
                    _ = [each async for each in first.ask(name)]
        assert [each async for each in first.ask("doubled", long)] == []

    asyncio.run(run())


# Who may ask

Operators = dict[str, str]
OPERATIONS = [
    (path, method) for path, item in DOCUMENT["paths"].items() if path.startswith("/admin/") for method in item
]


def request(gateway: Server, method: str, path: str, **given: Any) -> httpx.Response:
    return CLIENT.request(method, gateway.url + path, **given)


def chat(url: str, text: str, **fields: Any) -> httpx.Response:
    """As that of conftest, on a connection of its own, which costs less this way."""
    headers = {**bearer(fields.pop("tenant", "test-token")), **fields.pop("headers", {})}
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], **fields}
    return CLIENT.post(f"{url}/v1/chat/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def guarded(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    """A gateway with tenants and a key of operators."""
    tenants = [
        {"name": "search", "key_sha256": [digest("fp-search")]},
        {"name": "shop", "key_sha256": [digest("fp-shop")], "models": ["smollm2-small"]},
    ]
    changes = {"listen": {"admin_key_sha256": digest(KEY)}, "tenants": tenants}
    return start_gateway(merged(before_stubs(stub.url, stub_triton), changes))


def test_there_are_operations() -> None:
    assert len(OPERATIONS) == 8


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_operators_alone_may_ask(guarded: Server, path: str, method: str) -> None:
    where = path.replace("{key}", "0" * 64)
    for headers in ({}, bearer("fp-search"), bearer("fp-wrong"), {"x-api-key": "fp-wrong"}):
        refused = request(guarded, method, where, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        check(path, method, refused)
    assert request(guarded, method, where, headers=bearer(KEY)).status_code in (200, 400, 404)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("allow_anonymous", [False, True])
def test_without_a_key_this_machine_alone_may_ask(allow_anonymous: bool) -> None:
    listen = Listen(allow_anonymous=allow_anonymous)

    def asking(client: str, *headers: tuple[bytes, bytes]) -> Scope:
        return {"type": "http", "path": f"{ADMIN}/flush", "client": (client, 5), "headers": list(headers)}

    check_operator(asking("127.0.0.1"), listen)
    for scope in (
        asking("10.0.0.5"),
        asking("127.0.0.1", (b"x-forwarded-for", b"10.0.0.5")),
        asking("127.0.0.1", (b"origin", b"https://example.com")),
    ):
        with pytest.raises(NotAllowed):
            check_operator(scope, listen)


# One worker, and two


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def gateway(request: pytest.FixtureRequest, stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    changes = {"listen": {"workers": request.param}, "semantic_cache": {"similarity_threshold": 0.6}}
    gateway = start_gateway(merged(before_stubs(stub.url, stub_triton), changes))
    wait_until("all workers", lambda: gateway.log.read_text().count("listening on 127.0.0.1") == request.param, 60)
    return gateway


@pytest.fixture
def empty(gateway: Server) -> Server:
    assert request(gateway, "POST", f"{ADMIN}/flush").status_code == 200
    return gateway


def load(gateway: Server, *rows: Tree | str, headers: dict[str, str] | None = None) -> Tree:
    body = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    answer = request(gateway, "POST", f"{ADMIN}/entries", content=body, headers=headers or {})
    assert answer.status_code == 200, answer.text
    check(f"{ADMIN}/entries", "post", answer)
    return dict(answer.json())


def outcomes(gateway: Server, question: str, **fields: Any) -> set[str]:
    """By whichever worker."""
    asked = (chat(gateway.url, question, headers=NOBODY, **fields) for _ in range(CONNECTIONS))
    return {str(answer.headers["x-fingerpost-cache"]) for answer in asked}


def rows(gateway: Server, headers: dict[str, str] | None = None) -> dict[str, Tree]:
    """All entries, by question."""
    found: dict[str, Tree] = {}
    for prefix in "0123456789abcdef":
        answer = request(gateway, "GET", f"{ADMIN}/entries", params={"prefix": prefix}, headers=headers or {})
        assert answer.status_code == 200, answer.text
        check(f"{ADMIN}/entries", "get", answer)
        for line in answer.text.splitlines():
            row = json.loads(line)
            assert row["key"].startswith(prefix)
            assert row["question"] not in found
            found[row["question"]] = row
    return found


def faq(question: str, answer: str = "Galdhøpiggen", **more: Any) -> Tree:
    return {"question": question, "answer": answer, "tenant": SOMEBODY, **more}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.errors.splitlines()


def command(gateway: Server, *arguments: str) -> Done:
    """In this process, which is faster."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main([*arguments, "--url", gateway.url])
    return Done(status, errors.getvalue())


def process(gateway: Server, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "gateway", *arguments, "--url", gateway.url]
    return subprocess.run(line, cwd=ROOT, capture_output=True, check=False, timeout=300, input=given)


def test_an_faq_goes_in_and_out_and_in_again(empty: Server, tmp_path: Path) -> None:
    pairs, request_file, out = tmp_path / "faq.jsonl", tmp_path / "request.json", tmp_path / "out.jsonl"
    system = {"role": "system", "content": "Be brief."}
    request_file.write_text(json.dumps({"model": "auto", "temperature": 0.5, "messages": [system]}))
    many = [{"question": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(150)]
    pairs.write_text("\n\n".join(json.dumps(row) for row in [{"question": MOUNTAIN, "answer": "Galdhøpiggen"}, *many]))

    def asked(question: str) -> httpx.Response:
        messages = [system, {"role": "user", "content": question}]
        body = {"model": "auto", "temperature": 0.5, "messages": messages}
        headers = {**bearer("test-token"), **NOBODY}
        return CLIENT.post(f"{empty.url}/v1/chat/completions", json=body, headers=headers)

    def seen(question: str) -> set[str]:
        return {asked(question).headers["x-fingerpost-cache"] for _ in range(CONNECTIONS)}

    warmed = command(empty, "warm", str(pairs), "--request", str(request_file), "--tenant", SOMEBODY)
    assert (warmed.status, warmed.lines) == (0, ["100 stored, 0 not stored", "151 stored, 0 not stored"])
    assert seen(MOUNTAIN) == {"hit-exact"}
    assert seen(SAME_MOUNTAIN) == {"hit-semantic"}
    assert content(asked(SAME_MOUNTAIN)) == "Galdhøpiggen"
    assert asked(MOUNTAIN).headers["x-fingerpost-model"] == "faq"
    assert seen(OTHER_MOUNTAIN) == {"miss"}
    assert outcomes(empty, MOUNTAIN) == {"miss"}  # in another scope: without the system prompt

    exported = command(empty, "export", str(out))
    assert (exported.status, exported.lines[-1]) == (0, "151 written, all there were")
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["question"] for row in written} == {MOUNTAIN, *(row["question"] for row in many)}
    assert len(written) == 151
    assert list(tmp_path.glob("*.part")) == []

    assert request(empty, "POST", f"{ADMIN}/flush").json()["purged"] >= 151
    assert (seen(MOUNTAIN), seen(SAME_MOUNTAIN), rows(empty)) == ({"miss"}, {"miss"}, {})
    again = command(empty, "warm", str(out))
    assert again.status == 0, again.errors
    assert (seen(MOUNTAIN), seen(SAME_MOUNTAIN)) == ({"hit-exact"}, {"hit-semantic"})
    by_question = {row["question"]: row for row in written}
    assert {**rows(empty)[MOUNTAIN], "created_at": 0} == {**by_question[MOUNTAIN], "created_at": 0}
    assert "mountain" not in empty.log.read_text()


def test_statistics(empty: Server) -> None:
    def told() -> Tree:
        answer = request(empty, "GET", ADMIN)
        check(ADMIN, "get", answer)
        return dict(answer.json())

    before = told()
    workers = empty.log.read_text().count("listening on 127.0.0.1")
    assert (before["backend"], before["caches"], before["entries"]) == ("memory", workers, 0)
    load(empty, faq(MOUNTAIN))
    hits = [chat(empty.url, MOUNTAIN) for _ in range(CONNECTIONS)]
    assert {hit.headers["x-fingerpost-cache"] for hit in hits} == {"hit-exact"}
    chat(empty.url, "What is a fjord?")
    after = told()
    assert after["entries"] == workers + 1
    assert after["by_model"] == {"faq": workers, "smollm2-large": 0, "smollm2-small": 1}
    assert after["outcomes"]["hit-exact"] - before["outcomes"].get("hit-exact", 0) == CONNECTIONS
    assert after["outcomes"]["miss"] - before["outcomes"].get("miss", 0) == 1
    assert after["thresholds"] == {"max_error_rate": 0.01, "score": 1.0, "similarity": 0.6}
    assert after["limits"] == {"rows": 256, "bytes": 4 * 1024 * 1024}


def look_up(gateway: Server, question: str, tenant: str | None = SOMEBODY, **fields: Any) -> httpx.Response:
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], **fields}
    answer = request(gateway, "POST", f"{ADMIN}/lookup", json={"request": body, "tenant": tenant})
    check(f"{ADMIN}/lookup", "post", answer)
    return answer


def test_a_look_up_says_what_the_cache_would_do(empty: Server, stub: Server) -> None:
    answer = chat(empty.url, MOUNTAIN)  # in one of the caches
    received = len(httpx.get(f"{stub.url}/stub").json()["received"])
    for _ in range(4):
        exact = look_up(empty, MOUNTAIN).json()
        assert (exact["eligible"], exact["reason"]) == (True, None)
        assert exact["exact"]["answer"]["message"]["content"] == content(answer)
        assert exact["exact"]["key"] == exact["key"]
        near = look_up(empty, SAME_MOUNTAIN).json()
        assert (near["exact"], near["scope"]) == (None, exact["scope"])
        (candidate,) = near["candidates"]
        assert (candidate["key"], candidate["question"], candidate["served"]) == (exact["key"], MOUNTAIN, True)
        assert candidate["similarity"] == pytest.approx(1)
        assert candidate["score"] == pytest.approx(3)
        assert candidate["probability"] == pytest.approx(0.9526, abs=1e-3)
    (other,) = look_up(empty, OTHER_MOUNTAIN).json()["candidates"]
    assert (other["served"], other["score"] < 0) == (False, True)
    assert look_up(empty, "Who painted it?").json()["candidates"] == []
    assert look_up(empty, MOUNTAIN, hashlib.sha256(b"").hexdigest()).json()["exact"] is None
    assert look_up(empty, MOUNTAIN, temperature=0.1).json()["exact"] is None
    several = look_up(empty, MOUNTAIN, n=2).json()
    assert (several["eligible"], several["reason"], several["exact"]) == (False, "n is not 1", None)
    assert len(httpx.get(f"{stub.url}/stub").json()["received"]) == received
    assert chat(empty.url, SAME_MOUNTAIN, headers=NOBODY).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "request"),
        ({"request": []}, 400, "request"),
        ({"request": {"model": "auto"}, "tenant": SOMEBODY}, 400, "messages"),
        ({"request": {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}}, 400, "tenant"),
        ({"request": {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}, "tenant": "x"}, 400, "tenant"),
        ({"request": {}, "tenants": "x"}, 400, "tenants"),
        (
            {"request": {"model": "gpt-17", "messages": [{"role": "user"}]}, "tenant": SOMEBODY},
            400,
            "messages[0].content",
        ),
    ],
)
def test_a_bad_look_up_is_refused(gateway: Server, body: Tree, status: int, param: str) -> None:
    answer = request(gateway, "POST", f"{ADMIN}/lookup", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    check(f"{ADMIN}/lookup", "post", answer)


def test_an_unknown_model_is_not_looked_up(gateway: Server) -> None:
    answer = look_up(gateway, "Hi", model="gpt-17")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_one_entry_is_shown_and_deleted(empty: Server) -> None:
    chat(empty.url, MOUNTAIN)
    chat(empty.url, "What is a fjord?")
    key = look_up(empty, MOUNTAIN).json()["key"]
    where = f"{ADMIN}/entries/{key}"
    for _ in range(6):
        shown = request(empty, "GET", where)
        assert shown.json()["question"] == MOUNTAIN
        check(f"{ADMIN}/entries/{{key}}", "get", shown)
    for _ in range(2):
        deleted = request(empty, "DELETE", where)
        assert (deleted.status_code, deleted.json()) == (200, {"deleted": True})
    gone = request(empty, "GET", where)
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "key")
    check(f"{ADMIN}/entries/{{key}}", "get", gone)
    assert set(rows(empty)) == {"What is a fjord?"}
    assert outcomes(empty, MOUNTAIN) == {"miss"}
    for key in ("purge", "0" * 63, "A" * 64):
        for method in ("GET", "DELETE"):
            assert request(empty, method, f"{ADMIN}/entries/{key}").status_code == 400


@pytest.mark.parametrize("prefix", ["", "123456789", "x", "A", None])
def test_a_bad_prefix_is_refused(gateway: Server, prefix: str | None) -> None:
    answer = request(gateway, "GET", f"{ADMIN}/entries", params={"prefix": prefix} if prefix is not None else {})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prefix")


def test_some_are_purged(empty: Server) -> None:
    def purge(**which: str) -> int:
        answer = request(empty, "POST", f"{ADMIN}/purge", json=which)
        check(f"{ADMIN}/purge", "post", answer)
        return int(answer.json()["purged"])

    workers = empty.log.read_text().count("listening on 127.0.0.1")
    other = hashlib.sha256(b"Bearer other").hexdigest()
    load(empty, faq("A?"), faq("B?"), faq("C?", request={"model": "smollm2-small"}), faq("D?", tenant=other))
    chat(empty.url, "E?")
    found = rows(empty)
    assert set(found) == {"A?", "B?", "C?", "D?", "E?"}
    assert purge(tenant="nobody") == 0
    assert set(rows(empty)) == {"A?", "B?", "C?", "D?", "E?"}
    assert purge(scope=found["C?"]["scope"]) == workers
    assert set(rows(empty)) == {"A?", "B?", "D?", "E?"}
    assert purge(model="smollm2-small", tenant=other) == 0
    assert purge(model="smollm2-small") == 1
    assert set(rows(empty)) == {"A?", "B?", "D?"}
    assert purge(tenant=other) == workers
    assert set(rows(empty)) == {"A?", "B?"}
    assert outcomes(empty, "A?") == {"hit-exact"}
    assert outcomes(empty, "D?", tenant="other") == {"miss"}
    refused = request(empty, "POST", f"{ADMIN}/purge", json={"user": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")
    assert set(rows(empty)) == {"A?", "B?"}


def test_what_is_not_stored_is_named_by_its_line(empty: Server, tmp_path: Path) -> None:
    given: list[Tree | str] = [
        faq("A?"),
        "",
        "{",
        faq("B?", tenant="search"),
        {"question": "C?", "answer": "c"},
        faq("What is the weather today?"),
        faq("D? " * 300),
        faq("E?", request={"model": "gpt-17"}),
        faq("F?", request={"model": "auto", "n": 2}),
        faq("G?", ttl_seconds=10**9),
        {**ROW, "expires_at": time.time() - 1},
        {**ROW, "expires_at": time.time() + 100},
        faq("H?", request={"model": "auto", "messages": [{"role": 1}]}),
    ]
    told = load(empty, *given)
    assert told["stored"] == 2
    reasons = {each["line"]: each["reason"] for each in told["skipped"]}
    words = {
        3: "not valid JSON",
        4: "SHA-256",
        5: "SHA-256",
        6: "it would not be replayed: the answer depends on when it is given",
        7: "longer than the models read",
        8: "'gpt-17' does not exist",
        9: "it would not be replayed: n is not 1",
        10: "ttl_seconds is more than the 3600",
        11: "it has expired",
        13: "messages[0].role is not a string",
    }
    assert reasons.keys() == words.keys()
    for line, expected in words.items():
        assert expected in reasons[line]
    assert set(rows(empty)) == {"A?", "How deep?"}

    file = tmp_path / "faq.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in given))
    warmed = command(empty, "warm", str(file))
    assert warmed.status == 1
    said = warmed.lines
    assert [line.removeprefix(f"{file}:").partition(":")[0] for line in said[:-1]] == [str(i) for i in words]
    assert said[-1] == "2 stored, 10 not stored"


def test_a_time_to_live_is_kept_to(empty: Server) -> None:
    load(empty, faq("A?", ttl_seconds=2), faq("B?"))
    now = time.time()
    found = rows(empty)
    assert found["A?"]["expires_at"] == pytest.approx(now + 2, abs=1.5)
    assert found["B?"]["expires_at"] == pytest.approx(now + 3600, abs=2)
    wait_until("the first to expire", lambda: set(rows(empty)) == {"B?"}, 10)


def test_too_much_at_once_is_refused(gateway: Server) -> None:
    row = json.dumps(faq("A?")) + "\n"
    for body, status in ((257 * row, 400), ("", 400), ("\n \n", 400), (" " * 5_000_000, 413)):
        answer = request(gateway, "POST", f"{ADMIN}/entries", content=body)
        assert answer.status_code == status
        check(f"{ADMIN}/entries", "post", answer)


def test_methods_and_paths_that_are_not_there(gateway: Server) -> None:
    assert request(gateway, "GET", "/admin/other").status_code == 404
    for method, path in (("POST", ADMIN), ("PUT", f"{ADMIN}/entries"), ("POST", f"{ADMIN}/entries/{'0' * 64}")):
        assert request(gateway, method, path).status_code == 405
    assert request(gateway, "HEAD", ADMIN).status_code == 200


# What looking does not change


def test_looking_is_not_using(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> None:
    cache = {"semantic_cache": {"eviction_policy": "lru", "max_entries": 2}}
    gateway = start_gateway(merged(before_stubs(stub.url, stub_triton), cache))
    chat(gateway.url, "A?")
    chat(gateway.url, "B?")
    key = look_up(gateway, "A?").json()["key"]
    assert request(gateway, "GET", f"{ADMIN}/entries/{key}").status_code == 200
    rows(gateway)
    chat(gateway.url, "C?")
    assert set(rows(gateway)) == {"B?", "C?"}


# Whose answers they are


def test_tenants_are_told_by_name(guarded: Server) -> None:
    told = load(
        guarded,
        faq("A?", tenant="search"),
        faq("B?", tenant="shop"),
        faq("B?", tenant="shop", request={"model": "smollm2-small"}),
        faq("C?", tenant="nobody"),
        {"question": "D?", "answer": "d"},
        headers=bearer(KEY),
    )
    assert told["stored"] == 2
    reasons = {each["line"]: each["reason"] for each in told["skipped"]}
    assert reasons == {
        2: "tenant 'shop' may not use the model 'auto'",
        4: "tenant must be one of search, shop",
        5: "tenant must be one of search, shop",
    }
    assert outcomes(guarded, "A?", tenant="fp-search") == {"hit-exact"}
    assert outcomes(guarded, "B?", tenant="fp-shop", model="smollm2-small") == {"hit-exact"}
    assert outcomes(guarded, "B?", tenant="fp-search", model="smollm2-small") == {"miss"}
    purged = request(guarded, "POST", f"{ADMIN}/purge", json={"tenant": "search"}, headers=bearer(KEY))
    assert purged.json() == {"purged": 1}
    assert outcomes(guarded, "A?", tenant="fp-search") == {"miss"}
    assert outcomes(guarded, "B?", tenant="fp-shop", model="smollm2-small") == {"hit-exact"}


def test_the_key_of_the_commands_is_in_the_environment(
    guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faq.jsonl"
    file.write_text(json.dumps(faq("How high?", tenant="search")))
    for name, key, arguments, status in (
        ("OTHER", KEY, (), 1),
        ("FINGERPOST_ADMIN_KEY", "fp-wrong", (), 1),
        ("FINGERPOST_ADMIN_KEY", KEY, (), 0),
        ("OTHER", KEY, ("--key-env", "OTHER"), 0),
    ):
        monkeypatch.setenv(name, key)
        done = command(guarded, "warm", str(file), *arguments)
        assert done.status == status, done.errors
        assert ("the gateway answers 401: " in done.errors) == (status == 1)
    assert outcomes(guarded, "How high?", tenant="fp-search") == {"hit-exact"}


@pytest.mark.parametrize("named", [False, True], ids=["digests", "names"])
def test_answers_of_single_users(stub: Server, stub_triton: Tree, start_gateway: StartGateway, named: bool) -> None:
    tenants = [{"name": "search", "key_sha256": [digest("fp-search")]}] if named else []
    changes: Tree = {"semantic_cache": {"scope": "user"}, "tenants": tenants}
    gateway = start_gateway(merged(before_stubs(stub.url, stub_triton), changes))
    if named:
        (skipped,) = load(gateway, faq("A?", tenant="search"))["skipped"]
        assert "semantic_cache.scope is user" in skipped["reason"]
        return
    load(gateway, faq("A?"), faq("B?", request={"model": "auto", "user": "u"}))
    assert outcomes(gateway, "A?") == {"hit-exact"}
    assert outcomes(gateway, "B?") == {"miss"}
    assert outcomes(gateway, "B?", user="u") == {"hit-exact"}


def test_answers_for_all(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> None:
    gateway = start_gateway(merged(before_stubs(stub.url, stub_triton), {"semantic_cache": {"scope": "global"}}))
    assert load(gateway, {"question": "A?", "answer": "a"})["stored"] == 1
    assert outcomes(gateway, "A?", tenant="whoever") == {"hit-exact"}
    assert look_up(gateway, "A?", None).json()["exact"]["tenant"] == ""


def test_an_alias_whose_rules_change_requests_is_not_warmed(
    stub: Server, stub_triton: Tree, start_gateway: StartGateway
) -> None:
    rule = {"name": "brief", "when": {"category": ["math"]}, "model": "smollm2-small", "max_tokens": 50}
    changes = {"policy": {"rules": [rule], "default": "smollm2-small"}}
    gateway = start_gateway(merged(before_stubs(stub.url, stub_triton), changes))
    told = load(gateway, faq("A?"), faq("A?", request={"model": "smollm2-small"}))
    assert told["stored"] == 1
    (skipped,) = told["skipped"]
    assert (skipped["line"], "rules of auto change what is asked" in skipped["reason"]) == (1, True)
    chat(gateway.url, "What is math?")
    looked = look_up(gateway, "What is math?").json()  # in the scope of what the rule made of it
    assert looked["exact"]["origin"]["rule"] == "brief"
    assert look_up(gateway, "What is maths?").json()["scope"] != looked["scope"]


# What does not answer


def test_without_a_cache_or_triton_operators_are_told(
    stub: Server, stub_triton: Tree, start_gateway: StartGateway
) -> None:
    without = start_gateway(merged(before_stubs(stub.url, stub_triton), {"semantic_cache": {"enabled": False}}))
    for path, method in OPERATIONS:
        where, body = path.replace("{key}", "0" * 64), {"request": {"model": "auto"}}
        answer = request(without, method, where, params={"prefix": "0"}, json=body if "lookup" in path else faq("A?"))
        assert answer.status_code == (400 if path.endswith(("purge", "lookup")) else 503), path
        check(path, method, answer)
    deaf = start_gateway(merged(before_stubs(stub.url, stub_triton), {"triton": {"address": "127.0.0.1:9"}}))
    refused = request(deaf, "POST", f"{ADMIN}/entries", content=json.dumps(faq("A?")))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "part_unavailable")
    looked = look_up(deaf, "A?").json()
    assert (looked["eligible"], looked["reason"]) == (False, "the prompt could not be read: Triton is down")


def test_a_gateway_that_does_not_answer(tmp_path: Path) -> None:
    nobody = Server(f"http://127.0.0.1:{free_port()}", subprocess.Popen(["true"]), tmp_path)
    (tmp_path / "in.jsonl").write_text("{}")
    for arguments in (("warm", str(tmp_path / "in.jsonl")), ("export", str(tmp_path / "out.jsonl"))):
        done = command(nobody, *arguments)
        assert (done.status, "the gateway does not answer" in done.errors) == (1, True)
    assert not (tmp_path / "out.jsonl").exists()
    missing = command(nobody, "warm", str(tmp_path / "none.jsonl"))
    assert (missing.status, "none.jsonl: No such file" in missing.errors) == (1, True)


# The commands


def test_lines_are_completed_where_they_say_nothing() -> None:
    given = [b'{"question": "A"}\n', b"\n", b'{"question": "B", "tenant": "b"}\n', b'{"scope": "s"}\n', b"{\n"]
    found = list(lines(iter(given), {"model": "m"}, "t"))  # type: ignore[arg-type]
    assert [line.number for line in found] == [1, 3, 4, 5]
    assert orjson.loads(found[0].text) == {"question": "A", "request": {"model": "m"}, "tenant": "t"}
    assert orjson.loads(found[1].text) == {"question": "B", "request": {"model": "m"}, "tenant": "b"}
    assert [line.text for line in found[2:]] == [b'{"scope": "s"}', b"{"]


def test_batches_are_of_as_many_rows_and_bytes_as_are_taken() -> None:
    given = [Line(i, b"x" * size) for i, size in enumerate([1, 1, 1, 20, 3, 3], 1)]
    found = [[line.number for line in batch] for batch in batches(iter(given), 2, 8)]
    assert found == [[1, 2], [3], [4], [5, 6]]


def test_the_commands_are_those_of_the_gateway(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINGERPOST_ADMIN_KEY", KEY)
    given = json.dumps(faq("How deep?", tenant="search")).encode()
    warmed = process(guarded, "warm", "-", given=given)
    assert (warmed.returncode, warmed.stderr) == (0, b"1 stored, 0 not stored\n")
    exported = process(guarded, "export", "-")
    assert exported.returncode == 0
    assert "How deep?" in [json.loads(line)["question"] for line in exported.stdout.splitlines()]
    monkeypatch.setattr(sys, "argv", ["gateway", "--config", "x", "warm"])
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
        __main__.main()
    assert "warm comes first" in errors.getvalue()


@pytest.fixture
def crowded() -> Iterator[tuple[str, list[str], list[str]]]:
    """The address of a server with many entries, their rows, and the prefixes it was asked for."""
    keys = [f"ab{i % 16:x}{i:061x}" for i in range(CROWDED_ROWS)] + [f"0c{i:062x}" for i in range(9)]
    held, asked = [f'{{"key":"{key}"}}' for key in keys], []

    class Crowded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            prefix = parse_qs(urlsplit(self.path).query)["prefix"][0]
            asked.append(prefix)
            body = "".join(f"{row}\n" for row in held if row.startswith(f'{{"key":"{prefix}')).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Crowded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", held, asked
        server.shutdown()


def test_where_entries_are_many_they_are_asked_for_by_longer_prefixes(
    crowded: tuple[str, list[str], list[str]], tmp_path: Path
) -> None:
    url, held, asked = crowded
    done = command(Server(url, subprocess.Popen(["true"]), tmp_path), "export", str(tmp_path / "out.jsonl"))
    assert done.status == 0, done.errors
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines()) == sorted(held)
    assert len(asked) == 256 + 16
    assert {prefix for prefix in asked if len(prefix) > 2} == {f"ab{digit:x}" for digit in range(16)}


# Gateways that share a Milvus


def outcome(gateway: Server, question: str) -> str:
    return str(chat(gateway.url, question, headers=NOBODY).headers["x-fingerpost-cache"])


def sees(gateway: Server, question: str, expected: str) -> Callable[[], bool]:
    return lambda: outcome(gateway, question) == expected


def told(gateway: Server, method: str, path: str, **given: Any) -> httpx.Response:
    """Sent again, as the answer says, while Milvus does not answer in time on a machine that is busy."""
    answers: list[httpx.Response] = []

    def is_taken() -> bool:
        answers.append(request(gateway, method, path, **given))
        return answers[-1].status_code != 503

    wait_until(f"{method} {path}", is_taken, 60)
    return answers[-1]


def held(gateway: Server) -> int:
    return int(told(gateway, "GET", ADMIN).json()["entries"])


def does(gateway: Server, *arguments: str) -> Callable[[], bool]:
    return lambda: command(gateway, *arguments).status == 0


def test_a_purge_reaches_other_gateways(
    killable_milvus: tuple[Part, int], stub: Server, stub_triton: Tree, start_gateway: StartGateway, tmp_path: Path
) -> None:
    collection = {"name": f"admin_{tmp_path.name}".replace("-", "_")}
    milvus = {"connection": {"port": killable_milvus[1]}, "collection": collection}
    stubs = {
        **before_stubs(stub.url, stub_triton),
        "models": models(stub.url),
        "semantic_cache": {"backend_type": "milvus"},
    }
    one, other = start_gateway(stubs, milvus), start_gateway(stubs, milvus)
    for each in (one, other):
        wait_until("the cache", lambda each=each: request(each, "GET", "/ready").status_code == 200, 60)  # type: ignore[misc]
    assert load(one, *(faq(f"What is {i}?", str(i)) for i in range(5)), faq(MOUNTAIN))["stored"] == 6

    wait_until("the other to find it", sees(other, MOUNTAIN, "hit-exact"), 60)
    wait_until("it to be found by meaning", sees(other, SAME_MOUNTAIN, "hit-semantic"), 60)

    wait_until("all to be there", lambda: held(other) == 6, 60)
    statistics = told(other, "GET", ADMIN).json()
    assert (statistics["backend"], statistics["caches"]) == ("milvus", 1)
    asked = {"request": {"model": "auto", "messages": [{"role": "user", "content": SAME_MOUNTAIN}]}, "tenant": SOMEBODY}
    looked = told(other, "POST", f"{ADMIN}/lookup", json=asked).json()
    assert [candidate["question"] for candidate in looked["candidates"] if candidate["served"]] == [MOUNTAIN]

    scope = looked["scope"]
    gone = f"{ADMIN}/entries/{question_key(scope, 'What is 1?')}"
    assert told(other, "GET", gone).status_code == 200
    assert told(other, "DELETE", gone).json() == {"deleted": True}
    wait_until("that to be seen", sees(one, "What is 1?", "miss"), 10)
    assert told(one, "GET", gone).status_code == 404
    wait_until("the rest to be there", sees(one, MOUNTAIN, "hit-exact"), 60)

    out = tmp_path / "out.jsonl"
    wait_until("the export", does(other, "export", str(out)), 120)
    assert len(out.read_text().splitlines()) == 5
    assert told(one, "POST", f"{ADMIN}/purge", json={"tenant": SOMEBODY}).status_code == 200
    for text in (MOUNTAIN, SAME_MOUNTAIN, "What is 2?"):
        wait_until("the purge to be seen", sees(other, text, "miss"), 10)
    wait_until("none to be there", lambda: held(other) == 0, 60)

    wait_until("the warm-up", does(one, "warm", str(out)), 120)
    wait_until("the other to find it again", sees(other, MOUNTAIN, "hit-exact"), 60)
    assert told(other, "POST", f"{ADMIN}/flush").status_code == 200
    for each in (one, other):
        wait_until("all to be forgotten", sees(each, MOUNTAIN, "miss"), 10)
