"""The verifier: a cross-encoder that reads two questions and says whether one answer serves both.

It sees of each word piece whether the other question has it, too: so what differs stands out, and what is left to learn
is whether the difference matters. On disk without its base, as the heads are: low-rank updates and a small head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from training.base import Base
from training.heads import ADAPTER, ForeignBase
from training.model import with_lora
from training.pairs import Pair
from training.weights import appearing, read_manifest, write_manifest

SHIPPED = Path(__file__).parent / "shipped" / "verifier"
HEAD = "head.safetensors"
RANK, SCALE = 48, 1.0  # 2.2 M weights on the small base
DROPOUT = 0.1
HIDDEN = 192
WINDOW = 512  # tokens of both questions together: twice what the embedder reads
UNKNOWN = "[UNK]"  # word piece
FIRST, SECOND = 1, 2  # sides of a pair; marks and padding have side 0


class Verifier(nn.Module):
    """Trunk [B, T] -> [B, T, H], what its states say of each side and of what differs, a head with one hidden layer.

    `scale` and `bias` make log-odds of what the head says (Platt 1999).
    """

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.beside = nn.Embedding(3, width)  # added to a word piece: a mark, only here, also on the other side
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(6 * width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("bias", torch.tensor(0.0))
        nn.init.normal_(self.beside.weight, std=0.01)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, side: Tensor) -> Tensor:
        """Token ids, mask and side, int64 [B, T], to log-odds that one answer serves both, float32 [B, 1]."""
        shared = on_both(input_ids, side)
        table: Any = self.trunk.get_input_embeddings()  # type: ignore[operator]
        embedded = table(input_ids) + self.beside(torch.where(side > 0, 1 + shared.long(), 0))
        states = self.trunk(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        one, other = mean(states, side == FIRST), mean(states, side == SECOND)
        only_one, only_other = mean(states, (side == FIRST) & ~shared), mean(states, (side == SECOND) & ~shared)
        differs = (only_one - only_other).abs(), only_one * only_other, only_one + only_other
        said = self.head(torch.cat([states[:, 0], (one - other).abs(), one * other, *differs], 1))
        return self.scale * said.float() + self.bias


def on_both(input_ids: Tensor, side: Tensor) -> Tensor:
    """Bool [B, T]: the other side has this word piece, too."""
    facing = (side[:, :, None] * side[:, None, :]) == FIRST * SECOND
    return ((input_ids[:, :, None] == input_ids[:, None, :]) & facing).any(2)


def mean(states: Tensor, where: Tensor) -> Tensor:
    """Mean of `states` [B, T, H] over the positions `where` [B, T]; 0 where there are none."""
    weights = where[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def adapted(base: Base) -> nn.Module:
    """The trunk of `base` with what is to be learnt."""
    return with_lora(base.trunk, RANK, SCALE, DROPOUT)


@dataclass(frozen=True)
class Encoded:
    """Pairs of questions as token ids and sides."""

    ids: list[list[int]]
    sides: list[list[int]]
    truncated: list[bool]  # not all of the pair is read: it is too long, or has what the vocabulary lacks

    @property
    def lengths(self) -> list[int]:
        """In tokens, of each pair."""
        return [len(ids) for ids in self.ids]

    def tensors(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and side, int64 [B, T], of these rows."""
        longest = max(len(self.ids[i]) for i in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, side = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, i in enumerate(rows):
            length = len(self.ids[i])
            ids[row, :length] = torch.tensor(self.ids[i])
            side[row, :length] = torch.tensor(self.sides[i])
            mask[row, :length] = 1
        return ids, mask, side


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], most: int = WINDOW) -> Encoded:
    """As the server does: a mark, the question asked, a mark, the one in the cache, a mark."""
    tokenizer.enable_truncation(most)
    encodings = tokenizer.encode_batch([(pair.question, pair.cached) for pair in pairs])
    tokenizer.no_truncation()
    sides = [
        [
            0 if mark else FIRST + kind
            for kind, mark in zip(encoding.type_ids, encoding.special_tokens_mask, strict=True)
        ]
        for encoding in encodings
    ]
    unknown = tokenizer.token_to_id(UNKNOWN)
    unread = [bool(encoding.overflowing) or unknown in encoding.ids for encoding in encodings]
    return Encoded([encoding.ids for encoding in encodings], sides, unread)


@dataclass(frozen=True)
class TrainedVerifier:
    verifier: Verifier  # with the low-rank updates apart, not merged
    facts: Mapping[str, Any]  # thresholds, precision, data digests ...: for the export, and for people


def save_verifier(folder: Path, trained: TrainedVerifier, base: Base) -> None:
    """Write `trained` to `folder`, matrices in 8 bits, complete or not at all."""
    trunk: Any = trained.verifier.trunk
    with appearing(folder) as built:
        trunk.save_pretrained(built / ADAPTER)
        (built / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's empty model card
        adapter = built / ADAPTER / "adapter_model.safetensors"
        head = {name: value for name, value in trained.verifier.state_dict().items() if not name.startswith("trunk.")}
        save_file(packed(load_file(adapter)), adapter, {"format": "pt"})
        save_file(packed(head), built / HEAD)
        write_manifest(built, {"base": base.name, "base_digest": base.digest, **trained.facts})


STEPS = "!steps"  # follows the name of a matrix whose rows are whole numbers of such steps


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with a step for each row: a quarter of the bytes, and an error of 1/254 of a row's largest."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim == 2:
            steps = value.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            found |= {name: (value / steps).round().to(torch.int8), f"{name}{STEPS}": steps.float()}
        else:
            found[name] = value.detach().clone().contiguous()
    return found


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` made small, in float32."""
    plain = {name: value for name, value in state.items() if not name.endswith(STEPS)}
    return {
        name: value.float() * state[f"{name}{STEPS}"] if f"{name}{STEPS}" in state else value.float()
        for name, value in plain.items()
    }


def load_verifier(folder: Path, base: Base) -> TrainedVerifier:
    """What `save_verifier` wrote, on the same base. Raises ForeignBase, and FileNotFoundError when there is none."""
    if (found := read_manifest(folder)) is None:
        raise FileNotFoundError(f"{folder} holds no trained verifier")
    if found["base_digest"] != base.digest:
        raise ForeignBase(f"{folder} was trained on base {found['base']}, not on this {base.name}")
    trunk = adapted(base)
    set_peft_model_state_dict(trunk, unpacked(load_file(folder / ADAPTER / "adapter_model.safetensors")))
    verifier = Verifier(trunk, base.trunk.config.hidden_size)
    verifier.load_state_dict(unpacked(load_file(folder / HEAD)), strict=False)
    return TrainedVerifier(
        verifier.eval(), {key: value for key, value in found.items() if key not in ("base", "base_digest")}
    )


@torch.no_grad()
def rounded(verifier: Verifier) -> Verifier:
    """`verifier` as it will be when it was saved and loaded."""
    state = {name: parameter for name, parameter in verifier.named_parameters() if parameter.requires_grad}
    for name, value in unpacked(packed(state)).items():
        state[name].copy_(value)
    return verifier
