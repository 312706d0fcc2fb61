"""The policy: which rule holds for which prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Condition, Model, Policy, Price, Range, Rule, Share
from gateway.policy import OPEN, SHUT, Bar, Prompt, Pull, cheapest_within, decide, holds

FUZZ = settings(database=None, deadline=None, derandomize=True)

PROMPT = Prompt(text="What is a group?", prompt_tokens=4, category="math", complexity=0.5)
UNREAD = Prompt(text="What is a group?", prompt_tokens=4, category=None, complexity=None)

MATHS = Rule(name="maths", when=Condition(category=("math", "physics")), model="medium")
HARD = Rule(name="hard", when=Condition(complexity=Range(at_least=0.5)), model="large")
NEVER = Condition(category=("law",))


def model(name: str, price: float, input_price: float = 0.1, *, size: str = "small", window: int = 2048) -> Model:
    return Model(
        name=name,
        endpoints=("http://127.0.0.1:8000",),  # type: ignore[arg-type]
        price_per_million_tokens=Price(input=input_price, output=price),
        context_window=window,
        size=size,  # type: ignore[arg-type]
    )


MODELS = (model("small", 0.1), model("medium", 1), model("large", 10))


def decided(policy: Policy, prompt: Prompt) -> tuple[str, str]:
    """Model and rule."""
    decision = decide(policy, MODELS, prompt)
    return decision.model, decision.rule


def test_the_first_rule_that_holds_decides() -> None:
    assert decided(Policy(rules=(MATHS, HARD), default="small"), PROMPT) == ("medium", "maths")
    assert decided(Policy(rules=(HARD, MATHS), default="small"), PROMPT) == ("large", "hard")


def test_a_rule_that_does_not_hold_is_passed_over() -> None:
    never = Rule(name="never", when=NEVER, model="medium")
    assert decided(Policy(rules=(never, HARD), default="small"), PROMPT) == ("large", "hard")


def test_the_default_decides_when_no_rule_holds() -> None:
    never = Rule(name="never", when=NEVER, model="large")
    assert decided(Policy(rules=(never,), default="small"), PROMPT) == ("small", "default")
    assert decided(Policy(default="small"), PROMPT) == ("small", "default")


@pytest.mark.parametrize(
    ("categories", "expected"), [(("math",), True), (("law", "math"), True), (("law",), False), (("Math",), False)]
)
def test_one_of_the_categories(categories: tuple[str, ...], expected: bool) -> None:
    assert holds(Condition(category=categories), PROMPT) is expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (Range(at_least=0.5), True),
        (Range(at_least=0.51), False),
        (Range(below=0.5), False),
        (Range(below=0.51), True),
        (Range(at_least=0.5, below=0.6), True),
        (Range(at_least=0.4, below=0.5), False),
    ],
)
def test_a_range_holds_its_lower_border_and_not_its_upper(bounds: Range, expected: bool) -> None:
    assert holds(Condition(complexity=bounds), PROMPT) is expected


@pytest.mark.parametrize("complexity", [0.0, 1.0])
def test_a_range_from_zero_is_a_condition_too(complexity: float) -> None:
    prompt = Prompt(text="", prompt_tokens=0, category="math", complexity=complexity)
    assert holds(Condition(complexity=Range(at_least=0)), prompt)
    assert holds(Condition(complexity=Range(below=1)), prompt) is (complexity < 1)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [(Range(at_least=4), True), (Range(at_least=5), False), (Range(below=4), False), (Range(below=5), True)],
)
def test_a_number_of_tokens(bounds: Range, expected: bool) -> None:
    assert holds(Condition(prompt_tokens=bounds), PROMPT) is expected


@pytest.mark.parametrize(
    ("keyword", "text", "expected"),
    [
        ("prove", "Prove it.", True),
        ("PROVE", "prove it", True),
        ("prove", "to improve", False),
        ("prove", "proven", False),
        ("prove", "prove_it", False),
        ("prove", "(prove)", True),
        ("step by step", "Go Step By Step, please", True),
        ("step by step", "step by stepping", False),
        ("C++", "is c++ hard?", True),
        ("C++", "ccc", False),
        ("a.b", "axb", False),
        (".*", "anything", False),
        ("[x", "what is [x?", True),
        ("\\d", "1", False),
        ("#", "what is # for", True),
        ("докажи", "ДОКАЖИ теорему", True),
        ("докажи", "докажите", False),
        ("größe", "Welche GRÖSSE? Welche GRÖßE?", True),
        ("σοφός", "ΉΤΑΝ ΣΟΦΌΣ", True),
        ("一步一步", "请一步一步地解释", True),  # Chinese puts no spaces between its words
        ("prove", "", False),
    ],
)
def test_a_keyword_is_a_whole_word_in_any_case(keyword: str, text: str, expected: bool) -> None:
    prompt = Prompt(text=text, prompt_tokens=0, category=None, complexity=None)
    assert holds(Condition(keywords=(keyword,)), prompt) is expected


def test_one_of_the_keywords() -> None:
    when = Condition(keywords=("ring", "group", "group theory"))
    assert holds(when, PROMPT)
    assert holds(when, Prompt("Group theory", 0, None, None))
    assert not holds(when, Prompt("regrouped rings", 0, None, None))


def test_keywords_of_scripts_with_and_without_spaces() -> None:
    when = Condition(keywords=("ring", "一步一步", "証明"))
    for text in ("a ring", "请一步一步地解释", "それを証明して"):
        assert holds(when, Prompt(text, 0, None, None))
    assert not holds(when, Prompt("strings 一步", 0, None, None))


@pytest.mark.parametrize(
    "unmet",
    [
        {"category": ("law",)},
        {"complexity": Range(below=0.5)},
        {"prompt_tokens": Range(at_least=5)},
        {"keywords": ("ring",)},
    ],
)
def test_all_that_is_given_must_hold(unmet: dict[str, object]) -> None:
    met = {
        "category": ("math",),
        "complexity": Range(at_least=0.5),
        "prompt_tokens": Range(below=5),
        "keywords": ("group",),
    }
    assert holds(Condition.model_validate(met), PROMPT)
    assert not holds(Condition.model_validate({**met, **unmet}), PROMPT)


@pytest.mark.parametrize(
    "when",
    [
        Condition(category=("math",)),
        Condition(complexity=Range(at_least=0)),
        Condition(complexity=Range(below=1)),
        Condition(complexity=Range(below=1), keywords=("group",)),
    ],
)
def test_a_rule_on_what_was_not_read_does_not_hold(when: Condition) -> None:
    assert holds(when, PROMPT)
    assert not holds(when, UNREAD)


def test_rules_that_need_no_model_hold_without_one() -> None:
    assert holds(Condition(prompt_tokens=Range(at_least=4)), UNREAD)
    assert holds(Condition(keywords=("group",)), UNREAD)


# The cheapest model of nearly the best predicted quality

QUALITY = {"small": 0.70, "medium": 0.84, "large": 0.88}
GOOD_ENOUGH = Rule(name="good-enough", cheapest_within=0.05)


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.0, "large"), (0.03, "large"), (0.05, "medium"), (0.17, "medium"), (0.2, "small")]
)
def test_the_cheapest_within_a_margin_of_the_best(margin: float, expected: str) -> None:
    policy = Policy(rules=(Rule(name="good-enough", cheapest_within=margin),), default="small")
    assert decided(policy, replace(PROMPT, quality=QUALITY)) == (expected, "good-enough")


def test_a_choice_tells_why() -> None:
    decision = decide(Policy(rules=(GOOD_ENOUGH,), default="small"), MODELS, replace(PROMPT, quality=QUALITY))
    assert decision.reason == ("the cheapest whose predicted quality (0.840) is within 0.05 of the best (large, 0.880)")


def test_a_choice_among_some() -> None:
    rule = Rule(name="good-enough", cheapest_within=0.2, among=("large", "medium"))
    assert decided(Policy(rules=(rule,), default="small"), replace(PROMPT, quality=QUALITY))[0] == "medium"


def test_the_best_is_the_best_of_those_it_chooses_among() -> None:
    rule = Rule(name="good-enough", cheapest_within=0.15, among=("small", "medium"))
    assert decided(Policy(rules=(rule,), default="large"), replace(PROMPT, quality=QUALITY))[0] == "small"


def test_a_model_without_predicted_quality_is_not_chosen() -> None:
    known = {name: QUALITY[name] for name in ("medium", "large")}
    rule = Rule(name="good-enough", cheapest_within=1)
    assert decided(Policy(rules=(rule,), default="small"), replace(PROMPT, quality=known))[0] == "medium"


@pytest.mark.parametrize("among", [(), ("small", "large")])
def test_a_choice_without_predicted_qualities_does_not_hold(among: tuple[str, ...]) -> None:
    rule = Rule(name="good-enough", cheapest_within=0.05, among=among)
    assert decided(Policy(rules=(rule,), default="medium"), UNREAD) == ("medium", "default")
    asked = Rule(name="asked", when=Condition(keywords=("group",)), model="large")
    assert decided(Policy(rules=(rule, asked), default="medium"), UNREAD) == ("large", "asked")


def test_a_choice_has_its_condition() -> None:
    rule = Rule(name="good-enough", when=NEVER, cheapest_within=0.05)
    assert decided(Policy(rules=(rule,), default="small"), replace(PROMPT, quality=QUALITY)) == ("small", "default")


def test_prices_that_are_equal() -> None:
    by_input, by_order = [model("a", 1, 0.5), model("b", 1, 0.4)], [model("b", 1, 0.5), model("a", 1, 0.5)]
    assert cheapest_within(0, by_input, {"a": 0.5, "b": 0.5}).name == "b"
    assert cheapest_within(0, by_order, {"a": 0.5, "b": 0.5}).name == "b"


MARGINS = st.floats(0, 1)
PRICES = st.sampled_from([0.0, 0.1, 1.0, 10.0])  # few, so that some are equal


@st.composite
def tiers(draw: st.DrawFn) -> tuple[list[Model], dict[str, float]]:
    """Some models, and the predicted quality of each."""
    prices = draw(st.lists(st.tuples(PRICES, PRICES), min_size=1, max_size=6))
    models = [model(f"m{i}", *price) for i, price in enumerate(prices)]
    return models, {m.name: draw(st.floats(0, 1)) for m in models}


def price_of(chosen: Model) -> tuple[float, float]:
    return chosen.price_per_million_tokens.output, chosen.price_per_million_tokens.input


@FUZZ
@given(tiers(), MARGINS)
def test_the_chosen_is_good_and_nothing_good_is_cheaper(
    given_tiers: tuple[list[Model], dict[str, float]], margin: float
) -> None:
    models, quality = given_tiers
    chosen = cheapest_within(margin, models, quality)
    least = max(quality.values()) - margin
    assert quality[chosen.name] >= least
    for other in models[: models.index(chosen)]:
        assert quality[other.name] < least or price_of(other) > price_of(chosen)
    for other in models[models.index(chosen) :]:
        assert quality[other.name] < least or price_of(other) >= price_of(chosen)


@FUZZ
@given(tiers(), MARGINS, MARGINS)
def test_a_wider_margin_never_costs_more(
    given_tiers: tuple[list[Model], dict[str, float]], one: float, other: float
) -> None:
    models, quality = given_tiers
    narrow, wide = (cheapest_within(margin, models, quality) for margin in sorted((one, other)))
    assert price_of(wide) <= price_of(narrow)


@FUZZ
@given(tiers())
def test_the_whole_margin_takes_the_cheapest_and_none_the_best(
    given_tiers: tuple[list[Model], dict[str, float]],
) -> None:
    models, quality = given_tiers
    assert price_of(cheapest_within(1, models, quality)) == min(map(price_of, models))
    assert quality[cheapest_within(0, models, quality).name] == max(quality.values())


@FUZZ
@given(tiers(), MARGINS)
def test_what_is_not_asked_for_does_not_matter(
    given_tiers: tuple[list[Model], dict[str, float]], margin: float
) -> None:
    """Models outside of `among` change nothing, and neither does the order in which `among` names them."""
    models, quality = given_tiers
    among = tuple(m.name for m in models)
    others = [model("cheap-and-good", 0), *models, model("dear", 99)]
    prompt = replace(PROMPT, quality={**quality, "cheap-and-good": 1.0})
    rules = [Rule(name="choice", cheapest_within=margin, among=names) for names in (among, among[::-1])]
    chosen = {decide(Policy(rules=(rule,), default="dear"), others, prompt).model for rule in rules}
    assert chosen == {cheapest_within(margin, models, quality).name}


# Conditions on what else is known of a request


@pytest.mark.parametrize(
    ("when", "known", "expected"),
    [
        ({"category": ["math"], "min_confidence": 0.8}, {"confidence": 0.8}, True),
        ({"category": ["math"], "min_confidence": 0.8}, {"confidence": 0.79}, False),
        ({"category": ["law"], "min_confidence": 0.1}, {"confidence": 0.9}, False),
        ({"category": ["math"], "min_confidence": 0.0}, {"confidence": None}, None),
        ({"tenant": ["acme", "umbrella"]}, {"tenant": "acme"}, True),
        ({"tenant": ["acme"]}, {"tenant": "umbrella"}, False),
        ({"tenant": ["acme"]}, {"tenant": None}, False),
        ({"alias": ["auto-cheap"]}, {"alias": "auto-cheap"}, True),
        ({"alias": ["auto-cheap"]}, {"alias": "auto"}, False),
        ({"has_tools": True}, {"has_tools": True}, True),
        ({"has_tools": False}, {"has_tools": True}, False),
        ({"has_tools": False}, {"has_tools": False}, True),
        ({"has_images": True}, {"has_images": False}, False),
        ({"has_images": True}, {"has_images": True}, True),
        ({"regex": ["^What .* group"]}, {}, True),
        ({"regex": ["^what"]}, {}, False),
        ({"regex": ["^what", "(?i)^what"]}, {}, True),
    ],
)
def test_other_conditions(when: dict[str, object], known: dict[str, object], expected: bool | None) -> None:
    assert holds(Condition.model_validate(when), replace(PROMPT, **known)) is expected  # type: ignore[arg-type]


def test_a_regex_looks_at_the_beginning_of_a_text_only() -> None:
    when = Condition.model_validate({"regex": ["needle"]})
    assert holds(when, Prompt("x" * 990 + "needle", 0, None, None))
    assert not holds(when, Prompt("x" * 1000 + "needle", 0, None, None))


YES, NO, UNKNOWN = {"keywords": ["group"]}, {"keywords": ["ring"]}, {"complexity": {"at_least": 0.5}}
KLEENE = [
    ({"all": [YES, YES]}, True),
    ({"all": [YES, NO]}, False),
    ({"all": [UNKNOWN, NO]}, False),
    ({"all": [YES, UNKNOWN]}, None),
    ({"any": [NO, YES]}, True),
    ({"any": [NO, NO]}, False),
    ({"any": [UNKNOWN, YES]}, True),
    ({"any": [NO, UNKNOWN]}, None),
    ({"not": NO}, True),
    ({"not": YES}, False),
    ({"not": UNKNOWN}, None),
    ({"not": {"any": [NO, {"not": YES}]}}, True),
    ({"all": [{"any": [NO, YES]}], "not": NO, **YES}, True),
    ({"all": [{"any": [NO, YES]}], "not": NO, **NO}, False),
]


@pytest.mark.parametrize(("when", "expected"), KLEENE)
def test_all_any_and_not_know_what_is_not_known(when: dict[str, object], expected: bool | None) -> None:
    """Nothing read the prompt: `not` of what is not known is not known either, and a rule on it does not hold."""
    condition = Condition.model_validate(when)
    assert holds(condition, UNREAD) is expected
    decision = decided(Policy(rules=(Rule(name="r", when=condition, model="large"),), default="small"), UNREAD)
    assert decision == (("large", "r") if expected else ("small", "default"))


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (
            {"category": ["math"], "complexity": {"at_least": 0.4}},
            "its rule holds (category math (0.875), complexity 0.500)",
        ),
        ({"category": ["math"], "min_confidence": 0.5}, "its rule holds (category math (0.875))"),
        ({"keywords": ["ring", "group"]}, "its rule holds (keyword 'group')"),
        ({"regex": ["W.at"]}, "its rule holds (match of the regex 'W.at')"),
        ({"any": [NO, YES, UNKNOWN]}, "its rule holds (keyword 'group', complexity 0.500)"),
        ({"not": NO, "prompt_tokens": {"below": 9}}, "its rule holds (about 4 prompt tokens, none of the keywords)"),
        ({"tenant": ["acme"], "alias": ["auto"]}, "its rule holds (alias auto, tenant acme)"),
        ({"has_tools": False, "has_images": True}, "its rule holds (no tools, images)"),
        ({"not": {"regex": ["x"]}}, "its rule holds (no match of the regex)"),
    ],
)
def test_a_rule_tells_in_words_why_it_holds(when: dict[str, object], reason: str) -> None:
    prompt = replace(PROMPT, confidence=0.875, tenant="acme", has_images=True)
    rule = Rule(name="r", when=Condition.model_validate(when), model="large")
    assert decide(Policy(rules=(rule,), default="small"), MODELS, prompt).reason == reason


def test_a_decision_carries_what_its_rule_changes() -> None:
    rule = Rule.model_validate({"name": "brief", "model": "small", "max_tokens": 100, "reasoning_effort": "none"})
    assert decide(Policy(rules=(rule,), default="large"), MODELS, PROMPT).overrides.changes == {
        "max_tokens": 100,
        "reasoning_effort": "none",
    }
    assert decide(Policy(default="large"), MODELS, PROMPT).overrides.changes == {}


# Conversations

TIERS = (
    model("s", 0.1, size="small", window=1000),
    model("m", 1, size="medium", window=4000),
    model("l", 10, size="large", window=8000),
)
BY_COMPLEXITY = Policy(
    rules=(
        Rule(name="hard", when=Condition(complexity=Range(at_least=0.8)), model="l"),
        Rule(name="middling", when=Condition(complexity=Range(at_least=0.5)), model="m"),
    ),
    default="s",
)


def turn(complexity: float, text: str = "") -> Prompt:
    return Prompt(text, 10, "math", complexity)


@pytest.mark.parametrize(
    ("earlier", "newest", "expected"),
    [
        ([], 0.1, "s"),
        ([0.9], 0.1, "l"),
        ([0.9, 0.1, 0.1, 0.6], 0.1, "l"),
        ([0.6, 0.1], 0.1, "m"),
        ([0.6], 0.9, "l"),
        ([0.1, 0.2], 0.1, "s"),
    ],
)
def test_a_conversation_never_falls_to_a_smaller_model(earlier: list[float], newest: float, expected: str) -> None:
    assert decide(BY_COMPLEXITY, TIERS, turn(newest), [turn(c) for c in earlier]).model == expected


def test_a_follow_up_tells_why_it_keeps_its_model() -> None:
    decision = decide(BY_COMPLEXITY, TIERS, turn(0.1), [turn(0.9), turn(0.6)])
    assert (decision.model, decision.rule) == ("l", "hard")
    assert decision.reason == (
        "an earlier turn of the conversation is given it by hard: its rule holds (complexity 0.900); "
        "this turn alone would be given s by default"
    )


def test_a_follow_up_keeps_what_the_rule_changes() -> None:
    rule = Rule.model_validate(
        {"name": "think", "when": {"keywords": ["think"]}, "model": "l", "reasoning_effort": "high"}
    )
    decision = decide(Policy(rules=(rule,), default="s"), TIERS, turn(0.1, "go on"), [turn(0.1, "think")])
    assert decision.overrides.changes == {"reasoning_effort": "high"}


def test_of_two_models_of_one_size_the_newest_turn_decides() -> None:
    models = (model("prose", 1, size="medium"), model("code", 1, size="medium"))
    policy = Policy(rules=(Rule(name="code", when=Condition(keywords=("code",)), model="code"),), default="prose")
    assert decide(policy, models, turn(0.1, "a poem"), [turn(0.1, "code")]).model == "prose"


COMPLEXITIES = st.floats(0, 1)
SIZE = {"s": 0, "m": 1, "l": 2}


@FUZZ
@given(st.lists(COMPLEXITIES, min_size=1, max_size=8))
def test_each_turn_of_a_conversation_gets_a_model_at_least_as_large(complexities: list[float]) -> None:
    turns = [turn(complexity) for complexity in complexities]
    chosen = [decide(BY_COMPLEXITY, TIERS, turns[i], turns[:i]).model for i in range(len(turns))]
    sizes = [SIZE[name] for name in chosen]
    assert sizes == sorted(sizes)
    assert chosen[-1] == decide(BY_COMPLEXITY, TIERS, turn(max(complexities))).model


# The window


@pytest.mark.parametrize(
    ("complexity", "context", "output", "expected"),
    [
        (0.1, 1000, None, "s"),
        (0.1, 1001, None, "m"),
        (0.1, 900, 101, "m"),
        (0.1, 900, 100, "s"),
        (0.1, 4001, None, "l"),
        (0.6, 5000, None, "l"),
        (0.9, 5000, 3000, "l"),
        (0.1, 9000, None, "l"),
        (0.9, 9000, None, "l"),
    ],
)
def test_what_does_not_fit_goes_to_the_next_by_size(
    complexity: float, context: int, output: int | None, expected: str
) -> None:
    prompt = replace(turn(complexity), context_tokens=context, output_tokens=output)
    assert decide(BY_COMPLEXITY, TIERS, prompt).model == expected


def test_without_a_larger_one_a_smaller_one_is_taken() -> None:
    models = (model("s", 0.1, size="small", window=9000), model("m", 1, size="medium", window=9000), TIERS[2])
    prompt = replace(turn(0.9), context_tokens=8500)
    assert decide(BY_COMPLEXITY, models, prompt).model == "m"


def test_of_the_next_by_size_the_cheaper() -> None:
    models = (*TIERS[:1], model("m", 5, size="medium"), model("n", 4, size="medium"), TIERS[2])
    assert decide(BY_COMPLEXITY, models, replace(turn(0.1), context_tokens=1500)).model == "n"


def test_the_window_is_in_the_reason() -> None:
    fits = decide(BY_COMPLEXITY, TIERS, replace(turn(0.1), context_tokens=1500, output_tokens=100))
    assert fits.reason == (
        "about 1600 tokens, the answer included, do not fit into the 1000 of s; "
        "m is the next by size that they fit into; s because no rule holds"
    )
    none = decide(BY_COMPLEXITY, TIERS, replace(turn(0.1), context_tokens=15000))
    assert "l has the largest window of all" in none.reason


def test_a_rule_s_limit_of_the_answer_counts_instead_of_a_higher_one() -> None:
    policy = Policy.model_validate({"rules": [{"name": "brief", "model": "s", "max_tokens": 50}], "default": "l"})
    prompt = replace(turn(0.1), context_tokens=950, output_tokens=4000)
    assert decide(policy, TIERS, prompt).model == "s"
    assert decide(policy, TIERS, replace(prompt, context_tokens=951, output_tokens=None)).model == "m"
    assert decide(policy, TIERS, replace(prompt, context_tokens=951, output_tokens=49)).model == "s"


def test_a_rule_s_system_prompt_takes_room_too() -> None:
    rule = {"name": "long", "model": "s", "system_prompt": {"prepend": "x" * 400}}
    policy = Policy.model_validate({"rules": [rule], "default": "l"})
    assert decide(policy, TIERS, replace(turn(0.1), context_tokens=900)).model == "s"
    assert decide(policy, TIERS, replace(turn(0.1), context_tokens=901)).model == "m"


def test_the_cheapest_is_one_that_the_conversation_fits_into() -> None:
    quality = {"s": 0.8, "m": 0.8, "l": 0.8}
    policy = Policy(rules=(Rule(name="q", cheapest_within=0.1),), default="l")
    prompt = replace(turn(0.1), quality=quality, context_tokens=2000)
    decision = decide(policy, TIERS, prompt)
    assert decision.model == "m"
    assert decision.reason.startswith("the cheapest whose predicted quality")


# A share

SHARED = Policy(rules=(Rule(name="dial", share=Share(model="l", at_most=0.3)),), default="s")
AT_HALF = {"dial": Bar(newest=0.5, earlier=0.4)}


@pytest.mark.parametrize(("complexity", "expected"), [(0.5, "l"), (0.49, "s"), (1.0, "l"), (0.0, "s")])
def test_a_share_goes_by_the_bar(complexity: float, expected: str) -> None:
    assert decide(SHARED, TIERS, turn(complexity), bars=AT_HALF).model == expected


def test_a_share_tells_why() -> None:
    reason = decide(SHARED, TIERS, turn(0.75), bars=AT_HALF).reason
    assert reason == "its complexity (0.750) is among the highest 30 %, which begin at 0.500"


def test_a_share_without_a_bar_or_a_reading_does_not_hold() -> None:
    assert decide(SHARED, TIERS, turn(1.0)).rule == "default"
    assert decide(SHARED, TIERS, UNREAD, bars={"dial": OPEN}).rule == "default"


def test_a_conversation_keeps_its_model_while_the_bar_moves_a_little() -> None:
    assert decide(SHARED, TIERS, turn(0.1), [turn(0.45)], AT_HALF).model == "l"
    assert decide(SHARED, TIERS, turn(0.1), [turn(0.39)], AT_HALF).model == "s"


def test_each_share_goes_by_its_own_bar() -> None:
    shares = [Rule(name=name, share=Share(model=name, at_most=0.3)) for name in ("l", "m")]
    policy, bars = Policy(rules=tuple(shares), default="s"), {"l": Bar(0.8, 0.7), "m": Bar(0.4, 0.3)}
    told = decide(policy, TIERS, turn(0.75), [turn(0.35)], bars)
    assert (told.model, told.rule) == ("m", "m")
    assert told.pulls == {
        "l": Pull(0.75, 0.35, forced=False, given=False),
        "m": Pull(0.75, 0.35, forced=False, given=True),
    }
    assert decide(policy, TIERS, turn(0.1), [turn(0.75), turn(0.35)], bars).pulls["m"] == Pull(
        None, None, forced=False, given=False
    )


def pull(policy: Policy, prompt: Prompt, *earlier: Prompt) -> Pull:
    return decide(policy, TIERS, prompt, earlier, AT_HALF).pulls["dial"]


def test_what_a_request_tells_the_dial() -> None:
    assert pull(SHARED, turn(0.7)) == Pull(0.7, None, forced=False, given=True)
    assert pull(SHARED, turn(0.2)) == Pull(0.2, None, forced=False, given=False)
    assert pull(SHARED, turn(0.2), turn(0.45), turn(0.3)) == Pull(0.2, 0.45, forced=False, given=True)
    assert decide(SHARED, TIERS, UNREAD, bars=AT_HALF).pulls == {}
    assert decide(BY_COMPLEXITY, TIERS, turn(0.7), bars=AT_HALF).pulls == {}


ASKED = Rule(name="asked", when=Condition(keywords=("please",)), model="l")
SMALL_TALK = Rule(name="small-talk", when=Condition(keywords=("hello",)), model="s")


@pytest.mark.parametrize("rules", [(ASKED, SMALL_TALK, *SHARED.rules), (*SHARED.rules, ASKED)])
def test_what_goes_to_the_model_anyway_is_told_as_such(rules: tuple[Rule, ...]) -> None:
    assert pull(Policy(rules=rules, default="s"), turn(0.2, "please")).forced


def test_what_another_rule_takes_is_not_the_dial_s() -> None:
    policy = Policy(rules=(ASKED, SMALL_TALK, *SHARED.rules), default="s")
    assert pull(policy, turn(0.9, "hello")) == Pull(None, None, forced=False, given=False)
    when = Condition(category=("law",))
    only_law = Policy(rules=(Rule(name="dial", when=when, share=Share(model="l", at_most=0.3)),), default="s")
    assert pull(only_law, turn(0.9)) == Pull(None, None, forced=False, given=False)


def test_what_does_not_fit_into_the_model_is_not_the_dial_s() -> None:
    policy = Policy(rules=(Rule(name="dial", share=Share(model="m", at_most=0.3)),), default="s")
    assert pull(policy, replace(turn(0.9), context_tokens=5000)) == Pull(None, None, forced=False, given=False)
    assert pull(policy, replace(turn(0.1), context_tokens=2000)) == Pull(0.1, None, forced=True, given=True)


@FUZZ
@given(st.lists(COMPLEXITIES, max_size=3), COMPLEXITIES)
def test_a_request_is_given_the_model_just_when_its_pull_says_so(earlier: list[float], newest: float) -> None:
    before = [turn(complexity) for complexity in earlier]
    told = pull(SHARED, turn(newest), *before)
    decision = decide(SHARED, TIERS, turn(newest), before, AT_HALF)
    assert told.given == (decision.model == "l") == (newest >= 0.5 or max(earlier, default=0) >= 0.4)
    for bar, model_then in ((OPEN, "l"), (SHUT, "s")):
        assert decide(SHARED, TIERS, turn(newest), before, {"dial": bar}).model == model_then
