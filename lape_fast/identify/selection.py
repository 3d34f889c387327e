"""From counts to the neurons of each language, by one rule or by several at once.

With p the probability that a neuron fires for a language, q = p / sum of p over languages and H = -sum q ln q, LAPE
(arXiv 2402.16438) takes as candidates the neurons whose p is high for some language, selects those with the lowest H,
and gives each to every language for which its p is high. The other rules are told in ``rules``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lape_fast.errors import SelectionError
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.probabilities import Probabilities, quantile_rank
from lape_fast.identify.rules import Budget, Lape, Percentile, Rule, rule_kind, rule_name, rule_settings

# Scores this close are one: far above the rounding error of a sum over languages (1e-14), which differs between
# machines, and far below the distance between different neurons.
TIE = 2.0**-40

# What the neurons keep of the counts' metadata: the model that they belong to.
MODEL_FIELDS = ("model", "config_hash", "model_type", "hidden_size", "tokenizer_hash")

# By one rule: the neurons of each language, sorted [n] each, and what was found on the way, as JSON values.
Selected = tuple[list[np.ndarray], dict[str, Any]]


def select_neurons(counts: ActivationCounts, rule: Rule = Lape()) -> NeuronSet:  # noqa: B008
    """Selects the neurons of each language by one rule.

    Args:
        counts: of G languages.
        rule: ``Lape``, ``Percentile`` or ``Budget``, with its settings.

    Returns:
        The neurons, with the rule, its name, every setting and the thresholds found in the metadata.

    Raises:
        SelectionError: a language without tokens, or layers that the model does not have.

    Example:
        >>> positive = torch.tensor([[[90, 10, 50, 50]], [[10, 90, 50, 50]]])
        >>> counts = ActivationCounts(positive, torch.tensor([100, 100]), ["mlt_Latn", "cym_Latn"])
        >>> select_neurons(counts, Lape(top_rate=0.5, filter_rate=0.75, activation_bar=0.75))["mlt_Latn"]
        [tensor([0])]
    """
    return select_many(counts, [rule])[0]


def select_many(counts: ActivationCounts, rules: Sequence[Rule]) -> list[NeuronSet]:
    """Selects by several rules; what they have in common is computed once.

    Args:
        counts: of G languages.
        rules: any number, of any kind.

    Returns:
        What ``select_neurons`` returns for each rule, in order.

    Raises:
        SelectionError: a language without tokens, or layers that the model does not have.

    Example:
        >>> positive = torch.tensor([[[90, 10, 50, 50]], [[10, 90, 50, 50]]])
        >>> counts = ActivationCounts(positive, torch.tensor([100, 100]), ["mlt_Latn", "cym_Latn"])
        >>> [each.per_language() for each in select_many(counts, [Budget(1), Percentile(0.25)])]
        [{'mlt_Latn': 1, 'cym_Latn': 1}, {'mlt_Latn': 3, 'cym_Latn': 3}]
    """
    strange = [rule for rule in rules if type(rule) not in SELECTORS]
    if strange:
        raise SelectionError(
            f"{strange[0]!r} is no rule; pass Lape(), Percentile() or Budget(), or what parse_rules makes of a text."
        )
    counts.check_tokens()
    if len(counts.languages) == 1 and any(rule.compares_languages for rule in rules):
        raise SelectionError(
            f"The rule compares languages, and there is only {counts.languages[0]}; select from the counts of several "
            "languages, or by percentile."
        )
    groups: dict[tuple[type[Rule], range], list[int]] = {}
    for number, rule in enumerate(rules):
        groups.setdefault((type(rule), _layer_range(counts, rule)), []).append(number)
    probabilities = {layers: Probabilities(counts, layers) for _, layers in groups}
    source = {
        **{name: counts.metadata[name] for name in MODEL_FIELDS if name in counts.metadata},
        "counts_hash": counts.fingerprint(),
    }
    sets: dict[int, NeuronSet] = {}
    for (kind, layers), numbers in groups.items():
        selections = SELECTORS[kind](probabilities[layers], [rules[number] for number in numbers])
        for number, (members, found) in zip(numbers, selections, strict=True):
            metadata = {**source, **_rule_metadata(rules[number]), **found}
            if rules[number].exclusive:
                members = _in_one_only(members, probabilities[layers].neurons)
            before = layers.start * counts.neurons_per_layer
            positions = [torch.from_numpy(chosen + before) for chosen in members]
            by_language = dict(zip(counts.languages, positions, strict=True))
            sets[number] = NeuronSet.from_flat(by_language, counts.layers, counts.neurons_per_layer, metadata)
    return [sets[number] for number in range(len(rules))]


def _rule_metadata(rule: Rule) -> dict[str, Any]:
    settings = rule_settings(rule)
    # A neuron file's `layers` is how many the model has.
    layers = settings.pop("layers")
    return {"rule": rule_kind(rule), "name": rule_name(rule), **settings, "layer_range": layers}


def _layer_range(counts: ActivationCounts, rule: Rule) -> range:
    first, last = rule.layers or (0, counts.layers - 1)
    if last >= counts.layers:
        raise SelectionError(
            f"The rule looks at layers {first} to {last}, but the counts have {counts.layers} layers, 0 to "
            f"{counts.layers - 1}; name layers that exist."
        )
    return range(first, last + 1)


def _by_entropy(probabilities: Probabilities, rules: Sequence[Lape]) -> Iterator[Selected]:
    rates = {rate for rule in rules for rate in (rule.filter_rate, rule.activation_bar)}
    thresholds = {rate: probabilities.quantile(rate) for rate in rates}
    candidates = {}
    for rate in {rule.filter_rate for rule in rules}:
        neurons = probabilities.above_anywhere(thresholds[rate])
        candidates[rate] = neurons, probabilities.entropies(neurons)
    for rule in rules:
        neurons, entropies = candidates[rule.filter_rate]
        selected = neurons[_lowest(entropies, round(rule.top_rate * probabilities.neurons), absolute=TIE)]
        bar = thresholds[rule.activation_bar]
        members = list(probabilities.each_language(lambda p: selected[p > bar], selected))  # noqa: B023
        yield (
            members,
            {
                "filter_threshold": thresholds[rule.filter_rate],
                "activation_threshold": bar,
                "candidates": len(neurons),
                "selected": len(selected),
            },
        )


def _by_percentile(probabilities: Probabilities, rules: Sequence[Percentile]) -> Iterator[Selected]:
    ranks = [quantile_rank(rule.percentile, probabilities.neurons) - 1 for rule in rules]

    def of_language(p: np.ndarray) -> list[tuple[float, np.ndarray]]:
        return [(float(bar), (p > bar).nonzero()[0]) for bar in np.partition(p, ranks)[ranks]]

    for found in zip(*probabilities.each_language(of_language), strict=True):
        thresholds, members = zip(*found, strict=True)
        yield list(members), {"activation_thresholds": list(thresholds)}


def _by_ratio(probabilities: Probabilities, rules: Sequence[Budget]) -> Iterator[Selected]:
    sizes = [
        rule.neurons if isinstance(rule.neurons, int) else max(1, round(rule.neurons * probabilities.neurons))
        for rule in rules
    ]
    total, lost = probabilities.totals()

    def of_language(p: np.ndarray) -> list[np.ndarray]:
        # The ratio upside down, so that a neuron that no other language uses is 0 and not infinite. The mean of the
        # others differs from their sum by a factor that is the same for all neurons.
        ratios = total - p
        ratios += lost
        np.divide(ratios, p, out=ratios, where=p > 0)
        return [chosen_by(rule, size, p, ratios) for rule, size in zip(rules, sizes, strict=True)]

    def chosen_by(rule: Budget, size: int, p: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        eligible = p > rule.floor
        scores = np.where(eligible, ratios, np.inf)
        return _lowest(scores, min(size, np.count_nonzero(eligible)), relative=TIE, highest=p)

    by_rule = zip(*probabilities.each_language(of_language), strict=True)
    for size, members in zip(sizes, by_rule, strict=True):
        yield list(members), {"neurons_per_language": size}


# Each selects by all rules of its kind, so that they share what they can.
SELECTORS = {Lape: _by_entropy, Percentile: _by_percentile, Budget: _by_ratio}


def _lowest(
    scores: np.ndarray,
    share: int,
    *,
    absolute: float = 0.0,
    relative: float = 0.0,
    highest: np.ndarray | None = None,
) -> np.ndarray:
    """The positions, sorted, of the ``share`` lowest scores, or of all where there are fewer.

    Scores within ``absolute + relative * last`` of the last that has a place tie with it, so that no rounding error
    decides; the places that are left go to the tied ones with the highest ``highest``, and after that to the first.
    """
    if share >= len(scores):
        return np.arange(len(scores))
    if share == 0:
        return np.arange(0)
    last = np.partition(scores, share - 1)[share - 1]
    distance = absolute + relative * last
    chosen = scores < last - distance
    tied = (~chosen & (scores <= last + distance)).nonzero()[0]
    if highest is not None:
        tied = tied[(-highest[tied]).argsort(kind="stable")]
    chosen[tied[: share - np.count_nonzero(chosen)]] = True
    return chosen.nonzero()[0]


def _in_one_only(members: list[np.ndarray], neurons: int) -> list[np.ndarray]:
    """The members that no other language has."""
    owners = np.zeros(neurons, dtype=np.int32)
    for chosen in members:
        owners[chosen] += 1
    return [chosen[owners[chosen] == 1] for chosen in members]
