"""The policy: which rule holds for which prompt."""

from __future__ import annotations

import pytest

from gateway.config import Condition, Policy, Range, Rule
from gateway.policy import Decision, Prompt, decide, holds

PROMPT = Prompt(text="What is a group?", prompt_tokens=4, category="math", complexity=0.5)
UNREAD = Prompt(text="What is a group?", prompt_tokens=4, category=None, complexity=None)

MATHS = Rule(name="maths", when=Condition(category=("math", "physics")), model="medium")
HARD = Rule(name="hard", when=Condition(complexity=Range(at_least=0.5)), model="large")


def test_the_first_rule_that_holds_decides() -> None:
    assert decide(Policy(rules=(MATHS, HARD), default="small"), PROMPT) == Decision("medium", "maths")
    assert decide(Policy(rules=(HARD, MATHS), default="small"), PROMPT) == Decision("large", "hard")


def test_a_rule_that_does_not_hold_is_passed_over() -> None:
    never = Rule(name="never", when=Condition(category=("law",)), model="medium")
    assert decide(Policy(rules=(never, HARD), default="small"), PROMPT) == Decision("large", "hard")


def test_the_default_decides_when_no_rule_holds() -> None:
    never = Rule(name="never", when=Condition(category=("law",)), model="large")
    assert decide(Policy(rules=(never,), default="small"), PROMPT) == Decision("small", "default")
    assert decide(Policy(default="small"), PROMPT) == Decision("small", "default")


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
