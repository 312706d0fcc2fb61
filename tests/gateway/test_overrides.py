"""What a rule changes in the request that vLLM gets."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from gateway.config import Overrides
from gateway.overrides import CHAT, COMPLETIONS, LENGTHS, MESSAGES, RESPONSES, applied, output_tokens, scope

QUESTION = {"role": "user", "content": "Why?"}


def changed(body: dict[str, Any], path: str = CHAT, **overrides: Any) -> dict[str, Any]:
    """The body with what a rule says; that the one given stays as it is."""
    before = copy.deepcopy(body)
    after = applied(body, Overrides.model_validate(overrides), path)
    assert body == before
    return after


def with_system(prompt: dict[str, str], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    changed_messages = changed({"messages": [*messages, QUESTION]}, system_prompt=prompt)["messages"]
    assert changed_messages[-1] == QUESTION
    return list(changed_messages[:-1])


def test_nothing_is_changed_without_overrides() -> None:
    body = {"messages": [QUESTION], "max_tokens": 5, "x": [1]}
    for path in LENGTHS:
        assert changed(body, path) == body


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], [{"role": "system", "content": "Be kind."}]),
        ([{"role": "system", "content": "Be brief."}], [{"role": "system", "content": "Be kind.\n\nBe brief."}]),
        (
            [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}],
            [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be brief."}],
                }
            ],
        ),
        ([{"role": "system", "content": ""}], [{"role": "system", "content": "Be kind."}]),
        ([{"role": "system", "name": "x"}], [{"role": "system", "name": "x", "content": "Be kind."}]),
    ],
)
def test_a_system_prompt_before_the_client_s(messages: list[Any], expected: list[Any]) -> None:
    assert with_system({"prepend": "Be kind."}, *messages) == expected


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Be rude."}],
        [{"role": "system", "content": "Be rude."}, {"role": "developer", "content": "Swear."}],
    ],
)
def test_a_system_prompt_instead_of_the_client_s(messages: list[Any]) -> None:
    assert with_system({"replace": "Be kind."}, *messages) == [{"role": "system", "content": "Be kind."}]


def test_a_replaced_system_prompt_leaves_no_other_in_the_middle() -> None:
    said = {"role": "assistant", "content": "Because."}
    messages = with_system({"replace": "Be kind."}, QUESTION, {"role": "system", "content": "Be rude."}, said)
    assert messages == [{"role": "system", "content": "Be kind."}, QUESTION, said]


@pytest.mark.parametrize(
    ("path", "key", "asked"), [(RESPONSES, "instructions", "input"), (MESSAGES, "system", "messages")]
)
def test_a_system_prompt_of_the_other_forms(path: str, key: str, asked: str) -> None:
    for theirs, before in ((None, "A"), ("", "A"), ("B", "A\n\nB")):
        body = {key: theirs, asked: [QUESTION]}
        assert changed(body, path, system_prompt={"prepend": "A"}) == {**body, key: before}
        assert changed(body, path, system_prompt={"replace": "A"}) == {**body, key: "A"}
    blocks = [{"type": "text", "text": "B", "cache_control": {"type": "ephemeral"}}]
    assert changed({"system": blocks}, MESSAGES, system_prompt={"prepend": "A"}) == {
        "system": [{"type": "text", "text": "A"}, *blocks]
    }


def test_a_replaced_system_prompt_leaves_none_in_the_input_of_a_response() -> None:
    result = {"type": "function_call_output", "call_id": "1", "output": "42"}
    body = {"input": [{"role": "developer", "content": "Swear."}, QUESTION, result]}
    replaced = {"system_prompt": {"replace": "Be kind."}}
    assert changed(body, RESPONSES, **replaced) == {"instructions": "Be kind.", "input": [QUESTION, result]}
    assert changed({"input": "Why?"}, RESPONSES, **replaced) == {"instructions": "Be kind.", "input": "Why?"}


def test_a_completion_has_no_system_prompt_and_no_thoughts() -> None:
    all_of_them = {
        "system_prompt": {"replace": "A"},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert changed({"prompt": "Once"}, COMPLETIONS, **all_of_them) == {"prompt": "Once"}


def test_the_rule_s_reasoning_effort_counts() -> None:
    assert changed({"messages": [], "reasoning_effort": "high"}, reasoning_effort="low")["reasoning_effort"] == "low"
    responses = changed({"reasoning": {"effort": "high", "summary": "auto"}}, RESPONSES, reasoning_effort="minimal")
    assert responses == {"reasoning": {"effort": "minimal", "summary": "auto"}}


@pytest.mark.parametrize(
    ("body", "effort", "expected"),
    [
        ({}, "low", {"output_config": {"effort": "low"}}),
        ({}, "minimal", {"output_config": {"effort": "low"}}),
        ({}, "none", {"thinking": {"type": "disabled"}}),
        (
            {"output_config": {"effort": "max", "format": {"x": 1}}},
            "none",
            {"thinking": {"type": "disabled"}, "output_config": {"format": {"x": 1}}},
        ),
        (
            {"thinking": {"type": "disabled"}},
            "high",
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            "high",
            {"thinking": {"type": "enabled", "budget_tokens": 2000}, "output_config": {"effort": "high"}},
        ),
    ],
)
def test_the_reasoning_effort_in_anthropic_s_form(body: dict[str, Any], effort: str, expected: dict[str, Any]) -> None:
    assert changed(body, MESSAGES, reasoning_effort=effort) == expected


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (None, {"enable_thinking": False}),
        ({"enable_thinking": True, "x": 1}, {"enable_thinking": False, "x": 1}),
        ("nonsense", {"enable_thinking": False}),
    ],
)
def test_the_template_s_arguments_are_merged(path: str, theirs: Any, expected: dict[str, Any]) -> None:
    body = {"messages": [], "chat_template_kwargs": theirs}
    assert changed(body, path, chat_template_kwargs={"enable_thinking": False})["chat_template_kwargs"] == expected


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {}, {"max_completion_tokens": 100}),
        (CHAT, {"max_tokens": None}, {"max_tokens": None, "max_completion_tokens": 100}),
        (CHAT, {"max_tokens": 50}, {"max_tokens": 50}),
        (CHAT, {"max_tokens": 500}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": 500, "max_completion_tokens": 50}, {"max_tokens": 100, "max_completion_tokens": 50}),
        (CHAT, {"max_tokens": 1e9}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": "500"}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": True}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": -1}, {"max_tokens": -1}),
        (COMPLETIONS, {}, {}),
        (COMPLETIONS, {"max_tokens": 500}, {"max_tokens": 100}),
        (RESPONSES, {}, {"max_output_tokens": 100}),
        (RESPONSES, {"max_output_tokens": 500}, {"max_output_tokens": 100}),
        (MESSAGES, {}, {}),
        (MESSAGES, {"max_tokens": 500}, {"max_tokens": 100}),
    ],
)
def test_an_answer_is_no_longer_than_the_rule_says(path: str, body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changed(body, path, max_tokens=100) == expected


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 6),
        (CHAT, {"max_tokens": "5"}, None),
        (CHAT, {"max_tokens": True}, None),
        (CHAT, {"max_tokens": -5}, None),
        (RESPONSES, {"max_output_tokens": 7, "max_tokens": 5}, 7),
        (MESSAGES, {"max_tokens": 5.0}, 5),
    ],
)
def test_the_tokens_that_a_client_asks_for(path: str, body: dict[str, Any], expected: int | None) -> None:
    assert output_tokens(body, path) == expected


def test_another_scope_for_all_other_overrides() -> None:
    some: list[dict[str, Any]] = [
        {"system_prompt": {"prepend": "A"}},
        {"system_prompt": {"replace": "A"}},
        {"system_prompt": {"replace": "B"}},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"max_tokens": 100},
        {"max_tokens": 101},
        {"max_tokens": 100, "reasoning_effort": "low"},
    ]
    scopes = {scope(given, Overrides.model_validate(overrides)) for given in ("a", "b") for overrides in some}
    assert len(scopes | {"a", "b"}) == 2 * len(some) + 2
    assert scope("a", Overrides()) == "a"
