"""Regular expressions that cannot hold up the gateway: the most steps that one may take is worked out when it is read.

Python's `re` tries one way after the other, so that what a pattern costs is the number of ways there are to go through
it: those of a sequence multiply, those of alternatives add up, and a repetition has one for each number of times. This
bounds the work on a text of CHARACTERS characters; nothing longer is ever searched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

CHARACTERS = 1000  # of a text that are searched, from its beginning
MOST_STEPS = 20_000_000  # some 30 ms
_BEYOND = 1e18  # as good as endless; keeps the sums finite

_parser: Any = import_module("re._parser")  # what `re` itself reads patterns with


class _Cost(NamedTuple):
    ways: float  # at most, to match from one place on
    steps: float  # at most, to go through all of them


_ONE = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "FAILURE"}


def found(patterns: tuple[re.Pattern[str], ...], text: str) -> re.Pattern[str] | None:
    """The first of the patterns that occurs in the first CHARACTERS characters of a text."""
    return _found(patterns, text[:CHARACTERS])


@lru_cache(maxsize=256)
def _found(patterns: tuple[re.Pattern[str], ...], text: str) -> re.Pattern[str] | None:
    """Remembered, since a turn is decided more than once, and again with those that follow it."""
    return next((pattern for pattern in patterns if pattern.search(text)), None)


def steps(pattern: str) -> float:
    """The most steps that a search takes in CHARACTERS characters. Raises `re.error`."""
    parsed = _parser.parse(pattern)
    cost = _of_all(parsed)
    if _is_anchored(parsed):
        return CHARACTERS + cost.steps
    return (CHARACTERS + 1) * cost.steps


def _is_anchored(parsed: Any) -> bool:
    """Whether a match can only be at the beginning of the text."""
    if len(parsed) == 0 or str(parsed[0][0]) != "AT":
        return False
    multiline = bool(parsed.state.flags & re.MULTILINE)
    return str(parsed[0][1]) in ("AT_BEGINNING_STRING", "AT_BEGINNING" if not multiline else "")


def _compiled(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a regular expression, and not empty")
    try:
        most = steps(value)
        pattern = re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error or 'it is nested too deeply'}") from None
    if most > MOST_STEPS:
        words = "may take too long: repeat nothing within a repetition, and at most one thing without an end"
        raise ValueError(f"{words} (`.{{0,50}}` has one)")
    return pattern


Regex = Annotated[re.Pattern[str], BeforeValidator(_compiled)]


def _of_all(items: Sequence[Any]) -> _Cost:
    ways, steps = 1.0, 0.0
    for item in items:
        cost = _of(item)
        steps += ways * cost.steps
        ways *= cost.ways
    return _limited(ways, steps)


def _of(item: tuple[Any, Any]) -> _Cost:
    """What one part of a parsed pattern costs; what is not known here is taken to be endless."""
    kind, value = str(item[0]), item[1]
    if kind in _ONE:
        return _Cost(1, 1)
    if kind == "SUBPATTERN":
        return _of_all(value[-1])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeated(*value)
    if kind == "BRANCH":
        return _of_one_of(value[1])
    if kind in _ATOMIC:
        return _Cost(1, _ATOMIC[kind](value))
    return _Cost(_BEYOND, _BEYOND)


# What is matched in one way or not at all, and the steps that takes.
_ATOMIC: dict[str, Callable[[Any], float]] = {
    "POSSESSIVE_REPEAT": lambda value: _repeated(*value).steps,
    "ATOMIC_GROUP": lambda value: _of_all(value).steps,
    "ASSERT": lambda value: _of_all(value[1]).steps,
    "ASSERT_NOT": lambda value: _of_all(value[1]).steps,
    "GROUPREF": lambda value: CHARACTERS,
}


def _repeated(least: Any, most: Any, part: Any) -> _Cost:
    inner, (shortest, _) = _of_all(part), part.getwidth()
    most = min(int(most), CHARACTERS // max(1, shortest))
    powers = [min(_BEYOND, _power(inner.ways, times)) for times in range(most + 1)]
    return _limited(sum(powers[int(least) :]), inner.steps * sum(powers) + 1)


def _power(ways: float, times: int) -> float:
    try:
        return ways**times
    except OverflowError:
        return _BEYOND


def _of_one_of(alternatives: Sequence[Any]) -> _Cost:
    costs = [_of_all(alternative) for alternative in alternatives]
    firsts = [_first_letter(alternative) for alternative in alternatives]
    apart = None not in firsts and len(set(firsts)) == len(firsts)  # then no two can match at the same place
    ways = [cost.ways for cost in costs]
    return _limited(max(ways) if apart else sum(ways), sum(cost.steps + 1 for cost in costs))


def _first_letter(items: Sequence[Any]) -> str | None:
    """What an alternative has to begin with, whatever its case; None when that is not one letter."""
    if len(items) == 0 or str(items[0][0]) != "LITERAL":
        return None
    return chr(items[0][1]).casefold()


def _limited(ways: float, steps: float) -> _Cost:
    return _Cost(min(ways, _BEYOND), min(steps, _BEYOND))
