"""The policy: which rule holds for which prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Condition, Model, Policy, Price, Range, Rule
from gateway.policy import Prompt, cheapest_within, decide, holds

PROMPT = Prompt(text="What is a group?", prompt_tokens=4, category="math", complexity=0.5)
UNREAD = Prompt(text="What is a group?", prompt_tokens=4, category=None, complexity=None)

MATHS = Rule(name="maths", when=Condition(category=("math", "physics")), model="medium")
HARD = Rule(name="hard", when=Condition(complexity=Range(at_least=0.5)), model="large")
NEVER = Condition(category=("law",))


def model(name: str, price: float, input_price: float = 0.1) -> Model:
    return Model(
        name=name,
        endpoints=("http://127.0.0.1:8000",),
        price_per_million_tokens=Price(input=input_price, output=price),
        context_window=2048,
        size="small",
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


@given(tiers(), MARGINS, MARGINS)
def test_a_wider_margin_never_costs_more(
    given_tiers: tuple[list[Model], dict[str, float]], one: float, other: float
) -> None:
    models, quality = given_tiers
    narrow, wide = (cheapest_within(margin, models, quality) for margin in sorted((one, other)))
    assert price_of(wide) <= price_of(narrow)


@given(tiers())
def test_the_whole_margin_takes_the_cheapest_and_none_the_best(
    given_tiers: tuple[list[Model], dict[str, float]],
) -> None:
    models, quality = given_tiers
    assert price_of(cheapest_within(1, models, quality)) == min(map(price_of, models))
    assert quality[cheapest_within(0, models, quality).name] == max(quality.values())


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
