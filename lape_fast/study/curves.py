"""Gain against forgetting: frontiers, values at an equal level, and bootstrap intervals.

A learning rate and a number of steps trade one for the other, so a method is a curve and not a point. Both are in bits
per byte: gain is how much the target language fell, forgetting the mean rise elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lape_fast.errors import ShapeError

DRAWS = 4000
LEVEL = 0.95

# The base itself: nothing gained, nothing forgotten.
BASE = (0.0, 0.0)


@dataclass(frozen=True)
class Frontier:
    """The points of a method that no other point of it beats in both, with the base among them.

    Between two of them lies the straight line: what a step between theirs would give. Beyond the last the gain stays.

    Attributes:
        forgetting, gain: ``[N]``, both strictly increasing.
    """

    forgetting: tuple[float, ...]
    gain: tuple[float, ...]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Frontier:
        """The frontier of points (gain, forgetting).

        Example:
            >>> Frontier.of([(0.2, 0.1), (0.1, 0.2)])
            Frontier(forgetting=(0.0, 0.1), gain=(0.0, 0.2))
        """
        kept: list[tuple[float, float]] = []
        for gain, forgetting in sorted([BASE, *points], key=lambda point: (point[1], -point[0])):
            if not kept or gain > kept[-1][0]:
                kept.append((gain, forgetting))
        gains, forgettings = zip(*kept, strict=True)
        return cls(forgettings, gains)

    def gain_at(self, forgetting: float) -> float | None:
        """The most that is gained for this much forgetting; None if even the least forgetting is more."""
        if forgetting < self.forgetting[0]:
            return None
        return float(np.interp(forgetting, self.forgetting, self.gain))

    def forgetting_at(self, gain: float) -> float | None:
        """The least that is forgotten for this gain; None if the method does not reach it."""
        if gain > self.gain[-1]:
            return None
        return float(np.interp(gain, self.gain, self.forgetting))


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, and over how many languages and seeds it is taken."""

    mean: float
    low: float
    high: float
    languages: int
    values: int


def bootstrap(samples: Sequence[Sequence[float]], draws: int = DRAWS, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean over languages of the mean over seeds, with a percentile bootstrap interval.

    Languages are drawn with replacement, and for each drawn language its seeds are: a bootstrap of clusters. It says
    how far the mean would move with other languages and seeds of this kind; of a handful of languages it is a rough
    and rather narrow estimate.

    Args:
        samples: per language, a value per seed.
        draws: how many resamples.
        level: the share of them between the ends.
        seed: of the draws; the same samples give the same interval.

    Raises:
        ShapeError: no language, or one without a value.

    Example:
        >>> bootstrap([[0.1, 0.2], [0.3, 0.4]]).mean
        0.25
    """
    bands = bootstrap_band([[[value] for value in values] for values in samples], draws, level, seed)
    mean, low, high = (float(each[0]) for each in bands)
    return Interval(mean, low, high, len(samples), sum(map(len, samples)))


def bootstrap_band(
    samples: Sequence[Sequence[Sequence[float]]], draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``bootstrap`` of whole curves: mean, lower and upper end, ``[N]`` each.

    Args:
        samples: per language, per seed, a curve of N values.
        draws, level, seed: see ``bootstrap``.
    """
    if not samples or not all(len(values) for values in samples):
        raise ShapeError(
            f"An interval needs a value of every language; it got {[len(each) for each in samples]} values."
        )
    seeds = np.array([len(values) for values in samples])
    curves = np.zeros((len(samples), seeds.max(), len(samples[0][0])))  # [languages, seeds, N]
    for number, values in enumerate(samples):
        curves[number, : len(values)] = values
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.zeros((draws, curves.shape[2]))
    for language in generator.integers(len(samples), size=(len(samples), draws)):
        held = seeds[language][:, None]
        drawn = (generator.random((draws, seeds.max())) * held).astype(int)
        weights = (np.arange(seeds.max()) < held) / held
        means += np.einsum("ds,dsn->dn", weights, curves[language[:, None], drawn])
    means /= len(samples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return np.mean([np.mean(values, axis=0) for values in samples], axis=0), low, high
