"""Labelled prompts: read, checked all at once, and split by what their text says.

A row is `{"text": str, "category": str, "complexity": 0..1}`, a line of a JSONL file; one label may be missing or null.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.weights import digest


@dataclass(frozen=True)
class Row:
    text: str
    category: str | None
    complexity: float | None  # probability that a small model will not do


@dataclass(frozen=True)
class Splits:
    train: list[Row]
    validation: list[Row]  # chooses the epoch and calibrates
    test: list[Row]  # is only reported


class BadRows(Exception):
    """The data cannot be trained on; `problems` says why, one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def read_rows(path: Path) -> list[Row]:
    """Rows of the JSONL file at `path`, or of all such files in that folder, in order of file name.

    Raises BadRows with every bad row as `path:line: reason`.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise BadRows([f"{path}: no such file, nor a folder with .jsonl files"])
    rows: list[Row] = []
    problems: list[str] = []
    for file in files:
        for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
            if line.strip():
                row = _parse(line)
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    problems.append(f"{file}:{number}: {row}")
    if problems:
        raise BadRows(problems)
    return rows


def split(rows: Sequence[Row]) -> Splits:
    """Eight tenths to train on, a tenth to choose by, a tenth to report.

    Where a row goes depends on its normalised text alone: duplicates stay together, and rows added later move none.
    Raises BadRows when a split could not do its work.
    """
    parts: dict[int, list[Row]] = {part: [] for part in range(10)}
    for row in rows:
        parts[tenth(row.text)].append(row)
    splits = Splits([row for part in range(8) for row in parts[part]], parts[8], parts[9])
    if problems := _gaps(splits):
        raise BadRows(problems)
    return splits


def labels(rows: Iterable[Row]) -> list[str]:
    """The categories found in `rows`, sorted: the order of the classifier's outputs."""
    return sorted({row.category for row in rows if row.category is not None})


def tenth(text: str) -> int:
    """0 to 9, even over texts, the same for texts that differ only in case, spacing, punctuation or Unicode form."""
    return int(digest(normalised(text).encode()), 16) % 10


def normalised(text: str) -> str:
    """The words of `text`, case-folded, with single spaces; all of it when it holds no word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def rows_digest(rows: Iterable[Row]) -> str:
    """Name a set of rows by its content, whatever their order."""
    lines = sorted(json.dumps([row.text, row.category, row.complexity]) for row in rows)
    return digest("\n".join(lines).encode())


def _parse(line: bytes) -> Row | str:
    """The row on `line`, or what is wrong with it."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return f"not UTF-8: {_brief(line)}"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}): {_brief(line.decode())}"
    if not isinstance(found, dict):
        return f"not an object: {_brief(found)}"
    text, category, complexity = found.get("text"), found.get("category"), found.get("complexity")
    if problem := _text_problem(text) or _label_problem(category, complexity):
        return problem
    return Row(str(text), category and category.strip(), None if complexity is None else float(complexity))


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return f"text must be a string that is not empty: {_brief(text)}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"text holds half a surrogate pair: {_brief(text)}"
    return None


def _label_problem(category: Any, complexity: Any) -> str | None:
    if category is None and complexity is None:
        return "neither category nor complexity"
    if category is not None and not (isinstance(category, str) and category.strip()):
        return f"category must be a string that is not empty: {_brief(category)}"
    if complexity is not None and not _is_probability(complexity):
        return f"complexity must be a number from 0 to 1: {_brief(complexity)}"
    return None


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _gaps(splits: Splits) -> list[str]:
    """What each split lacks: every split needs categories and both easy and complex rows, training all categories."""
    problems = []
    everything = [*splits.train, *splits.validation, *splits.test]
    if len(labels(everything)) < 2:
        problems.append(f"categories: {labels(everything)}; at least two are needed")
    for name in ("train", "validation", "test"):
        rows: list[Row] = getattr(splits, name)
        complex_or_not = {row.complexity >= 0.5 for row in rows if row.complexity is not None}
        if not labels(rows) or len(complex_or_not) < 2:
            problems.append(
                f"{name} split: {len(rows)} of {len(everything)} rows; it needs rows with a category and rows with a "
                "complexity below and above 0.5 (a hundred rows are usually enough)"
            )
    untrained = sorted(set(labels(everything)) - set(labels(splits.train)))
    return problems + [f"category {label!r}: none of its rows falls into the training split" for label in untrained]
