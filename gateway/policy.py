"""The policy: which model is just good enough. Pure: what is known of a prompt in, a decision out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gateway.condition import Prompt as Prompt
from gateway.condition import facts
from gateway.condition import holds as holds
from gateway.config import DEFAULT_RULE, Model, Overrides, Policy, Rule, Share

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
class Pull:
    """What a request tells of a rule with a share: how strongly it asks for the rule's model."""

    newest: float | None  # complexity of the newest turn; None when no bar would let it through this rule
    earlier: float | None  # the highest of the earlier turns, likewise
    forced: bool  # it goes to that model wherever the bar is
    given: bool  # it goes to that model


@dataclass(frozen=True, slots=True)
class Decision:
    model: str
    rule: str
    reason: str  # why this model, in words
    overrides: Overrides = NO_OVERRIDES  # what the rule changes in the request
    pulls: Mapping[str, Pull] = field(default_factory=dict)  # by rule with a share; empty when nothing read the prompt
    cache_ttl_seconds: int | None = None  # that the rule gives the answer


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
    conversation = _Conversation(policy, models, earlier, prompt)
    chosen = conversation.choice(bars)
    pulls = {
        rule.name: conversation.pull(rule.name, rule.share.model, bars)
        for rule in policy.rules
        if rule.share is not None and prompt.complexity is not None
    }
    ttl = next((rule.cache_ttl_seconds for rule in policy.rules if rule.name == chosen.rule), None)
    return Decision(chosen.model.name, chosen.rule, chosen.why(), chosen.overrides, pulls, ttl)


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: Prompt
    rules: tuple[Rule, ...]  # whose conditions hold, up to one that surely decides
    is_newest: bool


@dataclass(frozen=True, slots=True)
class _Choice:
    model: Model
    rule: str
    why: Callable[[], str]  # worked out only for the choice that is taken
    overrides: Overrides = NO_OVERRIDES


class _Conversation:
    """The turns of a conversation, which are decided several times when there are shares, with other bars each time."""

    def __init__(self, policy: Policy, models: Sequence[Model], earlier: Sequence[Prompt], newest: Prompt) -> None:
        self._models = {model.name: model for model in models}
        self._default = self._models[policy.default]
        before = [_Turn(prompt, tuple(_holding(policy, prompt)), is_newest=False) for prompt in earlier]
        self._turns = [*before, _Turn(newest, tuple(_holding(policy, newest)), is_newest=True)]

    def choice(self, bars: Mapping[str, Bar]) -> _Choice:
        *earlier, newest = (self._of_turn(turn, bars) for turn in self._turns)
        return _fitting(_kept(newest, earlier), self._models.values(), self._turns[-1].prompt)

    def pull(self, rule: str, model: str, bars: Mapping[str, Bar]) -> Pull:
        """What the conversation tells of the rule of this name, whose share is that of `model`."""

        def given(at: Mapping[str, Bar]) -> bool:
            return self.choice({**bars, **at}).model.name == model

        asking: dict[bool, list[float]] = {True: [], False: []}  # complexities, by whether the turn is the newest
        opened = {rule: OPEN}
        for turn in self._turns if given(opened) else ():
            through = self._of_turn(turn, {**bars, **opened}).rule == rule
            if through and turn.prompt.complexity is not None:
                asking[turn.is_newest].append(turn.prompt.complexity)
        return Pull(
            newest=max(asking[True], default=None),
            earlier=max(asking[False], default=None),
            forced=given({rule: SHUT}),
            given=given({}),
        )

    def _of_turn(self, turn: _Turn, bars: Mapping[str, Bar]) -> _Choice:
        """Who answers one turn, whatever was before it and however long it is."""
        for rule in turn.rules:
            if choice := self._of_rule(rule, turn, bars):
                return choice
        return _Choice(self._default, DEFAULT_RULE, lambda: "no rule holds")

    def _of_rule(self, rule: Rule, turn: _Turn, bars: Mapping[str, Bar]) -> _Choice | None:
        """None when the rule needs what was not predicted, or the bar is higher."""
        if rule.model is not None:
            return _Choice(self._models[rule.model], rule.name, partial(_held, rule, turn.prompt), rule)
        if rule.share is not None:
            return self._of_share(rule, rule.share, turn, bars.get(rule.name))
        return self._of_quality(rule, turn.prompt)

    def _of_share(self, rule: Rule, share: Share, turn: _Turn, bar: Bar | None) -> _Choice | None:
        complexity = turn.prompt.complexity
        if complexity is None or bar is None:
            return None
        least = bar.newest if turn.is_newest else bar.earlier
        if complexity < least:
            return None
        return _Choice(self._models[share.model], rule.name, partial(_among, share.at_most, complexity, least), rule)

    def _of_quality(self, rule: Rule, prompt: Prompt) -> _Choice | None:
        quality = prompt.quality
        named = rule.among or quality
        candidates = [model for name, model in self._models.items() if name in quality and name in named]
        if rule.cheapest_within is None or not candidates:
            return None
        tokens = _tokens(prompt, rule)
        candidates = [model for model in candidates if tokens <= model.context_window] or candidates
        chosen = cheapest_within(rule.cheapest_within, candidates, quality)
        why = partial(_near_the_best, rule.cheapest_within, chosen, candidates, quality)
        return _Choice(chosen, rule.name, why, rule)


def _holding(policy: Policy, prompt: Prompt) -> Iterator[Rule]:
    for rule in policy.rules:
        if holds(rule.when, prompt):
            yield rule
            if rule.model is not None:
                return


def cheapest_within(margin: float, models: Sequence[Model], quality: Mapping[str, float]) -> Model:
    """The cheapest of the models (at least one) whose quality is at most `margin` below the best of them.

    Cheapest by the price of output, then that of input, then the order of the models.
    """
    least = max(quality[model.name] for model in models) - margin
    good = [model for model in models if quality[model.name] >= least]
    return min(good, key=_price)


def _price(model: Model) -> tuple[float, float]:
    return model.price_per_million_tokens.output, model.price_per_million_tokens.input


# Why, in words


def _held(rule: Rule, prompt: Prompt) -> str:
    why = ", ".join(facts(rule.when, prompt))
    return f"its rule holds ({why})" if why else "its rule always holds"


def _among(at_most: float, complexity: float, least: float) -> str:
    share, begin = f"the highest {100 * at_most:g} %", f"which begin at {least:.3f}"
    return f"its complexity ({complexity:.3f}) is among {share}, {begin}"


def _near_the_best(margin: float, chosen: Model, models: Sequence[Model], quality: Mapping[str, float]) -> str:
    best = max(models, key=lambda model: quality[model.name])
    return (
        f"the cheapest whose predicted quality ({quality[chosen.name]:.3f}) is within {margin:g} "
        f"of the best ({best.name}, {quality[best.name]:.3f})"
    )


# The conversation and the window


def size(model: Model) -> int:
    return SIZES.index(model.size)


def _kept(newest: _Choice, earlier: Sequence[_Choice]) -> _Choice:
    """The latest of the choices for earlier turns with the largest model, when that of the newest turn is smaller."""
    largest = max(reversed(earlier), key=lambda choice: size(choice.model), default=newest)
    if size(largest.model) <= size(newest.model):
        return newest

    def why() -> str:
        return (
            f"an earlier turn of the conversation is given it by {largest.rule}: {largest.why()}; "
            f"this turn alone would be given {newest.model.name} by {newest.rule}"
        )

    return replace(largest, why=why)


def _tokens(prompt: Prompt, overrides: Overrides) -> int:
    """What a window must hold: the conversation, and the answer as far as its length is said."""
    lengths = [length for length in (prompt.output_tokens, overrides.max_tokens) if length is not None]
    return prompt.context_tokens + overrides.added_tokens + min(lengths, default=0)


def _fitting(choice: _Choice, models: Collection[Model], prompt: Prompt) -> _Choice:
    """The choice, or another model when the conversation does not fit into the window of the one it names.

    The next by size: of those that it fits into, one of the same size or the nearest larger, then the nearest smaller,
    the cheaper first. Without any, the one with the largest window, whose own words the client gets.
    """
    tokens, chosen = _tokens(prompt, choice.overrides), choice.model
    if tokens <= chosen.context_window:
        return choice

    def distance(model: Model) -> tuple[bool, int, tuple[float, float]]:
        step = size(model) - size(chosen)
        return step < 0, abs(step), _price(model)

    fitting = [model for model in models if tokens <= model.context_window]
    if fitting:
        other, words = min(fitting, key=distance), "is the next by size that they fit into"
    else:
        other = max(models, key=lambda model: (model.context_window, model is chosen))
        words = "has the largest window of all"

    def why() -> str:
        return (
            f"about {tokens} tokens, the answer included, do not fit into the {chosen.context_window} of "
            f"{chosen.name}; {other.name} {words}; {chosen.name} because {choice.why()}"
        )

    return replace(choice, model=other, why=why)
