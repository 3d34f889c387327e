"""Percentile, budget, exclusive, layers and several rules at once, against plain Python with exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from lape_fast.errors import SelectionError
from lape_fast.identify import probabilities
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.rules import Budget, Lape, Percentile, Rule, parse_rules
from lape_fast.identify.selection import select_many, select_neurons
from tests.identify.test_selection import counts_of, drawn, pairs, reference

COUNTS = {
    "plain": drawn(1, languages=5, layers=3, neurons=101, most_tokens=100_000, zeros=0.3),
    "two-languages": drawn(2, languages=2, layers=2, neurons=257, most_tokens=10**12, zeros=0.1),
    "few-tokens": drawn(3, languages=12, layers=2, neurons=63, most_tokens=7, zeros=0.5),
    "one-token": drawn(4, languages=3, layers=2, neurons=77, most_tokens=1, zeros=0.2),
    "rarely-active": drawn(5, languages=4, layers=5, neurons=43, most_tokens=1000, zeros=0.97),
}


def exact(counts: ActivationCounts) -> list[dict[tuple[int, int], Fraction]]:
    """The probabilities of each language by (layer, neuron)."""
    return [
        {
            (layer, neuron): Fraction(count, tokens)
            for layer, row in enumerate(fired)
            for neuron, count in enumerate(row)
        }
        for fired, tokens in zip(counts.positive.tolist(), counts.tokens.tolist(), strict=True)
    ]


def by_percentile(counts: ActivationCounts, rule: Percentile) -> dict[str, list[tuple[int, int]]]:
    chosen = {}
    for language, p in zip(counts.languages, exact(counts), strict=True):
        threshold = sorted(p.values())[max(1, round(rule.percentile * len(p))) - 1]
        chosen[language] = [place for place in p if p[place] > threshold]
    return chosen


def by_ratio(counts: ActivationCounts, rule: Budget) -> dict[str, list[tuple[int, int]]]:
    all_p = exact(counts)
    size = rule.neurons if isinstance(rule.neurons, int) else max(1, round(rule.neurons * len(all_p[0])))
    chosen = {}
    for language, p in zip(counts.languages, all_p, strict=True):

        def order(place, p=p):
            others = [other[place] for other in all_p if other is not p]
            mean = sum(others) / len(others) if others else 0
            # An infinite ratio comes first.
            return (mean > 0, -p[place] / mean if mean else 0, -p[place], place)

        eligible = [place for place in p if float(p[place]) > rule.floor]
        chosen[language] = sorted(sorted(eligible, key=order)[:size])
    return chosen


def by_entropy(counts: ActivationCounts, rule: Lape) -> dict[str, list[tuple[int, int]]]:
    return reference(counts, rule.top_rate, rule.filter_rate, rule.activation_bar)[0]


ORACLES = {Percentile: by_percentile, Budget: by_ratio, Lape: by_entropy}


def expected(counts: ActivationCounts, rule: Rule) -> dict[str, list[tuple[int, int]]]:
    first, last = rule.layers or (0, counts.layers - 1)
    part = ActivationCounts(counts.positive[:, first : last + 1], counts.tokens, counts.languages)
    found = ORACLES[type(rule)](part, rule)
    chosen = {language: [(layer + first, neuron) for layer, neuron in places] for language, places in found.items()}
    if rule.exclusive:
        everywhere = [place for places in chosen.values() for place in places]
        chosen = {
            language: [place for place in places if everywhere.count(place) == 1] for language, places in chosen.items()
        }
    return chosen


TEXTS = [
    "percentile:percentile=0.9",
    "percentile:percentile=0.3,exclusive",
    "percentile:percentile=0.99,layers=1",
    "budget:neurons=1,floor=0",
    "budget:neurons=20",
    "budget:neurons=0.1,floor=0.3",
    "budget:neurons=1000,floor=0.5",
    "budget:neurons=30,floor=0,exclusive",
    "budget:neurons=0.2,layers=0-1,exclusive",
    "lape:top_rate=0.2,filter_rate=0.7,activation_bar=0.6,exclusive",
    "lape:top_rate=0.3,filter_rate=0.5,activation_bar=0.5,layers=1",
    "lape:top_rate=0.1,filter_rate=0.5,activation_bar=0.9,layers=0-1,exclusive",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_selection_is_what_the_rule_says(counts, text):
    (rule,) = parse_rules(text)
    assert pairs(select_neurons(counts, rule)) == expected(counts, rule)


@pytest.mark.parametrize("counts", [COUNTS["plain"], COUNTS["rarely-active"]], ids=["plain", "rarely-active"])
def test_several_rules_at_once_select_what_each_selects_alone(counts):
    # Twice the same rule, and kinds and layers out of order.
    rules = [rule for text in [*TEXTS, TEXTS[0], *reversed(TEXTS)] for rule in parse_rules(text)]
    together = select_many(counts, rules)
    for rule, neurons in zip(rules, together, strict=True):
        alone = select_neurons(counts, rule)
        assert torch.equal(neurons.indices, alone.indices) and torch.equal(neurons.offsets, alone.offsets)
        assert neurons.metadata == alone.metadata
    assert select_many(counts, []) == []


def test_a_budget_orders_neurons_that_no_other_language_uses_by_their_probability():
    # Neurons 0, 2 and 4 fire for the first language only; neuron 1 fires more often, but once elsewhere.
    positive = torch.tensor([[[20, 99, 40, 0, 30, 60]], [[0, 1, 0, 9, 0, 60]], [[0, 0, 0, 9, 0, 60]]])
    counts = counts_of(positive, [100, 100, 100])
    sizes = {size: pairs(select_neurons(counts, Budget(size, floor=0.1)))["language 0"] for size in range(1, 7)}
    assert sizes[1] == [(0, 2)]
    assert sizes[2] == [(0, 2), (0, 4)]
    assert sizes[3] == [(0, 0), (0, 2), (0, 4)]
    assert sizes[4] == [(0, 0), (0, 1), (0, 2), (0, 4)]
    assert sizes[5] == sizes[6] == [(0, 0), (0, 1), (0, 2), (0, 4), (0, 5)]


def test_a_budget_tells_apart_what_the_other_languages_do_next_to_nothing():
    # The others' share is a trillionth of p: a sum over all languages minus p would have lost it.
    tokens = 10**15
    others = torch.tensor([5, 3, 4, 1, 2])
    positive = torch.stack([torch.full((5,), tokens // 2), others, torch.zeros(5, dtype=torch.int64)])[:, None]
    neurons = select_neurons(counts_of(positive, [tokens] * 3), Budget(2))
    assert neurons["language 0"][0].tolist() == [3, 4]


@pytest.mark.parametrize("size", [1, 10, 60, 119])
def test_ratios_that_are_equal_on_paper_tie_and_the_first_neurons_win(size):
    # The others fire in all 120 orders of five counts: one mean on paper, several after rounding.
    orders = torch.tensor(list(itertools.permutations([3, 10, 40, 111, 997])))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    others = orders[order].T.reshape(5, 4, 30)
    positive = torch.cat([torch.full((1, 4, 30), 500), others])
    neurons = select_neurons(counts_of(positive.contiguous(), [1009] * 6), Budget(size))
    assert neurons.flat("language 0").tolist() == list(range(size))


@pytest.mark.parametrize("rule", [Budget(2), Percentile(0.5), Budget(2, exclusive=True)])
def test_a_language_without_neurons_is_kept(rule):
    positive = torch.tensor([[[9, 8, 1, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 9]]])
    neurons = select_neurons(counts_of(positive, [10, 10, 10]), rule)
    assert neurons.languages == ["language 0", "language 1", "language 2"]
    assert neurons.count("language 1") == 0 < min(neurons.count("language 0"), neurons.count("language 2"))


def test_every_language_gets_its_budget_where_lape_leaves_some_with_nothing():
    counts = COUNTS["plain"]
    quiet = counts_of(
        torch.cat([counts.positive, counts.positive[:1] // 4]), [*counts.tokens.tolist(), counts.tokens[0]]
    )
    assert min(select_neurons(quiet, Lape(0.02)).per_language().values()) == 0
    assert set(select_neurons(quiet, Budget(10)).per_language().values()) == {10}


def test_the_thresholds_and_the_size_are_in_the_metadata(tmp_path):
    counts = COUNTS["plain"]
    neurons = select_neurons(counts, Percentile(0.9, layers=(1, 2), exclusive=True))
    neurons.save(tmp_path / "neurons.safetensors")
    metadata = NeuronSet.load(tmp_path / "neurons.safetensors").metadata
    p = counts.probability()[:, 1:].flatten(1)
    assert metadata["activation_thresholds"] == p.kthvalue(round(0.9 * 202), dim=1).values.tolist()
    assert (metadata["rule"], metadata["percentile"], metadata["layer_range"]) == ("percentile", 0.9, [1, 2])
    assert metadata["exclusive"] is True and metadata["name"] == "percentile-0.9-exclusive-layers1-2"
    metadata = select_neurons(counts, Budget(0.1)).metadata
    assert (metadata["neurons"], metadata["floor"], metadata["neurons_per_language"]) == (0.1, 0.05, 30)


@pytest.mark.parametrize("rule", [Lape(layers=(0, 3)), Budget(layers=(3, 3)), Percentile(layers=(2, 9))])
def test_layers_that_the_model_does_not_have_are_refused(rule):
    with pytest.raises(SelectionError, match="but the counts have 3 layers, 0 to 2; name layers that exist"):
        select_neurons(COUNTS["plain"], rule)


def test_the_number_of_threads_changes_nothing_and_slices_leave_no_seams(monkeypatch):
    counts = drawn(11, languages=9, layers=4, neurons=3000, most_tokens=20_000, zeros=0.2)
    rules = [Budget(0.05), Percentile(0.95)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = select_many(counts, rules)
        torch.set_num_threads(3)
        monkeypatch.setattr(probabilities, "LONG_SLICE", 1009)
        together = select_many(counts, rules)
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first.indices, second.indices) and torch.equal(first.offsets, second.offsets)
