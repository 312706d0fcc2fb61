"""What training minimises: the labels of rows as tensors, and the loss of the heads against them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.rows import Row

COMPLEXITY_WEIGHT = 0.5
RIGHT_WEIGHT = 0.5


@dataclass(frozen=True)
class Targets:
    """Labels of N rows; -100 and nan where a row has none."""

    category: Tensor  # int64 [N]
    complexity: Tensor  # float32 [N]
    right: Tensor  # float32 [N, M], a grade per model

    def at(self, rows: Sequence[int]) -> "Targets":
        """The labels of these `rows` alone."""
        return Targets(self.category[rows], self.complexity[rows], self.right[rows])


def targets(rows: Sequence[Row], labels: Sequence[str], models: Sequence[str]) -> Targets:
    """The labels of `rows` as tensors: categories by their place in `labels`, grades by the model's in `models`."""
    place = {label: i for i, label in enumerate(labels)}
    missing = float("nan")
    return Targets(
        torch.tensor([-100 if row.category is None else place[row.category] for row in rows], dtype=torch.int64),
        torch.tensor([missing if row.complexity is None else row.complexity for row in rows]),
        torch.tensor([[row.correct.get(model, missing) for model in models] for row in rows]).view(len(rows), -1),
    )


def graded_models(rows: Sequence[Row]) -> list[str]:
    """The models that `rows` say were right or wrong, sorted."""
    return sorted({model for row in rows for model in row.correct})


def loss(category: Tensor, complexity: Tensor, right: Tensor, wanted: Targets, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of `category` [N, L], half that of `complexity` [N, 1] and of `right` [N, M], all logits.

    Each is a mean over the rows that have the label; a row's grades count as one label, however many models it has.
    """
    by_category = nn.functional.cross_entropy(category, wanted.category, label_smoothing=smoothing, reduction="sum")
    total = by_category / (wanted.category >= 0).sum().clamp(min=1)
    for weight, logits, true in (
        (COMPLEXITY_WEIGHT, complexity, wanted.complexity[:, None]),
        (RIGHT_WEIGHT, right, wanted.right),
    ):
        known = ~true.isnan()
        each = nn.functional.binary_cross_entropy_with_logits(logits, true.nan_to_num(), reduction="none") * known
        of_row = each.sum(1) / known.sum(1).clamp(min=1)
        total = total + weight * of_row.sum() / known.any(1).sum().clamp(min=1)
    return total
