"""What words alone say: a linear model over word pieces and hashed pairs of them, as a lookup table in the graph.

A fine-tuned encoder and a bag of words err on different prompts; how much the words count is fitted on validation rows
(`training.calibration`). The table holds, for each n-gram, its contribution to every output, fitted in closed or convex
form on the training rows; the graph sums the contributions and divides by the norm: TF-IDF with a linear model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from training.apgr import Floats
from training.objective import Targets

PAIRS = 1 << 16  # buckets for pairs of neighbouring word pieces
MULTIPLIERS = (31_337, 7_919)
SUPPORT_C = 0.3
RIDGE = 10.0
ENERGY_UNIT = 16.0  # keeps the sum over a long text within half precision
COMPLEXITY_SCALE = 4.0  # a share around a half, as logits: d logit / d p = 4


class Lexical(nn.Module):
    """Word pieces [W, T] -> contributions to C outputs [W, C], unnormalised, and their squared norm [W, 1]."""

    table: Tensor
    energy: Tensor

    def __init__(self, grams: int, outputs: int) -> None:
        super().__init__()
        self.vocabulary = grams - PAIRS
        self.register_buffer("table", torch.zeros(grams, outputs, dtype=torch.float16))
        self.register_buffer("energy", torch.zeros(grams, 1, dtype=torch.float16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [W, T], to sums over the n-grams of each window: [W, C] and [W, 1]."""
        grams = torch.cat([input_ids, pairs(input_ids, self.vocabulary)], 1)
        there = torch.cat([attention_mask, attention_mask[:, 1:]], 1)[..., None].float()

        def summed(table: Tensor) -> Tensor:
            return (nn.functional.embedding(grams, table).float() * there).sum(1)

        return summed(self.table), summed(self.energy)


def pairs(input_ids: Tensor, vocabulary: int) -> Tensor:
    """The bucket of each pair of neighbours, int64 [W, T - 1], numbered after the vocabulary."""
    first, second = MULTIPLIERS
    return vocabulary + (input_ids[:, :-1] * first + input_ids[:, 1:] * second) % PAIRS


@dataclass(frozen=True)
class Counts:
    """TF-IDF features of texts, fitted on training rows."""

    idf: Floats  # [V + PAIRS], 0 for what training never saw
    vocabulary: int

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], vocabulary: int) -> "Counts":
        """Fit on token ids with their special tokens."""
        seen = np.asarray((_counts(ids, vocabulary) > 0).sum(0), dtype=np.float64)[0]
        seen[[ids[0][0], ids[0][-1]]] = 0  # the special tokens are in every text: they say nothing
        return cls(np.where(seen > 0, np.log((1 + len(ids)) / (1 + seen)) + 1, 0), vocabulary)

    def features(self, ids: Sequence[Sequence[int]]) -> sparse.csr_matrix:
        """Rows [N, V + PAIRS] of unit length as far as the graph measures length: repeats add up linearly."""
        counts = _counts(ids, self.vocabulary)
        norm = np.sqrt(np.maximum(counts @ self.idf**2, 1e-6))
        return sparse.csr_matrix(sparse.diags(1 / norm) @ counts @ sparse.diags(self.idf))

    def lexical(self, weights: Floats) -> Lexical:
        """The module that gives features @ `weights` [V + PAIRS, C]."""
        module = Lexical(*weights.shape)
        module.table.copy_(torch.from_numpy(weights * self.idf[:, None]))
        module.energy.copy_(torch.from_numpy((self.idf[:, None] / ENERGY_UNIT) ** 2))
        return module


def _counts(ids: Sequence[Sequence[int]], vocabulary: int) -> sparse.csr_matrix:
    columns = [np.concatenate([text, pairs(torch.tensor([text]), vocabulary)[0].numpy()]) for text in ids]
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in columns])
    ones = np.ones(len(rows))
    return sparse.csr_matrix((ones, (rows, np.concatenate(columns))), shape=(len(ids), vocabulary + PAIRS))


def fit_lexical(
    ids: Sequence[Sequence[int]], wanted: Targets, labels: int, directions: int, vocabulary: int
) -> Lexical:
    """Fit all outputs on the training rows' first windows `ids`: L category margins, complexity, difficulty.

    Categories by one-against-rest linear support vectors, complexity and the models' grades by ridge regression; the
    grades' predictions are then rotated into their first `directions` principal components, which is reduced-rank
    regression. A prompt counts once however many models it has grades of, or two models that were asked apart from
    thirty others would have no say in the directions.
    """
    counts = Counts.of(ids, vocabulary)
    x = counts.features(ids)
    category, complexity, right = wanted.category.numpy(), wanted.complexity.numpy(), wanted.right.numpy()
    weights = np.zeros((x.shape[1], labels + 1 + directions))
    known = category >= 0
    if known.any():
        weights[:, :labels] = _margins(x[known], category[known], labels)
    if (known := ~np.isnan(complexity)).any():
        weights[:, labels] = _ridge(x[known], complexity[known][:, None])[:, 0] * COMPLEXITY_SCALE
    if right.shape[1]:
        graded = ~np.isnan(right)  # [N, M]
        share = [1 / np.sqrt(graded[rows].sum(1).mean()) if rows.any() else 0.0 for rows in graded.T]
        by_model = np.column_stack([_ridge_known(x, grades) for grades in right.T]) * share
        weights[:, labels + 1 :] = _principal(x, by_model, directions)
    return counts.lexical(weights)


def _margins(x: sparse.csr_matrix, category: NDArray[np.int64], labels: int) -> Floats:
    """[F, L]; zeros for a category without rows. Two categories give one column, which serves both ways."""
    model = LinearSVC(C=SUPPORT_C, random_state=0).fit(x, category)
    coefficients = model.coef_ if len(model.classes_) > 2 else np.vstack([-model.coef_, model.coef_])
    found = np.zeros((x.shape[1], labels))
    found[:, model.classes_] = coefficients.T
    return found


def _ridge_known(x: sparse.csr_matrix, grades: Floats) -> Floats:
    known = ~np.isnan(grades)
    return _ridge(x[known], grades[known][:, None])[:, 0] if known.any() else np.zeros(x.shape[1])


def _ridge(x: sparse.csr_matrix, y: Floats) -> Floats:
    """[F, C] for `y` [N, C]."""
    return np.asarray(Ridge(RIDGE, solver="sparse_cg", tol=1e-3).fit(x, y - y.mean(0)).coef_).reshape(y.shape[1], -1).T


def _principal(x: sparse.csr_matrix, by_model: Floats, directions: int) -> Floats:
    """`by_model` [F, M] in the `directions` [F, D] that explain most of x @ by_model, each of unit variance over x."""
    predicted = x @ by_model
    _, spread, basis = np.linalg.svd(predicted - predicted.mean(0), full_matrices=False)
    kept = min(directions, len(spread))
    scale = spread[:kept].clip(min=1e-9) / np.sqrt(len(predicted))
    return np.pad(by_model @ basis[:kept].T / scale, ((0, 0), (0, directions - kept)))
