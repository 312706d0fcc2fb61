"""What `embedder`, `classifier` and `verifier` are: texts in, one tokenisation, one ONNX pass, the graph's outputs out.

Triton hands `execute` every request of a dynamic batch; all their texts go through the network together, but in int8
each goes alone. A text longer than the network's window is read in several, which a graph with an input `text` pools;
any other reads the first alone. A model with two inputs reads pairs of texts, each pair as one, and its graph's input
`side` says of each token which of the two it is from (1, 2; 0 for marks).
Beside the graph's own outputs each text gets `truncated` (not all of it was read) and `fingerprint` (whose answer it
is).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from tokenizers import Encoding, Tokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Read `weights` beside the version folder. Raises TritonModelException naming what is missing or wrong."""
        model = Path(args["model_repository"])
        manifest, network, tokenizer = _read(model / "weights")
        self.fingerprint = manifest["fingerprint"].encode()
        self.max_characters = 32 * manifest["max_tokens"]
        window = manifest.get("window", manifest["max_tokens"])
        self.windows = manifest["max_tokens"] // window
        # The scales of int8 are taken over all that is read at once: alone, a text is read alike whoever else asks.
        self.alone = manifest.get("precision") == "int8"
        self.tokenizer = Tokenizer.from_str(tokenizer.decode())
        self.tokenizer.enable_truncation(window)
        config = json.loads(args["model_config"])
        self.columns = [given["name"] for given in config["input"]]
        # What the vocabulary lacks may be all that two texts differ by; a single text loses little with it.
        self.unknown = self.tokenizer.token_to_id("[UNK]") if len(self.columns) > 1 else None
        self.session = _session(network, config["parameters"])
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [output.name for output in self.session.get_outputs()]

    def execute(self, requests: list) -> list:
        """Answer all requests of the batch from one forward pass; texts are BYTES [n, 1], UTF-8, bad bytes replaced."""
        given = [[_texts(request, column) for column in self.columns] for request in requests]
        rows = [row for columns in given for row in zip(*columns, strict=True)]
        answers = self._run(rows)
        ends = np.cumsum([len(columns[0]) for columns in given])
        parts = {name: np.split(values, ends[:-1]) for name, values in answers.items()}
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, np.ascontiguousarray(part[i])) for name, part in parts.items()]
            )
            for i in range(len(requests))
        ]

    def _run(self, rows: list[tuple[str, ...]]) -> dict[str, np.ndarray]:
        """Outputs of the graph [B, ...], `truncated` bool [B, 1] and `fingerprint` bytes [B, 1]."""
        read = [tuple(text[: self.max_characters] for text in row) for row in rows]
        encodings = self.tokenizer.encode_batch(read if len(self.columns) > 1 else [row[0] for row in read])
        parts = [[encoding, *encoding.overflowing] for encoding in encodings]
        texts = [part[: self.windows] for part in parts]
        passes = [self._pass([text]) for text in texts] if self.alone else [self._pass(texts)]
        answers = dict(zip(self.outputs, map(np.concatenate, zip(*passes, strict=True)), strict=True))
        # A text past the character limit may still be few tokens; calling it truncated errs on the safe side.
        cut = [
            len(part) > self.windows or row != kept or self.unknown in part[0].ids
            for part, row, kept in zip(parts, rows, read, strict=True)
        ]
        answers["truncated"] = np.array(cut)[:, None]
        answers["fingerprint"] = np.full((len(rows), 1), self.fingerprint, dtype=object)
        return answers

    def _pass(self, texts: list[list[Encoding]]) -> list[np.ndarray]:
        """The graph's outputs [B, ...] for texts given as their windows."""
        inputs = _inputs(texts)
        outputs = self.session.run(None, {name: inputs[name] for name in self.inputs})
        return [output[: len(texts)] for output in outputs]


def _texts(request: object, column: str) -> list[str]:
    given = pb_utils.get_input_tensor_by_name(request, column).as_numpy()
    return [text.decode(errors="replace") for text in given[:, 0]]


def _inputs(texts: list[list[Encoding]]) -> dict[str, np.ndarray]:
    """Padded ids, mask and side of each text's windows [W, T], and `text` [W], which each window belongs to."""
    windows = [window for text in texts for window in text]
    lengths = np.array([len(window.ids) for window in windows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids, side = np.zeros_like(mask), np.zeros_like(mask)
    ids[mask.astype(bool)] = np.concatenate([window.ids for window in windows])
    types, marks = (
        np.concatenate([getattr(window, name) for window in windows]) for name in ("type_ids", "special_tokens_mask")
    )
    side[mask.astype(bool)] = (1 + types) * (1 - marks)
    text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask, "side": side, "text": text}


def _read(weights: Path) -> tuple[dict, bytes, bytes]:
    """Manifest, network and tokeniser of one and the same export."""
    for name in ("manifest.json", "model.onnx", "tokenizer.json"):
        if not (weights / name).exists():
            raise pb_utils.TritonModelException(f"{weights / name} is missing; `make train` writes it")
    manifest = json.loads((weights / "manifest.json").read_bytes())
    network, tokenizer = (weights / "model.onnx").read_bytes(), (weights / "tokenizer.json").read_bytes()
    if hashlib.sha256(network + tokenizer).hexdigest()[:16] != manifest["fingerprint"]:
        raise pb_utils.TritonModelException(f"{weights}: the files do not match fingerprint {manifest['fingerprint']}")
    return manifest, network, tokenizer


def _session(network: bytes, parameters: dict) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters["threads"]["string_value"])
    options.inter_op_num_threads = 1
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession(network, options, providers=providers)
