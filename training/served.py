"""Exported weights, read as Triton reads them: what is measured, and what proposes labels, is what is served."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from training.apgr import Floats
from training.calibration import read_abilities
from training.export import named
from training.tokens import batches, read_tokenizer, windows
from training.weights import read_manifest

BATCH_TOKENS = 4096


class NoWeights(Exception):
    """There are no complete weights to read with."""


@dataclass(frozen=True)
class Readings:
    """What N texts were read as."""

    category: Floats  # [N, L] probabilities
    complexity: Floats  # [N]
    difficulty: Floats  # [N, K]
    tokens: NDArray[np.int64]  # [N] that were read
    truncated: NDArray[np.bool_]  # [N] some were not


class Served:
    """The classifier in `folder`, or its graph at another precision."""

    def __init__(self, folder: Path, network: Path | None = None) -> None:
        """Raises NoWeights."""
        manifest = read_manifest(folder)
        if manifest is None or not (network or folder / "model.onnx").exists():
            raise NoWeights(f"{folder}: no complete weights; `make train` writes them")
        self.manifest: dict[str, Any] = manifest
        self.labels: list[str] = manifest["labels"]
        self.tokenizer = read_tokenizer(folder)
        self.alone = network is None and manifest.get("precision") == "int8"
        self.session = onnxruntime.InferenceSession(network or folder / "model.onnx", providers=_providers())

    def read(self, texts: Sequence[str], progress: str | None = None) -> Readings:
        """Read `texts`, whatever their number; `progress` names the bar."""
        window = self.manifest["window"]
        cut = windows(self.tokenizer, texts, window, self.manifest["max_tokens"] // window)
        lengths = np.bincount(cut.text, weights=[len(ids) for ids in cut.ids], minlength=len(texts)).astype(int)
        order = [[i] for i in range(len(texts))] if self.alone else list(batches(lengths.tolist(), BATCH_TOKENS))
        found: list[list[Any]] = []
        for batch in tqdm(order, desc=progress, unit="batch", disable=progress is None):
            part = cut.of(batch)
            outputs = self.session.run(None, named(self.session, part.tensors()))
            found.append([output[: len(batch)] for output in outputs])
        back = np.argsort([i for batch in order for i in batch])
        category, complexity, difficulty = (np.concatenate(column)[back] for column in zip(*found, strict=True))
        return Readings(
            category.astype(float), complexity[:, 0].astype(float), difficulty, lengths, np.array(cut.truncated)
        )

    def right(self, model: str, difficulty: Floats) -> Floats:
        """P(`model` is right) for prompts of `difficulty` [N, K]: [N]."""
        return read_abilities(self.manifest)[model].right(torch.from_numpy(difficulty)).numpy()


def _providers() -> list[str]:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in onnxruntime.get_available_providers()]
