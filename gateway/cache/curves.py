"""Decision curves: from which score on a cached answer is served, learned for each entry from what was observed.

A proposal is a cached answer for a new question, with a score x: log-odds, calibrated offline, that the answer serves
the new question, too. Entry e is right with P(right | x, e) = sigmoid(gamma * (x - t_e)), as in vCache (arXiv
2502.03771); gamma and the distribution of t_e are common to all entries. All of it is Bayes on a fixed grid:

- population: t_e is drawn from a Student-t distribution around mu with scale sigma. The posterior of (gamma, mu, sigma)
  begins with PSEUDO_OBSERVATIONS that go as the offline calibration says, P(right | x) = sigmoid(x), for x between -4
  and 4, and takes in the marginal likelihood of each entry's observations;
- entry: the population's distribution of (gamma, t) times the likelihood of the entry's own newest observations. The
  posterior mean of P(wrong | x, e) is the predicted error. It falls with x: an entry is served from one score on.

The limit is on the average error of what is served. Of all rules with some average, the one that serves most serves
what has a predicted error of at most one cut, the same for all entries. So no bound is put on what is known of an
entry: doubts about many of them average out. What does not is put on the cut. It is the largest for which the error of
those of the last MAX_PROPOSALS that it serves is at most `max_error_rate`: the mean of the predicted errors, and the
greater of

- DOUBT standard deviations of what is known of the population;
- what was wrong beyond the predictions, of the last MAX_MEASURED measured hits that the cut would serve again: each
  predicted without itself, PSEUDO_MEASURED ones added that were as predicted.

Until something is observed, the cut is the predicted error at the offline threshold; with n observations and
proposals, the geometric mean of the two, weighted n to PSEUDO_OBSERVATIONS. It is at most WORST (or where it began, if
higher). And when the limit was broken beyond doubt, it is divided by how much: `error().low / max_error_rate`.

A hit is measured with a probability that depends on nothing but score and entry. So likelihoods, which are given both,
need no weights, and would be too sure with them; weights are for averages over hits. Verdicts that come because an
answer was bad, as those of users do, are no observations in this sense.

What is known depends on the set of observations, not on their order, as far as `at` tells the newest and nothing is
forgotten in between. An entry's own are in force at once; those of others with every REFRESHth, the first ones sooner.
Of replicas with the same observations and proposals, one may be that far behind another.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gateway.cache import Vector

Floats = NDArray[np.float64]

PSEUDO_OBSERVATIONS = 100.0  # that the offline calibration is worth
PSEUDO_MEASURED = 400.0  # hits that the predictions are worth
DOUBT = 1.0
WORST = 0.2
MAX_OWN = 64  # observations of an entry
MAX_PROPOSALS = 1024
MAX_MEASURED = 1024
REFRESH = 256

LOWEST, HIGHEST, WIDTH = -10.0, 10.0, 1 / 16  # scores of likelihoods: rounded to these
COARSE = 4  # every so many of them is enough for a curve
SIGMAS = (0.25, 0.5, 1.0, 2.0)
TAILS = 4.0  # degrees of freedom of t_e: few, since some entries are hardly ever right
LEAST = 1e-30  # of what a logarithm is taken of


@dataclass(frozen=True, slots=True)
class Observation:
    """Whether a cached answer serves a new question. Raises `ValueError` when the weight is not 1 / a probability."""

    key: str  # of the cached answer
    score: float
    right: bool
    served: bool
    weight: float = 1.0  # 1 / probability with which it was sampled
    at: float = 0.0  # seconds; the newest are kept, of equal ones those that came last

    def __post_init__(self) -> None:
        if not 1 <= self.weight < math.inf:
            raise ValueError(f"weight: {self.weight} is not 1 / a probability")


@dataclass(frozen=True, slots=True)
class ErrorEstimate:
    """The share of wrong answers among served hits, with its 95 % interval."""

    rate: float  # 0 when nothing was measured
    low: float
    high: float
    observations: int


@dataclass(frozen=True, slots=True)
class _Grid:
    """X scores, G pairs of (gamma, t), H pairs of (mu, sigma)."""

    log_right: Vector  # (X, G), of P(right | x, gamma, t)
    log_wrong: Vector  # (X, G)
    wrong: Vector  # (X, G)
    odds: Vector  # (X, G): P(wrong) / P(right)
    scores: Floats  # (C,): of the curves, X / COARSE
    curve: Vector  # (C, G): those rows of `wrong`
    marginal: Vector  # (C, gamma * H): P(wrong | x, gamma, mu, sigma)
    kernel: Vector  # (H, t): P(t | mu, sigma)
    log_prior: Floats  # (gamma, H)


@cache
def _grid() -> _Grid:
    scores = np.arange(LOWEST, HIGHEST + WIDTH / 2, WIDTH)
    gamma, t = 2 ** np.linspace(-1, 1, 21), np.arange(-6, 10.5, 0.5)
    mu, sigma = (axis.reshape(-1, 1) for axis in np.meshgrid(np.arange(-4, 6.1, 0.125), SIGMAS))
    kernel = (1 + ((t - mu) / sigma) ** 2 / TAILS) ** (-(TAILS + 1) / 2)
    kernel /= kernel.sum(axis=1, keepdims=True)
    logits = np.clip(gamma[:, None] * (scores[:, None, None] - t), -40, 40)  # (X, gamma, t)
    offline = (np.abs(scores) <= 4).nonzero()[0]
    right, marginal = _sigmoid(scores[offline])[:, None, None], _sigmoid(logits[offline]) @ kernel.T  # (x, gamma, H)
    log_prior = np.mean(right * np.log(marginal) + (1 - right) * np.log1p(-marginal), axis=0)
    wrong = _sigmoid(-logits)
    logits = logits.reshape(len(scores), -1)
    return _Grid(
        log_right=_single(-np.logaddexp(0, -logits)),
        log_wrong=_single(-np.logaddexp(0, logits)),
        wrong=_single(wrong.reshape(logits.shape)),
        odds=_single(np.exp(-logits)),
        scores=scores[::COARSE],
        curve=_single(wrong.reshape(logits.shape)[::COARSE]),
        marginal=_single((wrong[::COARSE] @ kernel.T).reshape(len(scores[::COARSE]), -1)),
        kernel=_single(kernel),
        log_prior=PSEUDO_OBSERVATIONS * log_prior,
    )


def _single(values: Floats) -> Vector:
    return np.asarray(values, np.float32)


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)))


def _row(score: float) -> int:
    """Of the nearest score of the grid; NaN is as bad as can be."""
    return round((min(HIGHEST, max(LOWEST, score)) - LOWEST) / WIDTH)


@dataclass(slots=True, eq=False)
class _Entry:
    own: list[_Seen] = field(default_factory=list)  # oldest first
    fit: Vector | None = None  # (G,): log-likelihood of `own` less the greatest; None: there are none
    threshold: float = math.inf
    version: int = -1  # of the curves, when `threshold` was found


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    observation: Observation
    entry: _Entry
    row: int
    place: int  # in the order of arrival

    def __lt__(self, other: _Seen) -> bool:
        return (self.observation.at, self.place) < (other.observation.at, other.place)


class Curves:
    """Which proposals are served. Raises `ValueError` for settings that cannot be. Not for several threads at once.

    Arguments:
        threshold: score that keeps the limit offline; it alone decides until something is observed
        floor: score below which nothing is served
        max_error_rate: the share of what is served that may be wrong
        max_observations: that are kept; each takes at most 4 KB, and far less where entries have many
    """

    def __init__(
        self, *, threshold: float, floor: float, max_error_rate: float, max_observations: int = 20_000
    ) -> None:
        if not floor <= threshold:
            raise ValueError(f"floor: {floor} is above the threshold, {threshold}")
        if not 0 < max_error_rate < 1:
            raise ValueError(f"max_error_rate: {max_error_rate} is not between 0 and 1")
        if max_observations < 1:
            raise ValueError(f"max_observations: {max_observations} is less than 1")
        self._floor, self._limit, self._max_observations = floor, max_error_rate, max_observations
        self._grid = _grid()
        self._entries: dict[str, _Entry] = {}  # with observations
        self._seen: list[_Seen] = []  # a heap, oldest first
        self._measured: list[_Seen] = []  # the newest served ones, oldest first
        self._sums = np.zeros(4)  # of all served ones: number, weights, weights of wrong ones, squares of weights
        self._proposals: deque[tuple[str, int]] = deque(maxlen=MAX_PROPOSALS)  # keys, rows
        self._arrived = self._unused = self._version = 0
        self._evidence = self._grid.log_prior.copy()  # (gamma, H): log-posterior up to a constant
        self._log_prior = self._population()  # (G,)
        self._threshold = threshold
        first_errors = np.log(self._grid.curve @ self._posterior(None))
        self._first_cut = self._cut = math.exp(np.interp(threshold, self._grid.scores, first_errors))

    @property
    def threshold_now(self) -> float:
        """The score from which on entries without observations are served; infinite when none is good enough."""
        return self._threshold

    def serves(self, key: str, score: float) -> bool:
        """Whether to serve this entry for a question. Counts as a proposal: ask once, for the best candidate."""
        self._proposals.append((key, _row(score)))
        return score >= self._threshold_of(key)

    def decide(self, keys: Sequence[str], scores: Vector) -> NDArray[np.bool_]:
        """(n,): which of n candidates may be served. Counts as no proposal, since of these a question has one."""
        return np.asarray(scores >= np.fromiter(map(self._threshold_of, keys), np.float64, len(keys)))

    def predicted_error(self, key: str, score: float) -> float:
        """P(wrong | score, entry), as far as is known."""
        entry = self._entries.get(key)
        return float(self._grid.wrong[_row(score)] @ self._posterior(entry.fit if entry else None))

    def error(self) -> ErrorEstimate:
        """As measured on served hits; the interval is that of as many equally weighted ones as tell as much (Kish)."""
        number, weights, wrong, squares = map(float, self._sums)
        if not number:
            return ErrorEstimate(0.0, 0.0, 1.0, 0)
        rate, effective = min(1.0, max(0.0, wrong / weights)), weights**2 / squares
        return ErrorEstimate(rate, *clopper_pearson(rate * effective, effective), int(number))

    def observe(self, observation: Observation) -> None:
        """Take it into account; takes about ten milliseconds when it is the REFRESHth, a tenth of one otherwise."""
        entry = self._entries.setdefault(observation.key, _Entry())
        seen = _Seen(observation, entry, _row(observation.score), self._arrived)
        self._arrived += 1
        self._unused += 1
        heapq.heappush(self._seen, seen)
        self._add(seen)
        if len(self._seen) > self._max_observations:
            self._drop(heapq.heappop(self._seen))
        if self._unused >= min(REFRESH, 1 + len(self._seen) // 8):
            self._refresh()

    def _add(self, seen: _Seen) -> None:
        self._learn(seen.entry, _with(seen.entry.own, seen, MAX_OWN))
        if seen.observation.served:
            self._sums += _summands(seen.observation)
            self._measured = _with(self._measured, seen, MAX_MEASURED)

    def _drop(self, seen: _Seen) -> None:
        """Forget the oldest observation."""
        self._learn(seen.entry, _without(seen.entry.own, seen))
        if not seen.entry.own:
            del self._entries[seen.observation.key]
        if seen.observation.served:
            self._sums -= _summands(seen.observation)
            self._measured = _without(self._measured, seen)

    def _learn(self, entry: _Entry, own: list[_Seen]) -> None:
        """Have the entry's observations be `own`, for itself and for the population."""
        self._evidence -= self._marginal(entry.fit)
        entry.own, entry.fit, entry.version = own, self._likelihood(own), -1
        self._evidence += self._marginal(entry.fit)

    def _likelihood(self, own: list[_Seen]) -> Vector | None:
        """(G,): its logarithm, less the greatest."""
        if not own:
            return None
        right = [seen.row for seen in own if seen.observation.right]
        wrong = [seen.row for seen in own if not seen.observation.right]
        fit = self._grid.log_right[right].sum(axis=0) + self._grid.log_wrong[wrong].sum(axis=0)
        return np.asarray(fit - fit.max())

    def _marginal(self, fit: Vector | None) -> Floats | float:
        """(gamma, H): log-likelihood of an entry's observations with its t unknown, up to a constant."""
        if fit is None:
            return 0.0
        likelihood = np.exp(fit).reshape(len(self._evidence), -1)  # (gamma, t)
        return np.asarray(np.log(np.maximum(likelihood @ self._grid.kernel.T, LEAST)), np.float64)

    def _hyperposterior(self) -> Vector:
        """(gamma, H)"""
        posterior = np.exp(self._evidence - self._evidence.max())
        return _single(posterior / posterior.sum())

    def _population(self) -> Vector:
        """(G,): log P(gamma, t) for an entry that nothing is known of."""
        return _single(np.log(np.maximum(self._hyperposterior() @ self._grid.kernel, LEAST))).ravel()

    def _posterior(self, fit: Vector | None) -> Vector:
        """(..., G): P(gamma, t) for entries with these log-likelihoods, (..., G)."""
        logs = self._log_prior if fit is None else self._log_prior + fit
        posterior = np.exp(logs - logs.max(axis=-1, keepdims=True))
        return np.asarray(posterior / posterior.sum(axis=-1, keepdims=True))

    def _posteriors(self, entries: Sequence[_Entry | None]) -> Vector:
        """(entries, G)"""
        nothing = np.zeros_like(self._log_prior)
        return self._posterior(
            np.stack([nothing if entry is None or entry.fit is None else entry.fit for entry in entries])
        )

    def _threshold_of(self, key: str) -> float:
        entry = self._entries.get(key)
        if entry is None:
            return self._threshold
        if entry.version != self._version:
            entry.threshold, entry.version = self._find_threshold(entry.fit), self._version
        return entry.threshold

    def _find_threshold(self, fit: Vector | None) -> float:
        """The lowest score whose predicted error is at most the cut, and that is not below the floor."""
        rising = -np.log(self._grid.curve @ self._posterior(fit))
        return max(self._floor, float(np.interp(-math.log(self._cut), rising, self._grid.scores, -math.inf, math.inf)))

    def _refresh(self) -> None:
        """Put in force what is known of the population, and the cut that follows."""
        self._unused = 0
        self._version += 1
        self._log_prior = self._population()
        self._cut = self._find_cut()
        self._threshold = self._find_threshold(None)

    def _find_cut(self) -> float:
        n = min(len(self._seen), len(self._proposals))
        trust = n / (n + PSEUDO_OBSERVATIONS)
        cut = self._first_cut ** (1 - trust) * self._largest_cut() ** trust if n else self._first_cut
        return min(cut, max(WORST, self._first_cut)) / max(1.0, self.error().low / self._limit)

    def _largest_cut(self) -> float:
        """The largest that keeps the limit in the latest proposals."""
        entries = [self._entries.get(key) for key, _ in self._proposals]
        rows = [row for _, row in self._proposals]
        cuts = np.sort(np.einsum("pg,pg->p", self._posteriors(entries), self._grid.wrong[rows]))
        mean, doubt, excess = np.cumsum(cuts) / np.arange(1, len(cuts) + 1), self._doubt(cuts), self._excess(cuts)
        kept = np.flatnonzero(mean + np.maximum(mean * doubt, excess) <= self._limit)
        last = kept[-1] if len(kept) else 0
        single = min(self._limit / (1 + doubt[last]), self._limit - excess[last])  # if all may have it, each may
        return float(max(self._limit / 100, single, cuts[last] if len(kept) else 0))

    def _doubt(self, cuts: Vector) -> Floats:
        """(cuts,): relative, the population's at the score where that is predicted for it."""
        posterior = self._hyperposterior().ravel()
        mean = self._grid.marginal @ posterior
        spread = np.sqrt(np.maximum(0, self._grid.marginal**2 @ posterior - mean**2))
        return np.asarray(DOUBT * np.interp(-cuts, -mean, spread / mean))

    def _excess(self, cuts: Vector) -> Floats:
        """(cuts,): share of wrong ones beyond the predicted, of the measured hits that each cut would serve again."""
        if not self._measured:
            return np.zeros(len(cuts))
        errors = self._errors_unseen()
        order = np.argsort(errors)
        weights = np.array([seen.observation.weight for seen in self._measured], np.float64)
        weights *= weights.sum() / (weights**2).sum()  # their sum is the effective number
        wrong = np.array([not seen.observation.right for seen in self._measured])
        served = np.searchsorted(errors[order], cuts, side="right")
        number, beyond = (
            np.append(0, np.cumsum(sums[order]))[served] for sums in (weights, weights * (wrong - errors))
        )
        return np.asarray(np.maximum(0, beyond) / (PSEUDO_MEASURED + number))

    def _errors_unseen(self) -> Floats:
        """(measured,): predicted for each measured hit from the other observations of its entry.

        That is, with the posterior divided by the likelihood of the hit itself, which is 1 / (1 + odds) or
        1 / (1 + 1 / odds): the odds are E[odds] without a right answer, and 1 / E[1 / odds] without a wrong one.
        """
        posterior = self._posteriors([seen.entry for seen in self._measured])
        rows = [seen.row for seen in self._measured]
        right = np.array([seen.observation.right for seen in self._measured])
        own = np.array([bool(seen.entry.own) and not seen < seen.entry.own[0] for seen in self._measured])
        odds = self._grid.odds[rows]
        mean = np.einsum("mg,mg->m", posterior, np.where(right[:, None], odds, 1 / odds))
        errors = np.einsum("mg,mg->m", posterior, self._grid.wrong[rows])
        return np.asarray(np.where(own, np.where(right, mean, 1) / (1 + mean), errors), np.float64)


def _with(ordered: list[_Seen], seen: _Seen, at_most: int) -> list[_Seen]:
    insort(ordered, seen)
    return ordered[-at_most:]


def _without(ordered: list[_Seen], oldest: _Seen) -> list[_Seen]:
    """Unless newer ones have taken its place before."""
    return ordered[1:] if ordered and ordered[0] is oldest else ordered


def _summands(observation: Observation) -> Floats:
    weight = observation.weight
    return np.array([1, weight, 0 if observation.right else weight, weight**2])


def clopper_pearson(wrong: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share after `wrong` of `n`, which may be fractions (Clopper and Pearson, Biometrika 1934)."""
    tail = (1 - confidence) / 2
    low = _beta_quantile(tail, wrong, n - wrong + 1) if wrong > 0 else 0.0
    high = _beta_quantile(1 - tail, wrong + 1, n - wrong) if wrong < n else 1.0
    return low, high


def _beta_quantile(share: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _beta(middle, a, b) < share else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, I_x(a, b)."""
    return _beta_fraction(x, a, b) if x < (a + 1) / (a + b + 2) else 1 - _beta_fraction(1 - x, b, a)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """I_x(a, b) for x < (a + 1) / (a + b + 2), as a continued fraction (DLMF 8.17.22) by Lentz's method."""
    scale = math.lgamma(a + b) - math.lgamma(a + 1) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d, step, m = 1.0, 1 / (1 - (a + b) * x / (a + 1)), 0.0, 0
    fraction = d
    while abs(step - 1) > 1e-12:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction *= (1 + even / c) / (1 + even * d)
        c, d = 1 + even / c, 1 / (1 + even * d)
        c, d = 1 + odd / c, 1 / (1 + odd * d)
        step = c * d
        fraction *= step
    return math.exp(scale) * fraction
