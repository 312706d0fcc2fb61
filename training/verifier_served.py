"""The verifier as an ONNX graph, exported and read as Triton reads it; and how similar two questions are."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from training.export import PARITY, SEQUENCES, ParityError, convert, named, outliers, to_onnx
from training.frozen import remembering
from training.pairs import Pair
from training.served import NoWeights
from training.thresholds import Scores
from training.tokens import read_tokenizer
from training.verifier import WINDOW, Encoded, Verifier, encode_pairs
from training.weights import appearing, fingerprint, read_manifest, write_manifest

LONG = "Which of the two is older, and how do we know that it is so? " * 8
EXAMPLES = [
    Pair("Why?", "How?", same=False),
    Pair("What are the main renewable energy sources?", "What are the main non-renewable energy sources?", same=False),
    Pair("how do i turn the lights on", "how do i turn the lights off", same=False),
    Pair("Which bank is open?", LONG, same=False),
    Pair("5 + 7", "What is the sum of five and seven?", same=True),
]


def export_verifier(
    verifier: Verifier, tokenizer: Tokenizer, model: Path, manifest: dict[str, Any], precision: str
) -> str:
    """Write `model`/weights; return the fingerprint. Raises ParityError when ONNX and torch disagree in float32."""
    with appearing(model / "weights") as folder:
        network, smaller = folder / "model.onnx", folder / "smaller.onnx"
        onnx.save(to_onnx(verifier, ["score"], [*SEQUENCES, "side"]), network)
        difference = _disagreement(verifier, network, tokenizer)
        if not difference <= PARITY:
            raise ParityError(f"{model.name}: ONNX and torch differ by {difference:.2g}, more than {PARITY:g}")
        examples = encode_pairs(tokenizer, EXAMPLES).tensors(range(len(EXAMPLES)))
        convert(network, smaller, precision, outliers(network, examples) if precision == "int8" else ())
        smaller.replace(network)
        tokenizer.save(str(folder / "tokenizer.json"))
        found = fingerprint(folder)
        write_manifest(folder, {"fingerprint": found, "precision": precision, "max_tokens": WINDOW, **manifest})
    return found


def _disagreement(verifier: Verifier, network: Path, tokenizer: Tokenizer) -> float:
    """Largest difference between torch and the graph, over pairs of mixed lengths, alone and together."""
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    encoded, worst = encode_pairs(tokenizer, EXAMPLES), 0.0
    for rows in (range(len(EXAMPLES)), [0], [1, 3]):
        inputs = encoded.tensors(list(rows))
        with torch.inference_mode():
            expected = verifier(*inputs)
        (actual,) = session.run(["score"], named(session, inputs))
        worst = max(worst, float((expected - torch.from_numpy(actual)).abs().max()))
    return worst


class ServedVerifier:
    """The verifier in `folder`."""

    def __init__(self, folder: Path) -> None:
        """Raises NoWeights."""
        manifest = read_manifest(folder)
        if manifest is None or not (folder / "model.onnx").exists():
            raise NoWeights(f"{folder}: no complete weights; `make train-verifier` writes them")
        self.manifest: dict[str, Any] = manifest
        self.tokenizer = read_tokenizer(folder)
        self.alone = manifest.get("precision") == "int8"
        options = onnxruntime.SessionOptions()
        if self.alone:  # a pair is too little work to share
            options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def scores(self, pairs: Sequence[Pair], progress: str | None = None) -> Scores:
        """Log-odds [N] that one answer serves both questions of each pair; -inf for a pair that is too long."""
        encoded = encode_pairs(self.tokenizer, pairs, self.manifest["max_tokens"])
        found = np.zeros(len(pairs))

        def read(batch: list[int]) -> None:
            (said,) = self.session.run(["score"], named(self.session, encoded.tensors(batch)))
            found[batch] = said[:, 0]

        order = self._order(encoded)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if self.alone else 1) as threads:
            for _ in tqdm(threads.map(read, order), desc=progress, total=len(order), disable=progress is None):
                pass
        found[encoded.truncated] = -np.inf
        return found

    def _order(self, encoded: Encoded) -> list[list[int]]:
        """As the server does: in int8 each pair alone, else those of like length together."""
        if self.alone:
            return [[i] for i in range(len(encoded.ids))]
        order = sorted(range(len(encoded.ids)), key=lambda i: len(encoded.ids[i]))
        return [order[i : i + 64] for i in range(0, len(order), 64)]


def similarities(pairs: Sequence[Pair]) -> Scores:
    """Cosine [N] of the embeddings of both questions of each pair."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.question, pair.cached)))
    row = {text: i for i, text in enumerate(texts)}
    vectors = remembering()(texts)
    one, other = ([row[getattr(pair, side)] for pair in pairs] for side in ("question", "cached"))
    return np.asarray((vectors[one] * vectors[other]).sum(1), dtype=np.float64)
