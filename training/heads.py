"""A trained classifier on disk without its base: LoRA adapter, heads, words, calibration and abilities, under 12 MB."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from training.base import Base
from training.calibration import OTHER, Ability, read_abilities
from training.lexical import Lexical
from training.model import Calibration, Classifier, Router
from training.weights import appearing, digest, read_manifest, write_manifest

SHIPPED = Path(__file__).parent / "shipped" / "heads"
ADAPTER, HEADS = "adapter", "heads.safetensors"


class ForeignBase(Exception):
    """The heads were trained on another base."""


@dataclass(frozen=True)
class Trained:
    """What a run has fitted, and what a server must know of it."""

    router: Router  # with the low-rank updates apart, not merged
    labels: tuple[str, ...]  # the categories, in the order of the outputs
    models: tuple[str, ...]  # that the training data graded
    abstention: float  # probability of the best category below which it is "other"; 0 for never
    abilities: Mapping[str, Ability]
    window: int  # tokens read at a time
    windows: int  # windows of a text that are read
    facts: Mapping[str, Any]  # precision, data digests, metrics ...: for people, and for the export

    def manifest(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {
            "labels": list(self.labels),
            "abstention": {"label": OTHER, "below": self.abstention} if self.abstention else None,
            "difficulty": self.router.dimensions,
            "abilities": {model: asdict(ability) for model, ability in self.abilities.items()},
            "calibration": asdict(self.router.calibration),
            "window": self.window,
            "max_tokens": self.window * self.windows,
            "models": list(self.models),
            **self.facts,
        }


def save_heads(folder: Path, trained: Trained, base: Base) -> None:
    """Write `trained` to `folder`, complete or not at all."""
    classifier = trained.router.classifier
    with appearing(folder) as built:
        classifier.trunk.save_pretrained(built / ADAPTER)  # type: ignore[operator]
        (built / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's empty model card
        save_file(_heads(trained.router), built / HEADS)
        write_manifest(built, {"base": base.name, "base_digest": base.digest, **trained.manifest()})


def load_heads(folder: Path, base: Base) -> Trained:
    """What `save_heads` wrote, on the same base. Raises ForeignBase, and FileNotFoundError when `folder` has none."""
    if (found := read_manifest(folder)) is None:
        raise FileNotFoundError(f"{folder} holds no trained heads")
    if found["base_digest"] != base.digest:
        raise ForeignBase(f"{folder} was trained on base {found['base']}, not on this {base.name}")
    state = load_file(folder / HEADS)
    lexical = Lexical(*state["lexical.table"].shape)
    classifier = Classifier(
        PeftModel.from_pretrained(base.trunk, folder / ADAPTER, is_trainable=True),
        base.trunk.config.hidden_size,
        len(found["labels"]),
        len(found["models"]),
    )
    router = Router(classifier, lexical, Calibration(**found["calibration"]))
    router.load_state_dict(state, strict=False)
    known = {"base", "base_digest", "labels", "abstention", "difficulty", "abilities", "calibration", "window"}
    known |= {"max_tokens", "models"}
    return Trained(
        router.eval(),
        tuple(found["labels"]),
        tuple(found["models"]),
        found["abstention"]["below"] if found["abstention"] else 0.0,
        read_abilities(found),
        found["window"],
        found["max_tokens"] // found["window"],
        {key: value for key, value in found.items() if key not in known},
    )


def heads_digest(folder: Path) -> str:
    """Name the heads in `folder` by their weights."""
    return digest((folder / ADAPTER / "adapter_model.safetensors").read_bytes(), (folder / HEADS).read_bytes())


def _heads(router: Router) -> dict[str, torch.Tensor]:
    """Everything of `router` that is not in the trunk."""
    return {
        name: value.detach().contiguous()
        for name, value in router.state_dict().items()
        if not name.startswith("classifier.trunk.")
    }
