"""Thresholds: the lowest that surely keeps a rate, and what they serve of other pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.thresholds import TRAPS_PER_REPEAT, clopper_pearson, floor, hits_at, points, served, upper, verification


def pairs(repeats: list[float], traps: list[float]) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    return np.array([*repeats, *traps], dtype=float), np.array([True] * len(repeats) + [False] * len(traps))


@pytest.mark.parametrize(
    ("wrong", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.3085),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (10, 10, 0.6915, 1.0),
        (10, 1000, 0.0048, 0.0183),
    ],
)
def test_intervals_as_the_tables_have_them(wrong: int, n: int, low: float, high: float) -> None:
    assert clopper_pearson(wrong, n) == pytest.approx((low, high), abs=1e-4)


def test_nothing_wrong_in_three_hundred_is_at_most_one_percent() -> None:
    """The rule of three."""
    assert upper(0, 300) == pytest.approx(3 / 300, rel=0.01)
    assert upper(7, 7) == 1.0


def test_the_lowest_threshold_that_keeps_the_rate() -> None:
    scores, same = pairs([5.0] * 600 + [3.0] * 300 + [1.0] * 100, [4.0] * 1 + [2.0] * 9 + [-3.0] * 1990)
    found = {point.max_error_rate: point for point in points(scores, same)}
    strict, lenient = found[0.001], found[0.003]
    assert (strict.score, strict.repeats, strict.traps) == (3.0, 0.9, 1 / 2000)
    assert (lenient.score, lenient.repeats, lenient.traps) == (1.0, 1.0, 10 / 2000)
    assert lenient.traps_at_most == pytest.approx(upper(10, 2000))
    assert points(scores[:-1900], same[:-1900])[0].max_error_rate > 0.001  # 100 traps cannot tell


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_no_point_breaks_its_rate_and_stricter_rates_have_higher_scores(seed: int, apart: float) -> None:
    draw = np.random.default_rng(seed)
    scores, same = pairs(list(draw.normal(apart, 1, 300)), list(draw.normal(0, 1, 600)))
    found = points(scores, same)
    for point in found:
        wrong = TRAPS_PER_REPEAT * point.traps_at_most
        assert wrong / (wrong + point.repeats) <= point.max_error_rate
    assert [point.score for point in found] == sorted((point.score for point in found), reverse=True)
    assert [point.repeats for point in found] == sorted(point.repeats for point in found)


def test_the_bound_holds_on_other_pairs_nearly_always() -> None:
    """Of 200 thresholds for 5 %, fitted with 95 % confidence, few may break it."""
    draw, broken = np.random.default_rng(1), 0
    for _ in range(200):
        scores, same = pairs(list(draw.normal(2, 1, 500)), list(draw.normal(0, 1, 1000)))
        (point,) = points(scores, same, [0.05])
        wrong, right = (float((draw.normal(mean, 1, 20_000) >= point.score).mean()) for mean in (0, 2))
        broken += TRAPS_PER_REPEAT * wrong / (TRAPS_PER_REPEAT * wrong + right) > 0.05
    assert broken <= 25


def test_the_floor_loses_one_in_fifty_of_what_is_served() -> None:
    similarities = np.linspace(0.5, 1, 1001)
    scores, same = np.full(1001, 9.0), np.full(1001, fill_value=True)
    assert floor(similarities, scores, same, 1.0) == pytest.approx(0.51)
    assert floor(similarities + 0.2, scores, same, 1.0) == pytest.approx(0.71)


def test_what_the_manifest_says() -> None:
    scores, same = pairs([5.0] * 1000, [-5.0] * 1000)
    said = verification(scores, np.full(2000, 0.8), same)
    assert (said["floor"], said["repeats"], said["traps"]) == (0.8, 1000, 1000)
    assert said["thresholds"][0]["score"] == 5.0


def test_pairs_that_could_not_be_read_give_no_thresholds() -> None:
    scores, same = pairs([-np.inf] * 10, [-np.inf] * 10)
    with pytest.raises(ValueError, match="no threshold"):
        verification(scores, np.full(20, 0.8), same)


def test_what_a_threshold_serves_of_other_pairs() -> None:
    scores, same = pairs([3.0, 2.0, 1.0, 0.0], [2.5, -1.0])
    found = served(scores, same, 2.0)
    assert (found["hits"], found["hit_rate"], found["wrong"], found["wrong_rate"]) == (2, 0.5, 1, 0.5)
    assert found["wrong_interval"] == clopper_pearson(1, 2)


def test_the_most_hits_at_an_error() -> None:
    scores, same = pairs([5.0, 4.0, 2.0, 1.0], [3.0, 0.0])
    assert hits_at(scores, same, 0.0) == 0.5
    assert hits_at(scores, same, 0.2) == 1.0
    tied, labels = pairs([1.0, 1.0], [1.0])
    assert hits_at(tied, labels, 0.1) == 0.0  # no threshold parts them
