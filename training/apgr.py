"""What routing between a weak and a strong model is worth, as RouteLLM measures it (Ong et al. 2024, arXiv 2406.18665).

All arrays are [N], one entry for each prompt: `score` (the higher, the sooner the prompt goes to the strong model),
`weak` and `strong` (1 where that model is right, 0 where it is wrong, or a grade between). PGR is the part of the gap
between the two models' mean quality that is recovered at some share of strong calls; APGR is its mean over all shares,
0.5 for a coin. Prompts with equal scores count as if they came in every order equally often, so that a constant score
is the coin exactly.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000


class NoGap(ValueError):
    """The strong model is not better than the weak one on these prompts, so there is no gap to recover."""


def curve(score: Floats, weak: Floats, strong: Floats) -> tuple[Floats, Floats]:
    """Shares of strong calls, 0 to 1 in N steps, and the mean quality at each: both [N + 1]."""
    ties, gain = _ties(score), _floats(strong) - _floats(weak)
    expected = (np.bincount(ties, gain) / np.bincount(ties))[ties]  # the mean gain of a row's equals
    gained = np.concatenate([[0.0], np.cumsum(expected[np.argsort(-ties, kind="stable")])])
    return np.linspace(0, 1, len(gain) + 1), _floats(weak).mean() + gained / len(gain)


def recovered(score: Floats, weak: Floats, strong: Floats) -> tuple[Floats, Floats]:
    """Shares of strong calls and the PGR at each, both [N + 1]; raises NoGap."""
    shares, quality = curve(score, weak, strong)
    if not has_gap(weak, strong):
        raise NoGap(f"mean quality {np.mean(strong):.3f} of the strong model, {np.mean(weak):.3f} of the weak one")
    return shares, (quality - quality[0]) / (quality[-1] - quality[0])


def has_gap(weak: Floats, strong: Floats) -> bool:
    """Whether the strong model is better on the whole; without that neither PGR nor APGR is defined."""
    return bool(len(weak) and np.mean(strong) - np.mean(weak) > 1e-9)


def apgr(score: Floats, weak: Floats, strong: Floats) -> float:
    """The area under the PGR; raises NoGap."""
    shares, pgr = recovered(score, weak, strong)
    return float(np.trapezoid(pgr, shares))


def oracle(weak: Floats, strong: Floats) -> Floats:
    """The best score there is, the gain itself [N]; its APGR exceeds 1 when the weak model is sometimes the better."""
    return _floats(strong) - _floats(weak)


def calls_needed(score: Floats, weak: Floats, strong: Floats, part: float) -> float:
    """CPT: the least share of strong calls that recovers this `part` of the gap, 0 to 1; raises NoGap."""
    shares, pgr = recovered(score, weak, strong)
    after = int(np.argmax(pgr >= part - 1e-9))
    if after == 0:
        return 0.0
    return float(np.interp(part, pgr[after - 1 : after + 1], shares[after - 1 : after + 1]))


def resampled(score: Floats, weak: Floats, strong: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """The APGR of `resamples` bootstrap samples of the prompts: [resamples], nan for a sample without a gap.

    The same seed and N draw the same samples, so two scores' results can be subtracted pair by pair. With p the share
    of prompts placed below one's own (equals count half), the APGR is the mean of p weighted by the gain.
    """
    if not has_gap(weak, strong):
        raise NoGap("the strong model is not better than the weak one")
    ties, gain = _ties(score), _floats(strong) - _floats(weak)
    draw, n, distinct = np.random.default_rng(seed), len(gain), int(ties.max()) + 1
    found = np.full(resamples, np.nan)
    for i in range(resamples):
        rows = draw.integers(n, size=n)
        count = np.bincount(ties[rows], minlength=distinct)
        gained = np.bincount(ties[rows], gain[rows], minlength=distinct)
        if (total := gained.sum()) > 1e-9:
            found[i] = (gained * (count.cumsum() - count / 2)).sum() / n / total
    return found


def interval(values: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrap `values`, nan left out."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def apgr_interval(score: Floats, weak: Floats, strong: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the APGR over prompts; raises NoGap."""
    return interval(resampled(score, weak, strong, seed=seed))


def difference(ours: Floats, other: Floats, weak: Floats, strong: Floats, seed: int = 0) -> tuple[float, float, float]:
    """APGR of `ours` minus that of `other`, and its 95 % interval over the same (paired) samples; raises NoGap."""
    low, high = interval(resampled(ours, weak, strong, seed=seed) - resampled(other, weak, strong, seed=seed))
    return apgr(ours, weak, strong) - apgr(other, weak, strong), low, high


def _ties(score: Floats) -> NDArray[np.int64]:
    """The place of each score among the distinct ones, the lowest 0: [N]."""
    if not np.isfinite(score).all():
        raise ValueError("a score that is not finite")
    return np.unique(score, return_inverse=True)[1]


def _floats(values: Floats) -> Floats:
    return np.asarray(values, dtype=np.float64)
