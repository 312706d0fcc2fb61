"""Regular expressions in rules: which are taken, and that none of those takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.config import Condition
from gateway.regex import CHARACTERS, MOST_STEPS, found, steps


def condition(pattern: object) -> Condition:
    return Condition.model_validate({"regex": [pattern]})


@pytest.mark.parametrize(
    "pattern",
    [
        "^translate",
        r"(?i)\b(sql|select|join)\b",
        r"\w+@example\.com",
        "foo.*bar",
        "```python",
        r"^(?:https?://)?[\w.-]{1,80}\.com$",
        r"select\s.{0,100}\sfrom",
        "(?:foo|bar)+",
        "(?>a+)b",
        "a++b",
        "(?<!x)y(?=z)",
        r"(?x) a \s* b  # a comment",
        "[一-龥]{2,4}",
    ],
)
def test_a_pattern_that_is_taken(pattern: str) -> None:
    assert condition(pattern).regex == (re.compile(pattern),)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a*)*b",
        "(a|a)*b",
        "(a|ab)*c",
        r"(\w+\s?)*$",
        "(.*)(.*)(.*)x",
        ".*foo.*bar",
        r"([a-z]+)+\d",
        r"(a)?(?(1)b|c)*",
    ],
)
def test_a_pattern_that_may_take_long_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="may take too long"):
        condition(pattern)


@pytest.mark.parametrize(
    "pattern", ["(", "[", "*a", "(?P<n>", "a{2,1}", "\\", "(" * 5000 + ")" * 5000, "a{99999999999}"]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"is not a regular expression|may take too long"):
        condition(pattern)


@pytest.mark.parametrize("pattern", ["", 3, None, ["a"]])
def test_a_pattern_is_a_text(pattern: object) -> None:
    with pytest.raises(ValidationError, match="must be a regular expression"):
        condition(pattern)


def test_only_the_beginning_of_a_text_is_searched() -> None:
    patterns = condition("x$").regex
    assert found(patterns, "a" * (CHARACTERS - 1) + "x" + "a" * 10_000_000) is patterns[0]
    assert found(patterns, "a" * CHARACTERS + "x") is None


PIECES = [
    "a",
    "b",
    ".",
    r"\w",
    "[ab]",
    "a*",
    "a+",
    ".*",
    "a?",
    "(?:ab)*",
    "(?:a|b)+",
    "a{2,9}",
    ".{0,30}",
    "^",
    "$",
    r"\b",
]
PATTERNS = st.recursive(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda both: f"(?:{both[0]}|{both[1]})"),
        inner.map(lambda one: f"(?:{one}){{0,3}}"),
        inner.map(lambda one: f"(?:{one})*"),
    ),
    max_leaves=4,
)


@settings(database=None, deadline=None, derandomize=True, max_examples=150)
@given(PATTERNS, st.sampled_from(["a", "ab", "aab", "ba"]))
def test_no_pattern_that_is_taken_takes_long(pattern: str, text: str) -> None:
    """Of a text that almost matches, in the processor's time; a step is some nanoseconds."""
    if steps(pattern + "c") > MOST_STEPS:
        return
    started = time.process_time()
    assert found((re.compile(pattern + "c"),), text * CHARACTERS) is None
    assert time.process_time() - started < 0.5
