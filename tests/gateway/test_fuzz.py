"""Bodies, streams and configurations that nobody would send: no 500, no hang, and no memory without end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.answer import is_usage_only
from gateway.checked import ConfigError
from gateway.config import Config, check_against, load
from gateway.dialects import FORMS
from gateway.sse import FrameSplitter, data
from tests.conftest import ROOT, Server, StartGateway, Tree, before_stubs, shipped, wait_until
from tests.stub_triton import DIMENSION, LABELS

FUZZ = settings(
    database=None, deadline=None, derandomize=True, max_examples=250, suppress_health_check=list(HealthCheck)
)
SECONDS = 10.0  # in which whatever was sent has its answer, or its end
ANSWER_BYTES = 2 * 2**20  # the longest answer that this gateway takes
MEMORY_BYTES = 400 * 2**20  # that it may ever have held beyond what it began with, eight answers at a time


class Upstream:
    """An endpoint that answers what the request's own field `hostile` says, to the byte, in a thread of its own.

    `head` comes before `pieces`, each of which is sent by itself; then the connection is kept, closed, or the pieces
    begin again, for ever. Without the field it is an endpoint like others.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        assert self._ready.wait(60)
        return f"http://127.0.0.1:{self._port}"

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._answer, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                asked = json.loads(await reader.readexactly(int(found[1])))  # type: ignore[index]
                end = await self._play(writer, asked.get("hostile") or usual(asked))
                if end == "close":
                    break
        writer.close()

    async def _play(self, writer: asyncio.StreamWriter, hostile: Tree) -> str:
        writer.write(hostile["head"].encode("latin-1"))
        while True:
            for piece in hostile["pieces"]:
                writer.write(piece.encode("latin-1"))
                await writer.drain()
                await asyncio.sleep(0)  # a piece of its own, unless the kernel joins it with the next
            if hostile["end"] != "again":
                return str(hostile["end"])


HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n"
CHUNKED = HEAD.format("text/event-stream") + "Transfer-Encoding: chunked\r\n\r\n"
ENVELOPE = {"id": "chatcmpl-1", "created": 1, "model": "small"}


def usual(asked: Tree) -> Tree:
    """A chat completion, whatever is asked for."""
    if asked.get("stream"):
        return streaming([f"data: {json.dumps(CHUNKS[0])}\n\n".encode(), b"data: [DONE]\n\n"])
    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    raw = json.dumps({**ENVELOPE, "object": "chat.completion", "choices": [choice]})
    head = HEAD.format("application/json") + f"Content-Length: {len(raw)}\r\n\r\n"
    return {"head": head, "pieces": [raw], "end": "keep"}


def streaming(pieces: list[bytes], end: str = "keep") -> Tree:
    """A stream in these pieces; it ends as it should, unless the connection is closed."""
    framed = [f"{len(piece):x}\r\n{piece.decode('latin-1')}\r\n" for piece in pieces if piece]
    return {"head": CHUNKED, "pieces": [*framed, *(["0\r\n\r\n"] if end == "keep" else [])], "end": end}


@pytest.fixture(scope="module")
def gateway(stub_triton: Tree, start_gateway: StartGateway) -> Iterator[Server]:
    with Upstream() as url:
        yield start_gateway(
            {
                **before_stubs(url, stub_triton),
                "upstream": {
                    "first_byte_timeout_seconds": 5,
                    "idle_timeout_seconds": 5,
                    "max_wait_seconds": 0,
                    "max_answer_bytes": ANSWER_BYTES,
                    "health_check": {"enabled": False},
                },
            }
        )


@pytest.fixture(scope="module")
def client(gateway: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=SECONDS) as connection:
        yield connection


@pytest.fixture(scope="module", autouse=True)
def nothing_unexpected(gateway: Server) -> Iterator[None]:
    yield
    assert gateway.process.poll() is None
    exposition = httpx.get(f"{gateway.url}/metrics", timeout=SECONDS).text
    assert 'status="500"' not in exposition, gateway.log.read_text()[-4000:]
    assert httpx.get(f"{gateway.url}/health", timeout=SECONDS).status_code == 200


# Bodies

SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
KINDS = ["text", "input_text", "output_text", "image_url", "tool_use", "tool_result", "message", "function_call_output"]
PARTS = st.fixed_dictionaries({}, optional={"type": st.sampled_from(KINDS) | JSON, "text": st.text() | JSON, "x": JSON})
CONTENT = st.text() | st.lists(PARTS | JSON, max_size=3) | JSON
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer"]) | JSON
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"tool_calls": JSON, "type": JSON}) | JSON,
    max_size=4,
)
NAMES = st.sampled_from(["auto", "smollm2-small", "smollm2-large", "embedder", "nobody"]) | JSON
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": NAMES,
    "messages": MESSAGES,
    "prompt": CONTENT | st.lists(st.integers(0, 9)),
    "input": MESSAGES | CONTENT | st.lists(st.text(max_size=9), max_size=4),
    "system": CONTENT,
    "instructions": CONTENT,
    "stream": st.booleans() | JSON,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans() | JSON}) | JSON,
    "id": JSON,
    "good": st.booleans() | JSON,
    "comment": JSON,
    **dict.fromkeys(("temperature", "n", "tools", "tool_choice", "max_tokens", "max_completion_tokens"), JSON),
    **dict.fromkeys(("max_output_tokens", "response_format", "logprobs", "encoding_format", "dimensions"), JSON),
    **dict.fromkeys(("metadata", "user", "store", "reasoning", "reasoning_effort", "text"), JSON),
    "chat_template_kwargs": JSON,
}
GOOD: dict[str, Any] = {
    "model": "auto",
    "messages": [{"role": "user", "content": "Why?"}],
    "prompt": "Why?",
    "input": "Why?",
    "id": "chatcmpl-1",
    "good": True,
}
ASKED_FOR = {
    **{path: ["model", "messages", "prompt", "input"] for path in FORMS},
    "/v1/route": ["model", "messages"],
    "/v1/embeddings": ["model", "input"],
    "/v1/classify": ["input"],
    "/v1/feedback": ["id", "good"],
}
PATHS = st.sampled_from(sorted(ASKED_FOR))
ODD_BYTES = [b"\\ud800", b"\x00", b"[" * 200, b"1e999", b"-" * 9, b'"', b"9" * 400]


@st.composite
def almost_right(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body, some of whose fields are what they should be."""
    path = draw(PATHS)
    odd = draw(st.fixed_dictionaries({}, optional=FIELDS))
    body = {name: GOOD[name] for name in ASKED_FOR[path]} | odd
    return path, json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """Such a body with some bytes of it replaced."""
    path, raw = draw(almost_right())
    start = draw(st.integers(0, len(raw)))
    end = draw(st.integers(start, min(len(raw), start + 5)))
    odd = st.binary(max_size=5) | st.sampled_from(ODD_BYTES)
    return path, raw[:start] + draw(odd) + raw[end:]


@FUZZ
@given(asked=almost_right() | damaged() | st.tuples(PATHS, st.binary(max_size=60)))
def test_any_body_has_an_answer(client: httpx.Client, asked: tuple[str, bytes]) -> None:
    path, raw = asked
    response = client.post(path, content=raw)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"]


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"x-request-id", b"x-fingerpost-cache-control", b"authorization", b"x-api-key", b"expect"])
        | st.binary(max_size=9),
        st.binary(max_size=30) | st.sampled_from([b"no-cache", b"100-continue", b"chunked", b"9" * 30, b"-1"]),
    ),
    max_size=4,
)
LENGTHS = st.sampled_from([b"Content-Length: %d", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"X: %d", b""])
METHODS = st.sampled_from([b"POST", b"GET", b"PRI", b"\x16\x03"])


@settings(FUZZ, max_examples=100)
@given(asked=almost_right(), headers=HEADERS, length=LENGTHS, line=METHODS)
def test_any_request_has_an_answer_or_an_end(
    gateway: Server, asked: tuple[str, bytes], headers: list[tuple[bytes, bytes]], length: bytes, line: bytes
) -> None:
    path, raw = asked
    lines = [b"%b %b HTTP/1.1" % (line, path.encode()), b"Host: gateway", b"Connection: close"]
    lines += [length % len(raw) if b"%d" in length else length] if length else []
    lines += [name + b": " + value for name, value in headers]
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=SECONDS) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65_536):
                answer += piece
    assert not answer.startswith(b"HTTP/1.1 5"), answer


# Streams


def chunk(**choice: Any) -> Tree:
    return {**ENVELOPE, "object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": None, **choice}]}


CHUNKS = [
    chunk(delta={"role": "assistant", "content": ""}),
    chunk(delta={"content": "Sun 😀"}),
    chunk(delta={}, finish_reason="stop"),
]
GOOD_STREAM = b"".join(b"data: " + json.dumps(each, ensure_ascii=False).encode() + b"\n\n" for each in CHUNKS)
DONE = b"data: [DONE]\n\n"
HOSTILE = {
    "as it should be": GOOD_STREAM + DONE,
    "crlf": (GOOD_STREAM + DONE).replace(b"\n", b"\r\n"),
    "cr": (GOOD_STREAM + DONE).replace(b"\n", b"\r"),
    "mixed": GOOD_STREAM.replace(b"\n\n", b"\r\n\n") + b"\n\r\n\r\n\r" + DONE,
    "no end": GOOD_STREAM,
    "after the end": DONE + GOOD_STREAM + DONE,
    "half an event": GOOD_STREAM + b'data: {"choices": [',
    "not utf-8": GOOD_STREAM.replace(b"Sun", b"\xff\xfe\x80") + DONE,
    "byte order mark": b"\xef\xbb\xbf" + GOOD_STREAM + DONE,
    "zeros": b"data: \x00\n\n\x00\n\n" + DONE,
    "not json": b"data: {\n\ndata: ]\n\ndata: NaN\n\ndata: nul\n\n" + DONE,
    "other json": b"data: []\n\ndata: 1\n\ndata: null\n\ndata: {}\n\n" + b'data: {"choices": 7}\n\n' + DONE,
    "odd choices": b'data: {"choices": [null, {"index": -1}, {"delta": []}, {"delta": {"content": [1]}}]}\n\n' + DONE,
    "deep": b"data: " + b"[" * 300 + b"\n\n" + DONE,
    "fields": b": comment\n\nevent: x\nid: 1\nretry: 0\ndata\ndata:\ndata:a\ndata: b\n\n: \n\n" + DONE,
    "nothing but ends": b"\n\n\r\n\r\n\n\n\n" + DONE,
    "an error later": GOOD_STREAM + b'data: {"error": {"message": "no", "code": 503}}\n\n' + DONE,
    "numbers": b'data: {"choices": [], "usage": {"prompt_tokens": -1e999, "completion_tokens": 9e99}}\n\n' + DONE,
    "messages": b'event: message_start\ndata: {"type": "message_start", "message": {"usage": []}}\n\n' * 2,
    "responses": b'data: {"type": "response.completed", "response": {"output": [{"content": [{}]}]}}\n\n',
}
ASKING: dict[str, Tree] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Why?"}]},
    "/v1/completions": {"prompt": "Why?"},
    "/v1/responses": {"input": "Why?"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 9},
}
AS_IT_COMES = {"x-fingerpost-cache-control": "no-cache, no-store"}
TO_BE_STORED = {"x-fingerpost-cache-control": "no-cache"}


@dataclass(frozen=True)
class Received:
    status: int
    raw: bytes
    is_whole: bool


def ask(
    client: httpx.Client, hostile: Tree, path: str = "/v1/chat/completions", control: Tree = AS_IT_COMES
) -> Received:
    body = {"model": "smollm2-small", "stream": True, "hostile": hostile, **ASKING[path]}
    raw = b""
    with client.stream("POST", path, json=body, headers=control) as response:
        try:
            for piece in response.iter_raw():
                raw += piece
        except httpx.TimeoutException:
            raise
        except httpx.TransportError:
            return Received(response.status_code, raw, is_whole=False)
    return Received(response.status_code, raw, is_whole=True)


def split(stream: bytes, places: list[int]) -> list[bytes]:
    return [stream[start:end] for start, end in pairwise([0, *sorted(places), len(stream)])]


@pytest.mark.parametrize("stream", HOSTILE.values(), ids=HOSTILE)
def test_a_stream_that_is_split_at_every_byte_has_the_same_events(stream: bytes) -> None:
    whole = FrameSplitter()
    frames, rest = whole.feed(stream), whole.flush()
    assert b"".join(frames) + rest == stream
    for place in range(len(stream) + 1):
        splitter = FrameSplitter()
        pieces = [frame for piece in split(stream, [place]) for frame in splitter.feed(piece)]
        assert (pieces, splitter.flush()) == (frames, rest)
    splitter = FrameSplitter()
    assert [frame for byte in stream for frame in splitter.feed(bytes([byte]))] == frames


@pytest.mark.parametrize("stream", HOSTILE.values(), ids=HOSTILE)
def test_a_stream_that_is_split_at_every_byte_comes_as_it_is(client: httpx.Client, stream: bytes) -> None:
    for place in range(1, len(stream)):
        assert ask(client, streaming(split(stream, [place]))) == Received(200, stream, is_whole=True)
    assert ask(client, streaming([bytes([byte]) for byte in stream])) == Received(200, stream, is_whole=True)


FRAGMENTS = st.sampled_from(
    [
        *(piece for stream in HOSTILE.values() for piece in re.split(rb"(?<=\n\n)", stream) if piece),
        *(b"\n", b"\r", b"\r\n", b"data: ", b"data:", b":", b" ", b"{", b"}", b"\x00", b"\xf0\x9f", b"[DONE]"),
    ]
) | st.binary(max_size=20)


@FUZZ
@given(
    path=st.sampled_from(sorted(ASKING)),
    fragments=st.lists(FRAGMENTS, min_size=1, max_size=8),
    places=st.lists(st.integers(0, 400), max_size=6),
    end=st.sampled_from(["keep", "close"]),
    control=st.sampled_from([AS_IT_COMES, TO_BE_STORED]),
)
def test_any_stream_comes_as_it_is_or_is_broken_off(
    client: httpx.Client, path: str, fragments: list[bytes], places: list[int], end: str, control: Tree
) -> None:
    stream = b"".join(fragments)
    pieces = split(stream, [place for place in places if place < len(stream)])
    received = ask(client, streaming(pieces, end), path, control)
    assert received.status in (200, 503)
    if received.status == 503:  # it was empty, or began with an error
        assert json.loads(received.raw)["error"]["message"]
    elif control is AS_IT_COMES:
        assert stream == received.raw if end == "keep" else stream.startswith(received.raw)
        assert received.is_whole == (end == "keep")
    elif received.is_whole:  # the gateway has asked for the usage figures, and leaves their chunk out
        assert received.raw == without_usage(stream, path)


@settings(FUZZ, max_examples=100)
@given(path=st.sampled_from(sorted(FORMS)), payloads=st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=4))
def test_no_event_is_too_much_for_those_who_put_answers_together(path: str, payloads: list[str]) -> None:
    assembly = FORMS[path].assembly()
    for payload in payloads:
        assembly.add(data(b"data: " + payload.encode() + b"\n\n"))
    answer = assembly.answer()
    assert answer is None or answer.message


def without_usage(stream: bytes, path: str) -> bytes:
    splitter = FrameSplitter()
    kept = [frame for frame in splitter.feed(stream) if not is_usage_only(data(frame))]
    return b"".join(kept) + splitter.flush() if FORMS[path].asks_usage else stream


HEADS = {
    "not http": "hello\r\n\r\n",
    "nothing": "",
    "half a head": "HTTP/1.1 200 OK\r\nContent-Ty",
    "status": "HTTP/1.1 999 ?\r\n\r\n",
    "old": "HTTP/0.9 200 OK\r\n\r\n",
    "two lengths": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length": "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "more than told": HEAD.format("application/json") + "Content-Length: 2\r\n\r\n{}{}{}",
    "less than told": HEAD.format("application/json") + "Content-Length: 99\r\n\r\n{}",
    "chunk size": CHUNKED + "zz\r\ndata: 1\n\n\r\n0\r\n\r\n",
    "chunk size without end": CHUNKED + "f" * 4000,
    "no chunk": CHUNKED + "\r\n\r\n",
    "headers": "HTTP/1.1 200 OK\r\n" + "X-A: b\r\n" * 40_000 + "\r\n",
    "long header": "HTTP/1.1 200 OK\r\nX-A: " + "b" * 2_000_000 + "\r\n\r\n",
    "header characters": "HTTP/1.1 200 OK\r\nContent-Type: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
    "type": "HTTP/1.1 200 OK\r\nContent-Type: \xff/\xfe; charset=?\r\nContent-Length: 2\r\n\r\n{}",
    "retry-after": "HTTP/1.1 429 No\r\nRetry-After: \xff\r\nContent-Length: 2\r\n\r\n{}",
    "redirect": "HTTP/1.1 302 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 2\r\n\r\n{}",
    "continue": "HTTP/1.1 100 Continue\r\n\r\n" * 50 + HEAD.format("application/json") + "Content-Length: 2\r\n\r\n{}",
    "compressed": HEAD.format("application/json") + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "empty stream": CHUNKED + "0\r\n\r\n",
    "no content": "HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_an_answer_that_is_no_http_is_no_500(client: httpx.Client, head: str) -> None:
    received = ask(client, {"head": head, "pieces": [], "end": "close"})
    assert received.status in (200, 204, 302, 429, 503, 999), received

    def is_well() -> bool:
        return ask(client, streaming([GOOD_STREAM, DONE])) == Received(200, GOOD_STREAM + DONE, is_whole=True)

    if received.status == 429:  # the endpoint is left alone for a moment
        wait_until("the endpoint to have rested", is_well, SECONDS)
    assert is_well() or is_well()  # the first may be sent on the connection that is just being closed


def peak(server: Server) -> int:
    """The most memory that a server ever held, in bytes."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)[0]) * 1024


BLOCK = "x" * 65_536
FLOODS = {
    "an event": {"head": CHUNKED, "pieces": [f"10000\r\n{BLOCK}\r\n"], "end": "again"},
    "comments": {"head": CHUNKED, "pieces": ["10000\r\n" + ": x\n" * 16_384 + "\r\n"], "end": "again"},
    "a body": {"head": HEAD.format("application/json") + "\r\n", "pieces": [BLOCK], "end": "again"},
    "a head": {"head": "HTTP/1.1 200 OK\r\n", "pieces": ["X-A: b\r\n" * 8192], "end": "again"},
    "a header": {"head": "HTTP/1.1 200 OK\r\nX-A: ", "pieces": [BLOCK], "end": "again"},
    "a chunk size": {"head": CHUNKED, "pieces": ["0" * 65_536], "end": "again"},
    "a trailer": {"head": CHUNKED + "5\r\ndata:\r\n0\r\n", "pieces": ["X-A: b\r\n" * 8192], "end": "again"},
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_what_never_ends_is_ended(gateway: Server, flood: Tree) -> None:
    before = peak(gateway)

    def drown() -> Received:
        with httpx.Client(base_url=gateway.url, timeout=60) as client:
            return ask(client, flood)

    with ThreadPoolExecutor(8) as pool:
        for received in pool.map(lambda _: drown(), range(8)):
            assert received.status in (502, 503, 504) or (received.status == 200 and not received.is_whole), (
                received.status
            )
    assert peak(gateway) - before < MEMORY_BYTES


# Configurations

SNIPPETS = st.sampled_from(
    [
        *("2020-01-01", "12:30:45", "!!binary aGk=", "&a [*a]", "*a", "{", "[", "? x", "<<: *x", "!!set {a}", "|"),
        *("!!python/object:os.system {}", "${NOWHERE}", "${HOME}", "${", "${A:-", "~", "''", "%"),
        *("0x10", "1_000", ".inf", ".nan", "1e999"),
    ]
)
URLS = ["http://", "http://[", "http://a:b@c:99999/", "//", "127.0.0.1:0", "::1"]
VALUES = JSON | st.sampled_from([*URLS, "\x00", "/dev/null", "(", "(a+)+", "auto", -1, 0])


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, value in inner for place in places(value, (*path, key))]


@st.composite
def odd_trees(draw: st.DrawFn) -> Tree:
    """The shipped configuration with some of its values replaced, left out, or with others beside them."""
    tree: Tree = json.loads(json.dumps(shipped()))
    for _ in range(draw(st.integers(1, 3))):
        known = places(tree)
        *path, last = draw(st.sampled_from(known)) if known else ("models",)
        inner: Any = tree
        for key in path:
            inner = inner[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "replace":
            inner[last] = draw(VALUES)
        elif kind == "remove":
            del inner[last]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=8))] = draw(VALUES)
    return tree


@st.composite
def odd_texts(draw: st.DrawFn) -> str:
    """The shipped file with something else in the place of a value, or a piece of it cut out."""
    text = (ROOT / "config/config.yaml").read_text()
    start = draw(st.sampled_from([found.end() for found in re.finditer(r": ", text)]))
    length = draw(st.integers(0, 30))
    return text[:start] + draw(SNIPPETS | st.text(max_size=12)) + text[start + length :]


def checked(path: Path) -> Config | None:
    """The configuration; None when it is refused in words that name the file."""
    try:
        config = load(path)
        check_against(config, LABELS, DIMENSION)
    except ConfigError as error:
        words = str(error)
    else:
        return config
    assert words
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@FUZZ
@given(tree=odd_trees())
def test_any_tree_is_a_configuration_or_is_refused(file: Path, tree: Tree) -> None:
    file.write_text(yaml.safe_dump(tree))
    checked(file)


@FUZZ
@given(text=odd_texts())
def test_any_text_is_a_configuration_or_is_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    checked(file)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_refused(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    assert checked(file) is None


@settings(FUZZ, max_examples=15)
@given(tree=odd_trees())
def test_a_gateway_outlives_any_configuration(gateway: Server, tree: Tree) -> None:
    config = gateway.log.with_name("config.yaml")
    before = config.read_text()
    kept = {key: yaml.safe_load(before)[key] for key in ("listen", "data_dir", "triton")}
    try:
        for written in (yaml.safe_dump({**tree, **kept}), before):
            read = reloads(gateway)
            config.write_text(written)
            gateway.process.send_signal(signal.SIGHUP)
            wait_until("it to be read", partial(has_read, gateway, read))
            assert httpx.get(f"{gateway.url}/health", timeout=SECONDS).status_code == 200
    finally:
        config.write_text(before)
    assert ask_once(gateway) == 200


def has_read(gateway: Server, before: int) -> bool:
    return reloads(gateway) > before


def reloads(gateway: Server) -> int:
    """How many times the gateway has said what it made of its file."""
    said = gateway.log.read_text()
    return sum(said.count(words) for words in ("is in force", "is refused", "cannot be used"))


def ask_once(gateway: Server) -> int:
    body = {"model": "auto", "messages": [{"role": "user", "content": f"Is it {time.time()}?"}]}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=SECONDS).status_code
