"""What rules ask of activation probabilities, without the float64 [G, L, F] array that would hold them.

The work is split by language or by neuron over threads that never wait for each other: torch's own threads meet after
every operation, which on a busy machine makes rows of this size many times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lape_fast.identify.counts import ActivationCounts

# A float64 >= 0 has the order of its bits. The histogram's bin is all of them but the last 44: exponent and 8 bits of
# mantissa, so a bin spans 0.4 % of its value, and 1.0 lies in the last of 261,889 bins.
BIN_SHIFT = 44
BINS = (0x3FF0_0000_0000_0000 >> BIN_SHIFT) + 1

# Neurons that are worked on at once. Of the first there is one row per language, and they stay in the cache.
SLICE, LONG_SLICE = 4096, 32768


def quantile_rank(rate: float, values: int) -> int:
    """The rank, counted from 1, of the value that stands for a quantile: ``round(rate * values)``, at least 1."""
    return max(1, round(rate * values))


class Probabilities:
    """The probabilities p[g, n] that neuron n fires for a token of language g.

    Args:
        counts: of G languages, each with at least one token.
        layers: which layers; N is the number of their neurons, and neurons are counted from the first of them.
    """

    def __init__(self, counts: ActivationCounts, layers: range) -> None:
        self.positive = counts.positive[:, layers.start : layers.stop].flatten(1).numpy()  # int64 [G, N], not copied
        self.tokens = counts.tokens.numpy()  # int64 [G]
        self.neurons = self.positive.shape[1]

    def each_language(self, function: Callable[[np.ndarray], Any], neurons: np.ndarray | None = None) -> Iterator[Any]:
        """Yields ``function`` of each language's probabilities in order: float64 [N], or [n] of some neurons."""

        def of_language(language: int) -> Any:
            positive = self.positive[language]
            chosen = positive if neurons is None else positive.take(neurons)
            return function(chosen / self.tokens[language])

        return _threaded(of_language, range(len(self.tokens)))

    def quantile(self, rate: float) -> float:
        """A quantile of all probabilities, bit for bit ``torch.kthvalue`` of rank ``quantile_rank``."""
        rank = quantile_rank(rate, self.positive.size)
        wanted = int(self._histogram.searchsorted(rank))
        # Nothing but 0.0 is in the lowest bin, and it can hold nearly all neurons of a ReLU model.
        if wanted == 0:
            return 0.0
        values = np.concatenate(list(self.each_language(lambda p: p[_bins(p) == wanted])))
        position = rank - 1 - int(self._histogram[wanted - 1])
        values.partition(position)
        return float(values[position])

    @functools.cached_property
    def _histogram(self) -> np.ndarray:
        """How many probabilities lie in each bin or below it, [BINS]."""
        histogram = np.zeros(BINS, dtype=np.int64)
        for part in self.each_language(lambda p: np.bincount(_bins(p), minlength=BINS)):
            histogram += part
        return histogram.cumsum()

    def above_anywhere(self, threshold: float) -> np.ndarray:
        """The neurons with a language above ``threshold``, sorted [n]."""
        above = np.zeros(self.neurons, dtype=bool)
        for part in self.each_language(lambda p: p > threshold):
            above |= part
        return above.nonzero()[0]

    def entropies(self, neurons: np.ndarray) -> np.ndarray:
        """H of each neuron, in nats, float64 [n]; each must have fired for some language."""

        def of_slice(start: int) -> np.ndarray:
            chosen = neurons[start : start + SLICE]
            p = self.positive.take(chosen, axis=1) / self.tokens[:, None]  # [G, SLICE]
            total = p.sum(0)
            # -sum q ln q without q: ln total - (sum p ln p) / total. Where p is 0, so is p ln p.
            p_log_p = p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))
            return np.log(total) - p_log_p.sum(0) / total

        return np.concatenate([np.empty(0), *_threaded(of_slice, range(0, len(neurons), SLICE))])

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """The sum of each neuron's probabilities over all languages: float64 [N], and what its rounding lost, [N].

        Both together are exact enough to take one language out again: ``(total - p) + lost`` is the sum of the others
        to the last digits even where they are a trillionth of p, and 0 where they are 0.
        """
        total, lost = np.zeros(self.neurons), np.zeros(self.neurons)

        def add(start: int) -> None:
            part = slice(start, start + LONG_SLICE)
            for positive, tokens in zip(self.positive, self.tokens, strict=True):
                p = positive[part] / tokens
                # The two-sum of Knuth: what is lost is itself a float64.
                added = total[part] + p
                p_added = added - total[part]
                lost[part] += (total[part] - (added - p_added)) + (p - p_added)
                total[part] = added

        list(_threaded(add, range(0, self.neurons, LONG_SLICE)))
        return total, lost


def _threaded(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Yields ``function`` of each number, in order."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(function, numbers)


def _bins(probabilities: np.ndarray) -> np.ndarray:
    return probabilities.view(np.int64) >> BIN_SHIFT
