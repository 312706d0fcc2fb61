"""The policy: which model is just good enough. Pure: what is known of a prompt in, a decision out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from gateway.config import DEFAULT_RULE, Condition, Policy


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a rule may look at. Category and complexity are None when no model has read the prompt."""

    text: str
    prompt_tokens: int
    category: str | None
    complexity: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    model: str
    rule: str


def decide(policy: Policy, prompt: Prompt) -> Decision:
    """The first rule that holds; the default when none does. A rule on what is not known does not hold."""
    for rule in policy.rules:
        if holds(rule.when, prompt):
            return Decision(rule.model, rule.name)
    return Decision(policy.default, DEFAULT_RULE)


def holds(when: Condition, prompt: Prompt) -> bool:
    if when.category and prompt.category not in when.category:
        return False
    if when.complexity and (prompt.complexity is None or prompt.complexity not in when.complexity):
        return False
    if when.prompt_tokens and prompt.prompt_tokens not in when.prompt_tokens:
        return False
    return not when.keywords or _pattern(when.keywords).search(prompt.text) is not None


@lru_cache(maxsize=256)
def _pattern(keywords: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the keywords as whole words, whatever their case.

    A word of a script that puts no spaces between words (whose letters have no case) is found wherever it stands.
    """
    words = [rf"(?<!\w){re.escape(word)}(?!\w)" if _is_spaced(word) else re.escape(word) for word in keywords]
    return re.compile("|".join(words), re.IGNORECASE)


def _is_spaced(word: str) -> bool:
    return word.isascii() or word.lower() != word.upper()
