"""What counts as a row, what is said of a bad one, and where rows go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from training.rows import BadRows, Row, Splits, labels, normalised, read_rows, rows_digest, split, tenth

PROMPTS = ROOT / "training" / "prompts"


def plenty(**fields: object) -> list[Row]:
    """Two hundred rows that can be trained on, from `text 0` on."""
    return [Row(f"text {i}", "ab"[i % 2], float(i % 3 == 0), **fields) for i in range(200)]  # type: ignore[arg-type]


def test_every_bad_row_is_reported_with_its_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(
        b'{"text": "fine", "category": "math", "complexity": 0.25}\n'
        b"{oops\n"
        b"\n"
        b'["text"]\n'
        b'{"text": "  ", "category": "math"}\n'
        b'{"text": 7, "category": "math"}\n'
        b'{"text": "a"}\n'
        b'{"text": "a", "category": 3}\n'
        b'{"text": "a", "complexity": 1.5}\n'
        b'{"text": "a", "complexity": NaN}\n'
        b'{"text": "a", "complexity": true}\n'
        b'{"text": "\\ud800", "complexity": 1}\n'
        b"\xff\n"
        b'{"text": "a", "correct": {"m": null}}\n'
        b'{"text": "a", "correct": {"m": 2}}\n'
        b'{"text": "a", "correct": {" ": 1}}\n'
        b'{"text": "a", "correct": [1]}\n'
        b'{"text": "a", "category": "b", "split": "tests"}\n'
        b'{"text": "a", "category": "b", "template": ["t"]}\n'
    )
    with pytest.raises(BadRows) as caught:
        read_rows(path)
    assert [problem.removeprefix(f"{path}:") for problem in caught.value.problems] == [
        "2: not JSON (Expecting property name enclosed in double quotes): '{oops'",
        "4: not an object: ['text']",
        "5: text must be a string that is not empty: '  '",
        "6: text must be a string that is not empty: 7",
        "7: no label: none of category, complexity, correct",
        "8: category must be a string that is not empty: 3",
        "9: complexity must be a number from 0 to 1: 1.5",
        "10: complexity must be a number from 0 to 1: nan",
        "11: complexity must be a number from 0 to 1: True",
        "12: text holds half a surrogate pair: '\\ud800'",
        "13: not UTF-8: b'\\xff'",
        "14: no label: none of category, complexity, correct",
        "15: correct: 'm' must have a number from 0 to 1, or null: 2",
        "16: correct: a model's name must be a string that is not empty: ' '",
        "17: correct must be an object of model names and numbers: [1]",
        "18: split must be train, validation or test: 'tests'",
        "19: template must be a string: ['t']",
    ]


def test_a_text_may_have_a_hundred_thousand_characters_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"text": "{"x" * 100_000}", "category": "a"}}\n{{"text": "{"x" * 100_001}", "category": "a"}}\n')
    with pytest.raises(BadRows) as caught:
        read_rows(path)
    assert len(caught.value.problems) == 1
    assert f"{path}:2: text is longer than 100,000 characters (100,001)" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_first_fifty_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n" * 70)
    with pytest.raises(BadRows) as caught:
        read_rows(path)
    assert len(caught.value.problems) == 70
    assert str(caught.value).endswith("\n... and 20 more")
    assert str(caught.value).count("\n") == 50


def test_any_one_label_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(
        '\ufeff{"text": "a", "category": " law "}\n'
        '{"text": "b", "category": null, "complexity": 1}\n'
        '{"text": "c", "correct": {"gpt": 1, "llama": 0.5, "phi": null}, "template": 3, "kind": "a", "split": "val"}\n'
    )
    assert read_rows(path) == [
        Row("a", "law", source="my"),
        Row("b", complexity=1.0, source="my"),
        Row("c", None, None, {"gpt": 1.0, "llama": 0.5}, "3", "a", "validation", "my"),
    ]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="nowhere: no such file or folder"):
        read_rows(tmp_path / "nowhere")


def test_own_prompts_are_good_balanced_and_split_about_eight_one_one() -> None:
    rows = [row for row in read_rows(PROMPTS) if row.split is None]
    splits = split(rows)
    assert len(rows) >= 5000
    assert len(labels(rows)) >= 14
    assert labels(splits.test) == labels(splits.validation) == labels(rows)
    assert 0.76 < len(splits.train) / len(rows) < 0.84
    assert {*splits.train, *splits.validation, *splits.test, *splits.dropped} == set(rows)


def test_no_text_is_in_two_splits_whatever_its_form() -> None:
    splits = split(read_rows(PROMPTS))
    seen = [{normalised(row.text) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert tenth("Why does ICE float?") == tenth(" why does ice \uff46loat")


def test_rows_without_template_go_where_they_always_went() -> None:
    splits = split(plenty())
    for part, tenths in ((splits.train, range(8)), (splits.validation, [8]), (splits.test, [9])):
        assert {tenth(row.text) for row in part} == set(tenths)
    assert [tenth(text) for text in ("why do cats purr", "What does EBITDA stand for?")] == [9, 0]


def test_rows_added_later_move_none_of_the_others() -> None:
    rows = read_rows(PROMPTS)
    assert set(split(rows[::2]).test) <= set(split(rows).test)


def places(splits: Splits, texts: str) -> list[str]:
    """The splits that hold the one-word `texts`."""
    found = {row.text: name for name in ("train", "validation", "test", "dropped") for row in getattr(splits, name)}
    return [found[text] for text in texts.split()]


def test_rows_of_one_template_share_a_split_and_a_named_split_leads_it() -> None:
    made = [Row(f"{t}{i}", "a", template=t) for t in "pqrstuvwxyz" for i in range(5)]
    splits = split([*plenty(), *made])
    held = [{row.template for row in part} - {None} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, held)) == 11
    led = [Row("one", "a", template="t"), Row("two", "a", template="t", split="test"), Row("three", "a", template="t")]
    assert places(split([*plenty(), *led]), "one two three") == ["test"] * 3


def test_a_row_goes_where_it_says_but_never_to_train_with_a_text_that_is_held_out() -> None:
    named = [
        *(Row(name, "a", split=name) for name in ("train", "validation", "test")),
        Row("both", "a", split="test"),
        Row("Both!", "a", split="train"),
        Row("BOTH", "a", split="validation"),
        Row("twice", "a", split="validation"),
        Row("Twice", "a", split="train"),
    ]
    splits = split([*plenty(), *named])
    assert places(splits, "train validation test both Both! BOTH twice Twice") == (
        ["train", "validation", "test", "test", "dropped", "dropped", "validation", "dropped"]
    )
    assert len(splits.dropped) == 3


def test_too_few_rows_are_refused_with_what_is_lacking() -> None:
    with pytest.raises(BadRows) as caught:
        split([Row("one", "a", 0.0), Row("two", "a", 1.0)])
    assert "categories: ['a']; at least two are needed" in caught.value.problems
    assert any(problem.startswith("validation split: 0 of 2 rows") for problem in caught.value.problems)
    with pytest.raises(BadRows, match="there are no rows"):
        split([])


@pytest.mark.parametrize("kept", ["category", "complexity", "correct"])
def test_one_kind_of_label_alone_can_be_trained_on(kept: str) -> None:
    none: dict[str, Any] = {"category": None, "complexity": None, "correct": {}}
    rows = [replace(row, **{**none, kept: getattr(row, kept)}) for row in plenty(correct={"m": 1.0})]
    assert len(split(rows).train) > 140


def test_a_kind_of_label_that_occurs_is_needed_in_every_split() -> None:
    graded = Row("graded", correct={"m": 1.0}, split="train")
    with pytest.raises(BadRows, match=r"test split: .* it needs rows with graded answers"):
        split([*plenty(), graded])
    with pytest.raises(BadRows, match=r"train split: .* it needs rows with a complexity below 0.5"):
        split([Row(row.text, complexity=1.0) for row in plenty()])
    with pytest.raises(BadRows, match="category 'rare': none of its rows falls into the training split"):
        split([*plenty(), Row("seldom", "rare", split="test")])


def test_the_digest_names_the_content_not_the_order() -> None:
    rows = [Row("a", "x", 0.0), Row("b", "y", 1.0)]
    assert rows_digest(rows) == rows_digest(rows[::-1])
    assert rows_digest(rows) != rows_digest([Row("a", "x", 0.0), Row("b", "y", 0.9)])
    assert rows_digest(rows) != rows_digest([Row("a", "x", 0.0, {"m": 1.0}), Row("b", "y", 1.0)])
    assert rows_digest(rows) == rows_digest([Row("a", "x", 0.0, source="elsewhere"), Row("b", "y", 1.0)])
