"""From scores of labelled pairs to what is served: for each error rate the score from which it surely holds.

Validation pairs are groups of look-alikes: half of what is asked of them are traps, which is far from what people ask.
An error rate is of hits when TRAPS_PER_REPEAT is how often a trap is asked for each repeat.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

Scores = NDArray[np.float64]
Labels = NDArray[np.bool_]

# Of Quora's questions with a neighbour at a cosine of 0.80 or more, 18 % have another meaning than it: 0.22 traps for
# each repeat, as its users measured static thresholds. Rounded up.
TRAPS_PER_REPEAT = 0.25
RATES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CONFIDENCE = 0.95
ALIKE = 0.95  # similarity from which questions in the same words are not verified
SIMILARITY_WEIGHT = 4.0  # log-odds for each unit of cosine: docs/training.md says how it was chosen
WORTH = 0.02  # error rate up to which the floor of similarity costs no more than LOST
LOST = 0.02  # share of the repeats served that a floor of similarity may cost


@dataclass(frozen=True)
class Point:
    """What a threshold serves of the pairs it was fitted on."""

    max_error_rate: float
    score: float
    repeats: float  # share of the true repeats that are served
    traps: float  # share of the traps
    traps_at_most: float  # with CONFIDENCE


def weighed(said: Scores, similarities: Scores, weight: float) -> Scores:
    """What the verifier said [N], less for what similarities [N] lack to 1: `gateway.contract.Verification.score`."""
    return said - weight * (1 - similarities)


def clopper_pearson(wrong: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The two-sided interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, wrong, n - wrong + 1) if wrong else 0.0
    high = beta.ppf(1 - tail, wrong + 1, n - wrong) if wrong < n else 1.0
    return float(low), float(high)


def upper(wrong: int, n: int) -> float:
    """The share is no higher, with CONFIDENCE: the one-sided bound."""
    return float(beta.ppf(CONFIDENCE, wrong + 1, n - wrong)) if wrong < n else 1.0


def points(scores: Scores, same: Labels, rates: Sequence[float] = RATES) -> list[Point]:
    """For each rate that can be kept, the lowest threshold that does; `scores` [N] and labels [N] of pairs."""
    repeats, traps = np.sort(scores[same]), np.sort(scores[~same])
    # From strict to lenient; what was not read is not served.
    candidates = np.unique(scores[np.isfinite(scores)])[::-1]
    served = 1 - np.searchsorted(repeats, candidates) / len(repeats)
    wrong = len(traps) - np.searchsorted(traps, candidates)
    bounds = np.array([upper(int(count), len(traps)) for count in wrong])
    error = TRAPS_PER_REPEAT * bounds / (TRAPS_PER_REPEAT * bounds + served)
    found = []
    for rate in rates:
        kept = np.flatnonzero(error <= rate)
        if len(kept):
            i = kept[-1]
            found.append(
                Point(rate, float(candidates[i]), float(served[i]), float(wrong[i]) / len(traps), float(bounds[i]))
            )
    return found


def floor(similarities: Scores, scores: Scores, same: Labels, threshold: float) -> float:
    """The similarity below which LOST of the repeats lie that are served at `threshold`, rounded down to hundredths."""
    served = similarities[same & (scores >= threshold)]
    return float(np.floor(100 * np.quantile(served, LOST)) / 100) if len(served) else 0.0


def verification(scores: Scores, similarities: Scores, same: Labels) -> dict[str, Any]:
    """What the gateway reads in the manifest of the weights, see `gateway.contract.Verification`."""
    found = points(scores, same)
    if not found:
        raise ValueError("no threshold keeps any of the error rates")
    wanted = [point for point in found if point.max_error_rate <= WORTH] or found[:1]
    lenient = max(wanted, key=lambda point: point.max_error_rate)
    return {
        "floor": floor(similarities, scores, same, lenient.score),
        "alike": ALIKE,
        "similarity_weight": SIMILARITY_WEIGHT,
        "thresholds": [asdict(point) for point in found],
        "repeats": int(same.sum()),
        "traps": int((~same).sum()),
        "confidence": CONFIDENCE,
        "traps_per_repeat": TRAPS_PER_REPEAT,
    }


def served(scores: Scores, same: Labels, threshold: float) -> dict[str, Any]:
    """What a threshold serves of other pairs: counts, shares, and their intervals."""
    hits, wrong = int((scores[same] >= threshold).sum()), int((scores[~same] >= threshold).sum())
    repeats, traps = int(same.sum()), int((~same).sum())
    return {
        "threshold": threshold,
        "repeats": repeats,
        "hits": hits,
        "hit_rate": hits / max(repeats, 1),
        "hit_interval": clopper_pearson(hits, repeats) if repeats else (0.0, 1.0),
        "traps": traps,
        "wrong": wrong,
        "wrong_rate": wrong / max(traps, 1),
        "wrong_interval": clopper_pearson(wrong, traps) if traps else (0.0, 1.0),
    }


def hits_at(scores: Scores, same: Labels, error: float) -> float:
    """The largest share of the repeats that a threshold serves while at most `error` of all that it serves is wrong."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(same[order])
    among = np.arange(1, len(order) + 1)
    last = np.append(scores[order][1:] != scores[order][:-1], True)  # thresholds cannot part equal scores
    kept = last & ((among - right) <= error * among)
    return float(right[kept].max() / max(same.sum(), 1)) if kept.any() else 0.0
