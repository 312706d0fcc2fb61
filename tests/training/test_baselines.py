"""The baselines find what is there to find, leave out what they cannot do, and the perturbations do what they say."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.apgr import Floats, apgr
from training.baselines import Part, category_baselines, complexity_baselines, grades, routing_baselines
from training.perturb import NEIGHBOURS, PERTURBATIONS, typos
from training.rows import Row

WORDS = {
    "cooking": ["simmer", "garlic", "oven", "recipe", "butter"],
    "sailing": ["anchor", "tide", "mast", "harbour", "keel"],
    "chess": ["bishop", "gambit", "castle", "pawn", "endgame"],
}


def part(count: int, seed: int, embedded: bool = True) -> Part:
    """Rows whose words give away the category; "prove" means that only the strong model is right, usually."""
    draw = Random(seed)  # noqa: S311
    rows = []
    for _ in range(count):
        category = draw.choice(list(WORDS))
        hard = draw.random() < 0.5
        text = " ".join(["prove" if hard else "name", *draw.choices(WORDS[category], k=draw.randint(2, 8))])
        correct = {"weak": float(draw.random() < (0.2 if hard else 0.8)), "strong": float(draw.random() < 0.8)}
        rows.append(Row(text=text, category=category, complexity=float(hard), correct=correct))
    vectors = [[row.text.count(word) for words in WORDS.values() for word in [*words, "prove"]] for row in rows]
    return Part(rows, np.array(vectors, dtype=float) if embedded else None)


def accuracy(predicted: object, on: Part) -> float:
    return float(np.mean(np.asarray(predicted) == [row.category for row in on.rows]))


def test_category_baselines() -> None:
    train, validation, test = part(300, 0), part(80, 1), part(100, 2)
    found = {name: predict(test) for name, predict in category_baselines(train, validation).items()}
    most = max(WORDS, key=lambda category: sum(row.category == category for row in train.rows))
    assert set(found["majority class"]) == {most}
    assert accuracy(found["TF-IDF + linear SVM"], test) == 1
    assert accuracy(found["frozen MiniLM + logistic regression"], test) == 1
    assert accuracy(found["prompt length"], test) < 0.6
    assert set(category_baselines(part(50, 0, embedded=False), validation)) == set(found) - {
        "frozen MiniLM + logistic regression"
    }


def test_routing_baselines() -> None:
    train, validation, test = part(600, 0), part(200, 1), part(400, 2)
    known = grades(test.rows, "weak", "strong")
    scores = routing_baselines(train, validation, "weak", "strong")
    found = {name: apgr(score(test), *known) for name, score in scores.items()}
    assert found["random"] == pytest.approx(0.5)
    assert found["TF-IDF + linear"] > 0.65
    assert found["frozen MiniLM + linear"] > 0.65
    assert abs(found["category mean gain"] - 0.5) < 0.1
    assert found["oracle"] == max(found.values())
    np.testing.assert_array_equal(scores["prompt length"](test), [len(row.text) for row in test.rows])


def test_routing_trains_on_the_rows_both_models_were_graded_on() -> None:
    train, none = part(100, 0), Part([])
    other = Part([*train.rows, Row(text="name harbour", category="other", correct={"weak": 1.0})])
    for name, score in routing_baselines(other, none, "weak", "strong").items():
        expected: Floats = routing_baselines(Part(train.rows), none, "weak", "strong")[name](train)
        np.testing.assert_array_equal(score(train), expected, err_msg=name)


def test_complexity_baselines() -> None:
    train, validation, test = part(300, 0), part(80, 1), part(100, 2)
    for name, score in complexity_baselines(train, validation).items():
        separated = ((score(test) >= 0.5) == [row.complexity == 1 for row in test.rows]).mean()
        assert separated == 1 or name == "prompt length"


def test_without_labelled_rows_there_are_no_baselines() -> None:
    train, none = Part([Row(text="anything", correct={"weak": 1.0})]), Part([])
    assert category_baselines(train, none) == complexity_baselines(train, none) == {}
    assert routing_baselines(train, none, "weak", "strong") == {}


@given(st.text())
def test_perturbations_are_repeatable_and_leave_a_text(text: str) -> None:
    for name, perturb in PERTURBATIONS.items():
        once = perturb(text, Random(3))  # noqa: S311
        assert once == perturb(text, Random(3)), name  # noqa: S311
        assert bool(once.strip()) == bool(text.strip()), name


def test_perturbations_do_what_they_say() -> None:
    text = "Don't panic: why does MY 3 kW oven trip?"
    done = {name: perturb(text, Random(0)) for name, perturb in PERTURBATIONS.items()}  # noqa: S311
    assert done["lower case"] == text.lower()
    assert done["upper case"] == text.upper()
    assert done["title case"] == "Don't Panic: Why Does My 3 Kw Oven Trip?"
    assert done["no punctuation"] == "Dont panic why does MY 3 kW oven trip"
    assert typos(text, Random(0), 0.0) == text  # noqa: S311


@given(st.integers(0, 10_000))
def test_a_typo_is_one_slip(seed: int) -> None:
    slipped = typos("harbour", Random(seed), 1.0)  # noqa: S311
    assert abs(len(slipped) - 7) <= 1
    if len(slipped) == 7 and sorted(slipped) != sorted("harbour"):
        ((was, now),) = [pair for pair in zip("harbour", slipped, strict=True) if len(set(pair)) == 2]
        assert now in NEIGHBOURS[was]


def test_typos_come_at_the_rate_asked_for() -> None:
    words = ["lighthouse"] * 4000
    changed = sum(word != "lighthouse" for word in typos(" ".join(words), Random(0), 0.3).split())  # noqa: S311
    assert changed / 4000 == pytest.approx(0.3, abs=0.03)
    assert set(NEIGHBOURS["g"]) == set("fhtyvb")
    assert set(NEIGHBOURS["a"]) == set("sqwz")
