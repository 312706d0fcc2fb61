"""Decision curves: against integration, against the offline threshold, and in simulated traffic."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta

from gateway.cache.curves import (
    MAX_OWN,
    PSEUDO_OBSERVATIONS,
    SIGMAS,
    TAILS,
    Curves,
    ErrorEstimate,
    Observation,
    clopper_pearson,
)

Floats = NDArray[np.float64]

LIMIT = 0.01
THRESHOLD = 3.46  # keeps the limit where P(right | x) = sigmoid(x) and x ~ N(1.5, 3), as in `Traffic`
FLOOR = -2.0


def curves(threshold: float = THRESHOLD, floor: float = FLOOR, max_observations: int = 20_000) -> Curves:
    return Curves(threshold=threshold, floor=floor, max_error_rate=LIMIT, max_observations=max_observations)


def sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)))


def lowest_served(known: Curves, key: str) -> float:
    scores = np.arange(-8, 8, 0.01, dtype=np.float32)
    served = known.decide([key] * len(scores), scores)
    return float(scores[served][0]) if served.any() else math.inf


# The interval


@pytest.mark.parametrize("n", [1, 7.3, 50, 812.4, 20_000])
@pytest.mark.parametrize("share", [0, 1e-9, 0.003, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_is_that_of_scipy(n: float, share: float, confidence: float) -> None:
    wrong, tail = share * n, (1 - confidence) / 2
    low = beta.ppf(tail, wrong, n - wrong + 1) if wrong > 0 else 0
    high = beta.ppf(1 - tail, wrong + 1, n - wrong) if wrong < n else 1
    assert clopper_pearson(wrong, n, confidence) == pytest.approx((low, high), abs=1e-6)


def test_the_measured_error_is_weighted() -> None:
    known = curves()
    assert known.error() == ErrorEstimate(0.0, 0.0, 1.0, 0)
    for number in range(90):
        known.observe(Observation("a", 5.0, right=number >= 3, served=True, weight=10.0, at=number))
    known.observe(Observation("a", 5.0, right=False, served=True, weight=1.0, at=90))
    known.observe(Observation("a", 1.0, right=False, served=False, at=91))
    error, weights, squares = known.error(), 901.0, 9001.0
    assert error.rate == pytest.approx(31 / weights)
    assert (error.low, error.high) == clopper_pearson(31 * weights / squares, weights**2 / squares)
    assert error.observations == 91


# What is known


def integral(own: list[tuple[float, bool]], other: list[tuple[float, bool]], score: float) -> float:
    """P(wrong | score, entry) by sums much finer than the grid's, straight from the module's docstring."""
    t, mu = np.arange(-10, 14, 0.05), np.arange(-4, 6.01, 0.1)
    offline = np.linspace(-4, 4, 65)
    total = wrong = 0.0
    for gamma in 2 ** np.linspace(-1, 1, 21):
        for sigma in SIGMAS:
            density = (1 + ((t - mu[:, None]) / sigma) ** 2 / TAILS) ** (-(TAILS + 1) / 2)
            density /= density.sum(axis=1, keepdims=True)  # (mu, t)
            right = sigmoid(gamma * (offline[:, None] - t)) @ density.T  # (x, mu)
            as_offline = sigmoid(offline)[:, None]
            fit = np.mean(as_offline * np.log(right) + (1 - as_offline) * np.log1p(-right), axis=0)
            weight = np.exp(PSEUDO_OBSERVATIONS * (fit + 0.4))
            likelihoods = [
                np.prod([sigmoid((1 if right else -1) * gamma * (x - t)) for x, right in seen], axis=0)
                for seen in (own, other)
            ]
            for likelihood in likelihoods:
                weight *= density @ likelihood
            prior = weight @ density
            total += float(prior @ likelihoods[0])
            wrong += float(prior @ (likelihoods[0] * sigmoid(-gamma * (score - t))))
    return wrong / total


@pytest.mark.parametrize("score", [0.5, 2.0, 4.0])
def test_the_predicted_error_is_the_integral(score: float) -> None:
    own, other = [(1.0, True), (2.5, False), (3.0, False)], [(2.0, True), (-1.0, False)]
    known = curves()
    for key, seen in (("own", own), ("other", other)):
        for x, right in seen:
            known.observe(Observation(key, x, right, served=False))
    assert known.predicted_error("own", score) == pytest.approx(integral(own, other, score), rel=0.02)


def test_before_any_observation_the_threshold_decides() -> None:
    known = curves(threshold=2.3)
    for score in (-8.0, 2.2999, 2.3, 2.3001, 9.0):
        assert known.serves("a", score) == (score >= 2.3)
    assert not known.serves("a", math.nan)
    assert known.threshold_now == 2.3
    assert known.decide(["a", "b"], np.array([2.29, 2.31], np.float32)).tolist() == [False, True]


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_a_few_observations_move_the_others_little(wrong: int) -> None:
    known = curves()
    for number in range(10):
        known.serves(f"new {number}", 3.0)
        known.observe(Observation(f"entry {number}", 2.0, right=number >= wrong, served=False))
    assert known.threshold_now == pytest.approx(THRESHOLD, abs=1.0)


def test_a_wrong_answer_makes_its_entry_stricter_and_right_ones_looser() -> None:
    known = curves()
    known.observe(Observation("bad", 4.0, right=False, served=True, weight=10))
    for number in range(8):
        known.observe(Observation("good", 2.0, right=True, served=False, at=number))
    assert lowest_served(known, "bad") > lowest_served(known, "new") + 1
    assert lowest_served(known, "good") < lowest_served(known, "new") - 0.3
    assert not known.serves("bad", 4.0)


def test_nothing_is_served_below_the_floor() -> None:
    known = curves(threshold=1.0, floor=0.5)
    for number in range(600):
        known.serves("good", 0.6)
        known.observe(Observation("good", -1.0, right=True, served=False, at=number))
    assert known.serves("good", 0.5)
    assert not known.serves("good", 0.4999)
    assert known.threshold_now >= 0.5


def test_a_broken_limit_tightens_more_and_more() -> None:
    def threshold(wrong: int) -> float:
        known = curves()
        for number in range(384):
            known.serves("new", float(number % 8))
            known.observe(Observation(f"entry {number}", 6.0, right=number >= wrong, served=True, weight=10, at=number))
        assert (known.error().low > LIMIT) == (wrong > 9)
        return known.threshold_now

    thresholds = [threshold(wrong) for wrong in (0, 6, 12, 24, 48)]
    assert thresholds == sorted(thresholds)
    assert thresholds[-1] > thresholds[0] + 1


def some_observations(number: int, seed: int = 3) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        Observation(f"entry {rng.zipf(1.5) % 50}", x, bool(rng.random() < 1 / (1 + math.exp(1 - x))), x > 3, at=at)
        for at, x in enumerate(rng.normal(1.5, 3, number).tolist())
    ]


def test_what_is_known_does_not_depend_on_the_order() -> None:
    seen = some_observations(600)
    one, other = curves(max_observations=400), curves(max_observations=400)
    for observation in seen:
        one.observe(observation)
    for place in np.random.default_rng(1).permutation(len(seen)):
        other.observe(seen[place])
    for known in (one, other):  # and then what is left of the last REFRESH
        for number in range(256):
            known.observe(Observation("last", 1.0, right=True, served=False, at=1000 + number))
    for key in {observation.key for observation in seen}:
        for score in (0.0, 2.0, 4.0):
            assert one.predicted_error(key, score) == pytest.approx(other.predicted_error(key, score), rel=1e-3)
        assert lowest_served(one, key) == pytest.approx(lowest_served(other, key), abs=0.1)
    assert one.error() == other.error()


def test_memory_is_bounded_and_what_fell_out_is_unlearned() -> None:
    known, fresh = curves(max_observations=300), curves(max_observations=300)
    for observation in some_observations(700):
        known.observe(observation)
    last = [replace(observation, at=observation.at + 1000) for observation in some_observations(300, seed=4)]
    for observation in last:
        known.observe(observation)
        fresh.observe(observation)
    assert len(known._seen) == 300
    assert set(known._entries) == {observation.key for observation in last}
    assert max(len(entry.own) for entry in known._entries.values()) == MAX_OWN
    assert np.allclose(known._evidence, fresh._evidence, atol=1e-6)
    assert known.error() == fresh.error()


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1.0, "floor": 2.0, "max_error_rate": 0.01},
        {"threshold": math.nan, "floor": 2.0, "max_error_rate": 0.01},
        {"threshold": 1.0, "floor": 0.0, "max_error_rate": 0.0},
        {"threshold": 1.0, "floor": 0.0, "max_error_rate": 0.01, "max_observations": 0},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"floor|max_error_rate|max_observations"):
        Curves(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.5, math.nan, math.inf])
def test_a_weight_that_cannot_be(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Observation("a", 1.0, right=True, served=True, weight=weight)


# In traffic


@dataclass(frozen=True)
class Traffic:
    entries: NDArray[np.int64]  # (n,)
    scores: Floats  # (n,)
    right: NDArray[np.bool_]  # (n,)

    @property
    def second_half(self) -> slice:
        return slice(len(self.scores) // 2, None)


@dataclass(frozen=True)
class Outcome:
    hits: int
    wrong: int

    @property
    def keeps_the_limit(self) -> bool:
        return clopper_pearson(self.wrong, self.hits, 0.98)[0] <= LIMIT

    @property
    def rate(self) -> float:
        return self.wrong / self.hits


def traffic(seed: int, shift: float = 0.0, spread: float = 0.0, never: float = 0.0, n: int = 20_000) -> Traffic:
    """Of 2,000 entries, by Zipf's law; t_e ~ N(shift, spread), but for a share of entries that are `never` right."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, 2001)
    entries = rng.choice(2000, n, p=popularity / popularity.sum())
    t = np.where(rng.random(2000) < never, 20, rng.normal(shift, spread, 2000))
    scores = np.clip(rng.normal(1.5, 3, n), -8, 8)
    return Traffic(entries, scores, rng.random(n) < sigmoid(scores - t[entries]))


def served_by(known: Curves, of: Traffic, sampled: float = 0.1) -> Outcome:
    """In the second half, after a tenth of the hits was measured, and all that was not served."""
    sample = np.random.default_rng(0).random(len(of.scores)) < sampled
    served = np.zeros(len(of.scores), np.bool_)
    for at, (entry, score, right) in enumerate(
        zip(of.entries.tolist(), of.scores.tolist(), of.right.tolist(), strict=True)
    ):
        served[at] = hit = known.serves(str(entry), score)
        if not hit or sample[at]:
            known.observe(Observation(str(entry), score, right, hit, 1 / sampled if hit else 1.0, at))
    return outcome(served, of)


def outcome(served: NDArray[np.bool_], of: Traffic) -> Outcome:
    half = of.second_half
    return Outcome(int(served[half].sum()), int((served & ~of.right)[half].sum()))


def best_threshold(of: Traffic) -> float:
    """Of all there are, with hindsight: the lowest that keeps the limit in the second half."""
    scores, right = of.scores[of.second_half], of.right[of.second_half]
    order = np.argsort(-scores)
    rates = np.cumsum(~right[order]) / np.arange(1, len(order) + 1)
    return float(scores[order][np.flatnonzero(rates <= LIMIT)[-1]])


def test_traffic_as_validated_keeps_the_limit_and_the_hits() -> None:
    of = traffic(1)
    learned, static = served_by(curves(), of), outcome(of.scores >= THRESHOLD, of)
    assert learned.keeps_the_limit
    assert learned.hits > 0.85 * static.hits


def test_harder_traffic_breaks_the_limit_of_the_threshold_alone() -> None:
    of = traffic(2, shift=1.7)
    learned, static = served_by(curves(), of), outcome(of.scores >= THRESHOLD, of)
    assert static.rate > 4 * LIMIT
    assert learned.keeps_the_limit
    assert learned.hits > 0.6 * outcome(of.scores >= best_threshold(of), of).hits


def test_easier_traffic_has_more_hits() -> None:
    of = traffic(3, shift=-1.5)
    learned, static = served_by(curves(), of), outcome(of.scores >= THRESHOLD, of)
    assert learned.keeps_the_limit
    assert learned.hits > 1.4 * static.hits


def test_entries_that_differ_are_better_served_by_their_own_curves() -> None:
    of = traffic(4, spread=1.5)
    learned, best = served_by(curves(threshold=5.16), of), outcome(of.scores >= best_threshold(of), of)
    assert learned.keeps_the_limit
    assert learned.hits > 1.05 * best.hits
    assert learned.rate <= best.rate


def test_entries_that_are_never_right_are_found() -> None:
    of = traffic(5, never=0.02)
    learned, static = served_by(curves(), of), outcome(of.scores >= THRESHOLD, of)
    assert static.rate > 2 * LIMIT
    assert learned.rate < 0.75 * static.rate


def test_a_decision_takes_microseconds() -> None:
    known = curves()
    for observation in some_observations(512):
        known.observe(observation)
    taken = {"new": [], "entry 1": []}  # type: dict[str, list[float]]
    for key, times in taken.items():
        for _ in range(200):
            if key in known._entries:
                known._entries[key].version = -1  # as after an observation
            start = time.perf_counter()
            known.serves(key, 3.0)
            times.append(time.perf_counter() - start)
    assert median(taken["new"]) < 100e-6
    assert median(taken["entry 1"]) < 1e-3
