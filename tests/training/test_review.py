"""What the review finds in rows with known faults, and that it finds nothing else."""

import json
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from training.review import FOLDS, OutOfSample, as_json, near, out_of_fold, review, summary, without_leaks
from training.rows import Row, Splits, normalised

WORDS = {
    "cooking": ["simmer", "garlic", "oven", "recipe", "butter"],
    "sailing": ["anchor", "tide", "mast", "keel", "rope"],
}
DRAW = random.Random(0)  # noqa: S311


def rows(size: int, category: str = "cooking", **fields: object) -> list[Row]:
    """Rows of random letters after a word of the category: unlike each other, easy and complex in turn."""
    word = WORDS[category]
    texts = [f"{DRAW.choice(word)} {DRAW.getrandbits(200):x}" for _ in range(size)]
    return [Row(text, category, float(i % 2), **fields) for i, text in enumerate(texts)]  # type: ignore[arg-type]


def embed(texts: Sequence[str]) -> NDArray[np.float64]:
    """How often each word of WORDS is in each text."""
    known = [word for words in WORDS.values() for word in words]
    return np.array([[text.count(word) for word in known] for text in texts]) + 0.01


def test_good_rows_give_no_findings() -> None:
    good = [*rows(60), *rows(60, "sailing")]
    assert review(Splits(good[:100], good[100:110], good[110:])) == []
    assert summary([]) == "review: nothing found"
    assert review(Splits([], [], [])) == []


def test_small_classes_and_one_sided_complexity_are_found() -> None:
    easy = [Row(row.text, "sailing", 0.0) for row in rows(30, "sailing")]
    found = review(Splits([*rows(19), *easy], [], []))
    assert [(finding.kind, finding.message, len(finding.rows)) for finding in found] == [
        ("small class", "cooking: 19 rows; 20 or more are needed", 19),
        ("imbalance", "sailing: 0% of 30 rows have a complexity of 0.5 or more", 0),
    ]


def test_duplicates_are_found_and_contradictions_among_them() -> None:
    good = rows(60)
    same = [Row("How long do I boil an egg?", "cooking", 0.0), Row("how long do i boil an EGG", "cooking", 0.2)]
    said = [Row("What does keel over mean?", "cooking"), Row("What does keel over mean", "sailing", 1.0)]
    hard = [Row("Bake bread.", "cooking", 0.0), Row("bake bread", None, 1.0)]
    found = review(Splits([*good, *same, *said, *hard, *rows(30, "sailing")], [], []))
    assert [(finding.kind, finding.message, finding.rows) for finding in found] == [
        ("contradiction", "2 times 'What does keel over mean?': cooking, sailing", tuple(said)),
        ("contradiction", "2 times 'Bake bread.': cooking, both easy and complex", tuple(hard)),
        ("duplicate", "2 times 'How long do I boil an egg?'", tuple(same)),
    ]


def test_near_duplicates_are_leaks_when_they_lie_in_two_splits() -> None:
    text = "Please write a polite letter to my landlord about the broken heating in the kitchen of my flat, number "
    a, b, c = (Row(f"{text}{i}", "cooking") for i in (1, 2, 3))
    fence = "Which way does the tide run past the old harbour wall at noon on "
    one, other = Row(f"{fence}Monday", "sailing"), Row(f"{fence}Monday!?s", "sailing")
    good = [*rows(60), *rows(60, "sailing")]
    leak, alike = review(Splits([*good, a, b, one, other], [], [c]))
    assert (leak.kind, leak.rows) == ("leak", (a, b, c))
    assert leak.message.startswith("3 alike (up to 0.9")
    assert "in train and test: 'Please write" in leak.message
    assert (alike.kind, alike.rows) == ("near-duplicate", (one, other))


def test_rows_of_one_template_may_be_alike_but_not_in_two_splits() -> None:
    made = [
        Row(f"Translate into French, keeping the tone, this sentence: {word}", "cooking", template="t")
        for word in "abc"
    ]
    assert review(Splits([*rows(60), *made], [], [])) == []
    kinds = [(finding.kind, finding.message) for finding in review(Splits([*rows(60), *made[:2]], [made[2]], []))]
    assert kinds[0] == ("leak", "template 't' is in train and validation")
    assert {kind for kind, _ in kinds} == {"leak"}


def test_near_finds_what_comparing_all_pairs_finds() -> None:
    draw = random.Random(1)  # noqa: S311
    words = [f"{draw.randrange(10**6):x}" for _ in range(1000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(150)]
    texts += [f"{text} {draw.choice(words)}" for text in texts]
    texts += ["", "a", "ab", "ü" * 9, "日本語の長い文", "日本語の長い文章"]
    texts = list(dict.fromkeys(texts))
    sets = [{text[i : i + 5] for i in range(max(len(text) - 4, 1))} for text in texts]
    wanted = {
        (i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    }
    wanted = {pair: similarity for pair, similarity in wanted.items() if similarity >= 0.8}
    assert len(wanted) > 50
    assert near(texts) == pytest.approx(wanted)


def test_what_nearly_repeats_a_held_out_row_is_dropped() -> None:
    told = "The harbour has two piers, one of oak and one of stone, and a light at the end of each. Which is older"
    held, chosen, repeated = (Row(told + end, "sailing", 1.0) for end in ("?", ", and why?", " of the two?"))
    good, other = rows(20), Row("Name a fish.", "cooking", 0.0)
    splits = without_leaks(Splits([repeated, *good], [chosen, other], [held]))
    assert splits == Splits(good, [other], [held], [repeated, chosen])
    assert without_leaks(splits) == splits
    assert not [finding for finding in review(splits) if finding.kind == "leak"]


def test_twenty_thousand_rows_made_alike_are_reviewed_in_time() -> None:
    many = [Row(f"Say in one word what number {i} has to do with the tides", "sailing") for i in range(5_000)]
    many += rows(15_000)
    start = time.process_time()
    (found,) = review(Splits(many[1:], [], many[:1]))
    assert time.process_time() - start < 15
    assert (found.kind, len(found.rows)) == ("leak", 5_000)


def test_probable_label_errors_are_found_out_of_fold() -> None:
    good = [*rows(100), *rows(100, "sailing")]
    wrong = [Row("the oven and the butter", "sailing"), Row("a rope, a mast and a keel", "cooking")]
    few = [Row(f"tide {i}", "few") for i in range(FOLDS - 1)]
    unlabelled = Row("garlic", None, 1.0)
    predicted = out_of_fold([*good, unlabelled, *wrong, *few], embed, seed=0)
    assert predicted.rows == [*good, *wrong]
    assert predicted.labels == ["cooking", "sailing"]
    assert predicted.probabilities.sum(axis=1) == pytest.approx(1)
    again = out_of_fold([*good, unlabelled, *wrong, *few], embed, seed=0)
    assert (again.probabilities == predicted.probabilities).all()
    found = [finding for finding in review(Splits([*good, *wrong], [], []), predicted) if finding.kind == "label"]
    assert {finding.rows[0] for finding in found} == set(wrong)
    assert any(f.message.startswith("'the oven and the butter' is labelled sailing, cooking at ") for f in found)


def test_out_of_fold_leaves_copies_out_together() -> None:
    """A wrong label that is there ten times teaches no model that judges one of the ten."""
    wrong = [Row(f"oven{'!' * i}", "sailing") for i in range(10)]
    assert len({normalised(row.text) for row in wrong}) == 1
    predicted = out_of_fold([*rows(50), *rows(50, "sailing"), *wrong], embed, seed=0)
    assert (predicted.probabilities[-10:, 0] > 0.5).all()


def test_out_of_fold_needs_two_categories() -> None:
    assert review(Splits(rows(60), [], []), out_of_fold(rows(60), embed, seed=0)) == []


def test_confident_learning_on_given_probabilities() -> None:
    """Thresholds: a (0.9 + 0.8 + 0.1) / 3 = 0.6, b (0.9 + 0.7 + 0.35) / 3 = 0.65; an unsure row is let be."""
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.1, 0.9], [0.3, 0.7], [0.65, 0.35]])
    given = [Row(f"{i}", "aaabbb"[i]) for i in range(6)] + [Row("6", None, 1.0)]
    found = review(Splits([], [], []), OutOfSample(given, ["a", "b"], np.vstack([p, [[1, 0]]])))
    assert [finding.message for finding in found] == ["'2' is labelled a, b at 0.90", "'5' is labelled b, a at 0.65"]
    p[5] = [0.59, 0.41]
    found = review(Splits([], [], []), OutOfSample(given, ["a", "b"], np.vstack([p, [[1, 0]]])))
    assert [finding.message for finding in found] == ["'2' is labelled a, b at 0.90"]


def test_the_summary_is_short_and_no_text_is_shown_in_full() -> None:
    long = [Row(f"secret\x1b[2J {i} {DRAW.getrandbits(4000):x}", f"class {i}", source="my") for i in range(9)]
    dropped = Row("gone", "class 1", source="my")
    found = review(Splits([*long, *long[:7]], [], [], [dropped]))
    lines = summary(found).splitlines()
    assert lines[0] == "review: small class, 9 found"
    assert lines[6:8] == ["  ... and 4 more", "review: duplicate, 7 found"]
    assert lines[-1] == "  1 rows: their texts, or nearly those, are in a split that is held out further"
    assert "\x1b" not in summary(found)
    written = json.loads(json.dumps(as_json(found)))
    assert written["counts"] == {"small class": 9, "duplicate": 7, "dropped": 1}
    assert written["findings"][-1]["rows"] == [
        {"source": "my", "text": "gone", "category": "class 1", "complexity": None}
    ]
    assert max(len(row["text"]) for finding in written["findings"] for row in finding["rows"]) == 60
