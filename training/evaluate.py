"""What the heads are worth: calibration on one split, figures on another, beside baselines that need no network."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor, nn

from training.rows import Row, Splits

Floats = NDArray[np.float64]
BINS = 10


@dataclass(frozen=True)
class Targets:
    """Labels of N rows; -100 and nan where a row has none."""

    category: Tensor  # int64 [N]
    complexity: Tensor  # float32 [N]

    def at(self, rows: Sequence[int]) -> "Targets":
        """The labels of these `rows` alone."""
        return Targets(self.category[rows], self.complexity[rows])


@dataclass(frozen=True)
class Calibration:
    """p(category) = softmax(logits / temperature); p(complex) = sigmoid(scale * logit + bias)."""

    temperature: float = 1.0
    scale: float = 1.0
    bias: float = 0.0

    def probabilities(self, category: Tensor, complexity: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, L] and [N, 1] to probabilities of the same shapes."""
        return torch.softmax(category / self.temperature, -1), torch.sigmoid(self.scale * complexity + self.bias)


@dataclass(frozen=True)
class Figures:
    accuracy: float
    macro_f1: float
    ece: float
    complexity_auc: float
    complexity_accuracy: float
    complexity_ece: float


def targets(rows: Sequence[Row], labels: Sequence[str]) -> Targets:
    """The labels of `rows` as tensors, categories by their place in `labels`."""
    index = {label: i for i, label in enumerate(labels)}
    return Targets(
        torch.tensor([-100 if row.category is None else index[row.category] for row in rows]),
        torch.tensor([float("nan") if row.complexity is None else row.complexity for row in rows]),
    )


def loss(category: Tensor, complexity: Tensor, wanted: Targets, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of `category` logits [N, L] plus half that of `complexity` logits [N, 1], over labelled rows."""
    known = ~wanted.complexity.isnan()
    by_category = nn.functional.cross_entropy(category, wanted.category, label_smoothing=smoothing, reduction="sum")
    by_complexity = nn.functional.binary_cross_entropy_with_logits(
        complexity[known, 0], wanted.complexity[known], reduction="sum"
    )
    labelled = (wanted.category >= 0).sum().clamp(min=1)
    return by_category / labelled + 0.5 * by_complexity / known.sum().clamp(min=1)


def calibrate(category: Tensor, complexity: Tensor, wanted: Targets) -> Calibration:
    """Temperature for the categories (Guo et al. 2017) and Platt scaling for the complexity, by maximum likelihood.

    Logits [N, L] and [N, 1] of rows not trained on. A faint pull towards no change keeps perfect scores finite.
    """
    known = ~wanted.complexity.isnan()
    category, complexity, soft = category.double(), complexity[known, 0].double(), wanted.complexity[known].double()
    start = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)  # 1 / temperature, scale, bias: convex in all three
    found = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(category * found[0], wanted.category)
        value = value + nn.functional.binary_cross_entropy_with_logits(found[1] * complexity + found[2], soft)
        value = value + 1e-3 * (found - start).pow(2).sum()
        value.backward()
        return value

    optimiser.step(objective)
    sharpness, scale, bias = found.tolist()
    return Calibration(1 / max(sharpness, 1e-2), max(scale, 1e-2), bias)


def figures(category: Tensor, complexity: Tensor, wanted: Targets, calibration: Calibration) -> Figures:
    """Figures of category logits [N, L] and complexity logits [N, 1] after `calibration`."""
    by_category, by_complexity = calibration.probabilities(category, complexity)
    return _figures(by_category.numpy(), by_complexity[:, 0].numpy(), wanted)


def _figures(category: Floats, complexity: Floats, wanted: Targets) -> Figures:
    """Figures of category probabilities [N, L] and complexity probabilities [N], over the rows labelled with each."""
    with_category = (wanted.category >= 0).numpy()
    with_complexity = ~wanted.complexity.isnan().numpy()
    true, predicted = wanted.category.numpy()[with_category], category[with_category].argmax(1)
    hard, p = wanted.complexity.numpy()[with_complexity] >= 0.5, complexity[with_complexity]
    return Figures(
        accuracy=float((predicted == true).mean()),
        macro_f1=float(f1_score(true, predicted, average="macro")),
        ece=calibration_error(category[with_category].max(1), predicted == true),
        complexity_auc=float(roc_auc_score(hard, p)),
        complexity_accuracy=float(((p >= 0.5) == hard).mean()),
        complexity_ece=calibration_error(p, hard),
    )


def calibration_error(probability: Floats, happened: NDArray[np.bool_]) -> float:
    """Expected calibration error over BINS equal-width bins, both [N] (Naeini et al. 2015)."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=probability - happened, minlength=BINS)
    return float(np.abs(gaps).sum() / len(probability))


def baselines(splits: Splits, labels: Sequence[str]) -> dict[str, Figures]:
    """The same figures on the test split for what trains on the same rows in seconds."""
    length = FunctionTransformer(lambda texts: np.log1p([[len(text)] for text in texts]))
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    models = {
        "majority class": DummyClassifier(),
        "prompt length": make_pipeline(length, StandardScaler(), LogisticRegression()),
        "TF-IDF + logistic regression": make_pipeline(words, LogisticRegression(C=10, max_iter=1000)),
    }
    return {name: _baseline(model, splits, labels) for name, model in models.items()}


def _baseline(model: ClassifierMixin, splits: Splits, labels: Sequence[str]) -> Figures:
    """`model` trained once for each label, on the rows that have it."""
    texts = [row.text for row in splits.test]
    rows = [row for row in splits.train if row.category is not None]
    model.fit([row.text for row in rows], [row.category for row in rows])
    category = model.predict_proba(texts)  # columns sorted by name, as `labels` are; training holds every category
    graded = [(row.text, row.complexity >= 0.5) for row in splits.train if row.complexity is not None]
    model.fit([text for text, _ in graded], [is_complex for _, is_complex in graded])
    return _figures(category, model.predict_proba(texts)[:, 1], targets(splits.test, labels))


def table(found: dict[str, Figures], rows: int) -> str:
    """`found` as lines to print, best read from the top: each is measured on the same `rows` test rows."""
    lines = [
        f"{'':30}{'category':^24}{'complexity':^24}",
        f"{f'test split, {rows} rows':30}{'accuracy':>8}{'macro-F1':>9}{'ECE':>7}{'AUC':>8}{'accuracy':>9}{'ECE':>7}",
    ]
    for name, f in found.items():
        lines.append(
            f"{name:30}{f.accuracy:8.3f}{f.macro_f1:9.3f}{f.ece:7.3f}"
            f"{f.complexity_auc:8.3f}{f.complexity_accuracy:9.3f}{f.complexity_ece:7.3f}"
        )
    last = list(found.values())[-1].accuracy
    lines.append(f"one standard error of the last accuracy: {(last * (1 - last) / rows) ** 0.5:.3f}")
    return "\n".join(lines)
