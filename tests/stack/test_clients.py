"""The official clients against the gateway before the real Triton, Milvus and vLLM; and vLLM's bytes through it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest

from gateway.tenants import digest
from tests.conftest import ROOT, Server, Stack, StartGateway, Tree, free_port, models

SMALL = "smollm2-small"
SECONDS = 300  # a CPU generates a dozen tokens a second
STILL: Tree = {"temperature": 0, "seed": 1}
COLD: Tree = {"temperature": 0}  # which Anthropic's client knows no more
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "green", "red"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
SCHEMA: Tree = {"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS, "strict": True}}
PAINT: Tree = {"name": "paint", "description": "Paint the wall.", "parameters": COLOURS, "strict": True}
TOOLS = [{"type": "function", "function": PAINT}]
ASK_FOR_PAINT = "Paint the wall blue."


def user(text: str) -> list[Tree]:
    return [{"role": "user", "content": text}]


def is_a_colour(text: str) -> bool:
    return json.loads(text)["colour"] in COLOURS["properties"]["colour"]["enum"]  # type: ignore[index]


@pytest.fixture(scope="module")
def client(stack: Stack) -> Any:
    """Typed as anything: the client's own types want literals where these tests have variables."""
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="openai-client", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def claude(stack: Stack) -> Any:
    return anthropic.Anthropic(base_url=stack.url, api_key="anthropic-client", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def guarded(stack: Stack, start_gateway: StartGateway) -> Server:
    """A gateway with tenants in front of the same servers, and with a model whose endpoint is not there."""
    small, large = models(f"http://127.0.0.1:{stack.ports['vllm']}")
    return start_gateway(
        {
            "triton": stack.config_tree["triton"],
            "models": [small, {**large, "endpoints": [f"http://127.0.0.1:{free_port()}"]}],
            "semantic_cache": {"backend_type": "memory"},
            "tenants": [
                {"name": "all", "key_sha256": [digest("key-all")]},
                {"name": "few", "key_sha256": [digest("key-few")], "models": ["auto"], "requests_per_minute": 1},
            ],
        }
    )


# OpenAI's


def test_chat(client: Any) -> None:
    whole = client.chat.completions.create(model="auto", messages=user("Say hello."), max_tokens=8, **STILL)
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8
    assert whole.id.startswith("chatcmpl-")


def test_chat_stream(client: Any) -> None:
    wanted = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 8, **STILL}
    chunks = list(client.chat.completions.create(model=SMALL, messages=user("Say hello."), **wanted))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert 0 < chunks[-1].usage.completion_tokens <= 8


def test_chat_helper_for_streams(client: Any) -> None:
    question = user("Which colour has the sea? Answer as JSON.")
    asked = {"messages": question, "response_format": SCHEMA, "max_tokens": 48}  # it takes no answer that is cut short
    with client.chat.completions.stream(model=SMALL, **asked, **STILL) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_tools(client: Any, choice: Any) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 64, **STILL}
    messages = user(ASK_FOR_PAINT)
    whole = client.chat.completions.create(model=SMALL, messages=messages, **asked)
    [call] = whole.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert is_a_colour(call.function.arguments)
    chunks = list(client.chat.completions.create(model=SMALL, messages=messages, stream=True, **asked))
    deltas = [part for chunk in chunks if chunk.choices for part in chunk.choices[0].delta.tool_calls or []]
    assert "".join(part.function.name or "" for part in deltas) == "paint"
    assert is_a_colour("".join(part.function.arguments or "" for part in deltas))


def test_what_a_tool_said(client: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "blue"}'}}
    turns = [
        *user(ASK_FOR_PAINT),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "The wall is blue now."},
    ]
    whole = client.chat.completions.create(model="auto", messages=turns, tools=TOOLS, max_tokens=8, **STILL)
    assert whole.choices[0].message.content


def test_json_schema(client: Any) -> None:
    asked = {"messages": user("What colour is grass? Answer as JSON."), "response_format": SCHEMA, "max_tokens": 48}
    whole = client.chat.completions.create(model="auto", **asked, **STILL)
    assert is_a_colour(whole.choices[0].message.content)
    streamed = client.chat.completions.create(model=SMALL, stream=True, **asked, **STILL)
    assert is_a_colour("".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices))


def test_log_probabilities(client: Any) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 4, **STILL}
    whole = client.chat.completions.create(model="auto", messages=user("Count to ten."), **asked)
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in told)


def test_n(client: Any) -> None:
    asked = {"n": 2, "temperature": 0.8, "seed": 1, "max_tokens": 4}
    whole = client.chat.completions.create(model="auto", messages=user("Name a river."), **asked)
    assert [choice.index for choice in whole.choices] == [0, 1]
    chunks = client.chat.completions.create(model="auto", messages=user("Name a river."), stream=True, **asked)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def test_completions(client: Any) -> None:
    asked = {"prompt": "The capital of Norway is", "max_tokens": 8, **STILL}
    whole = client.completions.create(model="auto", **asked)
    assert whole.choices[0].text
    chunks = client.completions.create(model=SMALL, stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text


def test_responses(client: Any) -> None:
    asked = {"input": "Say hello.", "instructions": "Be brief.", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(model="auto", **asked)
    assert whole.output_text
    assert whole.usage.output_tokens <= 8
    events = list(client.responses.create(model=SMALL, stream=True, **asked))
    assert events[0].type == "response.created"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def test_embeddings(client: Any) -> None:
    texts = ["How tall is the Eiffel Tower?", "What is the height of the Eiffel Tower?", "Knead the dough."]
    found = client.embeddings.create(model="embedder", input=texts)  # the client asks for base64
    first, second, third = (row.embedding for row in found.data)
    plain = client.embeddings.create(model="embedder", input=texts[0], encoding_format="float")
    assert first == pytest.approx(plain.data[0].embedding, abs=1e-5)
    assert dot(first, second) > 0.8 > 0.4 > dot(first, third)
    with pytest.raises(openai.BadRequestError, match="384"):
        client.embeddings.create(model="embedder", input=texts, dimensions=128)


def test_models(client: Any) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["auto", SMALL, "smollm2-large"]
    assert client.models.retrieve(SMALL).owned_by == "vllm"


def filled(fields: Tree) -> Tree:
    """Those that say something: vLLM names all that it knows of."""
    return {name: value for name, value in fields.items() if value not in (None, [])}


def replayed(create: Callable[..., Any], form: str, **asked: Any) -> tuple[Any, Any]:
    """The answer that was generated, and its replay."""
    first, second = create(**asked), create(**asked)
    assert first.headers["x-fingerpost-cache"] == "miss", form
    assert second.headers["x-fingerpost-cache"] == "hit-exact", form
    return first.parse(), second.parse()


def test_replays_are_the_clients_own_kind(client: Any, claude: Any) -> None:
    """Answers that a schema brings to their own end, or a stop word."""
    client, claude = (each.with_options(api_key="nothing-asked-before") for each in (client, claude))
    question = "Which colour has the sky? Answer as JSON."
    chat = client.chat.completions.with_raw_response.create
    first, second = replayed(
        chat, "chat", model="auto", messages=user(question), response_format=SCHEMA, max_tokens=48, **STILL
    )
    told, replay = (filled(each.choices[0].message.to_dict()) for each in (first, second))
    assert told == replay
    assert first.usage == second.usage
    assert first.id != second.id
    complete = client.completions.with_raw_response.create
    first, second = replayed(complete, "completions", model="auto", prompt="1, 2, 3, 4,", stop=[","], **STILL)
    assert first.choices[0].text == second.choices[0].text
    text = {"format": {"type": "json_schema", "name": "colours", "schema": COLOURS, "strict": True}}
    respond = client.responses.with_raw_response.create
    first, second = replayed(respond, "responses", model="auto", input=question, text=text, max_output_tokens=48)
    assert first.output_text == second.output_text
    events = list(client.responses.create(model="auto", input=question, text=text, max_output_tokens=48, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == first.output_text
    asked = {"model": "auto", "messages": user(question), "max_tokens": 48}
    form = {**COLD, "output_config": {"format": {"type": "json_schema", "schema": COLOURS}}}
    first, second = replayed(claude.messages.with_raw_response.create, "messages", **asked, extra_body=form)
    assert first.content == second.content
    with claude.messages.stream(**asked, extra_body=form) as stream:
        assert stream.get_final_message().content[0].text == first.content[0].text


# Anthropic's


def test_messages(claude: Any) -> None:
    whole = claude.messages.create(
        model="auto", system="Be brief.", messages=user("Say hello."), max_tokens=8, extra_body=COLD
    )
    assert (whole.type, whole.role) == ("message", "assistant")
    assert whole.content[0].text
    assert 0 < whole.usage.output_tokens <= 8


def test_messages_stream(claude: Any) -> None:
    with claude.messages.stream(model=SMALL, messages=user("Say hello."), max_tokens=8, extra_body=COLD) as stream:
        pieces = list(stream.text_stream)
        whole = stream.get_final_message()
    assert "".join(pieces) == whole.content[0].text
    assert whole.stop_reason in ("max_tokens", "end_turn")


def test_messages_tools(claude: Any) -> None:
    tool = {"name": "paint", "description": "Paint the wall.", "input_schema": COLOURS, "strict": True}
    choice = {"type": "tool", "name": "paint", "disable_parallel_tool_use": True}
    asked = {"messages": user(ASK_FOR_PAINT), "tools": [tool], "tool_choice": choice, "max_tokens": 64}
    whole = claude.messages.create(model=SMALL, extra_body=COLD, **asked)
    [call] = [part for part in whole.content if part.type == "tool_use"]
    assert call.name == "paint"
    assert is_a_colour(json.dumps(call.input))
    with claude.messages.stream(model=SMALL, extra_body=COLD, **asked) as stream:
        streamed = stream.get_final_message()
    assert [part.input for part in streamed.content if part.type == "tool_use"] == [call.input]


# Errors


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"model": "gpt-17"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"temperature": -3}, openai.BadRequestError),  # vLLM's own refusal
        ({"messages": user("word " * 5000)}, openai.BadRequestError),  # more than the model's window
        ({"messages": user("x" * 5_000_000)}, openai.APIStatusError),
    ],
    ids=["model", "messages", "temperature", "window", "size"],
)
def test_errors_of_openai_s_client(client: Any, asked: Tree, kind: type[openai.APIStatusError]) -> None:
    whole = {"model": SMALL, "messages": user("Hi"), "max_tokens": 4, **asked}
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**whole)
    assert raised.value.status_code in (400, 404, 413)
    assert raised.value.body["message"]  # type: ignore[index]
    with pytest.raises(kind):
        list(client.chat.completions.create(**{**whole, "stream": True}))


@pytest.mark.parametrize(
    ("asked", "kind", "type"),
    [
        ({"model": "gpt-17"}, anthropic.NotFoundError, "not_found_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": user("word " * 5000)}, anthropic.BadRequestError, None),  # vLLM's own words
    ],
    ids=["model", "messages", "window"],
)
def test_errors_of_anthropic_s_client(
    claude: Any, asked: Tree, kind: type[anthropic.APIStatusError], type: str | None
) -> None:
    with pytest.raises(kind) as raised:
        claude.messages.create(**{"model": SMALL, "messages": user("Hi"), "max_tokens": 4, **asked})
    assert type is None or raised.value.body["error"]["type"] == type  # type: ignore[index]


def test_errors_of_tenants(guarded: Server) -> None:
    def asking(key: str, model: str = "auto") -> Any:
        of_key = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)
        return of_key.chat.completions.create(model=model, messages=user("Hi"), max_tokens=4)  # type: ignore[arg-type]

    def messaging(key: str, model: str = "auto") -> Any:
        of_key = anthropic.Anthropic(base_url=guarded.url, api_key=key, max_retries=0, timeout=SECONDS)
        return of_key.messages.create(model=model, messages=user("Hi"), max_tokens=4)  # type: ignore[arg-type]

    for ask, package in ((asking, openai), (messaging, anthropic)):
        with pytest.raises(package.AuthenticationError):
            ask("key-none")
        with pytest.raises(package.InternalServerError) as raised:
            ask("key-all", "smollm2-large")  # nobody is there
        assert raised.value.status_code == 503
    with pytest.raises(openai.PermissionDeniedError):
        asking("key-few", SMALL)
    with pytest.raises(openai.RateLimitError) as limited:
        [asking("key-few") for _ in range(3)]
    assert int(limited.value.response.headers["retry-after"]) > 0
    with pytest.raises(anthropic.RateLimitError):
        messaging("key-few")


# Node


@pytest.fixture(scope="module")
def node() -> str:
    """Its program, where OpenAI's client for it is installed, too; see docs/dependencies.md."""
    found = shutil.which("node")
    if found is None or not (ROOT / "node_modules/openai").is_dir():
        pytest.skip("there is no node, or npm could not install openai")
    return found


def test_node(node: str, stack: Stack, guarded: Server) -> None:
    command = [node, "tests/stack/client.mjs", stack.url, guarded.url, SMALL]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["models"] == ["auto", SMALL, "smollm2-large"]
    assert told["chat"]
    assert told["chat_stream"] == told["chat"]
    assert told["usage"] > 0
    assert is_a_colour(told["tool"])
    assert is_a_colour(told["tool_stream"])
    assert is_a_colour(told["schema"])
    assert told["logprobs"] == 4
    assert told["n"] == [0, 1]
    assert told["completion_stream"] == told["completion"] != ""
    assert told["response_stream"] == told["response"] != ""
    assert told["embedding"] == [2, 384]
    errors = {"unknown": 404, "empty": 400, "vllm": 400, "key": 401, "down": 503}
    assert told["errors"] == errors


# vLLM's bytes


@dataclass(frozen=True)
class Asked:
    path: str
    body: Tree
    status: int = 200


def chatting(text: str = "Name three rivers.", **fields: Any) -> Asked:
    status = fields.pop("status", 200)
    body = {"model": SMALL, "messages": user(text), "max_tokens": 10, **STILL, **fields}
    return Asked("/v1/chat/completions", body, status)


def completing(**fields: Any) -> Asked:
    status = fields.pop("status", 200)
    return Asked("/v1/completions", {"model": SMALL, "prompt": "Rivers:", "max_tokens": 10, **STILL, **fields}, status)


def responding(**fields: Any) -> Asked:
    status = fields.pop("status", 200)
    body = {"model": SMALL, "input": "Name three rivers.", "max_output_tokens": 10, "temperature": 0, **fields}
    return Asked("/v1/responses", body, status)


def messaging(**fields: Any) -> Asked:
    status = fields.pop("status", 200)
    body = {"model": SMALL, "messages": user("Name three rivers."), "max_tokens": 10, "temperature": 0, **fields}
    return Asked("/v1/messages", body, status)


PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "What?"}]
REQUIRED: Tree = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 48}
ASKED = {
    "chat": chatting(),
    "chat-stream": chatting(stream=True),
    "chat-usage": chatting(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "chat-no-usage": chatting(stream=True, stream_options={"include_usage": False}),
    "stop": chatting(stop=[","], include_stop_str_in_output=True, max_tokens=20),
    "logprobs": chatting(logprobs=True, top_logprobs=2),
    "logprobs-stream": chatting(logprobs=True, top_logprobs=2, stream=True),
    "n": chatting(n=2, temperature=0.8),
    "schema": chatting("What colour is grass?", response_format=SCHEMA, max_tokens=48),
    "schema-stream": chatting("What colour is grass?", response_format=SCHEMA, max_tokens=48, stream=True),
    "tools": chatting(ASK_FOR_PAINT, **REQUIRED),
    "tools-stream": chatting(ASK_FOR_PAINT, stream=True, **REQUIRED),
    "tools-auto": chatting(ASK_FOR_PAINT, tools=TOOLS),
    "vendor": chatting(return_token_ids=True, min_tokens=3, top_k=5, repetition_penalty=1.1, ignore_eos=True),
    "template": chatting(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low"),
    "completion": completing(),
    "completion-stream": completing(stream=True, stream_options={"include_usage": True}),
    "completion-echo": completing(echo=True, logprobs=1),
    "completion-prompts": completing(prompt=["Rivers:", "Lakes:"]),
    "completion-tokens": completing(prompt=[504, 3575, 28]),
    "response": responding(),
    "response-stream": responding(stream=True),
    "response-items": responding(input=[{"role": "user", "content": [{"type": "input_text", "text": "Say hi."}]}]),
    "message": messaging(),
    "message-stream": messaging(stream=True, system="Be brief."),
    "message-stop": messaging(stop_sequences=[","], top_k=3),
    "error-temperature": chatting(temperature=-3, status=400),
    "error-stream": chatting(temperature=-3, stream=True, status=400),
    "error-window": chatting("word " * 5000, status=400),
    "error-picture": chatting(status=400, messages=[{"role": "user", "content": PICTURE}]),
    "error-type": chatting(max_tokens="many", status=400),
    "error-completion": completing(max_tokens=-5, status=400),
    "error-response": responding(temperature=-3, status=400),
    "error-message": messaging(max_tokens="many", status=400),
}
TIMES = re.compile(rb'"(created|created_at|completed_at)":\s?\d+(\.\d+)?')
IDS = re.compile(rb"\b(resp|msg|fc|call|chatcmpl-tool|cmpl|chatcmpl)([-_])(?!tool)[\w-]{8,}")


def said(raw: bytes) -> bytes:
    """Without what is another one each time."""
    return IDS.sub(rb"\1\2ID", TIMES.sub(rb'"\1":0', raw))


def posted(url: str, asked: Asked, control: str = "no-cache, no-store") -> httpx.Response:
    headers = {"x-request-id": "the-same-for-both", "x-fingerpost-cache-control": control}
    return httpx.post(url + asked.path, json=asked.body, headers=headers, timeout=SECONDS)


def own(stack: Stack, asked: Asked) -> Iterable[httpx.Response]:
    """vLLM's own answers, up to three: when its process is held up it puts two tokens into one event."""
    return (posted(f"http://127.0.0.1:{stack.ports['vllm']}", asked) for _ in range(3))


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_vllm_s_answer_comes_byte_for_byte(stack: Stack, asked: Asked) -> None:
    posted(f"http://127.0.0.1:{stack.ports['vllm']}", asked)  # from now on it has computed the prompt
    through = posted(stack.url, asked)
    assert through.status_code == asked.status, through.text
    assert through.headers["x-fingerpost-model"] == SMALL
    for direct in own(stack, asked):
        assert direct.status_code == through.status_code
        assert direct.headers["content-type"] == through.headers["content-type"]
        if said(direct.content) == said(through.content):
            return
    assert said(through.content).decode() == said(direct.content).decode()


@pytest.mark.parametrize("name", ["chat", "completion", "response", "message", "response-stream", "message-stream"])
def test_so_it_does_when_it_may_be_stored(stack: Stack, name: str) -> None:
    asked = ASKED[name]
    through = posted(stack.url, asked, "no-cache")
    assert said(through.content) in {said(direct.content) for direct in own(stack, asked)}


@pytest.mark.parametrize("name", ["chat-stream", "completion-stream"])
def test_so_does_a_stream_whose_usage_only_the_gateway_asks_for(stack: Stack, name: str) -> None:
    """vLLM then names its fingerprint in the chunk of the usage, which the client does not get."""
    asked = Asked(ASKED[name].path, {**ASKED[name].body, "stream_options": None})
    through = posted(stack.url, asked, "no-cache")
    assert b"system_fingerprint" in through.content
    assert said(through.content) in {said(direct.content) for direct in own(stack, asked)}


def test_an_alias_is_the_model_s_own_answer(stack: Stack) -> None:
    asked = chatting()
    through = posted(stack.url, Asked(asked.path, {**asked.body, "model": "auto"}))
    same = Asked(asked.path, {**asked.body, "model": through.headers["x-fingerpost-model"]})
    assert said(through.content) in {said(direct.content) for direct in own(stack, same)}
