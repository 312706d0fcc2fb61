"""What `embedder` and `classifier` both are: texts in, one tokenisation, one ONNX pass, the graph's outputs out.

Triton hands `execute` every request of a dynamic batch; all their texts go through the network together, but in int8
each goes alone. A text longer than the network's window is read in several, which a graph with an input `text` pools;
any other reads the first alone.
Beside the graph's own outputs each text gets `truncated` (its end was not read) and `fingerprint` (whose answer it is).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


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
        self.session = _session(network, json.loads(args["model_config"])["parameters"])
        self.inputs = [given.name for given in self.session.get_inputs()]
        self.outputs = [output.name for output in self.session.get_outputs()]

    def execute(self, requests: list) -> list:
        """Answer all requests of the batch from one forward pass; `text` is BYTES [n, 1], UTF-8, bad bytes replaced."""
        texts = [pb_utils.get_input_tensor_by_name(request, "text").as_numpy()[:, 0] for request in requests]
        answers = self._run([text.decode(errors="replace") for text in np.concatenate(texts)])
        ends = np.cumsum([len(text) for text in texts])
        parts = {name: np.split(values, ends[:-1]) for name, values in answers.items()}
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, np.ascontiguousarray(part[i])) for name, part in parts.items()]
            )
            for i in range(len(requests))
        ]

    def _run(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Outputs of the graph [B, ...], `truncated` bool [B, 1] and `fingerprint` bytes [B, 1]."""
        encodings = self.tokenizer.encode_batch([text[: self.max_characters] for text in texts])
        parts = [[encoding, *encoding.overflowing] for encoding in encodings]
        read = [[window.ids for window in part[: self.windows]] for part in parts]
        passes = [self._pass([text]) for text in read] if self.alone else [self._pass(read)]
        answers = dict(zip(self.outputs, map(np.concatenate, zip(*passes, strict=True)), strict=True))
        # A text past the character limit may still be few tokens; calling it truncated errs on the safe side.
        cut = [len(p) > self.windows or len(t) > self.max_characters for p, t in zip(parts, texts, strict=True)]
        answers["truncated"] = np.array(cut)[:, None]
        answers["fingerprint"] = np.full((len(texts), 1), self.fingerprint, dtype=object)
        return answers

    def _pass(self, texts: list[list[list[int]]]) -> list[np.ndarray]:
        """The graph's outputs [B, ...] for texts given as the token ids of their windows."""
        inputs = _inputs(texts)
        outputs = self.session.run(None, {name: inputs[name] for name in self.inputs})
        return [output[: len(texts)] for output in outputs]


def _inputs(texts: list[list[list[int]]]) -> dict[str, np.ndarray]:
    """Token ids of each text's windows to padded ids and mask [W, T], and `text` [W], which each window belongs to."""
    windows = [ids for text in texts for ids in text]
    lengths = np.array([len(ids) for ids in windows])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    padded = np.zeros_like(mask)
    padded[mask.astype(bool)] = np.concatenate(windows)
    text = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    return {"input_ids": padded, "attention_mask": mask, "text": text}


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
