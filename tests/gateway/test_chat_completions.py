"""Chat completions in full: what a client sends reaches vLLM, what vLLM says reaches the client, to the byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import Server, StartGateway, Tree, chat, events, models, wait_until

Ask = Callable[..., httpx.Response]

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "river", "schema": {"type": "object"}, "strict": True}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
USAGE = {"prompt_tokens": 11, "total_tokens": 31, "completion_tokens": 20, "prompt_tokens_details": None}


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(
        {
            "triton": stub_triton,
            "models": models(stub.url),
            "policy": {
                "rules": [{"name": "code", "when": {"category": ["code"]}, "model": "smollm2-large"}],
                "default": "smollm2-small",
            },
            "semantic_cache": {"backend_type": "memory"},
        }
    )


@pytest.fixture
def ask(request: pytest.FixtureRequest, gateway: Server) -> Ask:
    return partial(chat, gateway.url, tenant=request.node.name.encode().hex())


@pytest.fixture(autouse=True)
def healthy_stub(stub: Server) -> Iterator[None]:
    yield
    httpx.post(f"{stub.url}/stub", json={"fault": "none"})


def play(stub: Server, *pieces: str, content_type: str = "text/event-stream") -> None:
    """Have the stub answer with these pieces, whatever it is asked."""
    script = {"content_type": content_type, "pieces": pieces}
    httpx.post(f"{stub.url}/stub", json={"fault": "none", "script": script}).raise_for_status()


def completion(*messages: Tree, reason: str = "stop", **choice: Any) -> str:
    """A chat.completion as vLLM writes it."""
    choices = [
        {"index": i, "message": {"role": "assistant", **message}, "logprobs": None, "finish_reason": reason, **choice}
        for i, message in enumerate(messages)
    ]
    whole = {"id": "chatcmpl-9", "object": "chat.completion", "created": 1, "model": "small", "choices": choices}
    return json.dumps({**whole, "usage": USAGE, "vendor": {"a": [1.0, 1e-9, "ä"]}}, ensure_ascii=False)


def chunks(*deltas: tuple[Tree, str | None], usage: bool = True, **choice: Any) -> list[str]:
    """A stream as vLLM writes it."""
    envelope = {"id": "chatcmpl-9", "object": "chat.completion.chunk", "created": 1, "model": "small"}
    payloads = [
        {**envelope, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, **choice}]}
        for delta, reason in deltas
    ]
    payloads += [{**envelope, "choices": [], "usage": USAGE}] if usage else []
    written = [json.dumps(payload, ensure_ascii=False, separators=(",", ":")) for payload in payloads]
    return [*(f"data: {payload}\n\n" for payload in written), "data: [DONE]\n\n"]


def sent(stub: Server) -> Tree:
    return dict(httpx.get(f"{stub.url}/stub").json()["received"][-1]["body"])


FIELDS: list[Tree] = [
    {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
        "parallel_tool_calls": False,
    },
    {"response_format": SCHEMA},
    {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a+"}},
    {"n": 2, "best_of": 3},
    {"stop": ["\n\n", "END"], "include_stop_str_in_output": True, "stop_token_ids": [2]},
    {"stop": "END"},
    {"logprobs": True, "top_logprobs": 3},
    {"seed": 7, "temperature": 0.0, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": -0.5},
    {"user": "somebody", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": False},
    {"max_tokens": 5, "max_completion_tokens": 6, "logit_bias": {"50256": -100}},
    {"vendor_field": {"nested": [1, 2.5, None, "ä", 1e22, True]}, "another": None},
    {"stream_options": None, "stream": False},
]


@pytest.mark.parametrize("fields", FIELDS, ids=[next(iter(fields)) for fields in FIELDS])
def test_every_field_reaches_vllm(ask: Ask, stub: Server, fields: Tree) -> None:
    assert ask("Tell me about fields.", **fields).status_code == 200
    expected = {"model": "smollm2-small", "messages": [{"role": "user", "content": "Tell me about fields."}], **fields}
    assert sent(stub) == expected


CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "fjord"}'}}
WHOLE = {
    "tools": completion({"content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]}, reason="tool_calls"),
    "n": completion({"content": "Glomma"}, {"content": "Rhine"}),
    "logprobs": completion(
        {"content": "A"}, logprobs={"content": [{"token": "A", "logprob": -0.1, "top_logprobs": []}]}
    ),
    "reasoning": completion({"content": "Glomma", "reasoning": "Let me see …", "reasoning_content": "Let me see …"}),
    "stop": completion({"content": "Glomma"}, stop_reason="END"),
    "spaced": " " + completion({"content": "Glomma"}) + "\n",
    "refusal": completion({"content": None, "refusal": "No."}),
}


@pytest.mark.parametrize("said", WHOLE.values(), ids=WHOLE)
def test_an_answer_comes_byte_for_byte(ask: Ask, stub: Server, said: str) -> None:
    play(stub, said, content_type="application/json")
    answer = ask("Name a river.")
    assert answer.content == said.encode()
    assert answer.headers["content-type"] == "application/json"


ROLE: tuple[Tree, None] = ({"role": "assistant", "content": ""}, None)
END: tuple[Tree, str] = ({"content": ""}, "stop")


def tool_delta(index: int, **function: str) -> tuple[Tree, None]:
    call: Tree = {"index": index, "function": function}
    if "name" in function:
        call |= {"id": f"call_{index}", "type": "function"}
    return {"tool_calls": [call]}, None


STREAMS = {
    "tools": chunks(
        ROLE,
        tool_delta(0, name="look_up", arguments=""),
        tool_delta(0, arguments='{"word": '),
        tool_delta(0, arguments='"fjord"}'),
        tool_delta(1, name="look_up", arguments='{"word": "gnu"}'),
        ({}, "tool_calls"),
    ),
    "n": [*chunks(ROLE, ({"content": "a"}, None))[:2], *chunks(({"content": "b"}, "stop"), index=1)],
    "logprobs": chunks(ROLE, ({"content": "A"}, None), END, logprobs={"content": [{"token": "A", "logprob": -0.1}]}),
    "reasoning": chunks(
        ROLE, ({"reasoning": "Hm"}, None), ({"reasoning_content": "Hm"}, None), ({"content": "A"}, None), END
    ),
    "comments": [": keep-alive\n\n", *chunks(ROLE, ({"content": "A"}, None), END), ": bye\n\n"],
    "crlf": [piece.replace("\n", "\r\n") for piece in chunks(ROLE, ({"content": "A"}, None), END)],
    "usage-in-each": chunks(ROLE, ({"content": "A"}, None), END),
    "unfinished": [*chunks(ROLE, ({"content": "A"}, None))[:-2], "data: {"],
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_comes_byte_for_byte(ask: Ask, stub: Server, name: str) -> None:
    play(stub, *STREAMS[name])
    answer = ask("Name a river.", stream=True, stream_options={"include_usage": True})
    assert answer.content == "".join(STREAMS[name]).encode()


def test_a_stream_split_at_every_byte(ask: Ask, stub: Server) -> None:
    whole = "".join(STREAMS["reasoning"])
    play(stub, *whole)
    answer = ask("Name a river.", stream=True, stream_options={"include_usage": True})
    assert answer.content == whole.encode()


def test_only_the_figures_that_nobody_asked_for_are_left_out(ask: Ask, stub: Server) -> None:
    for name in ("reasoning", "comments"):
        play(stub, *STREAMS[name])
        answer = ask(f"Name a river, {name}.", stream=True, stream_options={"continuous_usage_stats": True})
        without = [piece for piece in STREAMS[name] if '"choices":[]' not in piece]
        assert answer.content == "".join(without).encode()
        assert sent(stub)["stream_options"] == {"include_usage": True}


def test_tool_calls_are_never_replayed(ask: Ask, stub: Server) -> None:
    play(stub, WHOLE["tools"], content_type="application/json")
    outcomes = [ask("Look it up.", tools=[TOOL]).headers["x-fingerpost-cache"] for _ in range(2)]
    play(stub, *STREAMS["tools"])
    outcomes += [ask("Look it up.", tools=[TOOL], stream=True).headers["x-fingerpost-cache"] for _ in range(2)]
    assert outcomes == ["miss"] * 4


def test_the_result_of_a_tool_is_not_a_question(ask: Ask, stub: Server) -> None:
    turns = [
        {"role": "user", "content": "What does fjord mean?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a long inlet"},
    ]
    answer = ask(messages=turns, tools=[TOOL])
    assert answer.headers["x-fingerpost-cache"] == "bypass"
    assert sent(stub)["messages"] == turns


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_reasoning_is_replayed(ask: Ask, stub: Server, stream: bool) -> None:
    if stream:
        play(stub, *STREAMS["reasoning"])
    else:
        play(stub, WHOLE["reasoning"], content_type="application/json")
    assert ask("Name a river.", stream=stream).headers["x-fingerpost-cache"] == "miss"
    hit, streamed = ask("Name a river."), ask("Name a river.", stream=True)
    assert hit.headers["x-fingerpost-cache"] == "hit-exact"
    expected = (
        {"reasoning": "Hm", "reasoning_content": "Hm"}
        if stream
        else dict.fromkeys(("reasoning", "reasoning_content"), "Let me see …")
    )
    message = hit.json()["choices"][0]["message"]
    deltas = [choice["delta"] for event in events(streamed) for choice in event["choices"]]
    for field, text in expected.items():
        assert message[field] == text
        assert "".join(delta.get(field, "") for delta in deltas) == text


def test_a_hit_is_a_new_answer_that_cost_nothing(ask: Ask, stub: Server) -> None:
    miss, hit, again = (ask("Name a river.") for _ in range(3))
    assert "x-fingerpost-upstream-tokens" not in miss.headers
    assert hit.headers["x-fingerpost-upstream-tokens"] == "0"
    first, second, third = (answer.json() for answer in (miss, hit, again))
    assert len({answer["id"] for answer in (first, second, third)}) == 3
    assert second["id"] == f"chatcmpl-{hit.headers['x-request-id']}"
    assert second["created"] >= first["created"]
    assert second["usage"] == first["usage"]
    assert (second["object"], second["model"]) == (first["object"], first["model"])


def test_a_picture_is_routed_by_its_text_and_never_cached(ask: Ask, stub: Server) -> None:
    text = {"type": "text", "text": "Which code is in this picture?"}
    asked = [{"role": "user", "content": [text, PICTURE]}]
    for _ in range(2):
        answer = ask(messages=asked)
        assert (answer.headers["x-fingerpost-rule"], answer.headers["x-fingerpost-category"]) == ("code", "code")
        assert answer.headers["x-fingerpost-cache"] == "bypass"
        assert "not text alone" in answer.headers["x-fingerpost-cache-reason"]
        assert sent(stub)["messages"] == asked
    later = [*asked, {"role": "assistant", "content": "Python."}, {"role": "user", "content": "Are you sure?"}]
    for _ in range(2):
        answer = ask(messages=later)
        assert answer.headers["x-fingerpost-cache"] == "bypass"
        assert "earlier message" in answer.headers["x-fingerpost-cache-reason"]


def test_a_text_in_parts_is_a_text(ask: Ask) -> None:
    assert ask(messages=[{"role": "user", "content": "Name a river."}]).headers["x-fingerpost-cache"] == "miss"
    parts = [{"type": "text", "text": "Name a river."}]
    assert ask(messages=[{"role": "user", "content": parts}]).headers["x-fingerpost-cache"] == "hit-exact"


def test_with_openais_client(gateway: Server, stub: Server) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="official-client") as client:
        asked: Any = {"model": "auto", "messages": [{"role": "user", "content": "Name a fjord."}]}
        play(stub, WHOLE["tools"], content_type="application/json")
        (choice,) = client.chat.completions.create(**asked, tools=[TOOL]).choices
        assert [call.id for call in choice.message.tool_calls or []] == ["call_1", "call_2"]
        play(stub, *STREAMS["tools"])
        with client.chat.completions.stream(**asked, tools=[TOOL]) as stream:
            final = stream.get_final_completion()
        assert [call.function.arguments for call in final.choices[0].message.tool_calls or []] == [
            '{"word": "fjord"}',
            '{"word": "gnu"}',
        ]
        play(stub, WHOLE["n"], content_type="application/json")
        assert len(client.chat.completions.create(**asked, n=2).choices) == 2
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**asked, "model": "gpt-17"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["none", "length", "tool-call"])
def test_tokens_are_counted_however_an_answer_ends(
    gateway: Server, stub: Server, ask: Ask, fault: str, stream: bool
) -> None:
    def counted() -> list[float]:
        text = httpx.get(f"{gateway.url}/metrics").text
        name = 'fingerpost_tokens_total{{kind="{}",model="smollm2-small"}} '
        found = [re.search(re.escape(name.format(kind)) + r"(\S+)", text) for kind in ("prompt", "completion")]
        return [float(each[1]) if each else 0.0 for each in found]

    before = counted()
    httpx.post(f"{stub.url}/stub", json={"fault": fault})
    assert ask(f"How does it end? {fault} {stream}", stream=stream).status_code == 200
    wait_until("the tokens to be counted", lambda: counted() == [before[0] + 11, before[1] + 20])
