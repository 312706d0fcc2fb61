"""The forms beside chat completions: what is read of them, which answers are kept, and that a replay is one of them."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.answer import Answer, Identity, response_id
from gateway.dialects import CHAT, COMPLETIONS, FORMS, MESSAGES, RESPONSES, Form
from gateway.errors import BadRequest
from gateway.request import ChatRequest, parse, scope_key
from gateway.sse import FrameSplitter, data
from gateway.usage import by_kind
from tests import stub_forms
from tests.conftest import Server, StartGateway, Tree, before_stubs

FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=60)
NEW = Identity("id-new", 1_700_000_000)
OTHERS = (COMPLETIONS, RESPONSES, MESSAGES)
IDS = [form.path for form in OTHERS]
TEXT = "Sun, wind — and naïve 😀"
THINKING = {"type": "thinking", "thinking": "Hm …", "signature": "5f"}
REASONING = {
    "id": "rs_stub",
    "summary": [],
    "type": "reasoning",
    "content": [{"text": "Hm …", "type": "reasoning_text"}],
    "encrypted_content": None,
    "status": None,
}


def asking(form: Form, text: Any = "Name a river.", **fields: Any) -> Tree:
    """A body of this form that asks for `text`."""
    told = [{"role": "user", "content": text}]
    if form is COMPLETIONS:
        return {"model": "auto", "prompt": text, **fields}
    if form is RESPONSES:
        return {"model": "auto", "input": text if isinstance(text, str) else told, **fields}
    return {"model": "auto", "max_tokens": 100, "messages": told, **fields}


def read(form: Form, body: Tree) -> ChatRequest:
    return parse(json.dumps(body).encode(), form.view)


def scope(form: Form, body: Tree) -> str:
    return scope_key(read(form, body), "tenant")


def upstream(form: Form, fault: str = "none", text: str = TEXT) -> bytes:
    """An answer of the stub."""
    return json.dumps(stub_forms.FORMS[form.path].whole({"model": "small"}, text, fault)).encode()


def assembled(form: Form, frames: list[bytes]) -> Answer | None:
    assembly = form.assembly()
    for frame in frames:
        assembly.add(data(frame))
    return assembly.answer()


def streamed(form: Form, fault: str = "none", text: str = TEXT) -> Answer | None:
    body = {"model": "small", "stream_options": {"include_usage": True}}
    return assembled(form, stub_forms.frames(form.path, body, text, fault))


def counted(answer: Answer | None) -> tuple[int | None, int | None]:
    assert answer is not None
    figures = by_kind(answer.usage or {})
    return figures.get("prompt"), figures.get("completion")


# What is read


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
def test_the_question_is_read(form: Form) -> None:
    request = read(form, asking(form, " Name a river. "))
    assert (request.question, request.uncacheable, request.stream) == ("Name a river.", None, False)
    assert read(form, asking(form, stream=True)).stream is True


def test_the_last_of_a_conversation_is_the_question() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    last = {
        "role": "user",
        "content": [{"type": "input_text", "text": "Name"}, {"type": "input_text", "text": "a river."}],
    }
    request = read(RESPONSES, {"model": "auto", "instructions": "Be brief.", "input": [*turns, last]})
    assert request.question == "Name\na river."
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "user"]
    parts = [{"type": "text", "text": "Name"}, {"type": "text", "text": "a river."}]
    body = {
        "model": "auto",
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [*turns, {**last, "content": parts}],
    }
    request = read(MESSAGES, body)
    assert request.question == "Name\na river."
    assert [message["role"] for message in request.messages] == ["system", "user", "assistant", "user"]
    assert request.prompt_tokens == len("Be brief.HiHelloName\na river.") // 4


@pytest.mark.parametrize(
    ("form", "fields", "question", "reason"),
    [
        (COMPLETIONS, {"prompt": ["Name a river.", "Name a lake."]}, "Name a river.\nName a lake.", "not one string"),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, "", "not text"),
        (COMPLETIONS, {"prompt": [[1, 2], [3]]}, "", "not text"),
        (COMPLETIONS, {"prompt": None, "prompt_embeds": "AAAA"}, "", "not text"),
        (COMPLETIONS, {"prompt": " "}, "", "empty"),
        (COMPLETIONS, {"n": 2}, "Name a river.", "n is not 1"),
        (COMPLETIONS, {"logprobs": 0}, "Name a river.", "log probabilities"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "Name a river.", "previous_response_id"),
        (RESPONSES, {"background": True}, "Name a river.", "background"),
        (RESPONSES, {"store": True}, "Name a river.", "store"),
        (
            RESPONSES,
            {
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_text", "text": "What is it?"}, {"type": "input_image"}],
                    }
                ]
            },
            "What is it?",
            "not text alone",
        ),
        (
            RESPONSES,
            {
                "input": [
                    {"role": "user", "content": "Name a river."},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "Glomma"},
                ]
            },
            "Name a river.",
            "not the user's",
        ),
        (
            RESPONSES,
            {
                "input": [
                    {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image"}]},
                    {"role": "user", "content": "Which river is it?"},
                ]
            },
            "Which river is it?",
            "an earlier message is not text alone",
        ),
        (
            MESSAGES,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "Glomma"}]}
                ]
            },
            "",
            "not text alone",
        ),
        (
            MESSAGES,
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}],
                    },
                    {"role": "assistant", "content": "A river."},
                    {"role": "user", "content": "Which?"},
                ]
            },
            "Which?",
            "an earlier message is not text alone",
        ),
    ],
)
def test_what_may_not_be_cached(form: Form, fields: Tree, question: str, reason: str) -> None:
    request = read(form, {**asking(form), **fields})
    assert request.question == question
    assert reason in (request.uncacheable or "")


@pytest.mark.parametrize("item", [{"type": ""}, {"type": "reasoning", "content": [3]}, {"type": "text", "output": [3]}])
def test_an_item_that_is_no_message_asks_nothing(item: Tree) -> None:
    request = read(RESPONSES, {"model": "auto", "input": [item]})
    assert (request.question, request.uncacheable) == ("", "the last message is not the user's")
    assert scope_key(request, "tenant")


def test_a_store_that_is_not_asked_for_is_no_obstacle() -> None:
    assert read(RESPONSES, asking(RESPONSES, store=False)).uncacheable is None
    assert read(RESPONSES, asking(RESPONSES, previous_response_id=None)).uncacheable is None


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
def test_a_scope_is_all_but_the_wording(form: Form) -> None:
    one = scope(form, asking(form, "Name a river."))
    assert one == scope(form, asking(form, "Name a lake.", stream=True))
    for difference in (
        {"temperature": 0.1},
        {"model": "small"},
        {"tools": [{"name": "f"}]},
        {"seed": 1},
    ):
        assert one != scope(form, asking(form, **difference))


@pytest.mark.parametrize(
    ("form", "field", "told_in_the_answer"),
    [
        (COMPLETIONS, "user", False),
        (RESPONSES, "user", True),
        (RESPONSES, "metadata", True),
        (MESSAGES, "metadata", False),
    ],
)
def test_whom_it_is_for_is_in_the_scope_where_the_answer_tells_it(
    form: Form, field: str, told_in_the_answer: bool
) -> None:
    one, other = (scope(form, asking(form, "Name a river.", **{field: {"user_id": name}})) for name in ("ada", "bob"))
    assert (one != other) == told_in_the_answer


def test_blanks_around_a_prompt_make_it_another_one() -> None:
    one = scope(COMPLETIONS, asking(COMPLETIONS, "def area(r):"))
    assert one != scope(COMPLETIONS, asking(COMPLETIONS, "def area(r):\n    "))
    assert one != scope(COMPLETIONS, asking(COMPLETIONS, "\ndef area(r):"))


def test_no_two_forms_share_a_scope() -> None:
    scopes = [scope(form, asking(form, max_tokens=100)) for form in (CHAT, *OTHERS)]
    assert len(set(scopes)) == 4


def test_system_and_instructions_are_in_the_scope() -> None:
    assert scope(MESSAGES, asking(MESSAGES)) != scope(MESSAGES, asking(MESSAGES, system="Be brief."))
    assert scope(RESPONSES, asking(RESPONSES)) != scope(RESPONSES, asking(RESPONSES, instructions="Be brief."))


BAD: list[tuple[Form, Tree, str]] = [
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": 3}, "prompt"),
    (COMPLETIONS, {"prompt": {}}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"stream": "yes"}, "stream"),
    (RESPONSES, {"input": None}, "input"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"input": 3}, "input"),
    (RESPONSES, {"input": ["a"]}, "input[0]"),
    (RESPONSES, {"input": [{"content": "a"}]}, "input[0].role"),
    (RESPONSES, {"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
    (RESPONSES, {"input": [{"role": "user"}]}, "input[0].content"),
    (RESPONSES, {"input": [{"role": "user", "content": [3]}]}, "input[0].content[0]"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    (RESPONSES, {"input": [{"type": 3}]}, "input[0].type"),
    (RESPONSES, {"instructions": 3}, "instructions"),
    (MESSAGES, {"messages": None}, "messages"),
    (MESSAGES, {"messages": []}, "messages"),
    (MESSAGES, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    (MESSAGES, {"system": 3}, "system"),
    (MESSAGES, {"system": [{"text": "x"}]}, "system[0]"),
    (MESSAGES, {"model": ""}, "model"),
]


@pytest.mark.parametrize(("form", "fields", "param"), BAD, ids=[f"{form.path} {fields}" for form, fields, _ in BAD])
def test_what_cannot_be_read_is_named(form: Form, fields: Tree, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        read(form, {**asking(form), **fields})
    assert raised.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.sampled_from(["user", "text", "input_text", "message", "Hi"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "output"]), inner)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("form", [CHAT, *OTHERS], ids=list(FORMS))
@FUZZ
@given(asked=JSON, beside=JSON)
def test_any_body_is_read_or_refused(form: Form, asked: Any, beside: Any) -> None:
    keys = {"prompt": asked, "input": asked, "messages": asked, "system": beside, "instructions": beside}
    try:
        request = read(form, {"model": "auto", **keys})
    except BadRequest:
        return
    assert scope_key(request, "tenant")


# What is kept


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
def test_the_same_answer_from_a_body_and_from_a_stream(form: Form) -> None:
    whole, stream = form.whole(upstream(form)), streamed(form)
    assert whole is not None
    assert stream is not None
    assert counted(whole) == counted(stream) == (11, 20)
    assert form.replay(whole, NEW) == form.replay(stream, NEW)


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@pytest.mark.parametrize("fault", ["length", "tool-call", "break", "error-event"])
def test_what_is_not_whole_is_not_kept(form: Form, fault: str) -> None:
    if fault == "tool-call" and form is COMPLETIONS:
        pytest.skip("it has no tools")
    if fault in ("length", "tool-call"):
        assert form.whole(upstream(form, fault)) is None
    assert streamed(form, fault) is None


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
def test_a_stream_that_ends_early(form: Form) -> None:
    frames = stub_forms.frames(form.path, {"model": "small"}, TEXT, "none")
    last = -1 if form is not COMPLETIONS else len(frames) - 1
    for end in range(len(frames[:last])):
        assert assembled(form, frames[:end]) is None


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@pytest.mark.parametrize("text", ["", "x" * (1024 * 1024 + 1)], ids=["empty", "endless"])
def test_a_text_that_is_not_kept(form: Form, text: str) -> None:
    assert form.whole(upstream(form, text=text)) is None
    assert streamed(form, text=text) is None


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        (COMPLETIONS, {"choices": []}),
        (COMPLETIONS, {"model": None}),
        (COMPLETIONS, {"choices": [{"index": 0, "text": "a", "finish_reason": "stop"}] * 2}),
        (RESPONSES, {"status": "incomplete"}),
        (RESPONSES, {"object": "list"}),
        (RESPONSES, {"output": []}),
        (RESPONSES, {"output": [stub_forms.output_item("a"), stub_forms.output_item("b")]}),
        (RESPONSES, {"output": [{"type": "reasoning", "content": []}, stub_forms.output_item("a")]}),
        (RESPONSES, {"output": [REASONING, REASONING, stub_forms.output_item("a")]}),
        (RESPONSES, {"output": [stub_forms.output_item("a"), REASONING]}),
        (RESPONSES, {"output": [{**REASONING, "encrypted_content": "x"}, stub_forms.output_item("a")]}),
        (RESPONSES, {"output": [{**stub_forms.output_item("a"), "content": []}]}),
        (RESPONSES, {"output": [{**stub_forms.output_item("a"), "content": [{"type": "refusal", "refusal": "no"}]}]}),
        (
            RESPONSES,
            {
                "output": [
                    {**stub_forms.output_item("a"), "content": [{**stub_forms.output_text("a"), "logprobs": [1]}]}
                ]
            },
        ),
        (MESSAGES, {"content": []}),
        (MESSAGES, {"content": [{"type": "text", "text": "a"}] * 2}),
        (MESSAGES, {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}),
        (MESSAGES, {"content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]}),
        (MESSAGES, {"content": [{"type": "text", "text": "a"}, THINKING]}),
        (MESSAGES, {"content": [THINKING, THINKING, {"type": "text", "text": "a"}]}),
        (MESSAGES, {"content": [THINKING]}),
        (MESSAGES, {"content": [{"type": "text", "text": "a", "citations": [{"url": "x"}]}]}),
        (MESSAGES, {"stop_reason": "stop_sequence"}),
        (MESSAGES, {"usage": None}),
        (MESSAGES, {"usage": {"input_tokens": "many"}}),
    ],
)
def test_a_body_that_is_not_kept(form: Form, changes: Tree) -> None:
    assert form.whole(json.dumps({**json.loads(upstream(form)), **changes}).encode()) is None


@pytest.mark.parametrize("form", [CHAT, *OTHERS], ids=list(FORMS))
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"null", b"[]", b"3", b"{}", b'{"error": {}}', b"[" * 100_000])
def test_a_body_that_is_no_answer(form: Form, raw: bytes) -> None:
    assert form.whole(raw) is None
    assembly = form.assembly()
    assembly.add(raw)
    assert assembly.answer() is None


def test_an_answer_nested_more_deeply_than_can_be_written() -> None:
    raw = upstream(RESPONSES).replace(b'"metadata": null', b'"metadata": ' + b"[" * 300 + b"]" * 300)
    assert b"[[[" in raw
    assert RESPONSES.whole(raw) is None


EVENTS = st.recursive(
    st.none()
    | st.integers(0, 1)
    | st.sampled_from(["text", "end_turn", "message_start", "text_delta", "message_stop"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "index", "delta", "message", "content", "usage", "response"]), inner)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@FUZZ
@given(st.lists(EVENTS, max_size=4))
def test_any_stream_is_an_answer_or_is_not(form: Form, events: list[Any]) -> None:
    frames = stub_forms.frames(form.path, {"model": "small"}, TEXT, "none")
    for spoilers in (events, [*json_of(frames[:2]), *events], [*events, *json_of(frames)]):
        assembly = form.assembly()
        for event in spoilers:
            assembly.add(event if isinstance(event, bytes) else json.dumps(event).encode())
        if (answer := assembly.answer()) is not None:
            assert form.whole(form.replay(answer, NEW)) is not None


def json_of(frames: list[bytes]) -> list[bytes]:
    return [data(frame) for frame in frames]


def thoughtful(form: Form) -> bytes:
    """An answer of a model that thinks first, as vLLM writes it."""
    whole = json.loads(upstream(form))
    key, thought = ("output", REASONING) if form is RESPONSES else ("content", THINKING)
    return json.dumps({**whole, key: [thought, *whole[key]]}).encode()


@pytest.mark.parametrize("form", [RESPONSES, MESSAGES], ids=["responses", "messages"])
def test_a_thought_before_the_text_is_kept(form: Form) -> None:
    answer = form.whole(thoughtful(form))
    assert answer is not None
    replayed = json.loads(form.replay(answer, NEW))
    if form is RESPONSES:
        assert Response.model_validate(replayed).output_text == TEXT
        assert [item["id"] for item in replayed["output"]] == ["rs_id-new", "msg_id-new"]
        assert replayed["output"][0] == {**REASONING, "id": "rs_id-new"}
    else:
        assert replayed["content"] == [THINKING, {"type": "text", "text": TEXT}]
    frames = FrameSplitter().feed(form.stream(answer, NEW, False))
    from_stream = assembled(form, frames)
    assert from_stream is not None
    assert json.loads(form.replay(from_stream, NEW)) == replayed
    if form is RESPONSES:
        events = [TypeAdapter(ResponseStreamEvent).validate_json(data(frame)) for frame in frames]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert [event.delta for event in events if event.type == "response.reasoning_text.delta"] == ["Hm …"]


def test_a_thought_in_the_events_of_vllm_is_kept() -> None:
    events: list[Tree] = [event for _, event in stub_forms.message_events({"model": "small"}, TEXT, "none")]
    thought = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "…"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "5f"}},
        {"type": "content_block_stop", "index": 0},
    ]
    later = [{**event, "index": 1} if "index" in event else event for event in events[1:]]
    frames = [stub_forms.named(event["type"], event) for event in [events[0], *thought, *later]]
    assert assembled(MESSAGES, frames) == MESSAGES.whole(thoughtful(MESSAGES))
    assert assembled(MESSAGES, [frames[0], *frames[2:]]) is None


# Replays


@pytest.mark.parametrize("form", [CHAT, *OTHERS], ids=list(FORMS))
@FUZZ
@given(text=st.text(min_size=1))
def test_an_answer_comes_back_from_any_form(form: Form, text: str) -> None:
    answer = Answer("small", {"role": "assistant", "content": text}, "stop", stub_forms.USAGE)
    if form is not CHAT:
        answer = form.whole(upstream(form, text=text)) or answer
    body = form.replay(answer, NEW)
    again = form.whole(body)
    assert again is not None
    assert form.replay(again, NEW) == body
    stream = form.stream(answer, NEW, True)
    frames = FrameSplitter().feed(stream)
    assert b"".join(frames) == stream
    from_stream = assembled(form, frames)
    assert from_stream is not None
    assert form.replay(from_stream, NEW) == body
    assert response_id(body) == response_id(data(frames[0])) == NEW.id


def kept(form: Form) -> Answer:
    answer = form.whole(upstream(form))
    assert answer is not None
    return answer


def test_a_replayed_completion_has_the_form_that_openais_client_expects() -> None:
    replayed = Completion.model_validate_json(COMPLETIONS.replay(kept(COMPLETIONS), NEW), strict=True)
    assert (replayed.id, replayed.created, replayed.choices[0].text) == (NEW.id, NEW.created, TEXT)
    assert replayed.usage is not None
    assert replayed.usage.total_tokens == 31
    frames = FrameSplitter().feed(COMPLETIONS.stream(kept(COMPLETIONS), NEW, False))
    assert frames.pop() == b"data: [DONE]\n\n"
    choices = [json.loads(data(frame))["choices"][0] for frame in frames]
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices] == [None, "stop"]


def test_a_replayed_response_has_the_form_that_openais_client_expects() -> None:
    replayed = Response.model_validate_json(RESPONSES.replay(kept(RESPONSES), NEW))
    assert (replayed.id, replayed.created_at, replayed.output_text) == (NEW.id, NEW.created, TEXT)
    frames = FrameSplitter().feed(RESPONSES.stream(kept(RESPONSES), NEW, False))
    events = [TypeAdapter(ResponseStreamEvent).validate_json(data(frame)) for frame in frames]
    names = [frame.split(b"\n")[0].removeprefix(b"event: ").decode() for frame in frames]
    theirs = stub_forms.response_events({"model": "small"}, "short", "none")
    assert [event.type for event in events] == names == [name for name, _ in theirs]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == TEXT


def test_a_replayed_response_keeps_the_order_and_the_fields_of_the_first() -> None:
    first, replayed = json.loads(upstream(RESPONSES)), json.loads(RESPONSES.replay(kept(RESPONSES), NEW))
    assert list(first) == list(replayed)
    assert {key for key in first if first[key] != replayed[key]} == {"id", "created_at", "output"}


def test_a_replayed_message_has_the_fields_of_the_first() -> None:
    first, replayed = json.loads(upstream(MESSAGES)), json.loads(MESSAGES.replay(kept(MESSAGES), NEW))
    assert replayed == {**first, "id": NEW.id, "stop_sequence": None}


def test_a_replayed_stream_of_a_message_has_the_events_of_the_first() -> None:
    theirs = stub_forms.frames(MESSAGES.path, {"model": "small"}, "short", "none")
    ours = FrameSplitter().feed(MESSAGES.stream(kept(MESSAGES), NEW, False))
    assert [frame.split(b"\n")[0] for frame in ours] == [frame.split(b"\n")[0] for frame in theirs]
    first, start = json.loads(data(theirs[0])), json.loads(data(ours[0]))
    assert start["message"] == {**first["message"], "id": NEW.id}
    assert json.loads(data(ours[-2])) == json.loads(data(theirs[-2]))


# Over HTTP

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def gateway(stub: Server, stub_triton: Tree, start_gateway: StartGateway) -> Server:
    return start_gateway(before_stubs(stub.url, stub_triton))


@pytest.fixture(autouse=True)
def healthy_stub(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "stub" in request.fixturenames:
        tell(request.getfixturevalue("stub"))


def tell(stub: Server, fault: str = "none", **fields: Any) -> None:
    httpx.post(f"{stub.url}/stub", json={"fault": fault, **fields}).raise_for_status()


def received(stub: Server) -> list[Tree]:
    return list(httpx.get(f"{stub.url}/stub").json()["received"])


def post(url: str, tenant: str, form: Form, text: Any = "Name a river.", **fields: Any) -> httpx.Response:
    headers = {"x-api-key" if form is MESSAGES else "authorization": f"Bearer {tenant}", **fields.pop("headers", {})}
    return httpx.post(url + form.path, json=asking(form, text, **fields), headers=headers, timeout=60)


@pytest.fixture
def ask(request: pytest.FixtureRequest, gateway: Server) -> Ask:
    return partial(post, gateway.url, request.node.name.encode().hex())


def said(form: Form, response: httpx.Response) -> str:
    """The text of an answer, whichever way it came."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        answer = form.whole(response.content)
    else:
        answer = assembled(form, FrameSplitter().feed(response.content))
    assert answer is not None
    return str(answer.message["output"][0]["content"][0]["text"] if form is RESPONSES else answer.message["content"])


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
def test_a_miss_an_exact_hit_and_a_paraphrase(ask: Ask, stub: Server, form: Form) -> None:
    before = len(received(stub))
    answers = [
        ask(form, text) for text in ("What is the capital of Norway?",) * 2 + ("The capital of Norway is what?",)
    ]
    assert [answer.headers["x-fingerpost-cache"] for answer in answers] == ["miss", "hit-exact", "hit-semantic"]
    assert len({said(form, answer) for answer in answers}) == 1
    (sent,) = received(stub)[before:]
    assert sent["path"] == form.path
    assert sent["body"] == {**asking(form, "What is the capital of Norway?"), "model": "smollm2-small"}
    assert [answer.headers.get("x-fingerpost-upstream-tokens") for answer in answers] == [None, "0", "0"]
    assert len({answer.json()["id"] for answer in answers}) == 3
    assert answers[1].json()["usage"] == answers[0].json()["usage"]
    assert ask(CHAT, "What is the capital of Norway?").headers["x-fingerpost-cache"] == "miss"


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@pytest.mark.parametrize("first", [False, True], ids=["json-first", "stream-first"])
@pytest.mark.parametrize("second", [False, True], ids=["json-second", "stream-second"])
def test_every_way_has_the_same_content(ask: Ask, form: Form, first: bool, second: bool) -> None:
    one, two = ask(form, stream=first), ask(form, stream=second)
    assert [answer.headers["x-fingerpost-cache"] for answer in (one, two)] == ["miss", "hit-exact"]
    assert said(form, one) == said(form, two) != ""


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_what_the_endpoint_says_comes_byte_for_byte(ask: Ask, stub: Server, form: Form, stream: bool) -> None:
    tell(stub, "tool-call" if form is not COMPLETIONS else "length")
    count = len(received(stub))
    through = ask(form, "What now?", stream=stream, headers={"x-fingerpost-cache-control": "no-store"})
    text = f"generation {count + 1} by smollm2-small: What now? — naïve 😀"
    body, fault = (
        {**asking(form, "What now?"), "model": "smollm2-small"},
        "tool-call" if form is not COMPLETIONS else "length",
    )
    if stream:
        theirs = b"".join(stub_forms.frames(form.path, body, text, fault))
    else:
        theirs = json.dumps(stub_forms.FORMS[form.path].whole(body, text, fault), ensure_ascii=False).encode()
    assert without_times(through.content) == without_times(theirs)


def without_times(raw: bytes) -> list[bytes]:
    """The pieces between the numbers of ten digits."""
    return re.split(rb"\b\d{10}\b", raw)


@pytest.mark.parametrize("form", OTHERS, ids=IDS)
@pytest.mark.parametrize("fault", ["length", "tool-call", "break", "error-event", "bytes"])
def test_only_a_whole_stream_is_stored(ask: Ask, stub: Server, form: Form, fault: str) -> None:
    if fault == "tool-call" and form is COMPLETIONS:
        pytest.skip("it has no tools")
    tell(stub, fault)
    try:
        ask(form, stream=True)
    except httpx.RemoteProtocolError:
        assert fault == "break"
    tell(stub)
    assert ask(form).headers["x-fingerpost-cache"] == ("hit-exact" if fault == "bytes" else "miss")


def test_usage_of_a_completion_is_streamed_only_when_asked_for(ask: Ask) -> None:
    for outcome in ("miss", "hit-exact"):
        silent = ask(COMPLETIONS, stream=True)
        told = ask(COMPLETIONS, " Name a river.", stream=True, stream_options={"include_usage": True})
        assert silent.headers["x-fingerpost-cache"] == outcome
        assert b'"usage"' not in silent.content
        assert b'"total_tokens":31' in told.content


def test_an_error_has_the_form_of_its_request(gateway: Server) -> None:
    for body, status, kind in (
        (b"{", 400, "invalid_request_error"),
        (b'{"model": "gpt-17", "messages": [{"role": "user", "content": "Hi"}]}', 404, "not_found_error"),
        (b" " * 5_000_000, 413, "request_too_large"),
    ):
        response = httpx.post(gateway.url + MESSAGES.path, content=body)
        error = response.json()
        assert (response.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
        assert error["request_id"] == response.headers["x-request-id"]
    wrong_method = httpx.get(gateway.url + MESSAGES.path)
    assert (wrong_method.status_code, wrong_method.json()["type"]) == (405, "error")
    for form in (COMPLETIONS, RESPONSES):
        error = httpx.post(gateway.url + form.path, content=b"{").json()["error"]
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("target", [b"/v1/messages?q=%ff", b"/v1/messages?beta=true"])
@pytest.mark.parametrize("host", [b"a/b?c#d", b"[", b"\xff"])
def test_neither_query_nor_host_decides_the_form(gateway: Server, target: bytes, host: bytes) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port or 0), timeout=60) as client:
        head = b" HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\ncontent-length: 1\r\n\r\n"
        client.sendall(b"POST " + target + head + b"{")
        said = b"".join(iter(lambda: client.recv(65_536), b""))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b'"type":"invalid_request_error"' in said
    assert b'"type":"error"' in said


def test_an_error_of_the_endpoint_is_passed_on(ask: Ask, stub: Server) -> None:
    tell(stub, "status-400")
    for form in OTHERS:
        answer = ask(form)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "stub says no")


def test_two_keys_of_anthropics_form_share_nothing(gateway: Server) -> None:
    outcomes = [
        post(gateway.url, tenant, MESSAGES).headers["x-fingerpost-cache"] for tenant in ("key-a", "key-a", "key-b")
    ]
    assert outcomes == ["miss", "hit-exact", "miss"]


def test_with_openais_client(gateway: Server) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="official-client") as client:
        for outcome in ("first", "replayed"):
            completion = client.completions.create(model="auto", prompt="Name a fjord.")
            response = client.responses.create(model="auto", input="Name a fjord.")
            assert "Name a fjord." in completion.choices[0].text, outcome
            assert "Name a fjord." in response.output_text, outcome
            with client.responses.stream(model="auto", input="Name a fjord.") as stream:
                types = [event.type for event in stream]
                assert stream.get_final_response().output_text == response.output_text
            assert types[-1] == "response.completed"
            chunks = client.completions.create(model="auto", prompt="Name a fjord.", stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == completion.choices[0].text
