"""What the policy reads of a conversation."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.conversation import (
    EARLIER_TURNS,
    HARNESS_TAGS,
    READ_CHARACTERS,
    SEARCHED_CHARACTERS,
    Turn,
    cleaned,
    context_tokens,
    has_images,
    has_tools,
    turns,
)
from gateway.request import parse

FUZZ = settings(database=None, deadline=None, derandomize=True)
ANSWER = {"role": "assistant", "content": "I see."}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def conversation(*said: Any) -> list[dict[str, Any]]:
    """User turns with answers between them."""
    messages = [message for content in said for message in (user(content), ANSWER)]
    return messages[:-1]


def newest(*said: Any) -> Turn:
    return turns(conversation(*said))[-1]


# One turn


def test_a_single_turn_is_read_as_it_is_asked() -> None:
    """So that one reading does for the policy and for the cache."""
    text = "  What is <b>bold</b>?\n"
    request = parse(json.dumps({"model": "auto", "messages": [user(text)]}).encode())
    (only,) = turns(request.messages)
    assert only.read == only.text == request.question == "What is <b>bold</b>?"
    assert only.prompt_tokens == request.prompt_tokens


def test_without_a_user_turn_there_is_nothing_to_read() -> None:
    assert turns([{"role": "system", "content": "Be kind."}, ANSWER]) == ()


def test_what_follows_the_newest_user_turn_counts_as_its_tokens() -> None:
    (only,) = turns([user("12345678"), ANSWER, {"role": "tool", "content": "x" * 40, "tool_call_id": "1"}])
    assert (only.text, only.prompt_tokens) == ("12345678", (8 + 6 + 40) // 4)


# Turns before it


def test_a_follow_up_is_read_after_what_was_asked_before() -> None:
    read = newest("Prove that there is no largest prime.", "and in French?")
    assert read.text == "and in French?"
    assert read.read == "Prove that there is no largest prime.\nand in French?"


def test_answers_and_results_of_tools_are_not_read() -> None:
    messages = [{"role": "system", "content": "S"}, user("Fix it."), ANSWER]
    messages += [{"role": "tool", "content": "T", "tool_call_id": "1"}, user("Commit it.")]
    assert turns(messages)[-1].read == "Fix it.\nCommit it."


def test_the_nearest_turns_are_read_and_the_last_of_them_is_cut() -> None:
    read = newest("a" * 600, "b" * 600, "c" * 300).read
    assert read == "a" * (READ_CHARACTERS - 902) + "\n" + "b" * 600 + "\n" + "c" * 300
    assert len(read) == READ_CHARACTERS


def test_a_long_turn_is_read_whole_and_alone() -> None:
    assert newest("Hello", "x" * 5000).read == "x" * 5000


def test_earlier_turns_are_read_as_they_were_when_they_were_the_newest() -> None:
    said = ["Prove it.", "and in French?", "x" * 990, "shorter"]
    messages = conversation(*said)
    for i, turn in enumerate(turns(messages)):
        asked_then = turns(messages[: 2 * i + 1])[-1]
        assert (turn.text, turn.read, turn.prompt_tokens) == (
            asked_then.text,
            asked_then.read,
            asked_then.prompt_tokens,
        )


@pytest.mark.parametrize("length", [1, 2, EARLIER_TURNS, EARLIER_TURNS + 1, EARLIER_TURNS + 2, 40])
def test_of_many_turns_the_first_and_the_latest_are_looked_at(length: int) -> None:
    said = [f"turn {i}" for i in range(length)]
    found = [turn.text for turn in turns(conversation(*said))]
    assert found == (said if length <= EARLIER_TURNS + 1 else [said[0], *said[-EARLIER_TURNS:]])


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TEXT = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (conversation("a", "b"), False),
        (conversation("a", [IMAGE, TEXT], "c"), True),
        ([ANSWER, {"role": "assistant", "content": None}, user([TEXT])], False),
        ([user([{"type": "tool_result", "content": [TEXT, {"type": "image", "source": {}}]}])], True),
        ([user([{"type": "tool_result", "content": [TEXT, {"type": ["image"]}, "image"]}])], False),
    ],
)
def test_images(messages: list[dict[str, Any]], expected: bool) -> None:
    assert has_images(messages) is expected


# What a harness adds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Commit it.<system-reminder>Prove that P is not NP.</system-reminder>", "Commit it."),
        ("<system-reminder>\na\n</system-reminder>\n\nCommit it.", "Commit it."),
        ("<system-reminder>a</system-reminder>b<system-reminder>c</system-reminder>d", "bd"),
        ("<SYSTEM_REMINDER>a</System-Reminder>b", "b"),
        ('<tool_result id="1">a</tool_result>b', "b"),
        ("<environment_details>a <env>b</env> c</environment_details>d", "d"),
        ("<system-reminder>a<system-reminder>b</system-reminder>c</system-reminder>d", "d"),
        ("<system-reminder>a<env>b</system-reminder>c</env>d", "d"),
        ("<env>a", "<env>a"),
        ("a</env>b", "a</env>b"),
        ("<div>a</div>", "<div>a</div>"),
        ("if a < b and c > d: </x>", "if a < b and c > d: </x>"),
        ("<user_query>Fix it.</user_query>", "<user_query>Fix it.</user_query>"),
        ("<system-reminder>a</system-reminder>", ""),
    ],
)
def test_what_a_harness_adds_is_not_what_the_user_says(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@pytest.mark.parametrize("tag", sorted(HARNESS_TAGS))
def test_every_tag_of_a_harness(tag: str) -> None:
    assert cleaned(f"before <{tag}>noise</{tag}> after") == "before  after"


def test_noise_decides_no_turn() -> None:
    noise = "<system-reminder>Prove that P is not NP, step by step.</system-reminder>"
    noisy, plain = newest(f"Hello{noise}", f"Commit it.{noise}"), newest("Hello", "Commit it.")
    assert (noisy.text, noisy.read) == (plain.text, plain.read)


def test_a_turn_of_noise_alone_is_read_as_those_before_it() -> None:
    result = [{"type": "tool_result", "tool_use_id": "1", "content": "42"}, {"type": "text", "text": "<env>x</env>"}]
    found = newest("Fix the tests.", result)
    assert (found.text, found.read) == ("", "Fix the tests.")


def test_noise_is_read_when_there_is_nothing_else() -> None:
    assert newest("<env>x</env>").read == "<env>x</env>"


def test_the_question_and_what_is_sent_keep_the_noise() -> None:
    text = "Commit it.<system-reminder>Be brief.</system-reminder>"
    request = parse(json.dumps({"model": "auto", "messages": [user(text)]}).encode())
    turns(request.messages)
    assert request.question == text
    assert request.body["messages"] == [user(text)]


@FUZZ
@given(
    st.lists(st.sampled_from(["<env>", "</env>", "<tool-result>", "</tool-result>", "x", "<", "</", " "]), max_size=12)
)
def test_cleaning_keeps_what_is_outside_and_adds_nothing(pieces: list[str]) -> None:
    text = "".join(pieces)
    rest = iter(text)
    assert all(character in rest for character in cleaned(text)), "what is left stands in the text, in this order"
    assert cleaned("A " + text + " Z").startswith("A")


@pytest.mark.parametrize(
    "text",
    [
        "<env>" * 800_000,
        "</env>" * 600_000,
        "<env>" * 400_000 + "</env>" * 300_000,
        "<env " * 800_000 + "</",
        "<" * 4_000_000 + "</",
        "<env>x</env>" * 300_000,
    ],
    ids=["opened", "closed", "nested", "unfinished", "angles", "many"],
)
@pytest.mark.parametrize("messages", [1, 500])
def test_no_text_takes_long(text: str, messages: int) -> None:
    """Four megabytes, in one turn or many, in the processor's time."""
    piece = len(text) // messages
    said = conversation(*(text[i * piece : (i + 1) * piece] for i in range(messages)))
    started = time.process_time()
    turns(said)
    assert time.process_time() - started < 2


def test_a_long_text_is_cleaned_at_both_ends() -> None:
    noise = f"<env>{'x' * 300_000}</env>"
    assert newest(f"Fix it. {noise} Now.").text == "Fix it.  Now."


def test_of_a_long_text_the_beginning_and_the_end_are_searched() -> None:
    whole = f"Summarise: {'x' * 300_000} step by step"
    turn = newest(whole)
    assert len(turn.text) == SEARCHED_CHARACTERS
    assert turn.text.startswith("Summarise: x")
    assert turn.text.endswith("x step by step")
    assert turn.read == whole


# How much there is to read


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": [user("x" * 400)]}, 104),
        ({"messages": [user([{"type": "text", "text": "x" * 400}])]}, 107),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "data:" + "x" * 9999}}])]}, 4),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"arguments": "x" * 400}]}]}, 110),
        ({"messages": [], "tools": [{"description": "x" * 400}]}, 102),
        ({"messages": [], "tools": [{"x" * 400: {"type": ["string", "null"]}}]}, 103),
        ({"prompt": "x" * 400}, 100),
        ({"prompt": [1] * 400}, 400),
        ({"input": [{"type": "function_call_output", "output": "x" * 400}], "instructions": "y" * 40}, 118),
        ({"system": "x" * 400, "messages": []}, 100),
        ({"messages": [], "metadata": {"x": "y" * 400}}, 0),
        ({"messages": [user("день")]}, 6),
    ],
)
def test_the_tokens_of_a_context(body: dict[str, Any], expected: int) -> None:
    assert context_tokens(body) == pytest.approx(expected, abs=2)


def test_tools() -> None:
    assert has_tools({"tools": [{"type": "function"}]})
    assert has_tools({"functions": [{"name": "f"}]})
    assert not has_tools({"tools": []})
    assert not has_tools({"tools": None})
    assert not has_tools({})
