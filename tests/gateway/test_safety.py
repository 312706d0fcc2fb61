"""What a client, or a model's endpoint, cannot do to the gateway: over sockets, to a gateway with stubs behind it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Scope

from gateway.admission import check_operator, is_from_here
from gateway.config import ConfigError, Listen, load
from gateway.errors import BadRequest, NotAllowed, Unauthenticated
from gateway.limits import MAX_METADATA_BYTES, MAX_VALUES, check, check_raw, nesting, structure
from gateway.tenants import digest
from tests.conftest import (
    PATIENCE_SECONDS,
    Server,
    StartGateway,
    Tree,
    answers,
    before_stubs,
    chat,
    content,
    free_port,
    merged,
    models,
    running,
    shipped,
    wait_until,
)

MARKER = "okapi-17-marmalade"  # of prompts, which no log may have
SECONDS = 2.0  # for a request to arrive, and for a client to read
LISTEN = {"body_timeout_seconds": SECONDS, "write_timeout_seconds": SECONDS, "max_headers": 40, "max_messages": 50}


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        {
            "listen": LISTEN,
            "triton": stub_triton,
            "models": [{**model, "api_key": "upstream-secret"} for model in models(stub.url)],
            "policy": {"rules": [], "default": "smollm2-small"},
            "semantic_cache": {"backend_type": "memory"},
        }
    )


@pytest.fixture(autouse=True)
def healthy_stub(request: pytest.FixtureRequest) -> None:
    if "stub" in request.fixturenames:
        fail(request.getfixturevalue("stub"), "none")


def fail(stub: Server, fault: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault}).raise_for_status()


def told(stub: Server) -> Tree:
    found = httpx.get(f"{stub.url}/stub").json()
    assert isinstance(found, dict)
    return found


@contextlib.contextmanager
def connected(server: Server, receive_buffer: int = 0) -> Iterator[socket.socket]:
    """A client that does only what the test says."""
    with socket.socket() as client:
        client.settimeout(60)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        yield client


def received(client: socket.socket, until: bytes) -> bytes:
    """What comes, up to this end of it."""
    pieces = b""
    while not pieces.endswith(until):
        piece = client.recv(65536)
        assert piece, pieces
        pieces += piece
    return pieces


def everything(client: socket.socket) -> bytes:
    """What comes until the connection ends."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            received += piece
    return received


def status_and_code(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def request(body: bytes = b"", *, path: str = "/v1/chat/completions", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def chat_body(text: str = "What is a gnu?", **fields: Any) -> bytes:
    return json.dumps({"model": "auto", "messages": [{"role": "user", "content": text}], **fields}).encode()


def ended(gateway: Server, reason: str) -> float:
    """How many connections the gateway has ended for this reason."""
    exposition = httpx.get(f"{gateway.url}/metrics").text
    found = re.search(rf'^fingerpost_connections_ended_total{{reason="{reason}"}} (.*)$', exposition, re.MULTILINE)
    return float(found[1]) if found else 0.0


# Headers, both ways


def test_what_reaches_vllm(gateway: Server, stub: Server) -> None:
    headers = {
        "Authorization": "Bearer client-secret",
        "X-Api-Key": "client-secret",
        "Cookie": "session=1",
        "Connection": "x-hop",
        "X-Hop": "1",
        "Proxy-Authorization": "Basic abc",
        "X-Forwarded-For": "10.0.0.1",
        "X-Fingerpost-Model": "another",
        "X-Fingerpost-Cache-Control": "no-store",
        "X-Request-Id": "mine-1",
    }
    assert chat(gateway.url, headers=headers).status_code == 200
    received = told(stub)["received"][-1]["headers"]
    assert received.pop("host") == stub.url.removeprefix("http://")
    assert int(received.pop("content-length")) > 0
    assert received == {
        "authorization": "Bearer upstream-secret",
        "content-type": "application/json",
        "x-request-id": "mine-1",
        "accept": "*/*",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_what_reaches_the_client(gateway: Server, stub: Server, stream: bool) -> None:
    fail(stub, "headers")
    response = chat(gateway.url, "Which headers are mine?", stream=stream, headers={"X-Request-Id": "mine-2"})
    assert response.status_code == 200
    ours = {name: value for name, value in response.headers.items() if name.startswith("x-")}
    assert ours["x-request-id"] == "mine-2"
    assert ours["x-fingerpost-model"] == "smollm2-small"
    assert response.headers.keys() - ours.keys() <= {"content-type", "content-length", "date", "retry-after"}
    assert {"x-secret", "x-ratelimit-remaining-requests"}.isdisjoint(ours)
    assert "upstream-secret" not in str(response.headers)


def test_a_refusal_of_the_gateway_s_own_key_is_not_the_client_s_business(gateway: Server, stub: Server) -> None:
    fail(stub, "status-401")
    response = chat(gateway.url, "May I come in?")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "upstream_unavailable")
    assert "stub says no" not in response.text
    assert "does not take the model's api_key" in gateway.log.read_text()


# Who may see how the gateway is


def scope(client: tuple[str, int] | None, **headers: str) -> Scope:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "path": "/metrics", "client": client, "headers": raw}


@pytest.mark.parametrize(
    ("client", "headers", "expected"),
    [
        (("127.0.0.1", 5), {}, True),
        (("::1", 5), {}, True),
        (("::ffff:127.0.0.1", 5), {}, True),
        (("10.0.0.5", 5), {}, False),
        (("localhost", 5), {}, False),
        (None, {}, False),
        (("127.0.0.1", 5), {"x_forwarded_for": "127.0.0.1"}, False),
        (("127.0.0.1", 5), {"forwarded": "for=127.0.0.1"}, False),
    ],
)
def test_who_is_on_this_machine(client: tuple[str, int] | None, headers: dict[str, str], expected: bool) -> None:
    assert is_from_here(scope(client, **headers)) is expected


def test_who_may_read_the_metrics() -> None:
    here, there = scope(("127.0.0.1", 5)), scope(("10.0.0.5", 5))
    check_operator(here, Listen())
    with pytest.raises(NotAllowed, match=r"listen\.admin_key_sha256"):
        check_operator(there, Listen())
    check_operator(there, Listen(host="::", allow_anonymous=True))
    guarded = Listen(admin_key_sha256=digest("fp-admin"), allow_anonymous=True)
    check_operator(scope(("10.0.0.5", 5), x_api_key="fp-admin"), guarded)
    for asking in (here, scope(("127.0.0.1", 5), x_api_key="fp-tenant")):
        with pytest.raises(Unauthenticated):
            check_operator(asking, guarded)


@pytest.mark.parametrize("path", ["/metrics", "/ready"])
def test_a_proxy_on_this_machine_asks_for_others(gateway: Server, path: str) -> None:
    assert httpx.get(gateway.url + path).status_code == 200
    forwarded = httpx.get(gateway.url + path, headers={"X-Forwarded-For": "10.0.0.5"})
    assert (forwarded.status_code, forwarded.json()["error"]["code"]) == (403, "not_allowed")


# What a body may hold


JSON = st.recursive(
    st.none() | st.integers() | st.text('[]{}",\\ä\n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\,', max_size=3), inner, max_size=3),
)


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@settings(deadline=None)
@given(value=JSON, ascii_only=st.booleans())
def test_the_nesting_is_known_before_parsing(value: Any, ascii_only: bool) -> None:
    assert nesting(structure(json.dumps(value, ensure_ascii=ascii_only).encode())) == depth(value)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_anything_can_be_looked_at(raw: bytes) -> None:
    check_raw(raw * 50, Listen(max_nesting=250))


def test_brackets_in_a_string_are_not_nesting() -> None:
    check_raw(json.dumps({"content": '[{"' * 100_000}).encode(), Listen())


@pytest.mark.parametrize(
    "raw",
    [b"[" * 101 + b"]" * 101, b"[" * 4_000_000, b'{"a":' * 101 + b"1" + b"}" * 101],
    ids=["a little too deep", "megabytes", "objects"],
)
def test_what_is_nested_too_deeply(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="more than 100 deep"):
        check_raw(raw, Listen())


@pytest.mark.parametrize("raw", [b"[" + b"[]," * MAX_VALUES + b"1]", b"[" + b"1," * (MAX_VALUES + 1) + b"1]"])
def test_what_holds_too_many_values(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="250000 values"):
        check_raw(raw, Listen())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m" * 201}, "model"),
        ({"messages": [{}] * 2049}, "messages"),
        ({"input": ["text"] * 2049}, "input"),
        ({"metadata": {"key": "v" * MAX_METADATA_BYTES}}, "metadata"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_that_are_too_long(body: Tree, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check(body, Listen())
    assert caught.value.param == param


def test_what_is_in_bounds_passes() -> None:
    check({"model": "auto", "messages": [{}] * 2048, "metadata": {"user": "u"}}, Listen())
    check({"model": 7, "messages": None, "input": "text", "metadata": None}, Listen())
    check_raw(b"[" * 100 + b"]" * 100, Listen())


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (chat_body(model="m" * 201), 400, "model is longer"),
        (chat_body(messages=[{"role": "user", "content": "Hi"}] * 51), 400, "messages holds more than 50"),
        (chat_body(metadata={"k": "v" * 20_000}), 400, "metadata is longer"),
        (chat_body(tools=json.loads("[" * 120 + "]" * 120)), 400, "nested more than 100 deep"),
        (b"x" * 5_000_000, 413, "longer than 4194304 bytes"),
    ],
    ids=["model", "messages", "metadata", "nesting", "size"],
)
def test_limits_of_a_body_over_http(gateway: Server, body: bytes, status: int, words: str) -> None:
    response = httpx.post(f"{gateway.url}/v1/chat/completions", content=body, timeout=60)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


# What a head may hold, and how long a request may take to arrive


@pytest.mark.parametrize(
    "raw",
    [
        request(more="".join(f"X-{i}: 1\r\n" for i in range(41))),
        request(more=f"X-Long: {'v' * 40_000}\r\n"),
        request(path="/" + "p" * 40_000),
        b"POST / HTTP/1.1\r\nX-Endless: " + b"v" * 300_000,
    ],
    ids=["many", "long", "path", "endless"],
)
def test_a_head_that_is_too_large(gateway: Server, raw: bytes) -> None:
    before = ended(gateway, "headers_too_large")
    with connected(gateway) as client:
        client.sendall(raw)
        assert status_and_code(everything(client)) == (431, "headers_too_large")
    assert ended(gateway, "headers_too_large") == before + 1


def test_forty_headers_are_not_too_many(gateway: Server) -> None:
    with connected(gateway) as client:
        client.sendall(request(chat_body(), more="".join(f"X-{i}: 1\r\n" for i in range(37))))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "raw", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_not_http(gateway: Server, raw: bytes) -> None:
    with connected(gateway) as client:
        client.sendall(raw)
        assert status_and_code(everything(client)) == (400, "invalid_http")


@pytest.mark.parametrize(
    "begun",
    [b"POST /v1/chat", request()[:-2], request(chat_body())[:-5]],
    ids=["in the head", "at its end", "in the body"],
)
def test_a_request_that_does_not_arrive_whole(gateway: Server, begun: bytes) -> None:
    started = time.monotonic()
    with connected(gateway) as client:
        client.sendall(begun)
        assert status_and_code(everything(client)) == (408, "request_timeout")
    assert time.monotonic() - started >= SECONDS * 0.9


def test_a_body_that_comes_in_drops(gateway: Server) -> None:
    body = chat_body("x" * 400)
    with connected(gateway) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(request(body)[: -len(body)])
        for byte in body:
            client.sendall(bytes([byte]))
            time.sleep(0.02)
    with connected(gateway) as client:
        client.sendall(request(body)[: -len(body)])
        deadline = time.monotonic() + 60
        client.settimeout(0.05)
        answer = b""
        while not answer and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                answer = client.recv(65536)
            if not answer:
                client.sendall(b"x")
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed(gateway: Server) -> None:
    with connected(gateway) as client:
        assert everything(client) == b""


def test_a_body_after_its_answer_does_not_hold_the_connection(gateway: Server) -> None:
    head = request(b"x" * 100, path="/v1/nothing")[:-100]
    with connected(gateway) as client:
        client.sendall(head + b"x")
        assert b"404" in received(client, until=b"}}")
        assert everything(client) == b""  # and is closed, though the body never comes
    with connected(gateway) as client:
        client.sendall(head)
        assert b"404" in received(client, until=b"}}")
        client.sendall(b"x" * 100)  # which comes late
        client.sendall(request(chat_body()))
        assert received(client, until=b"}}").startswith(b"HTTP/1.1 200 ")
        assert everything(client) == b""  # and idles until the connection is closed


def test_requests_one_after_another_on_one_connection(gateway: Server) -> None:
    """Longer than a single request may take."""
    with httpx.Client(timeout=60) as client:
        for i in range(6):
            assert client.get(f"{gateway.url}/v1/models").status_code == 200, i
            time.sleep(SECONDS / 4)


def test_requests_sent_at_once_are_answered_in_their_order(gateway: Server) -> None:
    with connected(gateway) as client:
        client.sendall(request(chat_body("First?")) + request(chat_body("Second?"), more="Connection: close\r\n"))
        raw = everything(client)
    assert raw.index(b"First?") < raw.index(b"Second?")
    assert raw.count(b"HTTP/1.1 200 ") == 2


def test_a_head_that_begins_after_a_body_is_not_taken_for_a_large_one(gateway: Server) -> None:
    first, second = request(chat_body("x" * 100_000)), request(chat_body("Second?"), more="Connection: close\r\n")
    with connected(gateway) as client:
        client.sendall(first + second[:20])
        time.sleep(SECONDS / 4)
        client.sendall(second[20:])
        assert everything(client).count(b"HTTP/1.1 200 ") == 2


def test_a_head_that_begins_after_trailers_is_not_taken_for_a_large_one(gateway: Server) -> None:
    """Nor are many small chunks, or trailers that are few."""
    body = chat_body("x" * 10_000)
    chunks = b"".join(b"1;extension=yes\r\n%c\r\n" % byte for byte in body)
    first = chunked() + chunks + b"0\r\nX-Trailer: 1\r\n\r\n"
    second = request(chat_body("Second?"), more="Connection: close\r\n")
    with connected(gateway) as client:
        client.sendall(first + second[:20])
        time.sleep(SECONDS / 4)
        client.sendall(second[20:])
        assert everything(client).count(b"HTTP/1.1 200 ") == 2


# What frames a body


def chunked(path: str = "/v1/chat/completions", *, more: str = "") -> bytes:
    """The head of a request whose body comes in chunks."""
    return f"POST {path} HTTP/1.1\r\nHost: gateway\r\nTransfer-Encoding: chunked\r\n{more}\r\n".encode()


ENDLESS = {
    "a trailer": b"0\r\nX-Endless: " + b"v" * 600_000,
    "trailers": b"0\r\n" + b"X: 1\r\n" * 100_000,
    "an extension": b"5;endless=" + b"v" * 600_000,
}


@pytest.mark.parametrize("frame", ENDLESS.values(), ids=ENDLESS)
def test_what_frames_a_body_is_bounded(gateway: Server, frame: bytes) -> None:
    before = ended(gateway, "headers_too_large")
    with connected(gateway) as client:
        client.sendall(chunked() + b"1\r\n{\r\n" + frame)
        assert status_and_code(everything(client)) == (431, "headers_too_large")
    assert ended(gateway, "headers_too_large") == before + 1


@pytest.mark.parametrize(
    ("rest", "reason"),
    [(frame, "headers_too_large") for frame in ENDLESS.values()] + [(b"no size\r\n", "invalid_http")],
    ids=[*ENDLESS, "not a chunk"],
)
def test_a_body_after_its_answer_does_not_get_a_second_one(gateway: Server, rest: bytes, reason: str) -> None:
    before = ended(gateway, reason)
    with connected(gateway) as client:
        client.sendall(chunked("/v1/nothing") + b"1\r\n{\r\n")
        assert received(client, until=b"}}").startswith(b"HTTP/1.1 404 ")
        with contextlib.suppress(ConnectionError):
            client.sendall(rest)
        assert everything(client) == b""
    assert ended(gateway, reason) == before + 1


def test_trailers_are_not_headers(gateway: Server) -> None:
    with connected(gateway) as client:
        head = chunked(more="Connection: close\r\n")
        body = chat_body("Which headers?")
        trailers = "".join(f"X-{i}: 1\r\n" for i in range(100)) + "X-Request-Id: of-a-trailer\r\n"
        client.sendall(head + b"%x\r\n%b\r\n0\r\n" % (len(body), body) + trailers.encode() + b"\r\n")
        raw = everything(client)
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert b"of-a-trailer" not in raw


# Requests to go on in another protocol


H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nX-Empty:\r\n"


@pytest.mark.parametrize("cut", [None, 0, -1, -2, -3, -4, -30, 5], ids=lambda cut: f"cut at {cut}")
@pytest.mark.parametrize("chunks", [False, True], ids=["length", "chunks"])
def test_a_request_for_http_2_is_served_as_http_1(gateway: Server, chunks: bool, cut: int | None) -> None:
    """As Java's client sends one; in two pieces, cut so far from the end of the head."""
    asked = request(chat_body("First?"), more=H2C)
    if chunks:
        body = chat_body("First?")
        asked = chunked(more=H2C) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    pieces = [asked]
    if cut is not None:
        place = asked.index(b"\r\n\r\n") + 4 + cut
        pieces = [asked[:place], asked[place:]]
    with connected(gateway) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        assert b"First?" in received(client, until=b"}}")
        client.sendall(request(chat_body("Second?")))
        assert b"Second?" in received(client, until=b"}}")


def test_requests_for_http_2_are_answered_in_their_order(gateway: Server) -> None:
    last = H2C.replace("Upgrade,", "close, Upgrade,")
    asked = [request(chat_body(f"Number {i}?"), more=H2C if i < 4 else last) for i in range(5)]
    with connected(gateway) as client:
        client.sendall(b"".join(asked))
        raw = everything(client)  # the last one's `close` is heeded
    assert raw.count(b"HTTP/1.1 ") == raw.count(b"HTTP/1.1 200 ") == 5
    places = [raw.index(f"Number {i}?".encode()) for i in range(5)]
    assert places == sorted(places)


def test_a_request_for_http_2_of_http_1_0_is_the_last(gateway: Server) -> None:
    with connected(gateway) as client:
        client.sendall(request(chat_body("First?"), more=H2C).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        raw = everything(client)
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert b"First?" in raw
    assert raw.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (request(more=H2C + "".join(f"X-{i}: 1\r\n" for i in range(40))), (431, "headers_too_large")),
        (request(more=H2C + f"X-Long: {'v' * 40_000}\r\n"), (431, "headers_too_large")),
        (request(chat_body(), more=H2C)[:-5], (408, "request_timeout")),
        (request(more=H2C)[:-2], (408, "request_timeout")),
        (chunked(more=H2C) + ENDLESS["a trailer"], (431, "headers_too_large")),
        (b"CONNECT gateway:80 HTTP/1.1\r\nHost: gateway\r\n" + H2C.encode() + b"\r\n", (400, "invalid_http")),
    ],
    ids=["many", "long", "body not whole", "head not whole", "trailer", "connect"],
)
def test_a_request_for_http_2_is_bounded_like_others(gateway: Server, raw: bytes, expected: tuple[int, str]) -> None:
    with connected(gateway) as client:
        client.sendall(raw)
        assert status_and_code(everything(client)) == expected


# Clients that leave


@pytest.mark.parametrize("fault", ["silent", "endless"])
def test_a_client_that_has_asked_once_more_and_leaves_is_noticed(gateway: Server, stub: Server, fault: str) -> None:
    fail(stub, fault)
    before = told(stub)
    with connected(gateway) as client:
        client.sendall(request(chat_body("Is anybody there?", stream=fault == "endless")))
        wait_until("the model to be asked", lambda: len(told(stub)["received"]) > len(before["received"]))
        client.sendall(request(chat_body("Hello?")))
        time.sleep(0.2)
    wait_until("the model to be told", lambda: told(stub)["abandoned"] == before["abandoned"] + 1, 10)
    fail(stub, "none")
    assert len(told(stub)["received"]) == len(before["received"]) + 1


# Clients that do not read


def memory(server: Server) -> int:
    """Bytes of RAM that the process has."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)[0]) * 1024


def open_connections(server: Server) -> int:
    port = int(server.url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_a_client_that_does_not_read_is_not_buffered_for_and_let_go(gateway: Server, stub: Server) -> None:
    fail(stub, "flood")
    before, size, ends = told(stub), memory(gateway), ended(gateway, "not_read")
    with contextlib.ExitStack() as stack:
        for i in range(4):  # each asks something else: one generation would do for the same
            client = stack.enter_context(connected(gateway, receive_buffer=16_384))
            client.sendall(request(chat_body(f"Tell me everything, part {i}.", stream=True)))
        wait_until("the flood", lambda: told(stub)["flooded"] > before["flooded"])
        wait_until("the clients to be let go", lambda: ended(gateway, "not_read") == ends + 4, 60)
        wait_until("vLLM to be told", lambda: told(stub)["abandoned"] == before["abandoned"] + 4, 60)
        flooded = told(stub)["flooded"] - before["flooded"]
        assert flooded < 4 * 16 * 2**20, "more is taken than the connections hold"  # mostly the kernel's buffers
        assert memory(gateway) - size < 32 * 2**20
        fail(stub, "none")
        assert content(chat(gateway.url, "Are you still there?"))


def test_a_client_that_reads_slowly_gets_all_of_it(gateway: Server, stub: Server) -> None:
    """Slower than the model by far, yet it reads: it is not let go."""
    fail(stub, "flood")
    with connected(gateway, receive_buffer=65_536) as client:
        client.sendall(request(chat_body("Slowly, please.", stream=True)))
        taken, deadline = 0, time.monotonic() + 3 * SECONDS
        while time.monotonic() < deadline:
            piece = client.recv(65_536)
            assert piece
            taken += len(piece)
            time.sleep(0.02)
    assert taken > 10 * 65_536


def test_one_that_does_not_read_is_left_behind_by_one_that_does(gateway: Server, stub: Server) -> None:
    """They share a generation, and what one of them has not read is not held for it."""
    fail(stub, "flood")
    before, asked = told(stub), request(chat_body("Tell both of us everything.", stream=True))
    with connected(gateway, receive_buffer=16_384) as slow, connected(gateway) as quick:
        slow.sendall(asked)
        quick.sendall(asked)
        taken, size = 0, 0
        while taken < 96 * 2**20:
            piece = quick.recv(2**20)
            assert piece
            taken += len(piece)
            size = size or memory(gateway)
        assert memory(gateway) - size < 32 * 2**20
        fail(stub, "none")
        assert len(told(stub)["received"]) == len(before["received"]) + 1
        quick.close()
        assert len(everything(slow)) < 16 * 2**20


# Logs


def test_nothing_of_a_prompt_or_a_key_is_logged(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> None:
    gateway = start_gateway(
        {
            "listen": {"body_timeout_seconds": 1, "max_messages": 3},
            "triton": stub_triton,
            "models": [{**model, "api_key": "upstream-secret"} for model in models(stub.url)],
            "policy": {"rules": [], "default": "smollm2-small"},
            "semantic_cache": {"backend_type": "memory"},
            "tenants": [{"name": "team", "key_sha256": [digest("client-secret")], "tokens_per_minute": 5000}],
        }
    )
    url = f"{gateway.url}/v1/chat/completions"
    headers = {"Authorization": "Bearer client-secret"}
    for fault in ("none", "status-400", "status-500", "break", "drop", "no-done", "error-event", "error-first"):
        fail(stub, fault)
        for stream in (False, True):
            with contextlib.suppress(httpx.TransportError):
                chat(gateway.url, f"{MARKER} {fault} {stream}", stream=stream, tenant="client-secret")
    fail(stub, "none")
    for body in (
        f'{{"{MARKER}'.encode(),
        chat_body(MARKER, messages=MARKER),
        chat_body(model=MARKER),
        chat_body(messages=[{"role": "user", "content": MARKER}] * 4),
        chat_body(f"break triton {MARKER}"),
        chat_body(f"{MARKER} " * 3000),
        chat_body(MARKER, **{MARKER: 10**30}),
    ):
        httpx.post(url, content=body, headers=headers)
    httpx.post(f"{gateway.url}/v1/route", content=chat_body(MARKER), headers=headers)
    httpx.post(f"{gateway.url}/v1/{MARKER}", content=chat_body(MARKER), headers=headers)
    httpx.post(url, content=chat_body(MARKER), headers={"Authorization": "Bearer wrong-secret"})
    with connected(gateway) as client:
        client.sendall(request(chat_body(MARKER), more="Authorization: Bearer client-secret\r\n")[:-1])
        everything(client)
    with connected(gateway) as client:
        client.sendall(f"{MARKER}\r\nAuthorization: Bearer client-secret\r\n\r\n".encode())
        everything(client)
    log = gateway.log.read_text() + gateway_metrics(gateway)
    assert len(log.splitlines()) > 10
    for secret in (MARKER, "client-secret", "wrong-secret", "upstream-secret"):
        assert secret not in log, next(line for line in log.splitlines() if secret in line)


def test_prompts_are_logged_where_the_operator_wants_them(
    stub: Server, stub_triton: Tree, start_gateway: StartGateway
) -> None:
    gateway = start_gateway(
        {
            "log_prompts": True,
            **before_stubs(stub.url, stub_triton),
            "tenants": [{"name": "team", "key_sha256": [digest("client-secret")]}],
        }
    )
    assert "log_prompts is true" in gateway.log.read_text()
    prompt = f"{MARKER}\n2026-01-01 INFO all is well " + "x" * 5000
    assert chat(gateway.url, prompt, tenant="client-secret", headers={"X-Request-Id": "mine-3"}).status_code == 200
    (line,) = [line for line in gateway.log.read_text().splitlines() if MARKER in line]
    assert f"mine-3: team asks '{MARKER}\\n2026" in line  # in one line, whatever is asked
    assert len(line) < 2200
    assert "client-secret" not in gateway.log.read_text()


def gateway_metrics(gateway: Server) -> str:
    return httpx.get(f"{gateway.url}/metrics").text


# TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two authorities, `ca` and `other`, and what `ca` has signed: `server` and `client`."""
    folder = tmp_path_factory.mktemp("pki")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for name, more in (("ca", []), ("other", []), ("server", signed), ("client", signed)):
        about = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        subprocess.run([*new, *about, *files, *more], cwd=folder, check=True, capture_output=True)
    return folder


def shown(pki: Path, name: str, ca: str = "ca") -> Tree:
    """A section that shows the certificate of `name` and trusts `ca`."""
    return {
        "ca_file": str(pki / f"{ca}.pem"),
        "cert_file": str(pki / f"{name}.pem"),
        "key_file": str(pki / f"{name}.key"),
    }


@pytest.fixture(scope="module")
def tls_stubs(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of a vLLM and a Triton that want to see a client's certificate."""
    folder, vllm, triton = tmp_path_factory.mktemp("tls"), free_port(), free_port()
    files = [str(pki / name) for name in ("server.pem", "server.key", "ca.pem")]
    with contextlib.ExitStack() as stack:
        for name, port in (("vllm", vllm), ("triton", triton)):
            command = [sys.executable, f"tests/stub_{name}.py", str(port), *files]
            stack.enter_context(running(command, folder / f"{name}.log"))
        yield f"https://127.0.0.1:{vllm}", f"127.0.0.1:{triton}"


def test_tls_everywhere(
    pki: Path, tls_stubs: tuple[str, str], stub_triton: Tree, start_gateway: StartGateway, tmp_path: Path
) -> None:
    vllm, triton = tls_stubs
    port = free_port()
    listen_tls = {"cert_file": str(pki / "server.pem"), "key_file": str(pki / "server.key")}
    tree = merged(
        shipped(),
        {
            "listen": {"port": port, "tls": listen_tls},
            "triton": {**stub_triton, "address": triton, "tls": shown(pki, "client")},
            "models": models(vllm),
            "upstream": {"tls": shown(pki, "client")},
            "policy": {"rules": [], "default": "smollm2-small"},
            "semantic_cache": {"backend_type": "memory"},
        },
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    trusting = ssl.create_default_context(cafile=pki / "ca.pem")
    command = [sys.executable, "-m", "gateway", "--config", str(tmp_path / "config.yaml")]
    with (
        running(command, tmp_path / "gateway.log") as process,
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting, timeout=60) as client,
    ):

        def is_ready() -> bool:
            assert process.poll() is None, (tmp_path / "gateway.log").read_text()
            try:
                return client.get("/ready").status_code == 200
            except httpx.ConnectError:
                return False

        wait_until("the gateway, and it for its stubs", is_ready, PATIENCE_SECONDS)
        answer = client.post("/v1/chat/completions", content=chat_body("Is this private?"))
        assert content(answer)
        assert answer.headers["x-fingerpost-category"] == "other"  # Triton has read it
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"https://127.0.0.1:{port}/health")
        assert not answers(f"http://127.0.0.1:{port}/health")


def test_servers_whose_certificates_are_another_authority_s_are_not_used(
    pki: Path, tls_stubs: tuple[str, str], stub_triton: Tree, start_gateway: StartGateway
) -> None:
    vllm, triton = tls_stubs
    gateway = start_gateway(
        {
            "triton": {**stub_triton, "address": triton, "tls": shown(pki, "client", ca="other")},
            "models": models(vllm),
            "upstream": {"tls": shown(pki, "client", ca="other")},
            "policy": {"rules": [], "default": "smollm2-small"},
            "semantic_cache": {"backend_type": "memory"},
        }
    )
    assert chat(gateway.url).status_code == 503
    not_ready = httpx.get(f"{gateway.url}/ready", timeout=60).json()["not_ready"]
    assert not_ready.keys() == {"triton", "smollm2-small", "smollm2-large"}


@pytest.mark.parametrize(
    ("section", "given_files", "problem"),
    [
        ("listen", {"cert_file": "server.pem"}, "listen.tls.key_file: missing key"),
        ("listen", {"cert_file": "gone.pem", "key_file": "server.key"}, "listen.tls: no such file: "),
        ("listen", {"cert_file": "server.pem", "key_file": "ca.key"}, "the key is not the certificate's"),
        ("listen", {"cert_file": "server.key", "key_file": "server.key"}, "are not a certificate and its key"),
        ("triton", {"ca_file": "gone.pem"}, "triton.tls: ca_file "),
        ("triton", {"ca_file": "ca.key"}, "holds no certificate"),
        ("triton", {"cert_file": "client.pem"}, "triton.tls: cert_file and key_file go together"),
        ("upstream", {"key_file": "client.key"}, "upstream.tls: cert_file and key_file go together"),
        ("upstream", {"cert_file": "client.pem", "key_file": "ca.key"}, "the key is not the certificate's"),
        ("upstream", {"enabled": True}, "upstream.tls.enabled: unknown key"),
    ],
)
def test_tls_files_that_cannot_be_used(
    pki: Path, tmp_path: Path, section: str, given_files: dict[str, Any], problem: str
) -> None:
    files = {key: str(pki / value) if isinstance(value, str) else value for key, value in given_files.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(merged(shipped(), {section: {"tls": files}})))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "config.yaml")
    (line,) = str(caught.value).splitlines()
    assert problem in line
