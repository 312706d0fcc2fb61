"""Rows of the public benchmarks, from hand-made files of their form."""

import gzip
import json
from pathlib import Path
from typing import Any

from training.__main__ import main
from training.benchmarks import BROKEN, CATEGORY, STRONG, WEAK, benchmark_rows
from training.rows import SPLITS, labels
from training.sources import read

CHOICES = "\nA. one\nB. two\nC. three\nD. four\nAnswer:"


def written(folder: Path, pro: list[dict[str, Any]], mmlu: list[dict[str, Any]]) -> Path:
    for name, rows in (("mmlu_pro", pro), ("routellm_mmlu", mmlu)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def asked(question: str, subject: str) -> dict[str, Any]:
    return {"prompt": question + CHOICES, "subject": subject, "weak": 0, "strong": True}


def test_a_question_of_both_sets_stays_in_one_split(tmp_path: Path) -> None:
    questions = [f"Which tide turns at {i}?" for i in range(100)]
    pro = [
        {"question": q, "category": "physics", "split": "test" if i < 50 else "train", "correct": {"m": 1, "n": None}}
        for i, q in enumerate(questions)
    ]
    mmlu = [asked(f"which TIDE turns at {i}", "astronomy") for i in range(200)]
    rows = list(benchmark_rows(written(tmp_path, pro, mmlu)))
    ours, theirs = rows[:100], rows[100:]
    assert all(row["split"] == "test" for row in ours[:50])
    assert {row["split"] for row in ours[50:]} == {"train", "validation"}
    assert [row["split"] for row in theirs[:100]] == [row["split"] for row in ours]
    assert {row["split"] for row in theirs[100:]} == set(SPLITS)
    assert ours[0]["correct"] == {"m": 1}
    assert theirs[0]["correct"] == {WEAK: 0, STRONG: 1}
    assert theirs[0]["text"] == f"which TIDE turns at 0{CHOICES.removesuffix(chr(10) + 'Answer:')}"


def test_the_broken_subject_has_no_grades_and_every_subject_a_category(tmp_path: Path) -> None:
    rows = list(benchmark_rows(written(tmp_path, [], [asked(f"What is {s}?", s) for s in CATEGORY])))
    assert len(rows) == 57
    assert [row["correct"] for row, subject in zip(rows, CATEGORY, strict=True) if subject == BROKEN] == [{}]
    assert sum(bool(row["correct"]) for row in rows) == 56
    assert len({row["category"] for row in rows}) == 14


def test_the_command_writes_rows_that_can_be_read(tmp_path: Path, capsys: Any) -> None:
    pro = [{"question": "Why?", "category": "law", "split": "test", "correct": {"m": 0}}]
    folder = written(tmp_path, pro, [asked("How?", BROKEN)])
    assert main(["benchmarks", "--data", str(folder), "--to", str(tmp_path / "all" / "rows.jsonl")]) == 0
    assert capsys.readouterr().out.endswith("rows.jsonl: 2 rows\n")
    rows = read([str(tmp_path / "all" / "rows.jsonl")])
    assert labels(rows) == ["law", "math"]
    assert [row.source for row in rows] == ["MMLU-Pro", "RouteLLM MMLU"]
