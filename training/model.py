"""The classifier: one trunk, mean pooling, a category and a complexity head; and which weights training may move."""

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.evaluate import Calibration
from training.tokens import mean_pool

# Rank 16 on every linear layer trains 0.75 M of the small base's 26 M weights: room enough for two heads, 3 MB to ship.
RANK = 16


class Classifier(nn.Module):
    """Trunk [B, T] -> [B, T, H], mean over the text's tokens, brought to one scale, then a linear head per label."""

    def __init__(self, trunk: nn.Module, width: int, categories: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.drop = nn.Dropout(0.1)
        self.category = nn.Linear(width, categories)
        self.complexity = nn.Linear(width, 1)
        for parameter in (*self.category.parameters(), *self.complexity.parameters()):
            nn.init.zeros_(parameter)  # starts undecided

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, T], to category logits [B, L] and complexity logits [B, 1]."""
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = mean_pool(hidden, attention_mask)
        pooled = self.drop(nn.functional.layer_norm(pooled, pooled.shape[-1:]))
        return self.category(pooled), self.complexity(pooled)


class Calibrated(nn.Module):
    """The classifier with its calibration: what is exported."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__()
        self.classifier = classifier
        self.calibration = calibration

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, T], to category probabilities [B, L] and complexity probability [B, 1]."""
        return self.calibration.probabilities(*self.classifier(input_ids, attention_mask))


def with_lora(trunk: PreTrainedModel) -> nn.Module:
    """`trunk` frozen but for low-rank updates of every linear layer (LoRA, Hu et al. 2021) and its norms.

    In ModernBERT the linear layers are Wqkv and Wo of the attention, Wi and Wo of the MLP. The norms are few weights,
    and on the transplanted base they are least-squares fits that have something to gain.
    """
    norms = [name for name, module in trunk.named_modules() if isinstance(module, nn.LayerNorm)]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", modules_to_save=norms)
    return get_peft_model(trunk, config)


def merged(classifier: Classifier) -> Classifier:
    """`classifier` with the low-rank updates added into the weights they update: plain layers again, same outputs."""
    trunk: Any = classifier.trunk
    classifier.trunk = trunk.merge_and_unload()
    return classifier
