"""What counts as a row, what is said of a bad one, and where rows go."""

from pathlib import Path

import pytest

from training.base import PROMPTS
from training.rows import BadRows, Row, labels, normalised, read_rows, rows_digest, split, tenth


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
    )
    with pytest.raises(BadRows) as caught:
        read_rows(path)
    assert [problem.removeprefix(f"{path}:") for problem in caught.value.problems] == [
        "2: not JSON (Expecting property name enclosed in double quotes): '{oops'",
        "4: not an object: ['text']",
        "5: text must be a string that is not empty: '  '",
        "6: text must be a string that is not empty: 7",
        "7: neither category nor complexity",
        "8: category must be a string that is not empty: 3",
        "9: complexity must be a number from 0 to 1: 1.5",
        "10: complexity must be a number from 0 to 1: nan",
        "11: complexity must be a number from 0 to 1: True",
        "12: text holds half a surrogate pair: '\\ud800'",
        "13: not UTF-8: b'\\xff'",
    ]


def test_either_label_may_be_missing_or_null(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('\ufeff{"text": "a", "category": " law "}\n{"text": "b", "category": null, "complexity": 1}\n')
    assert read_rows(path) == [Row("a", "law", None), Row("b", None, 1.0)]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="nowhere"):
        read_rows(tmp_path / "nowhere")


def test_own_prompts_are_good_balanced_and_split_about_eight_one_one() -> None:
    rows = read_rows(PROMPTS)
    splits = split(rows)
    assert len(rows) >= 1400
    assert len(labels(rows)) == 14
    assert labels(splits.test) == labels(splits.validation) == labels(rows)
    assert 0.76 < len(splits.train) / len(rows) < 0.84
    assert {*splits.train, *splits.validation, *splits.test} == set(rows)


def test_no_text_is_in_two_splits_whatever_its_form() -> None:
    splits = split(read_rows(PROMPTS))
    seen = [{normalised(row.text) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert tenth("Why does ICE float?") == tenth(" why does ice \uff46loat")


def test_rows_added_later_move_none_of_the_others() -> None:
    rows = read_rows(PROMPTS)
    assert set(split(rows[::2]).test) <= set(split(rows).test)


def test_too_few_rows_are_refused_with_what_is_lacking() -> None:
    with pytest.raises(BadRows) as caught:
        split([Row("one", "a", 0.0), Row("two", "a", 1.0)])
    assert "categories: ['a']; at least two are needed" in caught.value.problems
    assert any(problem.startswith("validation split") for problem in caught.value.problems)


def test_the_digest_names_the_content_not_the_order() -> None:
    rows = [Row("a", "x", 0.0), Row("b", "y", 1.0)]
    assert rows_digest(rows) == rows_digest(rows[::-1])
    assert rows_digest(rows) != rows_digest([Row("a", "x", 0.0), Row("b", "y", 0.9)])
