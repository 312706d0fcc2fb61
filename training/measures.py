"""The figures of a run as plain JSON: what `metrics.json` holds, and the pure functions that compute it from arrays.

N rows, L categories. A row without a category has `true` < 0, one without a complexity has nan. Intervals are the
middle 95 % of 1,000 bootstrap samples of the rows. Whatever cannot be computed is null, never nan.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from training import apgr
from training.apgr import RESAMPLES, Floats

Ints = NDArray[np.int64]
BINS = 10
LENGTHS = (0, 16, 32, 64, 128, 256, 512, 1024)  # tokens; the last bin has no end
POINTS = 100  # steps of a stored curve


class Estimate(TypedDict):
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Bin(TypedDict):
    """One bar of a reliability diagram: mean predicted probability, and how often it came true."""

    rows: int
    predicted: float | None
    happened: float | None


class Slice(TypedDict):
    """Accuracy over some of the rows."""

    name: str
    rows: int
    accuracy: float
    standard_error: float


class ClassFigures(TypedDict):
    category: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


class Abstention(TypedDict):
    """What taking `label` where the best probability is below `below` does."""

    label: str
    below: float
    share: float  # of rows abstained on
    accuracy_of_rest: float | None
    accuracy: float  # of all rows, with `label` in place of the categories abstained from


class CategoryBaseline(TypedDict):
    accuracy: Estimate
    macro_f1: Estimate
    standard_error: float


class CategoryFigures(CategoryBaseline):
    """Over the rows that have a category; macro-F1 is the mean over the categories that occur among them."""

    rows: int
    ece_before: float  # before temperature
    ece: float
    bins_before: list[Bin]
    bins: list[Bin]
    classes: list[ClassFigures]
    confusion: list[list[int]]  # [L][L], true by predicted
    by_length: list[Slice]
    by_kind: list[Slice]
    abstention: Abstention | None
    baselines: dict[str, CategoryBaseline]


class ComplexityFigures(TypedDict):
    """Over the rows that have a complexity; a row is complex from 0.5 on."""

    rows: int
    auc: float | None
    accuracy: float
    ece: float
    bins: list[Bin]
    baselines: dict[str, float | None]  # AUC


class SetFigures(TypedDict):
    name: str
    rows: int
    labels: list[str]
    category: CategoryFigures | None
    complexity: ComplexityFigures | None


class Perturbed(TypedDict):
    accuracy: float | None
    standard_error: float | None
    changed: float  # share of rows whose category differs from that of the text as written
    complexity_shift: float | None  # mean absolute change


class Routed(TypedDict):
    """One score on one pair of models."""

    apgr: Estimate
    calls_for_half: float  # CPT(50 %): least share of strong calls that recovers half the gap
    calls_for_most: float  # CPT(80 %)
    quality: list[float]  # at shares 0, 1/POINTS, ... 1
    lead: Estimate | None  # APGR of ours minus this one's, over paired samples; None for ours


class Pair(TypedDict):
    """Routing between two models on the rows of a set that both were graded on; `scores` begins with ours."""

    weak: str
    strong: str
    set: str
    rows: int
    weak_quality: float
    strong_quality: float
    scores: dict[str, Routed]


class Export(TypedDict):
    """One form of the exported network; milliseconds are p50 by tokens, "16", "32", "128"."""

    precision: str
    megabytes: float
    milliseconds: dict[str, float]
    accuracy: float | None
    auc: float | None


class Source(TypedDict):
    """Data by origin; `rows` by split."""

    name: str
    rows: dict[str, int]
    digest: str
    licence: str
    used_for: str


class Metrics(TypedDict, total=False):
    """Everything `metrics.json` may hold; the report leaves out what is absent or empty."""

    id: str
    created: str
    machine: str
    versions: dict[str, str]
    base: str
    settings: dict[str, Any]
    sources: list[Source]
    sets: list[SetFigures]
    robustness: dict[str, dict[str, Perturbed]]  # by set, by perturbation
    pairs: list[Pair]
    exports: list[Export]
    history: list[dict[str, float]]  # one record an epoch; keys with "loss" in them are drawn apart
    ours: str  # what our row is called beside the baselines
    limits: list[str]  # sentences for the model card, beside those it always holds


def evaluate_set(
    name: str,
    labels: Sequence[str],
    true: Ints,
    logits: Floats,
    probabilities: Floats,
    *,
    complexity: Floats | None = None,
    true_complexity: Floats | None = None,
    tokens: Ints | None = None,
    kinds: Sequence[str | None] | None = None,
    abstention: tuple[str, float] | None = None,
    baselines: Mapping[str, Ints] | None = None,
    complexity_baselines: Mapping[str, Floats] | None = None,
) -> SetFigures:
    """Figures of both heads on one set.

    `true` [N] places in `labels`, category `logits` and calibrated `probabilities` [N, L], `complexity` and
    `true_complexity` [N] probabilities, `tokens` [N] before any cut, `abstention` label and threshold, `baselines` the
    places in `labels` each predicts [N], `complexity_baselines` scores [N].
    """
    known = np.asarray(true) >= 0
    category = None
    if known.any():
        category = category_figures(
            labels,
            np.asarray(true)[known],
            np.asarray(logits)[known],
            np.asarray(probabilities)[known],
            None if tokens is None else np.asarray(tokens)[known],
            None if kinds is None else [kind for kind, keep in zip(kinds, known, strict=True) if keep],
            abstention,
            {key: np.asarray(predicted)[known] for key, predicted in (baselines or {}).items()},
        )
    graded = None
    if complexity is not None and true_complexity is not None and (has := ~np.isnan(true_complexity)).any():
        others = {key: np.asarray(score)[has] for key, score in (complexity_baselines or {}).items()}
        graded = complexity_figures(np.asarray(complexity)[has], np.asarray(true_complexity)[has], others)
    return {"name": name, "rows": len(known), "labels": list(labels), "category": category, "complexity": graded}


def category_figures(
    labels: Sequence[str],
    true: Ints,
    logits: Floats,
    probabilities: Floats,
    tokens: Ints | None,
    kinds: Sequence[str | None] | None,
    abstention: tuple[str, float] | None,
    baselines: Mapping[str, Ints],
) -> CategoryFigures:
    predicted = probabilities.argmax(1)
    raw = np.exp(logits - logits.max(1, keepdims=True))
    raw /= raw.sum(1, keepdims=True)
    before = reliability(raw.max(1), raw.argmax(1) == true)
    after = reliability(probabilities.max(1), predicted == true)
    counts = confusion(true, predicted, len(labels))
    return {
        **category_baseline(true, predicted, len(labels)),
        "rows": len(true),
        "ece_before": calibration_error(before),
        "ece": calibration_error(after),
        "bins_before": before,
        "bins": after,
        "classes": class_figures(labels, counts),
        "confusion": counts.tolist(),
        "by_length": [] if tokens is None else by_length(predicted == true, tokens),
        "by_kind": [] if kinds is None else by_kind(predicted == true, kinds),
        "abstention": abstention and abstained(labels, true, probabilities, *abstention),
        "baselines": {name: category_baseline(true, found, len(labels)) for name, found in baselines.items()},
    }


def category_baseline(true: Ints, predicted: Ints, labels: int) -> CategoryBaseline:
    """Accuracy and macro-F1 of `predicted` [N]; a prediction that is no label (< 0) is simply wrong.

    The rows enter both figures only by their cell of the confusion matrix, so that resampling rows is drawing the cells
    from a multinomial distribution.
    """
    counts = confusion(true, predicted, labels)
    n = len(true)
    draws = np.random.default_rng(0).multinomial(n, counts.ravel() / n, size=RESAMPLES)
    samples = draws.reshape(RESAMPLES, *counts.shape)
    accuracy = float((predicted == true).mean())
    return {
        "accuracy": _estimate(accuracy, np.trace(samples, axis1=1, axis2=2) / n),
        "macro_f1": _estimate(float(_macro_f1(counts)), _macro_f1(samples)),
        "standard_error": standard_error(accuracy, n),
    }


def confusion(true: Ints, predicted: Ints, labels: int) -> Ints:
    """How many rows of each true label (down) got each predicted one: [L, L + 1], the last column for no label.

    Without such rows it is [L, L].
    """
    wide = labels + int((predicted < 0).any())
    columns = np.where(predicted < 0, labels, predicted)
    return np.bincount(true * wide + columns, minlength=labels * wide).reshape(labels, wide)


def class_figures(labels: Sequence[str], counts: Ints) -> list[ClassFigures]:
    """Precision, recall and F1 of each label that occurs, from a confusion matrix [L, L]; null for 0 / 0."""
    found: list[ClassFigures] = []
    for i, label in enumerate(labels):
        right, rows, named = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        if rows or named:
            recall, precision = (right / rows if rows else None), (right / named if named else None)
            f1 = 2 * right / (rows + named)
            found.append({"category": label, "rows": rows, "precision": precision, "recall": recall, "f1": f1})
    return found


def reliability(probability: Floats, happened: NDArray[Any]) -> list[Bin]:
    """BINS bins of equal width over `probability` [N]; `happened` [N] is 0 or 1, or a probability itself."""
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins: list[Bin] = []
    for i in range(BINS):
        here = place == i
        rows = int(here.sum())
        predicted, true = (float(values[here].mean()) if rows else None for values in (probability, happened))
        bins.append({"rows": rows, "predicted": predicted, "happened": true})
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the bins' gaps, weighted by rows (Naeini et al. 2015)."""
    gaps = [
        b["rows"] * abs(b["predicted"] - b["happened"])
        for b in bins
        if b["predicted"] is not None and b["happened"] is not None
    ]
    return sum(gaps) / sum(b["rows"] for b in bins)


def by_length(right: NDArray[np.bool_], tokens: Ints) -> list[Slice]:
    """Accuracy by tokens, in bins that double; empty bins left out."""
    bounds = [*zip(LENGTHS, [*LENGTHS[1:], None], strict=True)]
    names = [f"{low}-{high - 1}" if high else f"{low}+" for low, high in bounds]
    place = np.digitize(tokens, LENGTHS[1:])
    return [_slice(name, right[place == i]) for i, name in enumerate(names) if (place == i).any()]


def by_kind(right: NDArray[np.bool_], kinds: Sequence[str | None]) -> list[Slice]:
    """Accuracy by kind, by name; rows without one left out."""
    named = np.array([kind or "" for kind in kinds])
    return [_slice(kind, right[named == kind]) for kind in sorted({kind for kind in kinds if kind})]


def abstained(labels: Sequence[str], true: Ints, probabilities: Floats, label: str, below: float) -> Abstention:
    """What it does to take `label` where the highest of `probabilities` [N, L] is under `below`."""
    unsure, predicted = probabilities.max(1) < below, probabilities.argmax(1)
    taken = np.where(unsure, list(labels).index(label), predicted)
    return {
        "label": label,
        "below": below,
        "share": float(unsure.mean()),
        "accuracy_of_rest": None if unsure.all() else float((predicted == true)[~unsure].mean()),
        "accuracy": float((taken == true).mean()),
    }


def complexity_figures(predicted: Floats, true: Floats, baselines: Mapping[str, Floats]) -> ComplexityFigures:
    """Both [N]; the calibration error is against the soft labels, AUC and accuracy against them cut at 0.5."""
    bins = reliability(predicted, true)
    return {
        "rows": len(true),
        "auc": auc(true >= 0.5, predicted),
        "accuracy": float(((predicted >= 0.5) == (true >= 0.5)).mean()),
        "ece": calibration_error(bins),
        "bins": bins,
        "baselines": {name: auc(true >= 0.5, score) for name, score in baselines.items()},
    }


def auc(true: NDArray[np.bool_], score: Floats) -> float | None:
    """Area under the ROC curve; None when all rows are alike."""
    return float(roc_auc_score(true, score)) if 0 < true.sum() < len(true) else None


def robustness(
    true: Ints,
    plain: tuple[Floats, Floats | None],
    perturbed: Mapping[str, tuple[Floats, Floats | None]],
) -> dict[str, Perturbed]:
    """What perturbing the texts does; each pair is probabilities [N, L] and complexity [N] (or None)."""
    known = np.asarray(true) >= 0

    def against(probabilities: Floats, complexity: Floats | None) -> Perturbed:
        right = (probabilities.argmax(1) == true)[known]
        accuracy = float(right.mean()) if known.any() else None
        shift = None if complexity is None or plain[1] is None else float(np.abs(complexity - plain[1]).mean())
        return {
            "accuracy": accuracy,
            "standard_error": None if accuracy is None else standard_error(accuracy, len(right)),
            "changed": float((probabilities.argmax(1) != plain[0].argmax(1)).mean()),
            "complexity_shift": shift,
        }

    return {"as written": against(*plain)} | {name: against(*found) for name, found in perturbed.items()}


def pair(
    weak: str,
    strong: str,
    set: str,
    grades: tuple[Floats, Floats],
    ours: tuple[str, Floats],
    baselines: Mapping[str, Floats],
) -> Pair | None:
    """Routing between models `weak` and `strong` with their `grades` [N] by our named score [N] and the others.

    None when the strong model is not the better one on these rows: then there is nothing to recover.
    """
    known = (np.asarray(grades[0], float), np.asarray(grades[1], float))
    if not apgr.has_gap(*known):
        return None
    samples = {name: apgr.resampled(score, *known) for name, score in {ours[0]: ours[1], **baselines}.items()}

    def routed(name: str, score: Floats) -> Routed:
        value = apgr.apgr(score, *known)
        lead = _estimate(apgr.apgr(ours[1], *known) - value, samples[ours[0]] - samples[name])
        return {
            "apgr": _estimate(value, samples[name]),
            "calls_for_half": apgr.calls_needed(score, *known, 0.5),
            "calls_for_most": apgr.calls_needed(score, *known, 0.8),
            "quality": np.interp(np.linspace(0, 1, POINTS + 1), *apgr.curve(score, *known)).tolist(),
            "lead": None if name == ours[0] else lead,
        }

    return {
        "weak": weak,
        "strong": strong,
        "set": set,
        "rows": len(known[0]),
        "weak_quality": float(known[0].mean()),
        "strong_quality": float(known[1].mean()),
        "scores": {ours[0]: routed(*ours)} | {name: routed(name, score) for name, score in baselines.items()},
    }


def plain(value: Any) -> Any:
    """`value` with numpy's numbers as Python's and nan and infinity as None, fit for strict JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def standard_error(accuracy: float, rows: int) -> float:
    """Of a share over `rows` independent rows."""
    return math.sqrt(accuracy * (1 - accuracy) / rows)


def _slice(name: str, right: NDArray[np.bool_]) -> Slice:
    accuracy = float(right.mean())
    return {
        "name": name,
        "rows": len(right),
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(right)),
    }


def _macro_f1(counts: NDArray[Any]) -> NDArray[Any]:
    """Mean F1 over the labels that occur, of confusion matrices [..., L, L or L + 1]: [...]."""
    labels = counts.shape[-2]
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    rows, named = counts.sum(-1), counts.sum(-2)[..., :labels]
    f1 = 2 * right / np.maximum(rows + named, 1)
    return np.where(rows > 0, f1, 0).sum(-1) / (rows > 0).sum(-1)


def _estimate(value: float, samples: Floats) -> Estimate:
    low, high = apgr.interval(samples)
    return {"value": value, "low": low, "high": high}
