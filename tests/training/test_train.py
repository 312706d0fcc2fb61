"""`python -m training` from labelled rows to served weights, on a base from a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from tests.conftest import ROOT
from training.__main__ import main
from training.tokens import encode, pad, read_tokenizer
from training.weights import fingerprint, missing, read_manifest


@pytest.fixture
def trained(tmp_path: Path, tiny_base: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments that trained `model_repository` in the present folder."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", str(tiny_base), "--data", str(tiny_data), "--epochs", "8"]
    assert main([*arguments, "--missing"]) == 0
    return arguments


def test_rows_become_weights_and_the_same_rows_the_same_weights(trained: list[str]) -> None:
    repository = Path("model_repository")
    assert missing(repository) == []
    embedder, classifier = repository / "embedder/weights", repository / "classifier/weights"
    first, frozen = read_manifest(classifier), (embedder / "manifest.json").stat().st_mtime_ns
    assert first is not None
    assert first["labels"] == ["chess", "cooking", "sailing"]
    assert first["metrics"]["accuracy"] > 0.6  # a third by chance
    (run,) = Path("runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["test"] == first["metrics"]
    assert set(json.loads((run / "metrics.json").read_text())["baselines"]) > {"majority class", "prompt length"}
    assert_serves(classifier, first["labels"])

    assert main(trained) == 0
    assert fingerprint(classifier) == first["fingerprint"]
    assert (embedder / "manifest.json").stat().st_mtime_ns == frozen

    quick = "import sys; from training.__main__ import main; main(['--missing']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", quick], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "model_repository: all weights are there\n")

    (classifier / "model.onnx").write_bytes(b"torn")
    assert missing(repository) == ["classifier"]


def assert_serves(weights: Path, labels: list[str]) -> None:
    """The graph gives each text of a mixed batch what it gives it alone, as probabilities."""
    texts = ["name garlic butter oven", "prove " + "bishop gambit endgame " * 30]
    ids = encode(read_tokenizer(weights), texts, 256)
    session = onnxruntime.InferenceSession(weights / "model.onnx")

    def scores(rows: list[list[int]]) -> list:
        input_ids, mask = pad(rows)
        return session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()})

    category, complexity = scores(ids)
    assert category.shape == (2, len(labels))
    assert category.sum(1) == pytest.approx([1, 1], abs=1e-5)
    assert complexity.shape == (2, 1)
    assert category[0] == pytest.approx(scores(ids[:1])[0][0], abs=1e-4)


def test_bad_rows_are_all_named_and_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n{"text": "a", "complexity": 2}\n')
    assert main(["--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("bad.jsonl:")[2][:2] for line in lines[:-1]] == ["1:", "2:"]
    assert lines[-1] == "nothing was trained (problems: 2)"
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there_is_named(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(tiny_data), "--base", "empty"]) == 1
    assert capsys.readouterr().err == "base 'empty': empty/config.json is missing\n"
