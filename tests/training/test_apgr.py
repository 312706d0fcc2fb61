"""APGR against cases worked out by hand, the definition applied directly, and what must hold for any scores."""

import time
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from training.apgr import (
    Floats,
    NoGap,
    apgr,
    apgr_interval,
    calls_needed,
    curve,
    difference,
    interval,
    oracle,
    recovered,
    resampled,
)

GRADES = st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])))


def arrays(*columns: Sequence[float]) -> tuple[Floats, ...]:
    return tuple(np.array(column, dtype=float) for column in columns)


def columns(rows: list[tuple[int, float, float]]) -> tuple[Floats, ...]:
    return arrays(*([row[i] for row in rows] for i in range(3)))


def drawn(n: int, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """A score that knows a little, and the grades of two models."""
    draw = np.random.default_rng(seed)
    weak, strong = ((draw.random(n) < share).astype(np.float64) for share in (0.4, 0.7))
    return strong - weak + draw.normal(size=n), weak, strong


def test_a_case_by_hand() -> None:
    score, weak, strong = arrays([4, 3, 2, 1], [0, 1, 0, 1], [1, 1, 1, 0])
    shares, quality = curve(score, weak, strong)
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert quality.tolist() == [0.5, 0.75, 0.75, 1.0, 0.75]
    assert recovered(score, weak, strong)[1].tolist() == [0, 1, 1, 2, 1]
    assert apgr(score, weak, strong) == pytest.approx((0.5 + 1 + 1.5 + 1.5) / 4)
    assert calls_needed(score, weak, strong, 0.5) == pytest.approx(0.125)
    assert calls_needed(score, weak, strong, 1.0) == pytest.approx(0.25)


def test_equal_scores_count_as_the_mean_over_their_orders() -> None:
    score, weak, strong = arrays([1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1])
    orders = [apgr(np.array([*order, 0.0]), weak, strong) for order in permutations([1.0, 2.0, 3.0])]
    assert apgr(score, weak, strong) == pytest.approx(np.mean(orders))


def test_a_constant_score_is_the_coin() -> None:
    _, weak, strong = drawn(50)
    _, pgr = recovered(np.zeros(50), weak, strong)
    np.testing.assert_allclose(pgr, np.linspace(0, 1, 51))
    assert apgr_interval(np.zeros(50), weak, strong) == (pytest.approx(0.5), pytest.approx(0.5))


def test_random_scores_have_a_mean_of_a_half() -> None:
    _, weak, strong = drawn(300)
    draw = np.random.default_rng(1)
    found = [apgr(draw.random(300), weak, strong) for _ in range(500)]
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / 500**0.5


@settings(deadline=None)
@given(GRADES)
def test_what_holds_for_any_score(rows: list[tuple[int, float, float]]) -> None:
    score, weak, strong = columns(rows)
    if not len(score) or strong.mean() <= weak.mean():
        with pytest.raises(NoGap):
            apgr(score, weak, strong) if len(score) else resampled(score, weak, strong)
        return
    found = apgr(score, weak, strong)
    assert apgr(oracle(weak, strong), weak, strong) >= found - 1e-9
    assert apgr(np.exp(score / 2) + 7, weak, strong) == pytest.approx(found)
    assert apgr(-score, weak, strong) == pytest.approx(1 - found)
    assert 0 <= calls_needed(score, weak, strong, 0.5) <= calls_needed(score, weak, strong, 0.8) <= 1


@settings(deadline=None, max_examples=30)
@given(GRADES, st.integers(0, 9))
def test_each_bootstrap_sample_is_the_apgr_of_its_rows(rows: list[tuple[int, float, float]], seed: int) -> None:
    assume(rows)
    score, weak, strong = columns(rows)
    assume(strong.mean() > weak.mean())
    draw = np.random.default_rng(seed)
    for value in resampled(score, weak, strong, resamples=5, seed=seed):
        chosen = draw.integers(len(rows), size=len(rows))
        if strong[chosen].mean() > weak[chosen].mean():
            assert value == pytest.approx(apgr(score[chosen], weak[chosen], strong[chosen]))
        else:
            assert np.isnan(value)


def test_intervals_are_seeded_paired_and_fast() -> None:
    score, weak, strong = drawn(1200)
    start = time.process_time()
    low, high = apgr_interval(score, weak, strong)
    assert time.process_time() - start < 2
    assert (low, high) == apgr_interval(score, weak, strong) == interval(resampled(score, weak, strong))
    assert low < apgr(score, weak, strong) < high
    value, least, most = difference(score, 3 * score, weak, strong)
    assert (value, least, most) == (0, 0, 0)
    assert difference(score, np.zeros(1200), weak, strong)[1] > 0


def test_a_strong_model_that_is_no_better_is_an_error() -> None:
    score, weak, strong = arrays([1, 2], [1, 0], [0, 1])
    for ask in (apgr, apgr_interval, recovered):
        with pytest.raises(NoGap):
            ask(score, weak, strong)  # type: ignore[operator]
    with pytest.raises(ValueError, match="finite"):
        apgr(np.array([1.0, np.nan]), weak, np.ones(2))
