"""The policy: which model is just good enough. Pure: what is known of a prompt in, a decision out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.condition import Prompt as Prompt
from gateway.condition import facts
from gateway.condition import holds as holds
from gateway.config import DEFAULT_RULE, Model, Overrides, Policy, Rule

SIZES = ("small", "medium", "large")
NO_OVERRIDES = Overrides()


@dataclass(frozen=True, slots=True)
class Bar:
    """The complexity from which on a rule with a share holds: for the newest turn, and for those before it.

    It moves. For the earlier turns it lies lower, so that a conversation keeps its model while it moves a little.
    """

    newest: float
    earlier: float


OPEN = Bar(-math.inf, -math.inf)
SHUT = Bar(math.inf, math.inf)
NO_BARS: Mapping[str, Bar] = {}


@dataclass(frozen=True, slots=True)
class Decision:
    model: str
    rule: str
    reason: str  # why this model, in words
    overrides: Overrides = NO_OVERRIDES  # what the rule changes in the request


@dataclass(frozen=True, slots=True)
class Pull:
    """What a request tells of a rule with a share: how strongly it asks for the rule's model."""

    newest: float | None  # complexity of the newest turn; None when no bar would let it through this rule
    earlier: float | None  # the highest of the earlier turns, likewise
    forced: bool  # it goes to that model wherever the bar is
    given: bool  # it goes to that model


def decide(
    policy: Policy,
    models: Sequence[Model],
    prompt: Prompt,
    earlier: Sequence[Prompt] = (),
    bars: Mapping[str, Bar] = NO_BARS,
) -> Decision:
    """Who answers the newest turn of a conversation whose `earlier` turns are given oldest first.

    The first rule that holds says it; the default when none does. A rule on what is not known does not hold. It is not
    a smaller model than an earlier turn is given, and one whose window the conversation fits into. `bars` are those of
    the rules with a share, by the rule's name; without its bar such a rule does not hold.
    """
    newest = _of_turn(policy, models, prompt, {name: bar.newest for name, bar in bars.items()})
    at_earlier = {name: bar.earlier for name, bar in bars.items()}
    before = [_of_turn(policy, models, turn, at_earlier) for turn in earlier]
    return _fitting(_kept(newest, before, models), models, prompt)


def pulls(
    policy: Policy, models: Sequence[Model], prompt: Prompt, earlier: Sequence[Prompt], bars: Mapping[str, Bar]
) -> dict[str, Pull]:
    """What a request tells of each rule with a share, by the rule's name; nothing when its prompt was not read."""
    if prompt.complexity is None:
        return {}
    shared = [(rule, rule.share.model) for rule in policy.rules if rule.share is not None]
    return {rule.name: _pull(rule, model, policy, models, prompt, earlier, bars) for rule, model in shared}


def _pull(
    rule: Rule,
    model: str,
    policy: Policy,
    models: Sequence[Model],
    prompt: Prompt,
    earlier: Sequence[Prompt],
    bars: Mapping[str, Bar],
) -> Pull:
    def decided(bar: Mapping[str, Bar]) -> bool:
        return decide(policy, models, prompt, earlier, {**bars, **bar}).model == model

    others = {name: bar.newest for name, bar in bars.items()}
    could = decided({rule.name: OPEN})

    def asking(turns: Iterable[Prompt]) -> Iterator[float]:
        for turn in turns if could else ():
            through = _of_turn(policy, models, turn, {**others, rule.name: -math.inf})
            if turn.complexity is not None and through.rule == rule.name:
                yield turn.complexity

    return Pull(
        newest=max(asking([prompt]), default=None),
        earlier=max(asking(earlier), default=None),
        forced=decided({rule.name: SHUT}),
        given=decided({}),
    )


def _of_turn(policy: Policy, models: Sequence[Model], prompt: Prompt, bars: Mapping[str, float]) -> Decision:
    """Who answers one turn, whatever was before it and however long it is."""
    for rule in policy.rules:
        if holds(rule.when, prompt) and (decision := _choice(rule, models, prompt, bars)):
            return decision
    return Decision(policy.default, DEFAULT_RULE, "no rule holds")


def _choice(rule: Rule, models: Sequence[Model], prompt: Prompt, bars: Mapping[str, float]) -> Decision | None:
    """The model of a rule whose condition holds; None when it needs what was not predicted or the bar is higher."""
    if rule.model is not None:
        why = ", ".join(facts(rule.when, prompt))
        return Decision(rule.model, rule.name, f"its rule holds ({why})" if why else "its rule always holds", rule)
    if rule.share is not None:
        return _of_share(rule, rule.share.model, rule.share.at_most, prompt.complexity, bars.get(rule.name))
    return _of_quality(rule, models, prompt)


def _of_share(rule: Rule, model: str, at_most: float, complexity: float | None, bar: float | None) -> Decision | None:
    if complexity is None or bar is None or complexity < bar:
        return None
    share, begin = f"the highest {100 * at_most:g} %", f"which begin at {max(bar, 0):.3f}"
    reason = f"its complexity ({complexity:.3f}) is among {share}, {begin}"
    return Decision(model, rule.name, reason, rule)


def _of_quality(rule: Rule, models: Sequence[Model], prompt: Prompt) -> Decision | None:
    quality = prompt.quality
    candidates = [model for model in models if model.name in quality and model.name in (rule.among or quality)]
    if rule.cheapest_within is None or not candidates:
        return None
    tokens = _tokens(prompt, rule)
    candidates = [model for model in candidates if tokens <= model.context_window] or candidates
    best = max(candidates, key=lambda model: quality[model.name])
    chosen = cheapest_within(rule.cheapest_within, candidates, quality)
    reason = (
        f"the cheapest whose predicted quality ({quality[chosen.name]:.3f}) is within {rule.cheapest_within:g} "
        f"of the best ({best.name}, {quality[best.name]:.3f})"
    )
    return Decision(chosen.name, rule.name, reason, rule)


def cheapest_within(margin: float, models: Sequence[Model], quality: Mapping[str, float]) -> Model:
    """The cheapest of the models (at least one) whose quality is at most `margin` below the best of them.

    Cheapest by the price of output, then that of input, then the order of the models.
    """
    least = max(quality[model.name] for model in models) - margin
    good = [model for model in models if quality[model.name] >= least]
    return min(good, key=_price)


def _price(model: Model) -> tuple[float, float]:
    return model.price_per_million_tokens.output, model.price_per_million_tokens.input


# The conversation and the window


def _kept(newest: Decision, earlier: Sequence[Decision], models: Sequence[Model]) -> Decision:
    """The latest of the decisions on earlier turns with the largest model, when that of the newest turn is smaller."""
    sizes = {model.name: SIZES.index(model.size) for model in models}
    largest = max(reversed(earlier), key=lambda decision: sizes[decision.model], default=newest)
    if sizes[largest.model] <= sizes[newest.model]:
        return newest
    reason = (
        f"an earlier turn of the conversation is given it by {largest.rule}: {largest.reason}; "
        f"this turn alone would be given {newest.model} by {newest.rule}"
    )
    return replace(largest, reason=reason)


def _tokens(prompt: Prompt, overrides: Overrides) -> int:
    """What a window must hold: the conversation, and the answer as far as its length is said."""
    lengths = [length for length in (prompt.output_tokens, overrides.max_tokens) if length is not None]
    return prompt.context_tokens + overrides.added_tokens + min(lengths, default=0)


def _fitting(decision: Decision, models: Sequence[Model], prompt: Prompt) -> Decision:
    """The decision, or another model when the conversation does not fit into the window of the one it names.

    The next by size: of those that it fits into, one of the same size or the nearest larger, then the nearest smaller,
    the cheaper first. Without any, the one with the largest window, whose own words the client gets.
    """
    tokens = _tokens(prompt, decision.overrides)
    chosen = next(model for model in models if model.name == decision.model)
    if tokens <= chosen.context_window:
        return decision
    size = SIZES.index(chosen.size)

    def distance(model: Model) -> tuple[bool, int, tuple[float, float]]:
        step = SIZES.index(model.size) - size
        return step < 0, abs(step), _price(model)

    fitting = [model for model in models if tokens <= model.context_window]
    if fitting:
        other, words = min(fitting, key=distance), "the next by size that they fit into"
    else:
        other = max(models, key=lambda model: (model.context_window, model is chosen))
        words = "the largest window of all"
    reason = (
        f"about {tokens} tokens, the answer included, do not fit into the {chosen.context_window} of {chosen.name}; "
        f"{other.name} has {words}; {chosen.name} because {decision.reason}"
    )
    return replace(decision, model=other.name, reason=reason)
