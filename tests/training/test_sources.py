"""Rows are the same whatever they are read from, and every fault of every source is reported at once."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.conftest import ROOT
from training.rows import BadRows, Row, tenth
from training.sources import read

ROWS = [
    Row("Why, oh why?\nTell me", "physics", 0.25, {"gpt": 1.0, "phi": 0.0}, "t", "everyday", "train", "first"),
    Row("second", "law", None, {"gpt": 0.5}, source="hand"),
    Row("third", None, 1.0, source="hand"),
]
RECORDS = [
    {"prompt": row.text, "label": row.category, "complexity": row.complexity, "correct": dict(row.correct) or None}
    | {"template": row.template, "kind": row.kind, "split": row.split, "source": row.source}
    for row in ROWS
]
WIDE = [  # with a column for each model
    {name: value for name, value in record.items() if name != "correct"}
    | {f"correct.{model}": row.correct.get(model) for model in ("gpt", "phi")}
    for row, record in zip(ROWS, RECORDS, strict=True)
]


def problems(*sources: object, **options: dict[str, str]) -> list[str]:
    with pytest.raises(BadRows) as caught:
        read([str(source) for source in sources], **options)
    return caught.value.problems


def write_csv(path: Path, records: list[dict[str, Any]], separator: str = ",") -> None:
    def field(value: object) -> str:
        said = "" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
        return '"' + said.replace('"', '""') + '"'

    lines: list[list[Any]] = [list(records[0]), *(list(record.values()) for record in records)]
    path.write_text("\r\n".join(separator.join(map(field, line)) for line in lines), "utf-8-sig", newline="")


@pytest.mark.parametrize("records", [RECORDS, WIDE])
def test_every_format_gives_the_same_rows(tmp_path: Path, records: list[dict[str, object]]) -> None:
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_csv(tmp_path / "a.csv", records)
    write_csv(tmp_path / "b.csv", records, ";")
    write_csv(tmp_path / "a.tsv", records, "\t")
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not rows")
    for file in tmp_path.glob("[ab].*"):
        assert read([str(file)]) == ROWS, file
    assert read([str(tmp_path)]) == 6 * ROWS
    assert read([str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")]) == 2 * ROWS


def test_a_row_without_source_is_of_the_stem_of_its_file_or_of_the_folder_given(tmp_path: Path) -> None:
    (file := tmp_path / "my.set.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a", "intent": "b"}'))
    assert read([str(file)]) == [Row("a", "b", source="my.set")]
    assert read([str(tmp_path)]) == [Row("a", "b", source=tmp_path.name)]


def test_columns_of_other_names_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("utterance,text,topic\nhello,ignored,greeting\n")
    assert read([str(tmp_path / "a.csv")], {"text": "utterance", "category": "topic"}) == [
        Row("hello", "greeting", source="a")
    ]
    assert problems(tmp_path / "a.csv", columns={"txt": "utterance"})[0].startswith(
        "no such field: txt; there are text,"
    )


def test_labels_of_a_parquet_file_that_datasets_wrote_become_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["refund", "delivery"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert [row.category for row in read([str(tmp_path)])] == ["delivery", "refund"]


def test_faults_of_all_sources_are_reported_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,complexity,correct\n"two\nlines",1,\nb,high,\nc,,{oops\nd,1,,more\n')
    (tmp_path / "b.csv").write_text("texts,category\na,b\n")
    (tmp_path / "c.csv").write_text('text,category\na,b\n"open,c\n')
    (tmp_path / "d.csv").write_bytes(b"text,category\na,b\n\xff,c\n")
    (tmp_path / "e.csv").write_text("text,colour\na,b\n")
    (tmp_path / "f.parquet").write_bytes(b"no Parquet at all")
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 99)[:-9])
    (tmp_path / "h.jsonl").write_text("[" * 100_000)
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "label": 3}]), tmp_path / "i.parquet")
    (tmp_path / "j.jsonl").touch()
    found = problems(*sorted(tmp_path.iterdir()), tmp_path / "k.jsonl", "l.csv")
    wanted = """
        a.csv:4: complexity must be a number from 0 to 1: 'high'
        a.csv:5: correct must be an object of model names and numbers: '{oops'
        a.csv:6: more fields than the header has
        b.csv:1: no column text or prompt or question; its columns are texts, category
        c.csv:2: not CSV (unexpected end of data)
        d.csv: cannot be read: 'utf-8' codec can't decode byte 0xff in position 18: invalid start byte
        e.csv:1: no column category or label or intent or complexity or correct; its columns are text, colour
        f.parquet: cannot be read: Parquet magic bytes not found
        g.jsonl.gz: cannot be read: Compressed file ended before the end-of-stream marker was reached
        h.jsonl:1: not JSON that can be read (maximum recursion depth exceeded
        i.parquet:1: category must be a string that is not empty: 3
        j.jsonl: holds no rows
        k.jsonl: no such file or folder
        l.csv: no such file or folder"""
    assert len(found) == 14
    for problem, line in zip(found, wanted.split("\n        ")[1:], strict=True):
        assert problem.removeprefix(f"{tmp_path}/").startswith(line)


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no rows")
    assert "holds no file of rows (.jsonl, .jsonl.gz, .csv, .tsv, .parquet)" in problems(tmp_path)[0]


def test_a_source_that_names_two_splits_takes_the_third_from_train(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "category": "a", "split": "test" if i % 10 == 0 else "training"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in read([str(tmp_path)]):
        number = int(row.text.split()[1])
        assert row.split == ("test" if number % 10 == 0 else "validation" if tenth(row.text) == 8 else "train")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows))
    assert {row.split for row in read([str(tmp_path)])} == {"train"}


def test_twenty_thousand_rows_are_read_in_two_seconds(tmp_path: Path) -> None:
    correct = {f"model-{i}": i % 2 for i in range(10)}
    line = json.dumps({"text": "What is the boiling point of water? " * 6, "category": "physics", "correct": correct})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 20_000)
    start = time.process_time()
    assert len(read([str(tmp_path)])) == 20_000
    assert time.process_time() - start < 2


def test_a_data_set_of_the_hub_is_read_when_no_such_path_exists_and_an_unreachable_one_is_named(tmp_path: Path) -> None:
    """`datasets` itself, offline, with one data set in its cache."""
    script = """
from pathlib import Path
from datasets import ClassLabel, Dataset, Features, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from training.rows import BadRows
from training.sources import read

features = Features({"text": Value("string"), "label": ClassLabel(names=["refund", "delivery"]), "id": Value("int64")})
files = {}
for split, texts in {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}.items():
    files[split] = f"{split}.parquet"
    columns = {"text": texts, "label": [1, 0][: len(texts)], "id": [7] * len(texts)}
    Dataset.from_dict(columns, features=features).to_parquet(files[split])
for config, data_files in {"default": files, "flat": {"train": files["train"]}}.items():
    builder = Parquet("cache", "tickets", config, hash="0123456789abcdef", data_files=data_files)
    builder.download_and_prepare()
home = Path("hf/datasets")
home.mkdir(parents=True, exist_ok=True)
cached = Path("cache/tickets").rename(home / "acme___tickets")
for folder in cached.iterdir():  # named for the configuration alone, as what comes from the Hub is
    folder.rename(cached / folder.name.split("-")[0])
for source in ("acme/tickets:default", "acme/tickets:flat"):
    print([(row.text, row.category, row.split, row.source) for row in read([source])])
try:
    read(["acme/nothing", "acme/tickets:other", "acme/my file"])
except BadRows as error:
    print(*error.problems, sep="\\n")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    whole, flat, *faults = run.stdout.splitlines()
    assert whole == str(
        [
            ("a", "delivery", "train", "acme/tickets"),
            ("b", "refund", "train", "acme/tickets"),
            ("c", "delivery", "validation", "acme/tickets"),
            ("d", "delivery", "test", "acme/tickets"),
        ]
    )
    assert flat == str([("a", "delivery", None, "acme/tickets"), ("b", "refund", None, "acme/tickets")])
    assert faults[0].startswith("acme/nothing: no such file or folder, and not to be had from the Hub: Couldn't reach")
    assert faults[1].startswith("acme/tickets:other: no such file or folder, and not to be had from the Hub: ")
    assert faults[-1] == "acme/my file: no such file or folder"
