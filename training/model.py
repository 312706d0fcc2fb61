"""The classifier: one trunk, mean pooling over a text's windows, three heads; and which weights training may move."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.lexical import ENERGY_UNIT, Lexical

# Rank 16 on every linear layer trains 0.75 M of the small base's 26 M weights: room enough for the heads, 3 MB to ship.
M = TypeVar("M", bound=nn.Module)
RANK = 16
DIFFICULTY = 8  # dimensions of a prompt's difficulty that the trunk gives


@dataclass(frozen=True)
class Scores:
    """What the heads say of B texts, as logits."""

    category: Tensor  # [B, L]
    complexity: Tensor  # [B, 1]
    difficulty: Tensor  # [B, K]


class Classifier(nn.Module):
    """Trunk [W, T] -> [W, T, H], mean over all tokens of each text, brought to one scale, then a linear head per label.

    `right` turns a difficulty into one logit per model of the training data (an item-response model with the models'
    abilities as its weights); it only teaches the trunk what difficulty is and is not exported.
    """

    def __init__(self, trunk: nn.Module, width: int, categories: int, models: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.drop = nn.Dropout(0.1)
        self.category = nn.Linear(width, categories)
        self.complexity = nn.Linear(width, 1)
        self.difficulty = nn.Linear(width, DIFFICULTY)
        self.right = nn.Linear(DIFFICULTY, models)
        for parameter in (*self.category.parameters(), *self.complexity.parameters(), *self.right.parameters()):
            nn.init.zeros_(parameter)  # starts undecided
        nn.init.normal_(self.difficulty.weight, std=0.05)
        nn.init.normal_(self.right.weight, std=0.3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Scores:
        """Windows, int64 [W, T], and the text each belongs to, int64 [W], counted from 0 in order.

        As many rows come back as windows went in; those after the last text mean nothing.
        """
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        belongs = membership(text).to(hidden.dtype)
        pooled = belongs @ (hidden * mask).sum(1) / (belongs @ mask.sum(1)).clamp(min=1)
        pooled = self.drop(nn.functional.layer_norm(pooled, pooled.shape[-1:]))
        return Scores(self.category(pooled), self.complexity(pooled), self.difficulty(pooled))


def membership(text: Tensor) -> Tensor:
    """[W, W]: 1 where window (column) belongs to text (row)."""
    return (text[None, :] == torch.arange(text.shape[0], device=text.device)[:, None]).float()


@dataclass(frozen=True)
class Calibration:
    """How logits of the trunk and of the words become probabilities; fitted on the validation split.

    p(category) = softmax((trunk + words * lexical) / temperature), p(complex) = sigmoid(scale * trunk + words + bias);
    for the category the words weigh more or less the longer the text is.
    """

    temperature: float = 1.0
    category_words: float = 0.0
    category_words_by_length: float = 0.0  # per unit of what `Router.words` gives last
    scale: float = 1.0
    complexity_words: float = 0.0
    bias: float = 0.0


class Router(nn.Module):
    """The classifier with what words alone say and with its calibration: what is measured, exported and served."""

    def __init__(self, classifier: Classifier, lexical: Lexical, calibration: Calibration) -> None:
        super().__init__()
        self.classifier = classifier
        self.lexical = lexical
        self.calibration = calibration
        self.labels = classifier.category.out_features
        self.dimensions = DIFFICULTY + lexical.table.shape[1] - self.labels  # of a difficulty: K

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows as in `Classifier` to category probabilities [W, L], complexity [W, 1] and difficulty [W, K]."""
        scores = self.classifier(input_ids, attention_mask, text)
        category, complexity = self.logits(scores, words := self.words(input_ids, attention_mask, text))
        return torch.softmax(category, -1), torch.sigmoid(complexity), self.hardness(scores, words)

    def words(self, input_ids: Tensor, attention_mask: Tensor, text: Tensor) -> Tensor:
        """What the words of each text contribute, [W, L + 1 + ...], and last the logarithm of their number."""
        belongs = membership(text)
        sums, energy = (belongs @ part for part in self.lexical(input_ids, attention_mask))
        tokens = belongs @ attention_mask.sum(1, keepdim=True).float()
        norm = ENERGY_UNIT * energy.clamp(min=1e-6).sqrt()
        return torch.cat([sums / norm, torch.log(tokens.clamp(min=1)) - 3], 1)

    def logits(self, scores: Scores, words: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated logits of category [B, L] and complexity [B, 1]."""
        of, c = self.labels, self.calibration
        weight = c.category_words + c.category_words_by_length * words[:, -1:]
        category = (scores.category + weight * words[:, :of]) / c.temperature
        return category, c.scale * scores.complexity + c.complexity_words * words[:, of : of + 1] + c.bias

    def hardness(self, scores: Scores, words: Tensor) -> Tensor:
        """The difficulty vector of each text [B, K]: what the trunk says, what the words say, and the length."""
        return torch.cat([scores.difficulty, words[:, self.labels + 1 :]], 1)


def with_lora(trunk: PreTrainedModel, rank: int = RANK, scale: float = 2.0, dropout: float = 0.0) -> nn.Module:
    """`trunk` frozen but for its norms and low-rank updates of its linear layers, times `scale` (LoRA, Hu et al. 2021).

    In ModernBERT the linear layers are Wqkv and Wo of the attention, Wi and Wo of the MLP. The norms are few weights,
    and on the transplanted base they are least-squares fits that have something to gain.
    """
    norms = [name for name, module in trunk.named_modules() if isinstance(module, nn.LayerNorm)]
    alpha = round(scale * rank)
    return get_peft_model(
        trunk, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", modules_to_save=norms)
    )


def merged(model: M) -> M:
    """`model` with the low-rank updates of its trunk added into the weights they update: plain layers, same outputs.

    In float64: what float32 adds up differs from one process to the next, and the fingerprint would with it.
    """
    trunk: Any = model.trunk
    model.trunk = trunk.double().merge_and_unload().float()
    return model
