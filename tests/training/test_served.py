"""What is done with weights that are served: a model is placed on their scale, prompts are labelled by them."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.training.conftest import WORDS, Run, records, written
from training.__main__ import main
from training.served import Served
from training.sources import read
from training.weights import fingerprint, read_manifest


@pytest.fixture
def repository(trained: Run, tmp_path: Path) -> Path:
    """A copy of the trained classifier."""
    shutil.copytree(trained.repository / "classifier", tmp_path / "repository/classifier")
    return tmp_path / "repository"


def graded(path: Path, count: int, model: str = "newcomer") -> Path:
    """Answers of a model that is right on most easy prompts and on few hard ones."""
    draw = random.Random(1)  # noqa: S311
    rows = records(count, "category", "complexity", seed=1)
    for row in rows:
        row["correct"] = {model: int(draw.random() < (0.05 if row["text"].startswith("prove") else 0.95))}
    return written(path, rows)


def test_a_new_model_is_placed_from_its_grades(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, data = repository / "classifier/weights", graded(tmp_path / "graded.jsonl", 200)
    before, named = read_manifest(weights), fingerprint(weights)
    assert main(["calibrate", "--model", "newcomer", "--data", str(data), "--out", str(repository)]) == 0
    said = re.search(r"on 40 held-out answers: ([\d.]+); of their mean alone: ([\d.]+)", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) < 0.6 * float(said[2])
    after = read_manifest(weights)
    assert before is not None
    assert after is not None
    placed = after["abilities"].pop("newcomer")
    assert after == before
    assert fingerprint(weights) == named
    assert (placed["prompts"], len(placed["weights"])) == (200, before["difficulty"])
    served = Served(weights)
    right = served.right("newcomer", served.read(["name garlic butter", "prove garlic butter"]).difficulty)
    assert right[0] > 0.7 > 0.3 > right[1]


def test_placed_anew_a_model_does_not_lean_on_its_old_place(repository: Path, tmp_path: Path) -> None:
    data = graded(tmp_path / "graded.jsonl", 60)
    arguments = ["calibrate", "--model", "newcomer", "--data", str(data), "--out", str(repository)]
    manifests = []
    for _ in range(2):
        assert main(arguments) == 0
        manifests.append((repository / "classifier/weights/manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_too_few_grades_place_nothing(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, manifest = graded(tmp_path / "graded.jsonl", 49), repository / "classifier/weights/manifest.json"
    before = manifest.read_bytes()
    for model, count in (("newcomer", 49), ("unknown", 0)):
        assert main(["calibrate", "--model", model, "--data", str(data), "--out", str(repository)]) == 1
        assert f"{count} answers of {model} are graded; at least 50 are needed" in capsys.readouterr().err
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_labels_are_proposed_the_least_certain_first(repository: Path, tmp_path: Path, suffix: str) -> None:
    prompts = [
        *(f"name {words[0]} {words[1]} {words[2]}" for words in WORDS.values()),
        "name rope",
        "prove garlic mast",
    ]
    prompts += ["une phrase, « à part »"] + (["two\nlines", "a line\u2028separator"] if suffix == ".jsonl" else [])
    lines = [json.dumps({"text": text}, ensure_ascii=False) if suffix == ".jsonl" else text for text in prompts]
    file = tmp_path / f"prompts{suffix}"
    file.write_text("\n".join([*lines, "", lines[0]]), encoding="utf-8")
    out = tmp_path / "new" / "labelled.jsonl"
    assert main(["label", "--prompts", str(file), "--to", str(out), "--out", str(repository)]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert [row["confidence"] for row in written] == sorted(row["confidence"] for row in written)
    rows = {row.text: row for row in read([str(out)])}
    assert set(rows) == set(prompts)
    for category, text in zip(WORDS, prompts, strict=False):
        assert rows[text].category == category
    again = tmp_path / "again.jsonl"  # what was written can be read again
    assert main(["label", "--prompts", str(out), "--to", str(again), "--out", str(repository)]) == 0
    assert len(again.read_text(encoding="utf-8").split("\n")) == len(prompts) + 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{oops",
        b"[1]",
        b'"text"',
        b"null",
        b'{"prompt": "a"}',
        b'{"text": 3}',
        b'{"text": " "}',
        b'{"text": "\\ud800"}',
    ],
)
def test_a_file_without_prompts_is_refused(
    content: bytes, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    arguments = ["label", "--prompts", str(tmp_path / "bad.jsonl"), "--to", str(tmp_path / "labelled.jsonl")]
    assert main([*arguments, "--out", str(repository)]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'bad.jsonl'}: ")
    assert not (tmp_path / "labelled.jsonl").exists()
