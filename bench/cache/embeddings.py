"""Texts to vectors by the embedder that Triton serves: its graph, its tokeniser, each text alone and on one thread.

So a vector here is the one that the gateway gets. Vectors are kept in `weights/bench-cache` under the embedder's
fingerprint and a digest of the texts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.cache.system import CannotRun, Vectors

WEIGHTS = Path("model_repository/embedder/weights")
KEPT = Path("weights/bench-cache")


@dataclass(frozen=True, slots=True)
class Embedded:
    texts: list[str]  # [N], each once
    vectors: Vectors  # [N, D], L2-normalised
    path: Path  # where the vectors are kept


class Embedder:
    def __init__(self, folder: Path = WEIGHTS) -> None:
        """Raises CannotRun."""
        if not (folder / "manifest.json").exists():
            raise CannotRun(f"{folder}: no complete weights; `make weights` exports them")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.fingerprint: str = manifest["fingerprint"]
        self.words = f"{manifest['model']}, {manifest['precision']}, {self.fingerprint}"
        self._max_characters = 32 * manifest["max_tokens"]  # as the server
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(manifest["max_tokens"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._inputs = [given.name for given in self._session.get_inputs()]

    def embed(self, text: str) -> Vectors:
        """[D]"""
        ids = np.array([self._tokenizer.encode(text[: self._max_characters]).ids])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "text": np.zeros(1, np.int64)}
        (vectors,) = self._session.run(["embedding"], {name: given[name] for name in self._inputs})
        return vectors[0]

    def embedded(self, texts: Iterable[str], words: str) -> Embedded:
        """Each of `texts` once; read from the disk when they have been embedded before. `words` names the bar."""
        unique = sorted(set(texts))
        digest = hashlib.sha256(json.dumps(unique).encode()).hexdigest()[:16]
        path = KEPT / f"{self.fingerprint}-{digest}.npy"
        if path.exists():
            return Embedded(unique, np.load(path), path)
        vectors = np.array([self.embed(text) for text in tqdm(unique, desc=f"embedding {words}")], np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, vectors)
        partial.replace(path)
        return Embedded(unique, vectors, path)

    def seconds(self, texts: Sequence[str]) -> list[float]:
        """How long each takes, tokenising included."""
        took = []
        for text in texts:
            begun = time.perf_counter()
            self.embed(text)
            took.append(time.perf_counter() - begun)
        return took
