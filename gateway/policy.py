"""The policy: which model is just good enough. Pure: what is known of a prompt in, a decision out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from gateway.config import DEFAULT_RULE, Condition, Model, Policy, Rule


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a rule may look at. Category and complexity are None, and quality is empty, when nothing read the prompt."""

    text: str
    prompt_tokens: int
    category: str | None
    complexity: float | None
    quality: Mapping[str, float] = field(default_factory=dict)  # model -> probability that its answer is right


@dataclass(frozen=True, slots=True)
class Decision:
    model: str
    rule: str
    reason: str  # why this model, in words


def decide(policy: Policy, models: Sequence[Model], prompt: Prompt) -> Decision:
    """The first rule that holds; the default when none does. A rule on what is not known does not hold."""
    for rule in policy.rules:
        if holds(rule.when, prompt) and (decision := _choice(rule, models, prompt.quality)):
            return decision
    return Decision(policy.default, DEFAULT_RULE, "no rule holds")


def _choice(rule: Rule, models: Sequence[Model], quality: Mapping[str, float]) -> Decision | None:
    """The model of a rule whose condition holds; None when it needs predicted qualities and there are none."""
    if rule.model is not None:
        return Decision(rule.model, rule.name, "the condition of the rule holds")
    candidates = [model for model in models if model.name in quality and model.name in (rule.among or quality)]
    if rule.cheapest_within is None or not candidates:
        return None
    best = max(candidates, key=lambda model: quality[model.name])
    chosen = cheapest_within(rule.cheapest_within, candidates, quality)
    reason = (
        f"the cheapest whose predicted quality ({quality[chosen.name]:.3f}) is within {rule.cheapest_within:g} "
        f"of the best ({best.name}, {quality[best.name]:.3f})"
    )
    return Decision(chosen.name, rule.name, reason)


def cheapest_within(margin: float, models: Sequence[Model], quality: Mapping[str, float]) -> Model:
    """The cheapest of the models (at least one) whose quality is at most `margin` below the best of them.

    Cheapest by the price of output, then that of input, then the order of the models.
    """
    least = max(quality[model.name] for model in models) - margin
    good = [model for model in models if quality[model.name] >= least]
    return min(good, key=lambda model: (model.price_per_million_tokens.output, model.price_per_million_tokens.input))


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
