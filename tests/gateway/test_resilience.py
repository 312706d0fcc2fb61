"""Several endpoints and several models: who is asked when one fails, over HTTP to stubs that can be told to fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from gateway import config
from gateway.endpoints import BURST
from gateway.errors import AnswerTooLong, UpstreamTimeout, UpstreamUnavailable
from gateway.metrics import Metrics
from gateway.upstream import WAIT_SECONDS, Reply, Upstream, UpstreamBroken, error_status, retry_after
from tests.conftest import Server, StartGateway, Tree, free_port, models
from tests.stub_vllm import Stub, create_app

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=60)


@contextlib.asynccontextmanager
async def serving(app: Starlette, port: int = 0) -> AsyncIterator[str]:
    """The app on a port of its own, in this event loop."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task


@contextlib.asynccontextmanager
async def sending(*pieces: bytes) -> AsyncIterator[str]:
    """A server that answers everything with these bytes, a moment between the pieces, and closes the connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02 if len(pieces) > 1 else 0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 (other tasks of this loop are what is waited for)
        await asyncio.sleep(0.01)


def dead() -> str:
    """An address at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def model(*urls: str, name: str = "m") -> config.Model:
    price = config.Price(input=1, output=1)
    endpoints = tuple(config.Endpoint(url=url) for url in urls)
    return config.Model(name=name, endpoints=endpoints, price_per_million_tokens=price, context_window=9, size="small")


@contextlib.asynccontextmanager
async def upstream(*models: config.Model, **settings: Any) -> AsyncIterator[Upstream]:
    found = Upstream(models, config.Upstream(**{"retries": 5, **settings}), Metrics())
    try:
        yield found
    finally:
        await found.close()


async def ask(upstream: Upstream, *models: config.Model, stream: bool = False) -> tuple[Reply, str]:
    """The reply to a question, and its text."""

    def body(model: config.Model) -> bytes:
        messages = [{"role": "user", "content": "Why?"}]
        return json.dumps({"model": model.name, "messages": messages, "stream": stream}).encode()

    reply = await upstream.send(models, body, "test", stream=stream)
    try:
        text = reply.body
        while reply.is_stream and (piece := await reply.piece()):
            text += piece
    finally:
        reply.close()
    return reply, text.decode(errors="replace")


def metric(upstream: Upstream, name: str, **labels: str) -> float:
    return upstream._metrics.registry.get_sample_value(f"fingerpost_{name}", labels) or 0.0


def errors(upstream: Upstream, model: config.Model, reason: str) -> float:
    """Those of its first endpoint."""
    url = model.endpoints[0].url
    return metric(upstream, "endpoint_errors_total", model=model.name, endpoint=url, reason=reason)


def states(upstream: Upstream, model: config.Model) -> list[str]:
    return [figures.state for figures in upstream.figures(model)]


def outstanding(upstream: Upstream, model: config.Model) -> list[int]:
    return [figures.outstanding for figures in upstream.figures(model)]


Scenario = Callable[[], Awaitable[None]]


def scenario(test: Scenario) -> Callable[[], None]:
    """A test that is a coroutine, and that never hangs."""

    def run() -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await test()

        asyncio.run(limited())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


# Another endpoint


@scenario
async def test_an_endpoint_that_cannot_be_reached_is_passed_over() -> None:
    stub = Stub()
    async with serving(create_app(stub)) as url:
        m = model(dead(), url)
        async with upstream(m) as up:
            replies = [(await ask(up, m))[0].status for _ in range(4)]
            assert replies == [200] * 4
            assert len(stub.received) == 4
            assert errors(up, m, "unreachable") >= 1
            assert metric(up, "retries_total", model="m") == 0  # nothing was sent
            assert outstanding(up, m) == [0, 0]


@scenario
async def test_however_many_cannot_be_reached_one_that_can_is_asked() -> None:
    stub = Stub()
    async with serving(create_app(stub)) as url:
        m = model(dead(), dead(), dead(), url)
        async with upstream(m, retries=0) as up:
            assert (await ask(up, m))[0].status == 200


BEFORE_THE_FIRST_BYTE = [
    *(("status-503", stream) for stream in (False, True)),
    *(("drop", stream) for stream in (False, True)),
    ("error-first", True),
    ("break", False),
]


@pytest.mark.parametrize(("fault", "stream"), BEFORE_THE_FIRST_BYTE)
def test_what_fails_before_its_first_byte_is_asked_for_elsewhere(fault: str, stream: bool) -> None:
    @scenario
    async def test() -> None:
        bad, good = Stub(), Stub()
        bad.fault = fault
        async with serving(create_app(bad)) as first, serving(create_app(good)) as second:
            m = model(first, second)
            async with upstream(m) as up:
                for _ in range(2):
                    reply, text = await ask(up, m, stream=stream)
                    assert (reply.status, reply.is_stream) == (200, stream)
                    assert "generat" in text
                assert len(good.received) == 2
                assert metric(up, "retries_total", model="m") == len(bad.received) >= 1
                assert outstanding(up, m) == [0, 0]

    test()


@scenario
async def test_after_the_first_byte_nothing_is_tried_again() -> None:
    bad, good = Stub(), Stub()
    bad.fault = "break"
    async with serving(create_app(bad)) as first, serving(create_app(good)) as second:
        m = model(first, second)
        async with upstream(m) as up:
            with pytest.raises(UpstreamBroken):
                await ask(up, m, stream=True)
            assert len(good.received) == 0
            assert errors(up, m, "broken") == 1
            assert outstanding(up, m) == [0, 0]


@pytest.mark.parametrize("status", [400, 500])
def test_other_statuses_are_the_answer(status: int) -> None:
    @scenario
    async def test() -> None:
        bad, good = Stub(), Stub()
        bad.fault = f"status-{status}"
        async with serving(create_app(bad)) as first, serving(create_app(good)) as second:
            m = model(first, second)
            async with upstream(m) as up:
                reply, text = await ask(up, m)
                assert (reply.status, "stub says no" in text) == (status, True)
                assert len(good.received) == 0
                assert up.figures(m)[0].failures_in_a_row == (status == 500)
            async with upstream(m, retry_statuses=(500,)) as up:
                assert [(await ask(up, m))[0].status for _ in range(2)] == [400 if status == 400 else 200, 200]

    test()


@scenario
async def test_when_all_refuse_the_refusal_is_passed_on() -> None:
    stubs = [Stub(), Stub()]
    for stub in stubs:
        stub.fault = "status-503"
    async with serving(create_app(stubs[0])) as first, serving(create_app(stubs[1])) as second:
        m = model(first, second)
        async with upstream(m) as up:
            reply, text = await ask(up, m)
            assert (reply.status, "stub says no" in text) == (503, True)
            assert [len(stub.received) for stub in stubs] == [1, 1]
        async with upstream(m, retries=0) as up:
            assert (await ask(up, m))[0].status == 503
            assert [len(stub.received) for stub in stubs] == [2, 1]


@scenario
async def test_an_overlong_answer_is_generated_once_and_is_nobody_s_failure() -> None:
    stubs = [Stub(), Stub(), Stub()]
    async with contextlib.AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(serving(create_app(stub))) for stub in stubs]
        m, other = model(first, second), model(third, name="other")
        async with upstream(m, other, max_answer_bytes=100, ejection={"consecutive_failures": 1}) as up:
            for _ in range(4):
                with pytest.raises(AnswerTooLong, match=r"'m' is longer than upstream.max_answer_bytes \(100\)"):
                    await ask(up, m, other)
            assert [len(stub.received) for stub in stubs] == [2, 2, 0]
            assert [(each.state, each.error_rate, each.outstanding) for each in up.figures(m)] == [("up", 0, 0)] * 2
            assert metric(up, "retries_total", model="m") == errors(up, m, "broken") == 0


@scenario
async def test_an_overlong_answer_is_not_read_to_its_end() -> None:
    gone = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x" * 1000)
                await writer.drain()
        gone.set()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        m = model(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with upstream(m, max_answer_bytes=100) as up:
            with pytest.raises(AnswerTooLong):
                await ask(up, m)
            await gone.wait()


@scenario
async def test_an_overlong_failure_is_the_endpoint_s() -> None:
    stub = Stub()
    async with sending(b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 999) as first, serving(create_app(stub)) as second:
        m = model(first, second)
        async with upstream(m, max_answer_bytes=998) as up:
            assert (await ask(up, m))[0].status == 200
            assert errors(up, m, "broken") == 1


@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_an_overlong_answer_is_one_final_error(
    start_gateway: StartGateway, stub: Server, stub_triton: Tree, path: str
) -> None:
    policy = {"rules": [], "default": "smollm2-small"}
    limits = {"max_answer_bytes": 100}
    gateway = start_gateway({"triton": stub_triton, "models": models(stub.url), "policy": policy, "upstream": limits})
    before = len(httpx.get(f"{stub.url}/stub").json()["received"])
    body = {"model": "smollm2-small", "max_tokens": 9, "messages": [{"role": "user", "content": "Much?"}]}
    response = httpx.post(f"{gateway.url}/v1/{path}", json=body, headers={"x-api-key": "fp-of-a-test"}, timeout=60)
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    error = response.json()["error"]
    assert "is longer than upstream.max_answer_bytes (100)" in error["message"]
    form = {"type": "api_error", "message": error["message"]}
    assert error == (form if path == "messages" else {**form, "param": None, "code": "answer_too_long"})
    assert len(httpx.get(f"{stub.url}/stub").json()["received"]) == before + 1


NOT_HTTP = [
    b"",
    b"\x00\xff" * 100,
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: minus\r\n\r\n",
    b"HTTP/1.1 999999 OK\r\n\r\n",
    b"HTTP/1.1 999 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nA\x00B: \x01\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh",
    b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe;;==\r\nContent-Length: 5\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
]


@pytest.mark.parametrize("raw", NOT_HTTP, ids=[str(raw[:50]) for raw in NOT_HTTP])
def test_a_server_that_does_not_speak_http_is_passed_over(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    @scenario
    async def test() -> None:
        stub = Stub()
        async with sending(raw) as first, serving(create_app(stub)) as second:
            m = model(first, second)
            async with upstream(m) as up:
                for _ in range(2):
                    assert (await ask(up, m, stream=True))[0].status == 200
                assert len(stub.received) == 2
                assert outstanding(up, m) == [0, 0]

    test()
    assert "OpenSSH" not in caplog.text  # what it sends may be part of an answer


@pytest.mark.parametrize(
    ("content_type", "passed_on", "is_stream"),
    [
        (b"text/event-stream", "text/event-stream", True),
        (b"Text/Event-Stream ;charset=UTF-8", "Text/Event-Stream ;charset=UTF-8", True),
        (b"text/event-stream; x=\xff", None, True),
        (b"text/event-streams", "text/event-streams", False),
        (b"application/json; x=\xc3\xa4", None, False),
        (b"", None, False),
    ],
)
def test_content_types(content_type: bytes, passed_on: str | None, is_stream: bool) -> None:
    @scenario
    async def test() -> None:
        raw = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: 2\r\n\r\n{}" % content_type
        async with sending(raw) as url:
            m = model(url)
            async with upstream(m) as up:
                reply, text = await ask(up, m)
                assert (reply.headers.get("content-type"), reply.is_stream, text) == (passed_on, is_stream, "{}")

    test()


@FUZZ
@given(st.integers(100, 999), st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=60))
def test_whatever_a_server_says_is_an_answer_or_a_failure(
    status: int, content_type: bytes, retry: bytes, body: bytes
) -> None:
    @scenario
    async def test() -> None:
        head = b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nRetry-After: %s\r\n\r\n" % (status, content_type, retry)
        async with sending(head + body) as url:
            m = model(url)
            async with upstream(m, max_wait_seconds=0) as up:
                with contextlib.suppress(UpstreamUnavailable, UpstreamBroken):
                    reply, _ = await ask(up, m)
                    assert 200 <= reply.status < 600
                    assert all(value.isascii() for value in reply.headers.values())
                assert outstanding(up, m) == [0]

    test()


@scenario
async def test_redirects_are_not_followed_and_cookies_not_kept() -> None:
    cookies = []

    async def chat(request: Request) -> Response:
        cookies.append(request.cookies)
        response = Response("{}", headers={"set-cookie": "a=b"})
        return RedirectResponse("/elsewhere") if len(cookies) == 3 else response

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    async with serving(app) as url:
        m = model(url)
        async with upstream(m) as up:
            assert [(await ask(up, m))[0].status for _ in range(3)] == [200, 200, 307]
    assert cookies == [{}, {}, {}]


# Time-outs


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_silent_endpoint_is_left_and_another_generates(stream: bool) -> None:
    @scenario
    async def test() -> None:
        silent, good = Stub(), Stub()
        silent.fault = "silent"
        async with serving(create_app(silent)) as first, serving(create_app(good)) as second:
            m = model(first, second)
            limit = {"first_byte_timeout_seconds" if stream else "idle_timeout_seconds": 0.2}
            async with upstream(m, **limit) as up:
                assert (await ask(up, m, stream=stream))[0].status == 200
                assert errors(up, m, "timeout") == 1
                await until(lambda: silent.abandoned)  # it is told to stop
                assert outstanding(up, m) == [0, 0]

    test()


@scenario
async def test_no_second_generation_where_none_is_allowed() -> None:
    silent, good = Stub(), Stub()
    silent.fault = "silent"
    async with serving(create_app(silent)) as first, serving(create_app(good)) as second:
        m = model(first, second)
        async with upstream(m, first_byte_timeout_seconds=0.2, timeout_retry_share=0) as up:
            with pytest.raises(UpstreamTimeout):
                await ask(up, m, stream=True)
            assert len(good.received) == 0


@scenario
async def test_a_fallback_s_second_generations_are_the_chosen_model_s() -> None:
    silent, good = Stub(), Stub()
    silent.fault = "silent"
    async with serving(create_app(silent)) as second, serving(create_app(good)) as third:
        models = [model(dead(), name="a"), model(second, name="b"), model(third, name="c")]
        async with upstream(*models, first_byte_timeout_seconds=0.2, timeout_retry_share=1) as up:
            for _ in range(int(BURST) + 2):
                assert (await ask(up, *models, stream=True))[0].model.name == "c"


@scenario
async def test_an_answer_that_drips_does_not_begin() -> None:
    good = Stub()
    async with sending(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 500) as first, serving(create_app(good)) as second:
        m = model(first, second)
        async with upstream(m, first_byte_timeout_seconds=0.3) as up:
            assert (await ask(up, m, stream=True))[0].status == 200
            assert errors(up, m, "timeout") == 1


@scenario
async def test_all_tries_together_have_a_limit() -> None:
    stubs = [Stub(), Stub(), Stub()]
    for stub in stubs:
        stub.fault = "silent"
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(create_app(stub))) for stub in stubs]
        m = model(*urls)
        async with upstream(m, first_byte_timeout_seconds=0.4, total_timeout_seconds=0.6) as up:
            started = time.monotonic()
            with pytest.raises(UpstreamTimeout):
                await ask(up, m, stream=True)
            assert time.monotonic() - started < 2
            assert [len(stub.received) for stub in stubs] == [1, 1, 0]


@scenario
async def test_a_stream_has_an_end() -> None:
    stub = Stub()
    stub.fault = "endless"
    async with serving(create_app(stub)) as url:
        m = model(url)
        async with upstream(m, total_timeout_seconds=0.5) as up:
            with pytest.raises(UpstreamBroken, match="total_timeout_seconds"):
                await ask(up, m, stream=True)
            assert up.figures(m)[0].failures_in_a_row == 0  # it was busy, not broken
            await until(lambda: stub.abandoned)


@scenario
async def test_a_client_that_leaves_is_no_failure() -> None:
    stub = Stub()
    stub.fault = "silent"
    async with serving(create_app(stub)) as url:
        m = model(url)
        async with upstream(m) as up:
            for stream in (False, True):
                asking = asyncio.create_task(ask(up, m, stream=stream))
                await until(lambda: outstanding(up, m)[0])
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
            assert outstanding(up, m) == [0]
            assert up.figures(m)[0].failures_in_a_row == 0
            await until(lambda: stub.abandoned == len(stub.received))


# Retry-After


@scenario
async def test_a_busy_endpoint_is_left_alone_as_long_as_it_asks() -> None:
    busy, good = Stub(), Stub()
    busy.fault, busy.retry_after = "status-429", "100"
    async with serving(create_app(busy)) as first, serving(create_app(good)) as second:
        m = model(first, second)
        async with upstream(m) as up:
            assert [(await ask(up, m))[0].status for _ in range(5)] == [200] * 5
            assert (len(busy.received), len(good.received)) == (1, 5)
            assert states(up, m) == ["resting", "up"]


@pytest.mark.parametrize("fault", ["status-429", "status-503"])
def test_a_short_wait_is_waited_for(fault: str) -> None:
    @scenario
    async def test() -> None:
        busy = Stub()
        busy.fault, busy.retry_after = fault, "1"
        async with serving(create_app(busy)) as url:
            m = model(url)
            async with upstream(m) as up:
                asking = asyncio.create_task(ask(up, m))
                await until(lambda: busy.received)
                busy.fault = "none"
                assert (await asking)[0].status == 200
                assert len(busy.received) == 2

    test()


@scenario
async def test_a_long_wait_is_the_client_s() -> None:
    busy = Stub()
    busy.fault, busy.retry_after = "status-429", "100"
    async with serving(create_app(busy)) as url:
        m = model(url)
        async with upstream(m) as up:
            reply, _ = await ask(up, m)
            assert (reply.status, reply.headers["retry-after"]) == (429, "100")
            with pytest.raises(UpstreamUnavailable) as caught:
                await ask(up, m)
            assert 95 <= int(caught.value.headers["Retry-After"]) <= 100
            assert len(busy.received) == 1
            assert states(up, m) == ["resting"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        ("999999999", 999_999_999),
        ("9" * 500, WAIT_SECONDS),
        ("-1", WAIT_SECONDS),
        ("", WAIT_SECONDS),
        (None, WAIT_SECONDS),
        ("٣", WAIT_SECONDS),
        ("soon", WAIT_SECONDS),
        ("Fri, 02 Jan 99999999999999999999 03:04:15 GMT", WAIT_SECONDS),
        (format_datetime(NOW.replace(second=35), usegmt=True), 30),
        (format_datetime(NOW.replace(year=2020)), 0),
        ("Fri, 02 Jan 2026 03:04:15", 10),
    ],
)
def test_retry_after(value: str | None, seconds: float) -> None:
    assert retry_after(value, NOW) == seconds


@FUZZ
@given(
    st.one_of(st.text(), st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,2} [A-Z][a-z]{2} [0-9]{1,30} [0-9:]{1,9} [A-Z+0-9-]*"))
)
def test_any_retry_after_is_some_seconds(value: str) -> None:
    assert 0 <= retry_after(value, NOW) < 1e12


# Another model


@pytest.mark.parametrize("fault", ["dead", "status-503", "status-429", "silent"])
def test_a_fallback_answers_when_no_endpoint_does(fault: str) -> None:
    @scenario
    async def test() -> None:
        bad, good = Stub(), Stub()
        bad.fault, bad.retry_after = "none" if fault == "dead" else fault, "100"
        async with serving(create_app(bad)) as first, serving(create_app(good)) as second:
            m, other = model(dead() if fault == "dead" else first), model(second, name="other")
            async with upstream(m, other, idle_timeout_seconds=0.3) as up:
                reply, text = await ask(up, m, other)
                assert (reply.status, reply.model.name) == (200, "other")
                assert "by other" in text
                assert good.received[0]["body"]["model"] == "other"
                assert metric(up, "fallbacks_total", model="m", fallback="other") == 1

    test()


@scenario
async def test_fallbacks_are_asked_in_order() -> None:
    stub = Stub()
    async with serving(create_app(stub)) as url:
        models = [model(dead(), name="a"), model(dead(), name="b"), model(url, name="c"), model(url, name="d")]
        async with upstream(*models) as up:
            assert (await ask(up, *models))[0].model.name == "c"
            assert metric(up, "fallbacks_total", model="a", fallback="c") == 1
            with pytest.raises(UpstreamUnavailable, match="'a' or 'b'"):
                await ask(up, *models[:2])


# Ejection, health


@scenario
async def test_an_endpoint_that_fails_again_and_again_is_ejected_and_comes_back() -> None:
    bad, good = Stub(), Stub()
    bad.fault = "status-503"
    async with serving(create_app(bad)) as first, serving(create_app(good)) as second:
        m = model(first, second)
        async with upstream(m, ejection={"consecutive_failures": 2, "seconds": 0.5}) as up:
            while states(up, m)[0] == "up":
                assert (await ask(up, m))[0].status == 200
                up._endpoints["m"].take(up._endpoints["m"].all[1]).given_up()  # so that it is the first one's turn
            before = len(bad.received)
            assert before == 2
            assert [(await ask(up, m))[0].status for _ in range(4)] == [200] * 4
            assert len(bad.received) == before
            assert metric(up, "endpoint_ejections_total", model="m", endpoint=first) == 1
            bad.fault = "none"
            await asyncio.sleep(0.5)
            while len(bad.received) == before:
                assert (await ask(up, m))[0].status == 200
            assert states(up, m) == ["up", "up"]


@scenario
async def test_when_all_are_ejected_the_least_bad_is_asked() -> None:
    stubs = [Stub(), Stub()]
    async with serving(create_app(stubs[0])) as first, serving(create_app(stubs[1])) as second:
        m = model(first, second)
        async with upstream(m, ejection={"consecutive_failures": 1, "seconds": 100, "max_share": 1}) as up:
            for stub in stubs:
                stub.fault = "status-500"
            while "up" in states(up, m):
                assert (await ask(up, m))[0].status == 500
            for stub in stubs:
                stub.fault = "none"
            assert (await ask(up, m))[0].status == 200
            assert "up" in states(up, m)


@scenario
async def test_health_checks_find_what_dies_and_what_comes_back() -> None:
    port = free_port()
    check = {"interval_seconds": 0.05, "timeout_seconds": 1}
    stub = Stub()
    async with serving(create_app(Stub())) as second:
        m = model(f"http://127.0.0.1:{port}", second)
        async with upstream(m, health_check=check) as up, up.watching():
            async with serving(create_app(stub), port):
                await until(lambda: metric(up, "health_checks_total", endpoint=m.endpoints[0].url, outcome="healthy"))
                assert await up.check(m)
                stub.fault = "unhealthy"
                await until(lambda: states(up, m) == ["down", "up"])
                stub.fault = "none"
                await until(lambda: states(up, m) == ["up", "up"])
            await until(lambda: states(up, m) == ["down", "up"])
            assert [(await ask(up, m))[0].status for _ in range(4)] == [200] * 4
            assert errors(up, m, "unreachable") == 0  # nobody asks what is down
            async with serving(create_app(Stub()), port):
                await until(lambda: states(up, m) == ["up", "up"])
        assert not [task for task in asyncio.all_tasks() if "_watch" in repr(task)]


@scenario
async def test_what_is_down_is_asked_when_nothing_else_is_left() -> None:
    stub = Stub()
    stub.fault = "unhealthy"
    async with serving(create_app(stub)) as url:
        m = model(url)
        async with upstream(m, health_check={"interval_seconds": 0.05}) as up, up.watching():
            await until(lambda: states(up, m) == ["down"])
            assert (await ask(up, m))[0].status == 200


@scenario
async def test_who_wants_to_know_whether_it_is_ready_changes_nothing() -> None:
    m = model(dead())
    async with upstream(m) as up:
        assert [await up.check(m) for _ in range(5)] == [False] * 5
        assert states(up, m) == ["up"]


@scenario
async def test_without_health_checks_requests_tell() -> None:
    m = model(dead())
    settings = {"health_check": {"enabled": False}, "ejection": {"consecutive_failures": 1, "max_share": 1}}
    async with upstream(m, **settings) as up, up.watching():
        assert await up.check(m)
        with pytest.raises(UpstreamUnavailable):
            await ask(up, m)
        assert not await up.check(m)


@pytest.mark.parametrize(
    ("chunk", "status"),
    [
        (b'data: {"error": {"code": 503}}\n\n', 503),
        (b'data: {"error": {"code": "x", "message": "y"}}\n\ndata: [DONE]\n\n', 500),
        (b'data: {"error": {"code": 7}}\n\n', 500),
        (b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"}}\n\n', 500),
        (b'data: {"error": null}\n\n', None),
        (b'data: {"error": "', None),
        (b'data: ["error"]\n\n', None),
        (b'data: {"error"\n\n', None),
        (b'data: {"choices": [{"delta": {"content": "\\"error\\""}}]}\n\n', None),
        (b"", None),
    ],
)
def test_what_a_stream_begins_with(chunk: bytes, status: int | None) -> None:
    assert error_status(chunk) == status
