"""LAPE, language activation probability entropy (arXiv 2402.16438): from counts to the neurons of each language.

With p the probability that a neuron fires for a language, q = p / sum of p over languages and H = -sum q ln q: neurons
whose p is high for some language are candidates, those with the lowest H are selected, and each belongs to every
language for which its p is high.

The work is split by language or by neuron over threads that never wait for each other: torch's own threads meet after
every operation, which on a busy machine makes rows of this size many times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import numpy as np
import torch

from lape_fast.errors import SelectionError
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet

# A float64 >= 0 has the order of its bits. The histogram's bin is all of them but the last 44: exponent and 8 bits of
# mantissa, so a bin spans 0.4 % of its value, and 1.0 lies in the last of 261,889 bins.
BIN_SHIFT = 44
BINS = (0x3FF0_0000_0000_0000 >> BIN_SHIFT) + 1

# Neurons whose entropy is computed at once: with 100 languages their probabilities stay in the cache.
SLICE = 4096

# Entropies this close are one: far above the rounding error of a sum over languages (1e-14), which differs between
# machines, and far below the distance between different neurons.
TIE = 2.0**-40

# What the neurons keep of the counts' metadata: the model that they belong to.
MODEL_FIELDS = ("model", "config_hash", "model_type", "hidden_size", "tokenizer_hash")


def select_neurons(
    counts: ActivationCounts, top_rate: float = 0.05, filter_rate: float = 0.95, activation_bar: float = 0.95
) -> NeuronSet:
    """Selects the neurons of each language.

    Ties in entropy go to the lower layer, then to the lower neuron. A language may end with no neurons at all.

    Args:
        counts: of G languages.
        top_rate: the share of all L x F neurons to select; fewer are selected where fewer are candidates.
        filter_rate: the quantile of all probabilities above which some language must lie for a neuron to be a
            candidate.
        activation_bar: the quantile of all probabilities above which a selected neuron belongs to a language.

    Returns:
        The neurons, with the rule, the rates and the thresholds found in the metadata.

    Raises:
        SelectionError: a rate outside (0, 1], or a language without tokens.

    Example:
        >>> positive = torch.tensor([[[90, 10, 50, 50]], [[10, 90, 50, 50]]])
        >>> counts = ActivationCounts(positive, torch.tensor([100, 100]), ["mlt_Latn", "cym_Latn"])
        >>> select_neurons(counts, top_rate=0.5, filter_rate=0.75, activation_bar=0.75)["mlt_Latn"]
        [tensor([0])]
    """
    rates = {"top_rate": top_rate, "filter_rate": filter_rate, "activation_bar": activation_bar}
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate <= 1:
            raise SelectionError(f"`{name}` is {rate!r}; it must be a number above 0 and at most 1.")
    counts.check_tokens()
    filter_threshold, activation_threshold = probability_quantiles(counts, (filter_rate, activation_bar))
    candidates = _above_anywhere(counts, filter_threshold)
    share = round(top_rate * counts.layers * counts.neurons_per_layer)
    selected = _lowest(_entropies(counts, candidates), candidates, share)
    active = _probabilities_of(counts, selected) > activation_threshold  # [G, selected]
    members = {
        language: torch.from_numpy(selected[row]) for language, row in zip(counts.languages, active, strict=True)
    }
    metadata = {
        **{name: counts.metadata[name] for name in MODEL_FIELDS if name in counts.metadata},
        "rule": "lape",
        **{name: float(rate) for name, rate in rates.items()},
        "filter_threshold": filter_threshold,
        "activation_threshold": activation_threshold,
        "candidates": len(candidates),
        "selected": len(selected),
        "counts_hash": counts.fingerprint(),
    }
    return NeuronSet.from_flat(members, counts.layers, counts.neurons_per_layer, metadata)


def probability_quantiles(counts: ActivationCounts, rates: Iterable[float]) -> list[float]:
    """Quantiles of all probabilities, exactly ``torch.kthvalue`` of ``counts.probability()``, without that array.

    Args:
        counts: every language with at least one token.
        rates: in (0, 1]; a rate stands for the value of rank ``round(rate * n)``, at least 1.
    """
    ranks = [max(1, round(rate * counts.positive.numel())) for rate in rates]
    histogram = np.zeros(BINS, dtype=np.int64)
    for part in _threaded(lambda p: np.bincount(_bins(p), minlength=BINS), counts):
        histogram += part
    found = {rank: _value_of_rank(counts, histogram, rank) for rank in set(ranks)}
    return [found[rank] for rank in ranks]


def _value_of_rank(counts: ActivationCounts, histogram: np.ndarray, rank: int) -> float:
    cumulative = histogram.cumsum()
    wanted = int(cumulative.searchsorted(rank))
    # Nothing but 0.0 is in the lowest bin, and it can hold nearly all neurons of a ReLU model.
    if wanted == 0:
        return 0.0
    values = np.concatenate(list(_threaded(lambda p: p[_bins(p) == wanted], counts)))
    position = rank - 1 - int(cumulative[wanted - 1])
    values.partition(position)
    return float(values[position])


def _threaded(function: Callable[[np.ndarray], Any], counts: ActivationCounts) -> Iterator[Any]:
    """Yields ``function`` of the probabilities of each language, float64 [L * F], in order."""

    def of_language(positive: np.ndarray, tokens: int) -> Any:
        return function(positive / tokens)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(of_language, counts.positive.flatten(1).numpy(), counts.tokens.tolist())


def _bins(probabilities: np.ndarray) -> np.ndarray:
    return probabilities.view(np.int64) >> BIN_SHIFT


def _above_anywhere(counts: ActivationCounts, threshold: float) -> np.ndarray:
    """The neurons with a language above ``threshold``, as sorted positions in [L * F]."""
    above = np.zeros(counts.layers * counts.neurons_per_layer, dtype=bool)
    for part in _threaded(lambda p: p > threshold, counts):
        above |= part
    return above.nonzero()[0]


def _probabilities_of(counts: ActivationCounts, neurons: np.ndarray) -> np.ndarray:
    """float64 [G, n]."""
    return counts.positive.flatten(1).numpy().take(neurons, axis=1) / counts.tokens.numpy()[:, None]


def _entropies(counts: ActivationCounts, neurons: np.ndarray) -> np.ndarray:
    """H of each neuron, in nats, float64 [n]; each must have fired for some language."""

    def of_slice(start: int) -> np.ndarray:
        p = _probabilities_of(counts, neurons[start : start + SLICE])
        total = p.sum(0)
        # -sum q ln q without q: ln total - (sum p ln p) / total. Where p is 0, so is p ln p.
        p_log_p = p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))
        return np.log(total) - p_log_p.sum(0) / total

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.concatenate([np.empty(0), *pool.map(of_slice, range(0, len(neurons), SLICE))])


def _lowest(entropies: np.ndarray, neurons: np.ndarray, share: int) -> np.ndarray:
    """The ``share`` neurons that come first by (H, layer, neuron), as sorted positions."""
    order = entropies.argsort(kind="stable")
    # Neighbours within a tie's distance share a rank. Rounding to a grid would part some of them, on some machines.
    steps = np.diff(entropies[order], prepend=-np.inf) > TIE
    ranks = np.empty_like(order)
    ranks[order] = steps.cumsum()
    return np.sort(neurons[ranks.argsort(kind="stable")[:share]])
