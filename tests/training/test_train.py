"""`python -m training` from labelled rows to served weights and a report, on a base from a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, wait_until
from tests.training.conftest import Run, records, written
from training.__main__ import main
from training.fit import DIRECTIONS
from training.heads import SHIPPED
from training.model import DIFFICULTY
from training.served import Served
from training.weights import fingerprint, missing, read_manifest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; its model repository has what is not trained, which takes long to export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_repository").mkdir()
    for model in ("embedder", "verifier"):
        (tmp_path / "model_repository" / model).symlink_to(trained.repository / model)
    return tmp_path


def test_rows_become_weights_and_a_manifest(trained: Run) -> None:
    assert missing(trained.repository) == []
    manifest = trained.manifest
    assert manifest["fingerprint"] == fingerprint(trained.weights)
    assert manifest["labels"] == ["chess", "cooking", "sailing"]
    assert manifest["models"] == sorted(manifest["abilities"]) == ["strong", "weak"]
    assert manifest["abstention"] is None  # no category is called "other"
    assert manifest["precision"] in ("float32", "int8", "float16")
    assert (manifest["window"], manifest["max_tokens"]) == (64, 256)
    assert manifest["difficulty"] == DIFFICULTY + DIRECTIONS + 1  # what the trunk says, the words, and the length
    assert all(len(known["weights"]) == manifest["difficulty"] for known in manifest["abilities"].values())
    (source,) = manifest["trained_on"]
    assert (source["name"], sum(source["rows"].values())) == ("own", 300)
    assert source["used_for"] == "category, complexity, correct"
    assert manifest["started_from"] is None
    assert manifest["metrics"]["own"]["accuracy"] > 0.9

    served = Served(trained.weights)
    found = served.read(["name garlic butter oven", "prove bishop gambit endgame"])
    assert [served.labels[i] for i in found.category.argmax(1)] == ["cooking", "chess"]
    assert found.category.sum(1) == pytest.approx([1, 1], abs=1e-5)
    assert found.complexity[0] < 0.3 < 0.7 < found.complexity[1]
    assert found.difficulty.shape == (2, manifest["difficulty"])
    gain = served.right("strong", found.difficulty) - served.right("weak", found.difficulty)
    assert gain[0] < 0.3 < gain[1]


def test_the_run_is_reported(trained: Run) -> None:
    metrics = json.loads((trained.report / "metrics.json").read_text())
    (test,) = (found for found in metrics["sets"] if found["name"] == "own")
    assert test["category"]["accuracy"]["value"] == trained.manifest["metrics"]["own"]["accuracy"]
    assert "TF-IDF + linear SVM" in test["category"]["baselines"]
    assert {"typos in 10 % of words", "lower case"} < set(metrics["robustness"]["own"])
    (pair,) = metrics["pairs"]
    assert (pair["weak"], pair["strong"]) == ("weak", "strong")
    assert pair["scores"]["this classifier"]["apgr"]["value"] > pair["scores"]["random"]["apgr"]["value"]
    assert [found["precision"] for found in metrics["exports"]] == ["float32", "int8", "float16"]
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    assert metrics["sources"] == trained.manifest["trained_on"]
    assert metrics["settings"]["window"] == "64"
    page, card = ((trained.report / name).read_text() for name in ("report.html", "model_card.md"))
    assert all(image in page for image in (path.name for path in trained.report.glob("*.png")))
    assert "| own | train 236, validation 32, test 32 |" in card
    assert read_manifest(trained.report) is not None
    assert list((trained.folder / "runs").glob(".*")) == []


def test_weights_that_are_there_are_not_made_again_and_torch_is_not_loaded(trained: Run) -> None:
    quick = "import sys; from training.__main__ import main; main(['weights']); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", quick]
    before = (trained.weights / "manifest.json").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=trained.folder, check=False)
    assert (done.returncode, done.stdout) == (0, "model_repository: all weights are there\n")
    assert (trained.weights / "manifest.json").stat().st_mtime_ns == before


def test_torn_weights_are_missing(trained: Run, folder: Path) -> None:
    torn = folder / "model_repository/classifier/weights"
    shutil.copytree(trained.weights, torn)
    assert missing(folder / "model_repository") == []
    (torn / "model.onnx").write_bytes(b"torn")
    assert missing(folder / "model_repository") == ["classifier"]


def test_training_that_was_killed_goes_on_and_ends_with_the_same_weights(trained: Run, folder: Path) -> None:
    """Three processes, two of them killed: in the middle of training, and after it while it is measured."""
    command = [sys.executable, "-m", "training", *trained.arguments]

    def kept() -> list[Path]:
        return list(folder.glob("runs/.unfinished-*.pt"))

    def said() -> str:
        return (folder / "log").read_text()

    for until in (kept, lambda: list(folder.glob("runs/.2*")) or "report:" in said()):
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=log, stderr=log)
        wait_until("training to get so far", lambda: until() or process.poll() is not None, 600)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, said()
        assert len(kept()) == 1
    assert main(trained.arguments) == 0
    assert fingerprint(folder / "model_repository/classifier/weights") == trained.manifest["fingerprint"]
    assert [path.name.startswith(".") for path in (folder / "runs").iterdir()] == [False]  # nothing half done is left


def test_own_categories_start_from_the_shipped_heads_unless_told_otherwise(folder: Path) -> None:
    data = written(folder / "mine.jsonl", records(150, "correct"))
    assert main(["train", "--data", str(data), "--epochs", "1", "--windows", "1"]) == 0
    manifest = read_manifest(folder / "model_repository/classifier/weights")
    shipped = read_manifest(SHIPPED)
    assert manifest is not None
    assert shipped is not None
    assert (manifest["labels"], manifest["base"]) == (["chess", "cooking", "sailing"], "small")
    assert manifest["started_from"]["data_digest"] == shipped["data_digest"]
    assert manifest["metrics"]["all"]["accuracy"] > 0.9
    (card,) = (folder / "runs").glob("*/model_card.md")
    assert "(of the heads started from)" in card.read_text()


@pytest.mark.parametrize("lacking", ["complexity", "correct"])
def test_a_kind_of_label_may_be_missing_altogether(lacking: str, folder: Path, tiny_base: Path) -> None:
    data = written(folder / "mine.jsonl", records(150, lacking))
    arguments = ["--data", str(data), "--base", str(tiny_base), "--epochs", "1", "--window", "64", "--windows", "2"]
    assert main(["train", *arguments]) == 0
    served = Served(folder / "model_repository/classifier/weights")
    found = served.read(["name garlic", "prove " + "tide " * 200])
    assert served.labels == ["chess", "cooking", "sailing"]
    assert all(array.size and (array == array).all() for array in (found.category, found.complexity, found.difficulty))
    assert set(served.manifest["abilities"]) == (set() if lacking == "correct" else {"weak", "strong"})
    assert main(["evaluate", "--data", str(data)]) == 0
    runs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/metrics.json")]
    for metrics in runs:
        assert metrics["sets"][0]["category"]["rows"] > 0
        assert (metrics["sets"][0]["complexity"] is None) == (lacking == "complexity")
        assert bool(metrics["pairs"]) == (lacking == "complexity")
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("train --data bad.jsonl", 2, "bad.jsonl:1: text must be a string that is not empty"),
        ("train --data none.jsonl", 2, "none.jsonl: no such file or folder"),
        ("train --data no_category.jsonl", 2, "category: no row has one; at least two are needed"),
        ("train --data good.jsonl --base empty", 1, "base 'empty': empty/config.json is missing"),
        ("train --data good.jsonl --base broken", 1, "base 'broken': "),
        ("train --data good.jsonl --base no/such/base", 1, "base 'no/such/base' is neither 'small', nor a folder"),
        ("evaluate --data good.jsonl --out none", 1, "no complete weights; `make train` writes them"),
        ("label --prompts none.txt", 2, "none.txt: cannot be read"),
        ("label --prompts empty.txt", 2, "empty.txt: holds no prompts"),
        ("label --prompts good.jsonl --out none", 1, "no complete weights"),
        ("calibrate --model m --data none.jsonl", 2, "none.jsonl: no such file or folder"),
        ("calibrate --model m --data good.jsonl", 1, "0 answers of m are graded; at least 50 are needed"),
        ("benchmarks --data empty", 2, "mmlu_pro.jsonl.gz"),
        ("benchmarks --data broken", 2, "mmlu_pro.jsonl.gz"),
    ],
)
def test_what_a_user_can_mend_is_a_message_and_a_status(
    command: str, status: int, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder / "good.jsonl", records(100))
    written(folder / "bad.jsonl", [{"text": ""}, {"text": "a", "complexity": 2}])
    written(folder / "no_category.jsonl", records(100, "category"))
    (folder / "empty.txt").write_text("\n \n")
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "mmlu_pro.jsonl.gz"):
        (folder / "broken" / name).write_text("{}")
    assert main(command.split()) == status
    assert says in capsys.readouterr().err
    assert missing(folder / "model_repository") == ["classifier"]
    assert not list(folder.glob("runs/*"))


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train --epochs 0",
        "train --window 2 --data none",
        "base --steps -1 --start none",
        "calibrate --model m",
        "fly",
    ],
)
def test_arguments_that_make_no_sense_are_explained(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert "usage: python -m training" in capsys.readouterr().err
