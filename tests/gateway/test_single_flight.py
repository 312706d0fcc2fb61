"""Those who ask the same at the same time share one generation, whatever form each wants it in and whoever leaves."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Server, StartGateway, Tree, before_stubs, content, merged, wait_until
from tests.gateway.test_chat_completions import TOOL


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        merged(
            before_stubs(stub.url, stub_triton),
            {"upstream": {"first_byte_timeout_seconds": 1.5, "total_timeout_seconds": 10, "retries": 0}},
        )
    )


@pytest.fixture(autouse=True)
def healthy_stub(stub: Server) -> Iterator[None]:
    yield
    fault(stub, "none")


def fault(stub: Server, name: str) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": name}).raise_for_status()


def told(stub: Server) -> Tree:
    found = httpx.get(f"{stub.url}/stub").json()
    assert isinstance(found, dict)
    return found


def generations(stub: Server, question: str) -> int:
    """How many times the model was asked this."""
    return sum(question in json.dumps(each) for each in told(stub)["received"])


Client = httpx.AsyncClient


def about(*words: object) -> str:
    """A question that is like no other."""
    slug = re.sub(r"\W+", "", "".join(map(str, words)))
    return " ".join(f"{slug}{word}" for word in ("name", "a", "river", "of", "norway"))


def ask(client: Client, url: str, question: str, **fields: Any) -> Awaitable[httpx.Response]:
    headers = {"Authorization": "Bearer one", **fields.pop("headers", {})}
    body = {"model": "auto", "messages": [{"role": "user", "content": question}], **fields}
    return client.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def together(scenario: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with httpx.AsyncClient() as client:
            return await scenario(client)

    return asyncio.run(run())


def outcomes(answers: list[httpx.Response]) -> Counter[str]:
    return Counter(answer.headers["x-fingerpost-cache"] for answer in answers)


FORMS: dict[str, list[Tree]] = {
    "all JSON": [{}] * 12,
    "all streams": [{"stream": True}] * 12,
    "JSON first": [{}, *[{"stream": True}] * 5, *[{}] * 6],
    "a stream first": [{"stream": True}, *[{}] * 5, *[{"stream": True}] * 6],
    "with and without usage": [
        {"stream": True},
        *[{"stream": True, "stream_options": {"include_usage": True}}] * 5,
        *[{"stream": True}] * 6,
    ],
}


@pytest.mark.parametrize("name", FORMS)
def test_one_generation_for_all_who_ask_at_once(gateway: Server, stub: Server, name: str) -> None:
    question = about("at once", name)
    fault(stub, "slow")

    async def scenario(client: Client) -> list[httpx.Response]:
        return list(await asyncio.gather(*(ask(client, gateway.url, question, **form) for form in FORMS[name])))

    answers = together(scenario)
    assert generations(stub, question) == 1
    assert len({content(answer) for answer in answers}) == 1
    assert outcomes(answers) == {"miss": 1, "joined": 11}
    for answer, form in zip(answers, FORMS[name], strict=True):
        usage = '"usage":{' in answer.text.replace(" ", "")
        assert usage == ("stream_options" in form or not form.get("stream"))
    again = together(lambda client: ask(client, gateway.url, question))
    assert again.headers["x-fingerpost-cache"] == "hit-exact"
    assert content(again) == content(answers[0])


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_may_leave(gateway: Server, stub: Server, stream: bool) -> None:
    question = about("leaves", stream)
    fault(stub, "slow")

    async def scenario(client: Client) -> httpx.Response:
        first = asyncio.ensure_future(ask(client, gateway.url, question, stream=stream))
        await asyncio.sleep(0.15)
        second = asyncio.ensure_future(ask(client, gateway.url, question, stream=stream))
        await asyncio.sleep(0.1)
        first.cancel()
        return await second

    answer = together(scenario)
    assert question in content(answer)
    assert answer.headers["x-fingerpost-cache"] == "joined"
    assert generations(stub, question) == 1


def test_when_all_have_left_the_model_is_told(gateway: Server, stub: Server) -> None:
    question, before = about("all leave"), told(stub)["abandoned"]
    fault(stub, "endless")

    async def scenario(client: Client) -> None:
        asking = [asyncio.ensure_future(ask(client, gateway.url, question, stream=True)) for _ in range(3)]
        await asyncio.sleep(0.5)
        for each in asking:
            each.cancel()

    together(scenario)
    wait_until("the stub to be left", lambda: told(stub)["abandoned"] == before + 1)
    assert generations(stub, question) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_others_ask_themselves_when_the_first_fails(gateway: Server, stub: Server, stream: bool) -> None:
    question = about("fails", stream)
    fault(stub, "silent")

    async def scenario(client: Client) -> list[httpx.Response]:
        first = asyncio.ensure_future(ask(client, gateway.url, question, stream=stream))
        await asyncio.sleep(0.3)
        others = [asyncio.ensure_future(ask(client, gateway.url, question, stream=stream)) for _ in range(3)]
        await asyncio.sleep(0.3)
        await client.post(f"{stub.url}/stub", json={"fault": "none"})
        return [await first, *await asyncio.gather(*others)]

    first, *others = together(scenario)
    assert first.status_code == 504
    assert all(question in content(answer) for answer in others)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["length", "tool-call"])
def test_an_answer_that_is_not_kept_is_nobody_else_s(gateway: Server, stub: Server, name: str, stream: bool) -> None:
    """Whether it is cut or, unless the configuration keeps those, calls tools."""
    question = about("not kept", name, stream)
    fault(stub, name)

    async def scenario(client: Client) -> list[httpx.Response]:
        others = [ask(client, gateway.url, question) for _ in range(3)]
        return list(await asyncio.gather(ask(client, gateway.url, question, stream=stream), *others))

    answers = together(scenario)
    assert outcomes(answers) == {"miss": 4}
    assert generations(stub, question) == 4


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("who asks", {"headers": {"Authorization": "Bearer two"}}),
        ("a parameter", {"seed": 7}),
        ("tools", {"tools": [TOOL]}),
        ("no-cache", {"headers": {"x-fingerpost-cache-control": "no-cache"}}),
        ("no-store", {"headers": {"x-fingerpost-cache-control": "no-store"}}),
        ("n", {"n": 2}),
    ],
)
def test_those_who_ask_something_else_do_not_join(gateway: Server, stub: Server, what: str, other: Tree) -> None:
    question = about("else", what)
    fault(stub, "slow")

    async def scenario(client: Client) -> list[httpx.Response]:
        asking = [ask(client, gateway.url, question, **fields) for fields in ({}, dict(other))]
        return list(await asyncio.gather(*asking))

    answers = together(scenario)
    assert "joined" not in outcomes(answers)
    assert generations(stub, question) == 2


def test_the_others_get_a_stream_while_it_comes(gateway: Server, stub: Server) -> None:
    """Not only when it has ended."""
    question = about("comes")
    fault(stub, "endless")

    async def scenario(client: Client) -> bytes:
        first = asyncio.ensure_future(ask(client, gateway.url, question, stream=True))
        await asyncio.sleep(0.3)
        body = {"model": "auto", "messages": [{"role": "user", "content": question}], "stream": True}
        headers = {"Authorization": "Bearer one"}
        async with client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.headers["x-fingerpost-cache"] == "joined"
            async for piece in answer.aiter_raw():
                first.cancel()
                return piece
        return b""

    assert together(scenario).startswith(b"data: ")
    assert generations(stub, question) == 1
