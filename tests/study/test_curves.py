"""Frontiers against hand-made points, intervals against a known distribution."""

from __future__ import annotations

import numpy as np
import pytest

from lape_fast.errors import ShapeError
from lape_fast.study.curves import Frontier, bootstrap, bootstrap_band


def test_the_frontier_keeps_what_no_point_beats_in_both():
    # (gain, forgetting): the third is beaten by the second, the fifth by the fourth; the last forgets less than none.
    points = [(0.1, 0.01), (0.3, 0.02), (0.2, 0.03), (0.5, 0.10), (0.4, 0.10), (0.05, -0.01)]
    front = Frontier.of(points)
    assert front.forgetting == (-0.01, 0.01, 0.02, 0.10)
    assert front.gain == (0.05, 0.1, 0.3, 0.5)


def test_the_base_is_a_point_of_every_frontier_unless_it_is_beaten():
    assert Frontier.of([]) == Frontier((0.0,), (0.0,))
    assert Frontier.of([(-0.1, 0.2)]) == Frontier((0.0,), (0.0,))
    assert Frontier.of([(0.1, 0.0)]) == Frontier((0.0,), (0.1,))


def test_between_two_points_lies_the_straight_line_and_beyond_the_last_the_gain_stays():
    front = Frontier.of([(0.2, 0.1), (0.4, 0.3)])
    assert front.gain_at(0.05) == pytest.approx(0.1)
    assert front.gain_at(0.2) == pytest.approx(0.3)
    assert front.gain_at(9.0) == 0.4
    assert front.gain_at(-0.01) is None
    assert front.forgetting_at(0.1) == pytest.approx(0.05)
    assert front.forgetting_at(0.3) == pytest.approx(0.2)
    assert front.forgetting_at(0.5) is None


def test_a_curve_and_its_inverse_agree():
    """Points of gain = sqrt(forgetting), sampled finely."""
    forgetting = np.linspace(0, 1, 401) ** 2
    front = Frontier.of(zip(np.sqrt(forgetting), forgetting, strict=True))
    for level in (0.04, 0.25, 0.81):
        # The chord of a step of 1/400 is below the curve by at most the square of it.
        assert front.gain_at(level) == pytest.approx(level**0.5, abs=1e-5)
        assert front.forgetting_at(front.gain_at(level)) == pytest.approx(level, abs=1e-12)


def test_the_mean_weighs_languages_alike_whatever_their_seeds():
    interval = bootstrap([[1.0, 3.0], [5.0]])
    assert interval.mean == 3.5
    assert (interval.languages, interval.values) == (2, 3)


def test_equal_values_have_an_interval_of_no_width():
    interval = bootstrap([[2.0, 2.0], [2.0]])
    assert (interval.low, interval.mean, interval.high) == (2.0, 2.0, 2.0)


def test_the_interval_is_that_of_the_normal_distribution():
    """Many languages with values of variance 1, a seed each: the mean of n has an interval of 1.96 / sqrt(n)."""
    values = np.random.default_rng(0).normal(size=400)
    values = (values - values.mean()) / values.std()
    interval = bootstrap([[value] for value in values], draws=10_000)
    # The ends of 10,000 draws vary by about 2 % of the width; the seed is fixed.
    assert interval.high == pytest.approx(1.96 / 20, rel=0.04)
    assert interval.low == pytest.approx(-1.96 / 20, rel=0.04)


def test_seeds_widen_the_interval_as_the_variance_of_both_levels_says():
    """Languages of variance 4, three seeds of variance 3 each: clusters whose means have variance 4 + 1, and within
    a cluster a resample of three adds the spread of its own seeds, 3 * (2/3) / 3 on average."""
    random = np.random.default_rng(1)
    samples = random.normal(scale=2, size=(600, 1)) + random.normal(scale=3**0.5, size=(600, 3))
    between = samples.mean(1).var()
    within = (samples.var(1) / 3).mean()
    interval = bootstrap(samples.tolist(), draws=4000)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * ((between + within) / 600) ** 0.5, rel=0.05)


def test_the_same_samples_give_the_same_interval_and_a_band_is_intervals_side_by_side():
    samples = [[0.1, 0.4], [0.3, 0.2], [0.9, 0.7]]
    assert bootstrap(samples) == bootstrap(samples)
    mean, low, high = bootstrap_band([[[value, 2 * value] for value in values] for values in samples])
    interval = bootstrap(samples)
    assert (mean[0], low[0], high[0]) == (interval.mean, interval.low, interval.high)
    assert np.allclose([mean[1], low[1], high[1]], 2 * np.array([interval.mean, interval.low, interval.high]))


def test_a_language_without_a_value_is_refused():
    with pytest.raises(ShapeError, match="a value of every language"):
        bootstrap([[0.1], []])
    with pytest.raises(ShapeError, match="a value of every language"):
        bootstrap([])
