"""The trunk to fine-tune: the small ModernBERT shipped with the project, one from a hub, or one in a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tokenizers import Tokenizer
from transformers import AutoModel, PreTrainedModel

from training.small import SHIPPED, ForeignTeacher, load_small, teacher_tokenizer
from training.tokens import read_tokenizer
from training.weights import digest

UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
LAYERS = "layers.safetensors"  # what `make base` writes instead of a whole model


class BaseError(Exception):
    """The base cannot be loaded; the message names it."""


@dataclass(frozen=True)
class Base:
    name: str
    trunk: PreTrainedModel  # float32
    tokenizer: Tokenizer
    digest: str  # of its weights: an adapter belongs to one base


def load_base(setting: str) -> Base:
    """The trunk and tokeniser that `setting` names.

    `small` is the one shipped with the project, otherwise a folder (a saved model, or what `make base` wrote) or a hub
    id such as answerdotai/ModernBERT-base. Raises BaseError.
    """
    folder = SHIPPED if setting == "small" else _fetched(setting)
    if (folder / LAYERS).exists():
        return _small(setting, folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise BaseError(f"base {setting!r}: {folder / name} is missing")
    try:
        trunk, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), read_tokenizer(folder)
    except Exception as error:  # transformers, safetensors and tokenizers each raise what they like for a broken file
        raise BaseError(f"base {setting!r}: {folder} cannot be loaded: {error}") from error
    return Base(setting, trunk, tokenizer, digest((folder / "model.safetensors").read_bytes()))


def _small(setting: str, folder: Path) -> Base:
    try:
        return Base(setting, load_small(folder), teacher_tokenizer(), digest((folder / LAYERS).read_bytes()))
    except ForeignTeacher as error:
        raise BaseError(f"base {setting!r}: {error}") from error


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
