"""Selection by LAPE against its formula in plain Python, one number at a time."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch

from lape_fast.errors import SelectionError
from lape_fast.identify import probabilities, selection
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.probabilities import Probabilities
from lape_fast.identify.rules import Budget, Lape, Percentile
from lape_fast.identify.selection import select_neurons


def quantile(values: list[float], rate: float) -> float:
    return sorted(values)[max(1, round(rate * len(values))) - 1]


def entropy(probabilities: list[float]) -> float:
    shares = [p / math.fsum(probabilities) for p in probabilities]
    # Rounded, since neurons whose entropies are equal on paper must tie.
    return round(-math.fsum(q * math.log(q) for q in shares if q > 0), 10)


def reference(counts: ActivationCounts, top_rate: float, filter_rate: float, activation_bar: float):
    """language -> [(layer, neuron)], and the two thresholds."""
    tokens = counts.tokens.tolist()
    fired = counts.positive.tolist()
    places = list(itertools.product(range(counts.layers), range(counts.neurons_per_layer)))
    p = {place: [fired[g][place[0]][place[1]] / tokens[g] for g in range(len(tokens))] for place in places}
    everything = [value for values in p.values() for value in values]
    threshold, bar = quantile(everything, filter_rate), quantile(everything, activation_bar)
    candidates = [place for place in places if max(p[place]) > threshold]
    ranked = sorted(candidates, key=lambda place: (entropy(p[place]), place))
    selected = sorted(ranked[: round(top_rate * len(places))])
    return {
        language: [place for place in selected if p[place][g] > bar] for g, language in enumerate(counts.languages)
    }, (threshold, bar)


def pairs(neurons: NeuronSet) -> dict[str, list[tuple[int, int]]]:
    return {
        language: [(layer, neuron) for layer, chosen in enumerate(neurons[language]) for neuron in chosen.tolist()]
        for language in neurons.languages
    }


def quantile_of(counts: ActivationCounts, rate: float) -> float:
    return Probabilities(counts, range(counts.layers)).quantile(rate)


def counts_of(positive: torch.Tensor, tokens: list[int] | torch.Tensor) -> ActivationCounts:
    return ActivationCounts(positive, tokens, [f"language {number}" for number in range(len(positive))])


def drawn(seed: int, languages: int, layers: int, neurons: int, most_tokens: int, zeros: float) -> ActivationCounts:
    """Counts with a share of neurons that never fire, and with tokens that differ between languages."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(max(1, most_tokens // 10), most_tokens + 1, (languages,), generator=generator)
    rates = torch.rand(languages, layers, neurons, generator=generator, dtype=torch.float64) ** 3
    rates[torch.rand(languages, layers, neurons, generator=generator) < zeros] = 0
    return counts_of((rates * tokens[:, None, None]).round().long(), tokens)


RATES = [(0.05, 0.95, 0.95), (0.2, 0.8, 0.8), (0.5, 0.5, 0.9), (1.0, 0.7, 0.3), (0.1, 0.001, 1.0)]


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(
    "counts",
    [
        drawn(1, languages=5, layers=3, neurons=101, most_tokens=100_000, zeros=0.3),
        drawn(2, languages=2, layers=1, neurons=257, most_tokens=10**12, zeros=0.0),
        drawn(3, languages=12, layers=2, neurons=63, most_tokens=7, zeros=0.5),
        drawn(4, languages=3, layers=2, neurons=77, most_tokens=1, zeros=0.2),
        drawn(5, languages=4, layers=5, neurons=43, most_tokens=1000, zeros=0.97),
    ],
    ids=["plain", "two-languages", "few-tokens", "one-token", "rarely-active"],
)
def test_the_selection_is_the_formula(counts, rates):
    wanted, thresholds = reference(counts, *rates)
    neurons = select_neurons(counts, Lape(*rates))
    assert pairs(neurons) == wanted
    assert (neurons.metadata["filter_threshold"], neurons.metadata["activation_threshold"]) == thresholds


def test_more_candidates_than_one_slice_holds():
    counts = drawn(6, languages=4, layers=3, neurons=3001, most_tokens=50_000, zeros=0.1)
    neurons = select_neurons(counts, Lape(0.3, 0.3, 0.6))
    assert neurons.metadata["candidates"] > 2 * probabilities.SLICE
    assert pairs(neurons) == reference(counts, 0.3, 0.3, 0.6)[0]


@pytest.mark.parametrize("share", [1, 10, 60, 119])
def test_permuted_neurons_tie_and_the_first_ones_win(share):
    # The same five counts in all 120 orders: one entropy on paper, several after rounding.
    orders = torch.tensor(list(itertools.permutations([3, 10, 40, 111, 997])))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    counts = counts_of(orders[order].T.reshape(5, 4, 30).contiguous(), [1009] * 5)
    neurons = select_neurons(counts, Lape(top_rate=share / 120, filter_rate=0.1, activation_bar=0.001))
    assert torch.cat(neurons.union()).numel() == share
    flat = [layer * 30 + neuron for layer, chosen in enumerate(neurons.union()) for neuron in chosen.tolist()]
    assert flat == list(range(share))


def test_scaled_neurons_tie():
    # q is the same for all, p is not.
    scale = torch.tensor([7, 1, 3, 11, 5, 2, 13, 9])
    counts = counts_of(torch.stack([scale * 3, scale * 17, scale * 29])[:, None], [1000, 1000, 1000])
    neurons = select_neurons(counts, Lape(top_rate=0.5, filter_rate=0.05, activation_bar=0.05))
    assert neurons.union()[0].tolist() == [0, 1, 2, 3]


def test_close_entropies_are_no_tie():
    # The share of the second language falls by one in a thousand million from neuron to neuron.
    positive = torch.tensor([[[10**9] * 6], [[10**8 - step for step in range(6)]]])
    neurons = select_neurons(counts_of(positive, [2 * 10**9] * 2), Lape(0.5, 0.1, 0.1))
    assert neurons.union()[0].tolist() == [3, 4, 5]


def test_equal_counts_leave_no_candidate():
    neurons = select_neurons(counts_of(torch.full((3, 2, 10), 4), [8, 8, 8]), Lape(0.5, 0.5, 0.5))
    assert neurons.union_count() == 0
    assert neurons.summary()["per_language"] == {"language 0": 0, "language 1": 0, "language 2": 0}


def test_neurons_that_never_fire_leave_no_candidate():
    assert select_neurons(counts_of(torch.zeros(2, 2, 5, dtype=torch.int64), [3, 4])).union_count() == 0


def test_rules_that_compare_languages_refuse_a_single_one():
    alone = counts_of(torch.tensor([[[1, 9, 2, 8], [7, 3, 6, 4]]]), [10])
    for rule in (Lape(), Budget(1)):
        with pytest.raises(SelectionError, match="there is only language 0"):
            select_neurons(alone, rule)
    chosen = select_neurons(alone, Percentile(0.75))["language 0"]
    assert [layer.tolist() for layer in chosen] == [[1, 3], []]


def test_fewer_candidates_than_the_share_are_all_selected():
    positive = torch.tensor([[[9, 1, 1, 1, 1]], [[1, 1, 1, 1, 8]]])
    neurons = select_neurons(counts_of(positive, [10, 10]), Lape(top_rate=1.0, filter_rate=0.8, activation_bar=0.8))
    assert neurons.metadata["candidates"] == neurons.metadata["selected"] == 2
    assert pairs(neurons) == {"language 0": [(0, 0)], "language 1": [(0, 4)]}


def test_a_probability_equal_to_a_threshold_is_not_above_it():
    positive = torch.tensor([[[5, 5, 6, 0]], [[0, 0, 5, 0]]])
    neurons = select_neurons(counts_of(positive, [10, 10]), Lape(top_rate=1.0, filter_rate=0.7, activation_bar=0.7))
    assert neurons.metadata["filter_threshold"] == 0.5
    assert pairs(neurons) == {"language 0": [(0, 2)], "language 1": []}


def test_two_thresholds_are_kept_apart():
    counts = drawn(7, languages=3, layers=2, neurons=50, most_tokens=1000, zeros=0.1)
    low, high = quantile_of(counts, 0.4), quantile_of(counts, 0.9)
    neurons = select_neurons(counts, Lape(top_rate=0.5, filter_rate=0.4, activation_bar=0.9))
    assert low < high
    assert (neurons.metadata["filter_threshold"], neurons.metadata["activation_threshold"]) == (low, high)
    assert pairs(neurons) == reference(counts, 0.5, 0.4, 0.9)[0]


@pytest.mark.parametrize("rate", [1e-9, 0.01, 0.31, 0.5, 0.77, 0.95, 0.999, 1.0])
@pytest.mark.parametrize(
    "counts",
    [
        drawn(8, languages=7, layers=2, neurons=431, most_tokens=10_000_000, zeros=0.0),
        drawn(9, languages=6, layers=3, neurons=257, most_tokens=5_000, zeros=0.9),
        drawn(10, languages=9, layers=2, neurons=301, most_tokens=3, zeros=0.3),
        counts_of(torch.full((4, 1, 99), 6), [7, 7, 7, 7]),
        counts_of(torch.full((4, 1, 99), 7), [7, 7, 7, 7]),
        counts_of(torch.zeros(4, 1, 99, dtype=torch.int64), [7, 7, 7, 7]),
        counts_of(10**15 + torch.arange(600).view(2, 3, 100), [3 * 10**15, 3 * 10**15 + 1]),
    ],
    ids=["many-tokens", "zeros", "few-tokens", "one-value", "always", "never", "one-bin"],
)
def test_quantiles_are_bit_for_bit_those_of_kthvalue(counts, rate):
    p = counts.probability().flatten()
    rank = max(1, round(rate * p.numel()))
    assert quantile_of(counts, rate) == p.kthvalue(rank).values.item()


def test_the_number_of_threads_changes_nothing():
    counts = drawn(11, languages=9, layers=4, neurons=3000, most_tokens=20_000, zeros=0.2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = select_neurons(counts, Lape(0.2, 0.8, 0.8))
        torch.set_num_threads(3)
        together = select_neurons(counts, Lape(0.2, 0.8, 0.8))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.indices, together.indices) and torch.equal(alone.offsets, together.offsets)
    assert alone.metadata == together.metadata


def test_counts_are_left_as_they_were():
    counts = drawn(12, languages=3, layers=2, neurons=40, most_tokens=100, zeros=0.1)
    before = counts.fingerprint()
    select_neurons(counts)
    assert counts.fingerprint() == before


def test_the_result_says_how_it_was_found(tmp_path):
    counts = drawn(13, languages=3, layers=2, neurons=40, most_tokens=100, zeros=0.1)
    counts.metadata = {"model": "tiny", "config_hash": "abc", "tokenizer_hash": "def", "corpus": "elsewhere"}
    select_neurons(counts, Lape(0.2, 0.8, 0.7)).save(tmp_path / "neurons.safetensors")
    loaded = NeuronSet.load(tmp_path / "neurons.safetensors")
    assert loaded.languages == counts.languages
    expected = {
        "rule": "lape",
        "name": "lape-top0.2-filter0.8-bar0.7",
        "exclusive": False,
        "layer_range": None,
        "top_rate": 0.2,
        "filter_rate": 0.8,
        "activation_bar": 0.7,
        "counts_hash": counts.fingerprint(),
        "model": "tiny",
        "config_hash": "abc",
        "tokenizer_hash": "def",
        "selected": loaded.metadata["selected"],
        "candidates": loaded.metadata["candidates"],
        "filter_threshold": quantile_of(counts, 0.8),
        "activation_threshold": quantile_of(counts, 0.7),
    }
    assert loaded.metadata == expected
    assert loaded.metadata["selected"] == round(0.2 * 80)


def test_languages_without_tokens_are_named():
    counts = counts_of(torch.tensor([[[1, 0]], [[0, 0]], [[1, 1]]]), [2, 0, 1])
    with pytest.raises(SelectionError, match="No token was counted for language 1,"):
        select_neurons(counts)


def test_a_name_is_no_rule():
    counts = counts_of(torch.ones(2, 1, 3, dtype=torch.int64), [2, 2])
    with pytest.raises(SelectionError, match="'lape' is no rule; pass Lape"):
        select_neurons(counts, "lape")


def test_the_examples_in_the_documentation_run():
    assert doctest.testmod(selection).failed == 0
    assert selection.select_neurons.__doc__.count(">>>") == selection.select_many.__doc__.count(">>>") == 3
