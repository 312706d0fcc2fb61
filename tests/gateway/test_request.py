"""Reading a chat request: what is refused, what is passed on, and what decides whether two may share an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.request import (
    CacheControl,
    ChatRequest,
    credential,
    is_request_id,
    owner,
    parse,
    parse_cache_control,
    question_key,
    scope_key,
    upstream_body,
)

FUZZ = settings(database=None, deadline=None, derandomize=True, max_examples=100)

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASKED = {"role": "user", "content": "Which planets are there?"}
ANSWERED = {"role": "assistant", "content": "Eight."}
QUESTION = {"role": "user", "content": "Which is the largest?"}
BODY: dict[str, Any] = {"model": "auto", "messages": [SYSTEM, ASKED, ANSWERED, QUESTION], "temperature": 0.7}


def parsed(**changes: Any) -> ChatRequest:
    """The request of BODY with other fields."""
    return parse(json.dumps({**BODY, **changes}).encode())


def asked(content: Any, **fields: Any) -> ChatRequest:
    """The request of BODY with another last turn."""
    return parsed(messages=[SYSTEM, ASKED, ANSWERED, {"role": "user", "content": content, **fields}])


def scope(request: ChatRequest) -> str:
    return scope_key(request, "tenant")


# What is read


def test_what_is_read_of_a_request() -> None:
    request = parsed(stream=True, stream_options={"include_usage": True})
    assert (request.model, request.stream, request.include_usage) == ("auto", True, True)
    assert request.question == "Which is the largest?"
    assert request.uncacheable is None


def test_what_need_not_be_given() -> None:
    request = parse(b'{"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}')
    assert (request.stream, request.include_usage) == (False, False)
    assert parsed(stream=None, stream_options=None).stream is False


def test_the_question_is_the_text_of_the_last_user_turn() -> None:
    assert parsed(messages=[SYSTEM, ASKED, ANSWERED]).question == "Which planets are there?"
    assert parsed(messages=[SYSTEM]).question == ""
    assert asked("  Why?\n").question == "Why?"
    parts = [{"type": "text", "text": "Why"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "now?"}]
    assert asked(parts).question == "Why\nnow?"


def test_tokens_are_estimated_from_the_bytes_of_all_messages() -> None:
    parts = [{"type": "text", "text": "day!"}]
    messages = [{"role": "system", "content": "ночь"}, {"role": "assistant"}, {"role": "user", "content": parts}]
    assert parsed(messages=messages).prompt_tokens == (8 + 4) // 4


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": ""},
        {"role": "a role of tomorrow", "content": "x"},
    ],
)
def test_messages_that_are_taken(message: dict[str, Any]) -> None:
    assert parsed(messages=[message, QUESTION]).body["messages"][0] == message


# What is refused


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"model": ["auto"]}, "model"),
        ({"model": True}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [SYSTEM, None]}, "messages[1]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": None, "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [SYSTEM, {"role": "user", "content": 3}]}, "messages[1].content"),
        ({"messages": [SYSTEM, {"role": "user", "content": []}]}, "messages[1].content"),
        ({"messages": [SYSTEM, {"role": "assistant", "content": {"a": 1}}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": 1}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parsed(**changes)
    assert caught.value.param == param
    assert caught.value.message.startswith(param)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_field_that_is_not_given_is_named(field: str) -> None:
    with pytest.raises(BadRequest, match=f"^{field} is required$") as caught:
        parse(json.dumps({key: value for key, value in BODY.items() if key != field}).encode())
    assert caught.value.param == field


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"not JSON",
        b"[]",
        b"null",
        b"3",
        b'"model"',
        b'{"model": "auto",}',
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"model": 1e999}',
        b'{"model": "\xff"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'\xef\xbb\xbf{"model": "auto"}',
        '{"model": "auto"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_body_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^the body "):
        parse(raw)


def read(raw: bytes) -> ChatRequest | None:
    """All that is done with a body before anything is sent; None when it is refused."""
    try:
        request = parse(raw)
    except BadRequest:
        return None
    question_key(scope_key(request, credential({})), request.question).encode()
    json.loads(upstream_body(request, "small", want_usage=True))
    return request


@pytest.mark.parametrize("field", ['"x"', '"metadata"', '"stream_options"'])
def test_a_body_is_taken_or_refused_however_deep_it_is(field: str) -> None:
    for depth in (*range(1, 20), *range(240, 270), *range(1015, 1030), 100_000):
        raw = b'{"model":"auto","messages":[{"role":"user","content":"Hi"}],%s:%s1%s}'
        taken = read(raw % (field.encode(), b'{"a":' * depth, b"}" * depth))
        if not 240 <= depth < 270:  # between them, either
            assert (taken is not None) == (depth < 20)


def test_a_message_is_taken_or_refused_however_deep_it_is() -> None:
    for depth in (*range(1, 20), *range(240, 270), 100_000):
        raw = b'{"model":"auto","messages":[{"role":"user","content":"Hi","x":%s1%s}]}'
        taken = read(raw % (b"[" * depth, b"]" * depth))
        if not 240 <= depth < 270:  # between them, either
            assert (taken is not None) == (depth < 20)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
CONTENT = st.text(max_size=20) | st.lists(
    JSON | st.fixed_dictionaries({"type": st.just("text") | JSON}, optional={"text": st.text(max_size=5) | JSON})
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENT | JSON},
    optional={"name": JSON, "tool_calls": JSON},
)
ALMOST = st.fixed_dictionaries(
    {"model": st.just("auto"), "messages": st.lists(MESSAGE, min_size=1, max_size=3) | JSON},
    optional={
        **dict.fromkeys(["stream", "stream_options", "n", "temperature", "logprobs", "prompt_logprobs", "tools"], JSON),
        "x": JSON,
    },
)


@FUZZ
@given(ALMOST | JSON)
def test_any_json_is_taken_or_refused(body: Any) -> None:
    read(json.dumps(body).encode())


@FUZZ
@given(st.binary(max_size=50))
def test_any_bytes_are_taken_or_refused(raw: bytes) -> None:
    read(raw)


@FUZZ
@given(st.data())
def test_a_damaged_body_is_taken_or_refused(data: st.DataObject) -> None:
    raw = json.dumps(BODY).encode()
    start, end = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, len(raw)))
    read(raw[:start] + data.draw(st.binary(max_size=4)) + raw[end:])


@FUZZ
@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=5))
@example("\ud800")
@example("\0")
def test_any_text_is_taken_or_refused(text: str) -> None:
    """Lone surrogates, as JSON escapes, among them."""
    read(json.dumps({**BODY, "messages": [{"role": "user", "content": text}], text: text}).encode())


# What is passed on


FIELDS = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key not in {*BODY, "stream", "stream_options"}),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ),
)


@FUZZ
@given(FIELDS)
def test_all_but_the_model_is_passed_on_as_it_came(fields: dict[str, Any]) -> None:
    passed_on = json.loads(upstream_body(parsed(**fields), "small", want_usage=False))
    assert passed_on == {**BODY, **fields, "model": "small"}


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 123456789012345678901234567890])
def test_a_whole_number_that_would_be_changed_is_refused(number: int) -> None:
    with pytest.raises(BadRequest, match="64 bits"):
        parse(json.dumps({**BODY, "seed": number}).encode())


def test_many_digits_in_a_text_are_fine() -> None:
    text = "9" * 40
    assert parse(json.dumps({**BODY, "user": text, "seed": 2**63}).encode()).body["user"] == text


def test_of_a_key_given_twice_the_last_counts_as_in_pythons_json() -> None:
    raw = b'{"model": "a", "model": "auto", "messages": [{"role": "user", "content": "Hi"}], "seed": 1, "seed": 2}'
    request = parse(raw)
    assert (request.model, request.body["seed"]) == ("auto", 2)
    assert json.loads(upstream_body(request, "small", want_usage=False)) == {**json.loads(raw), "model": "small"}


@pytest.mark.parametrize(
    ("given_options", "passed_on"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False, "x": 1}}, {"include_usage": True, "x": 1}),
    ],
)
def test_usage_is_asked_of_a_stream(given_options: dict[str, Any], passed_on: dict[str, Any]) -> None:
    request = parsed(stream=True, **given_options)
    body = json.loads(upstream_body(request, "small", want_usage=True))
    assert body == {**BODY, "stream": True, "model": "small", "stream_options": passed_on}


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_usage_is_not_asked_when_it_is_not_wanted_or_comes_anyway(options: dict[str, Any]) -> None:
    unwanted = upstream_body(parsed(stream=True, **options), "small", want_usage=False)
    assert json.loads(unwanted) == {**BODY, "stream": True, "model": "small", **options}
    unstreamed = upstream_body(parsed(**options), "small", want_usage=True)
    assert json.loads(unstreamed) == {**BODY, "model": "small", **options}


def test_passing_on_leaves_the_request_as_it_is() -> None:
    request = parsed(stream=True, stream_options={"include_usage": False})
    upstream_body(request, "small", want_usage=True)
    assert request.body == {**BODY, "stream": True, "stream_options": {"include_usage": False}}


# Who may share an answer


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "small"},
        {"messages": [{"role": "system", "content": "Be rude."}, ASKED, ANSWERED, QUESTION]},
        {"messages": [{"role": "developer", "content": SYSTEM["content"]}, ASKED, ANSWERED, QUESTION]},
        {"messages": [{**SYSTEM, "name": "x"}, ASKED, ANSWERED, QUESTION]},
        {"messages": [ASKED, ANSWERED, QUESTION]},
        {"messages": [SYSTEM, QUESTION]},
        {"messages": [SYSTEM, {"role": "user", "content": "Which moons are there?"}, ANSWERED, QUESTION]},
        {"messages": [SYSTEM, ASKED, {"role": "assistant", "content": "Nine."}, QUESTION]},
        {"messages": [SYSTEM, ASKED, ANSWERED, {**QUESTION, "name": "Ada"}]},
        {"messages": [SYSTEM, ASKED, ANSWERED, {**QUESTION, "role": "tool"}]},
        {"tools": [{"type": "function", "function": {"name": "look_up"}}]},
        {"tool_choice": "none"},
        {"response_format": {"type": "json_object"}},
        {"temperature": 0.8},
        {"temperature": None},
        {"top_p": 0.5},
        {"max_tokens": 10},
        {"stop": ["\n"]},
        {"seed": 1},
        {"logit_bias": {"1": 5}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"a_field_of_tomorrow": 1},
    ],
)
def test_what_can_change_an_answer_is_in_the_scope(changes: dict[str, Any]) -> None:
    assert scope(parsed(**changes)) != scope(parsed())


def test_a_field_of_a_text_part_is_in_the_scope() -> None:
    assert scope(asked([{"type": "text", "text": "Why?", "x": 1}])) != scope(asked([{"type": "text", "text": "Why?"}]))


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True},
        {"stream": False},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"messages": [SYSTEM, ASKED, ANSWERED, {"role": "user", "content": "Which is the smallest?"}]},
        {"messages": [SYSTEM, ASKED, ANSWERED, {"content": "Which is the largest?", "role": "user"}]},
        {"messages": [{"content": SYSTEM["content"], "role": "system"}, ASKED, ANSWERED, QUESTION]},
    ],
)
def test_what_cannot_change_it_is_not(changes: dict[str, Any]) -> None:
    assert scope(parsed(**changes)) == scope(parsed())


def test_the_order_of_keys_is_not_in_the_scope() -> None:
    one = parsed(metadata={"a": {"b": 1, "c": 2}, "d": 3}, seed=1)
    turned = {"seed": 1, "metadata": {"d": 3, "a": {"c": 2, "b": 1}}, **dict(reversed(BODY.items()))}
    other = parse(json.dumps(turned).encode())
    assert scope(one) == scope(other)


def test_the_tenant_is_in_the_scope() -> None:
    ada, bob = (credential({"authorization": f"Bearer {key}"}) for key in "ab")
    nobody = credential({})
    assert len({scope_key(parsed(), who) for who in (ada, bob, nobody)}) == 3
    assert credential({"authorization": "Bearer a"}) == ada


def test_who_shares_answers() -> None:
    def owners(sharing: Any) -> list[str]:
        asking = [
            ("search", "key-1", "ada"),
            ("search", "key-1", "bob"),
            ("search", "key-2", "ada"),
            ("shop", "k", "ada"),
        ]
        return [owner(parsed(user=user), sharing, tenant, key) for tenant, key, user in asking]

    assert len(set(owners("global"))) == 1
    one, same, also, other = owners("tenant")
    assert one == same == also != other
    assert len(set(owners("user"))) == 4
    assert owner(parsed(user="ada"), "user", "search", "k") == owner(parsed(user="ada"), "user", "search", "k")


@pytest.mark.parametrize("field", ["user", "safety_identifier", "prompt_cache_key"])
def test_whom_it_is_for_is_not_in_the_scope_but_may_be_in_the_owner(field: str) -> None:
    assert scope(parsed(**{field: "ada"})) == scope(parsed())
    assert owner(parsed(**{field: "ada"}), "user", "t", "k") != owner(parsed(), "user", "t", "k")


def test_a_tenant_does_not_show_its_credential() -> None:
    assert "secret" not in credential({"authorization": "Bearer secret"})
    assert len(credential({"authorization": "Bearer " + "secret" * 100})) == 64


def test_a_text_part_is_the_same_question_as_a_string() -> None:
    parts, string = asked([{"type": "text", "text": "Why?"}]), asked("Why?")
    assert (scope(parts), parts.question) == (scope(string), string.question)


def test_one_key_for_each_scope_and_question() -> None:
    keys = {question_key(scope, question) for scope in ("a", "b") for question in ("why", "why not", "")}
    assert len(keys) == 6
    assert question_key("a", "why") == question_key("a", "why")


# What is not cached


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": [QUESTION, ANSWERED]}, "the last message is not the user's"),
        ({"messages": [SYSTEM]}, "the last message is not the user's"),
        ({"n": 2}, "n is not 1"),
        ({"n": 0}, "n is not 1"),
        ({"n": [1]}, "n is not 1"),
        ({"logprobs": True}, "log probabilities are asked for"),
        ({"top_logprobs": 3}, "log probabilities are asked for"),
        ({"prompt_logprobs": 1}, "log probabilities are asked for"),
        ({"prompt_logprobs": 0}, "log probabilities are asked for"),  # vLLM: those of the prompt's own tokens
    ],
)
def test_an_uncacheable_request_says_why(changes: dict[str, Any], reason: str) -> None:
    assert parsed(**changes).uncacheable == reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the last message is empty"),
        (" \n", "the last message is empty"),
        ([{"type": "text", "text": " "}], "the last message is empty"),
        ([{"type": "text", "text": "What?"}, {"type": "image_url"}], "the last message is not text alone"),
        ([{"type": "input_audio"}], "the last message is not text alone"),
    ],
)
def test_an_uncacheable_last_message_says_why(content: Any, reason: str) -> None:
    assert asked(content).uncacheable == reason


def test_an_answer_with_token_ids_is_not_cached() -> None:
    """vLLM adds them beside the message; a replay would be without them."""
    for asked in (
        {"return_token_ids": True},
        {"echo": True},
        {"return_prompt_text": True},
        {"kv_transfer_params": {"a": 1}},
    ):
        assert parsed(**asked).uncacheable is not None
    assert parsed(return_token_ids=False, echo=False).uncacheable is None


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 1},
        {"n": None},
        {"temperature": 1},
        {"temperature": 0},
        {"temperature": None},
        {"logprobs": False, "top_logprobs": None},
        {"stream": True},
        {"tools": [{"type": "function", "function": {"name": "look_up"}}]},
    ],
)
def test_a_cacheable_request(changes: dict[str, Any]) -> None:
    assert parsed(**changes).uncacheable is None


# Headers


@pytest.mark.parametrize(
    ("header", "lookup", "store", "ttl"),
    [
        (None, True, True, None),
        ("", True, True, None),
        ("no-cache", False, True, None),
        ("no-store", True, False, None),
        ("no-cache, no-store", False, False, None),
        (" No-Store,NO-CACHE ,", False, False, None),
        ("ttl=60", True, True, 60),
        ("TTL=60, ttl=30", True, True, 30),
        ("ttl=0", True, False, 0),
    ],
)
def test_cache_control(header: str | None, lookup: bool, store: bool, ttl: int | None) -> None:
    assert parse_cache_control(header) == CacheControl(lookup=lookup, store=store, ttl_seconds=ttl)


@pytest.mark.parametrize(
    "header",
    ["max-age=0", "no-cache; no-store", "nocache", "no-cache, private", "ttl=", "ttl=-1", "ttl=1e3", "ttl=1 2"],
)
def test_an_unknown_cache_control(header: str) -> None:
    with pytest.raises(BadRequest, match=r"^x-fingerpost-cache-control takes no-cache, no-store and ttl=seconds, not "):
        parse_cache_control(header)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("abc-1.2_3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        (None, False),
        ("two words", False),
        ("a\n", False),
        ("a\r\nb", False),
        ("<b>", False),
    ],
)
def test_a_request_id_that_can_be_echoed(value: str | None, expected: bool) -> None:
    assert is_request_id(value) is expected
