"""Labelled prompts: what makes a row, and which rows train, choose and report.

A row has a text and at least one label: a category, a complexity, or which models got it right. `training.sources`
reads rows from files and data sets.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.weights import digest

SPLITS = ("train", "validation", "test")
SHOWN = 50  # problems that are printed; the rest are counted
LONGEST = 100_000  # characters of a text
SIDES = ("a complexity of 0.5 or more", "a complexity below 0.5")
_WORDS = re.compile(r"\w+")
HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    text: str
    category: str | None = None
    complexity: float | None = None  # probability that a small model fails where a large one succeeds
    correct: Mapping[str, float] = field(default_factory=dict, hash=False)  # by model: 1 right, 0 wrong, or a grade
    template: str | None = None  # rows made from one template share a split
    kind: str | None = None  # everyday, code ...: only for reports
    split: str | None = None  # one of SPLITS when the data says it
    source: str = ""  # the file or data set it was read from


@dataclass(frozen=True)
class Splits:
    train: list[Row]
    validation: list[Row]  # chooses the epoch and calibrates
    test: list[Row]  # is only reported
    dropped: list[Row] = field(default_factory=list)  # their texts, or nearly those, are in a split held out further


class BadRows(Exception):
    """The data cannot be trained on; `problems` says why, one line each; the message shows the first SHOWN."""

    def __init__(self, problems: list[str]) -> None:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        super().__init__("\n".join([*problems[:SHOWN], *more]))
        self.problems = problems


def read_rows(path: Path) -> list[Row]:
    """Rows of the file at `path`, or of all files of rows in that folder; raises BadRows."""
    from training.sources import read  # which needs Row

    return read([str(path.absolute())])  # an absolute path is never taken for a data set of the Hub


def split(rows: Sequence[Row]) -> Splits:
    """Eight tenths to train on, a tenth to choose by, a tenth to report; a row that names its split goes there.

    Else `tenth` decides, so duplicates and rows of one template stay together, and rows added later move none; when
    other rows of the template name a split, the one held out furthest. A text that is held out is dropped from the
    splits that are held out less. Raises BadRows when a split could not do its work.
    """
    named: dict[str, int] = {}
    for row in rows:
        if row.template and row.split:
            named[row.template] = max(named.get(row.template, 0), SPLITS.index(row.split))
    parts: list[list[Row]] = [[], [], []]
    for row in rows:
        parts[_part(row, named)].append(row)
    splits = _apart(*parts)
    if problems := _gaps(splits):
        raise BadRows(problems)
    return splits


def labels(rows: Iterable[Row]) -> list[str]:
    """The categories found in `rows`, sorted: the order of the classifier's outputs."""
    return sorted({row.category for row in rows if row.category is not None})


def tenth(text: str) -> int:
    """0 to 9, even over texts, the same for texts that differ only in case, spacing, punctuation or Unicode form.

    Of a row, its template's or else its text's: 0 to 7 trains, 8 is validation, 9 is test.
    """
    return int(digest(normalised(text).encode()), 16) % 10


def normalised(text: str) -> str:
    """The words of `text`, case-folded, with single spaces; all of it when it holds no word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORDS.findall(folded)) or folded.strip()


def rows_digest(rows: Iterable[Row]) -> str:
    """Name a set of rows by what training sees of them, whatever their order."""
    return digest("\n".join(sorted(map(_content, rows))).encode())


def parse(record: Mapping[str, Any], source: str) -> Row | str:
    """The row that `record` holds under the names of Row's fields, null or absent where it has none; or what is wrong.

    `source` is the row's when it names none.
    """
    text, category, complexity, part = (record.get(name) for name in ("text", "category", "complexity", "split"))
    if problem := _text_problem(text) or _label_problem(category, complexity):
        return problem
    correct = _grades(record.get("correct"))
    if isinstance(correct, str):
        return correct
    if category is None and complexity is None and not correct:
        return "no label: none of category, complexity, correct"
    if part is not None and part not in SPLITS:
        return f"split must be {', '.join(SPLITS[:2])} or {SPLITS[2]}: {brief(part)}"
    others = {name: record[name] for name in ("template", "kind", "source") if record.get(name) not in (None, "")}
    for name, value in others.items():
        if not isinstance(value, str | int) or HALF_PAIR.search(str(value)):
            return f"{name} must be a string: {brief(value)}"
    return Row(
        str(text),
        category and category.strip(),
        None if complexity is None else float(complexity),
        correct,
        split=part,
        **{"source": source, **{name: str(value) for name, value in others.items()}},
    )


def brief(value: object) -> str:
    """`value` as Python writes it, at most 60 characters of it."""
    shown = repr(value[:61] if isinstance(value, str | bytes) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _part(row: Row, named: Mapping[str, int]) -> int:
    """Where in SPLITS `row` goes; `named` holds where the rows of its template say that they go."""
    if row.split:
        return SPLITS.index(row.split)
    key = row.template or row.text
    return named[key] if row.template and key in named else max(tenth(key) - 7, 0)


def _apart(train: list[Row], validation: list[Row], test: list[Row]) -> Splits:
    """The splits without the rows whose text is in a later one."""
    held, dropped = {normalised(row.text) for row in test}, []
    kept = []
    for part in (validation, train):
        texts = [normalised(row.text) for row in part]
        kept.append([row for row, text in zip(part, texts, strict=True) if text not in held])
        dropped += [row for row, text in zip(part, texts, strict=True) if text in held]
        held.update(texts)
    return Splits(kept[1], kept[0], test, dropped)


def _content(row: Row) -> str:
    more = {"correct": dict(row.correct), "template": row.template, "split": row.split}
    present = {name: value for name, value in more.items() if value}
    return json.dumps([row.text, row.category, row.complexity, *([present] if present else [])], sort_keys=True)


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return f"text must be a string that is not empty: {brief(text)}"
    if len(text) > LONGEST:
        return f"text is longer than {LONGEST:,} characters ({len(text):,}): {brief(text)}"
    if HALF_PAIR.search(text):
        return f"text holds half a surrogate pair: {brief(text)}"
    return None


def _label_problem(category: Any, complexity: Any) -> str | None:
    if category is not None and not (isinstance(category, str) and category.strip()):
        return f"category must be a string that is not empty: {brief(category)}"
    if category is not None and HALF_PAIR.search(category):
        return f"category holds half a surrogate pair: {brief(category)}"
    if complexity is not None and not (_is_share(complexity) and not isinstance(complexity, bool)):
        return f"complexity must be a number from 0 to 1: {brief(complexity)}"
    return None


def _grades(found: Any) -> dict[str, float] | str:
    """The grades in `found`, those that are null left out, or what is wrong with it."""
    if found is not None and not isinstance(found, dict):
        return f"correct must be an object of model names and numbers: {brief(found)}"
    grades = {}
    for model, grade in (found or {}).items():
        if not isinstance(model, str) or not model.strip() or HALF_PAIR.search(model):
            return f"correct: a model's name must be a string that is not empty: {brief(model)}"
        if grade is not None and not _is_share(grade):
            return f"correct: {brief(model)} must have a number from 0 to 1, or null: {brief(grade)}"
        if grade is not None:
            grades[model.strip()] = float(grade)
    return grades


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _gaps(splits: Splits) -> list[str]:
    """What the splits lack: of each kind of label that occurs each needs some, training all categories."""
    everything = [*splits.train, *splits.validation, *splits.test]
    names = labels(everything)
    problems = [] if everything else ["there are no rows"]
    if len(names) == 1:
        problems.append(f"categories: {names}; at least two are needed")
    kinds = _kinds(everything)
    kinds |= set(SIDES) if kinds & set(SIDES) else set()
    for name in SPLITS:
        rows: list[Row] = getattr(splits, name)
        if lacking := sorted(kinds - _kinds(rows)):
            problems.append(
                f"{name} split: {len(rows)} of {len(everything)} rows; it needs rows with {' and with '.join(lacking)} "
                "(a hundred rows are usually enough)"
            )
    untrained = sorted(set(names) - set(labels(splits.train)))
    return problems + [f"category {label!r}: none of its rows falls into the training split" for label in untrained]


def _kinds(rows: Sequence[Row]) -> set[str]:
    """The kinds of label found in `rows`; a complexity on either side of the middle is a kind of its own."""
    kinds = {"a category"} if labels(rows) else set()
    kinds |= {"graded answers (correct)"} if any(row.correct for row in rows) else set()
    return kinds | {SIDES[row.complexity < 0.5] for row in rows if row.complexity is not None}
