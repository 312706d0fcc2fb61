"""An answer: whole or not at all, and the same however it came and however it is replayed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.answer import Answer, ChunkAssembly, Identity, completion, events, from_completion, is_usage_only
from gateway.sse import DONE, FrameSplitter, data

FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=100)

USAGE = {"prompt_tokens": 31, "total_tokens": 40, "completion_tokens": 9, "prompt_tokens_details": None}
ANSWER = Answer("smollm2-small", {"role": "assistant", "content": "Sun and wind."}, "stop", USAGE)
THOUGHT = Answer(
    "smollm2-small", {"role": "assistant", "content": "42", "reasoning": "Let me see…", "refusal": "no"}, "stop", None
)
NEW = Identity("chatcmpl-new", 1_700_000_000)


def body(**changes: Any) -> dict[str, Any]:
    """A chat.completion as vLLM writes it."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "Sun and wind.",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    whole = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "smollm2-small",
        "choices": [{**choice, **changes.pop("choice", {}), "message": {**message, **changes.pop("message", {})}}],
        "service_tier": None,
        "usage": USAGE,
        "prompt_logprobs": None,
    }
    return {**whole, **changes}


def from_body(value: object) -> Answer | None:
    return from_completion(json.dumps(value).encode())


def chunk(delta: Any = None, finish_reason: Any = None, **changes: Any) -> dict[str, Any]:
    """A chat.completion.chunk as vLLM writes it."""
    choice = {"index": 0, "delta": {} if delta is None else delta, "logprobs": None, "finish_reason": finish_reason}
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "smollm2-small"}
    return {**envelope, "choices": [choice], **changes}


ROLE = chunk({"role": "assistant", "content": ""})
END = chunk({"content": ""}, "stop")
COUNT = chunk(choices=[], usage=USAGE)
STREAM = [ROLE, chunk({"content": "Sun"}), chunk({"content": " and wind."}), END, COUNT]


def assembled(chunks: list[Any], last: bytes | None = b"[DONE]") -> Answer | None:
    assembly = ChunkAssembly()
    for each in chunks:
        assembly.add(each if isinstance(each, bytes) else json.dumps(each).encode())
    if last is not None:
        assembly.add(last)
    return assembly.answer()


def from_stream(stream: bytes) -> Answer | None:
    assembly = ChunkAssembly()
    for frame in FrameSplitter().feed(stream):
        assembly.add(data(frame))
    return assembly.answer()


# Whole answers


def test_the_same_answer_from_a_body_and_from_a_stream() -> None:
    assert from_body(body()) == ANSWER
    assert assembled(STREAM) == ANSWER


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "refusal", "a_text_of_tomorrow"])
def test_text_beside_the_content_is_kept(field: str) -> None:
    thought = [chunk({field: "Hm"}), chunk({field: ", so…"})]
    message = {"role": "assistant", "content": "Sun and wind.", field: "Hm, so…"}
    assert from_body(body(message=message)) == Answer("smollm2-small", message, "stop", USAGE)
    assert assembled([ROLE, *thought, *STREAM[1:]]) == Answer("smollm2-small", message, "stop", USAGE)


def test_an_answer_without_usage() -> None:
    expected = Answer("smollm2-small", ANSWER.message, "stop", None)
    assert from_body(body(usage=None)) == assembled(STREAM[:-1]) == expected


def test_a_role_is_not_repeated() -> None:
    every = [chunk({"role": "assistant", "content": "Sun"}), chunk({"role": "assistant", "content": " and wind."}), END]
    assert assembled([*every, COUNT]) == ANSWER


def test_the_end_may_come_with_the_last_words() -> None:
    assert assembled([ROLE, chunk({"content": "Sun and wind."}, "stop"), COUNT]) == ANSWER


def test_fields_that_are_null_or_empty_are_as_if_left_out() -> None:
    padded = chunk({"content": "Sun and wind.", "tool_calls": [], "reasoning": None})
    assert assembled([ROLE, padded, END, COUNT]) == ANSWER


def test_an_event_without_data_changes_nothing() -> None:
    assert assembled([b"", *STREAM, b""]) == ANSWER


# Anything else is no answer


@pytest.mark.parametrize(
    "changes",
    [
        {"choice": {"finish_reason": "length"}},
        {"choice": {"finish_reason": "tool_calls"}},
        {"choice": {"finish_reason": "content_filter"}},
        {"choice": {"finish_reason": None}},
        {"choice": {"finish_reason": ["stop"]}},
        {"message": {"content": ""}},
        {"message": {"content": None}},
        {"message": {"content": None, "reasoning": "Hm"}},
        {"message": {"content": 42}},
        {"message": {"content": [{"type": "text", "text": "Sun"}]}},
        {"message": {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}},
        {"message": {"function_call": {"name": "f", "arguments": "{}"}}},
        {"message": {"audio": {"id": "1"}}},
        {"choices": [*body()["choices"], *body()["choices"]]},
        {"choices": []},
        {"choices": None},
        {"choices": {}},
        {"choices": "stop"},
        {"choices": [None]},
        {"choices": [3]},
        {"choices": [["message"]]},
        {"choices": [{}]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"finish_reason": "stop", "message": None}]},
        {"choices": [{"finish_reason": "stop", "message": "Sun"}]},
        {"choices": [{"finish_reason": "stop", "message": ["Sun"]}]},
        {"model": None},
        {"model": 3},
    ],
)
def test_a_body_that_is_not_whole(changes: dict[str, Any]) -> None:
    assert from_body(body(**changes)) is None


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"null", b"[]", b"3", b'"x"', b"NaN", b"{}", b'{"error": {"message": "no"}}', b"[" * 100_000],
)
def test_a_body_that_is_no_completion(raw: bytes) -> None:
    assert from_completion(raw) is None


@pytest.mark.parametrize("usage", ["many", 3, [1], True])
def test_usage_is_an_object_or_nothing(usage: object) -> None:
    for answer in (from_body(body(usage=usage)), assembled([*STREAM[:-1], chunk(choices=[], usage=usage)])):
        assert answer is None or answer.usage is None


def test_a_stream_without_done() -> None:
    assert assembled(STREAM, last=None) is None


@pytest.mark.parametrize("kept", range(len(STREAM) - 1))
def test_a_stream_that_ends_early(kept: int) -> None:
    assert assembled(STREAM[:kept]) is None
    assert assembled(STREAM[:kept], last=None) is None


@pytest.mark.parametrize(
    "spoiler",
    [
        {"error": {"message": "the engine is dead", "type": "InternalServerError", "code": 500}},
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b"3",
        b"[DONE",
        chunk(choices=None),
        chunk(choices="x"),
        chunk(choices=[None]),
        chunk(choices=[[]]),
        chunk(choices=[{"index": 1, "delta": {"content": "Or rain."}, "finish_reason": None}]),
        chunk(choices=[{"index": None, "delta": {}}]),
        chunk(choices=[{"index": 0}]),
        chunk(choices=[{"index": 0, "delta": None}]),
        chunk(choices=[{"index": 0, "delta": "Sun"}]),
        chunk({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
        chunk({"function_call": {"name": "f"}}),
        chunk({"content": 3}),
        chunk({"content": [{"type": "text"}]}),
        chunk({"content": {"a": 1}}),
    ],
)
def test_one_chunk_spoils_a_stream(spoiler: Any) -> None:
    assert assembled([*STREAM[:2], spoiler, *STREAM[2:]]) is None
    assert assembled([*STREAM, spoiler]) is None


@pytest.mark.parametrize("reason", ["length", "tool_calls", "content_filter", None, ["stop"]])
def test_a_stream_that_the_model_did_not_end(reason: Any) -> None:
    assert assembled([ROLE, chunk({"content": "Sun"}), chunk({}, reason), COUNT]) is None


@pytest.mark.parametrize("model", [None, 3])
def test_a_stream_without_the_name_of_its_model(model: object) -> None:
    assert assembled([{**each, "model": model} for each in STREAM]) is None


def test_a_stream_without_text() -> None:
    assert assembled([ROLE, END, COUNT]) is None
    assert assembled([ROLE, chunk({"reasoning": "Hm"}), END, COUNT]) is None


def test_a_stream_that_goes_on_after_its_end() -> None:
    assert assembled([*STREAM, chunk({"content": " And rain."})]) is None


def test_a_stream_that_is_too_long() -> None:
    assembly = ChunkAssembly()
    for _ in range(17):
        assembly.add(json.dumps(chunk({"content": "x" * 1024 * 1024})).encode())
    for last in (END, COUNT):
        assembly.add(json.dumps(last).encode())
    assembly.add(b"[DONE]")
    assert assembly.answer() is None


KEYS = st.sampled_from(["choices", "message", "delta", "content", "model", "finish_reason", "index"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.sampled_from(["stop", "length", "", "Sun"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=15,
)
CHOICE = JSON | st.fixed_dictionaries(
    {},
    optional={
        "index": st.just(0) | JSON,
        "finish_reason": st.just("stop") | JSON,
        "message": JSON | st.dictionaries(st.sampled_from(["role", "content", "reasoning"]), JSON),
        "delta": JSON | st.dictionaries(st.sampled_from(["role", "content", "reasoning"]), JSON),
    },
)
ALMOST = st.fixed_dictionaries(
    {"model": st.just("m") | JSON, "choices": st.lists(CHOICE, max_size=2) | JSON}, optional={"usage": JSON}
)


def check_that_it_can_be_replayed(answer: Answer | None) -> None:
    if answer is not None:
        assert answer.usage is None or isinstance(answer.usage, dict)
        assert from_completion(completion(answer, NEW)) is not None
        assert from_stream(events(answer, NEW, True)) is not None


@FUZZ
@given(ALMOST | JSON)
def test_any_body_is_an_answer_or_is_not(value: Any) -> None:
    check_that_it_can_be_replayed(from_body(value))


@FUZZ
@given(st.lists(ALMOST | JSON, max_size=4))
def test_any_stream_is_an_answer_or_is_not(chunks: list[Any]) -> None:
    check_that_it_can_be_replayed(assembled(chunks))
    check_that_it_can_be_replayed(assembled([*STREAM, *chunks]))


@FUZZ
@given(st.binary(max_size=30))
def test_any_bytes_are_an_answer_or_are_not(raw: bytes) -> None:
    assert from_completion(raw) is None
    assembled([*STREAM, raw])


def test_figures_that_could_not_be_written_again() -> None:
    deep = json.dumps(body(usage={"x": 1})).replace('"x": 1', '"x": ' + "[" * 300 + "]" * 300)
    check_that_it_can_be_replayed(from_completion(deep.encode()))


# Replays


@pytest.mark.parametrize("answer", [ANSWER, THOUGHT])
def test_a_replay_has_the_form_that_openais_client_expects(answer: Answer) -> None:
    replayed = ChatCompletion.model_validate_json(completion(answer, NEW), strict=True)
    assert (replayed.id, replayed.created, replayed.model) == ("chatcmpl-new", 1_700_000_000, "smollm2-small")
    (choice,) = replayed.choices
    assert choice.message.content == answer.message["content"]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert (replayed.usage.total_tokens if replayed.usage else None) == (40 if answer.usage else None)


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("answer", [ANSWER, THOUGHT])
def test_a_replayed_stream_has_the_form_that_openais_client_expects(answer: Answer, include_usage: bool) -> None:
    stream = events(answer, NEW, include_usage)
    frames = FrameSplitter().feed(stream)
    assert b"".join(frames) == stream
    assert frames.pop() == DONE
    chunks = [ChatCompletionChunk.model_validate_json(data(frame), strict=True) for frame in frames]
    assert {(each.id, each.created) for each in chunks} == {("chatcmpl-new", 1_700_000_000)}
    assert {each.model for each in chunks} == {"smollm2-small"}
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [choice.delta.content or "" for each in chunks for choice in each.choices]
    assert "".join(deltas) == answer.message["content"]
    assert [choice.finish_reason for each in chunks for choice in each.choices] == [None, None, "stop"]
    assert [each for each in chunks if not each.choices] == (chunks[-1:] if include_usage else [])
    assert (chunks[-1].usage is not None) == (include_usage and answer.usage is not None)


@pytest.mark.parametrize("answer", [ANSWER, THOUGHT])
def test_text_beside_the_content_is_replayed(answer: Answer) -> None:
    assert json.loads(completion(answer, NEW))["choices"][0]["message"] == answer.message


@FUZZ
@given(
    beside=st.dictionaries(st.sampled_from(["reasoning", "refusal", "", "ключ"]), st.text(min_size=1)),
    content=st.text(min_size=1),
    usage=st.none() | st.dictionaries(st.text(max_size=9), st.none() | st.integers(0, 10**6), min_size=1),
)
def test_an_answer_comes_back_from_any_form(beside: dict[str, str], content: str, usage: dict[str, Any] | None) -> None:
    answer = Answer("m", {"role": "assistant", "content": content, **beside}, "stop", usage)
    raw = completion(answer, NEW)
    assert from_completion(raw) == answer
    assert from_stream(events(answer, NEW, True)) == answer
    once = from_completion(raw)
    assert once is not None
    assert completion(once, NEW) == raw


# The usage chunk


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (COUNT, True),
        (b'{"choices": [], "usage": {"total_tokens": 3}}', True),
        (b'{"choices":[ ],"usage":{"total_tokens":3}}', True),
        (ROLE, False),
        (chunk({"content": '"choices":[],"usage"'}), False),
        (chunk({"content": "x"}, usage=USAGE), False),
        (chunk(choices=[]), False),
        (b"[DONE]", False),
        (b"", False),
    ],
)
def test_the_chunk_that_only_counts(payload: Any, expected: bool) -> None:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload, separators=(",", ":")).encode()
    assert is_usage_only(raw) is expected
