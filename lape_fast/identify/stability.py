"""Whether more text would change a language's neurons: do the two halves of its text select the same ones?"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.rules import Lape, Rule
from lape_fast.identify.selection import select_neurons

# The interval covers 95 %; one that reaches further than this from its middle says too little.
RESAMPLES, COVERAGE, NARROW = 10_000, 0.95, 0.05


# Of a language about which the halves say nothing.
UNKNOWN = {"jaccard": None, "interval": None, "neurons": 0}


def measure_stability(counts: ActivationCounts, rule: Rule | None = None) -> dict[str, dict[str, Any]]:
    """How far the neurons that each half of a language's text selects agree.

    Each half has half the tokens, so the neurons selected from all of them are closer to the truth than this says.

    Args:
        counts: with their halves.
        rule: how the neurons are selected; LAPE as published by default.

    Returns:
        For every language "tokens", "jaccard" (shared neurons over all that either half selects), "interval" (of the
        Jaccard index, by a bootstrap over these neurons), and "neurons" that either half selects. Jaccard index and
        interval are None where a half has no text or neither has neurons, and where a rule that compares languages has
        only one.

    Raises:
        SelectionError: the halves were not kept.

    Example:
        >>> measure_stability(counts)["mlt_Latn"]["jaccard"]
    """
    halves = counts.halves()
    known = [
        language
        for language, *tokens in zip(counts.languages, *(half.tokens.tolist() for half in halves), strict=True)
        if min(tokens) > 0
    ]
    rule = rule or Lape()
    if len(known) < 2 and rule.compares_languages:
        known = []
    selected = [select_neurons(half.restrict(known), rule) for half in halves] if known else []
    report = {}
    for language, tokens in zip(counts.languages, counts.tokens.tolist(), strict=True):
        neurons = [half.flat(language) for half in selected] if language in known else []
        report[language] = {"tokens": tokens, **_agreement(*neurons)}
    return report


def is_stable(measured: dict[str, Any], threshold: float) -> bool:
    """Whether a language's agreement reaches a threshold, with an interval narrow enough to believe it."""
    if measured["jaccard"] is None:
        return False
    low, high = measured["interval"]
    return measured["jaccard"] >= threshold and high - low <= 2 * NARROW


def _agreement(*neurons: Tensor) -> dict[str, Any]:
    total = len(np.union1d(*neurons)) if neurons else 0
    if total == 0:
        return dict(UNKNOWN)
    shared = len(np.intersect1d(*neurons))
    jaccard = shared / total
    # To draw as many neurons again, and to count the shared ones among them, is to draw from a binomial distribution.
    # With half a neuron added to either side, so that two neurons that agree are no certainty.
    draws = np.random.default_rng(0).binomial(total, (shared + 0.5) / (total + 1), RESAMPLES) / total
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return {"jaccard": jaccard, "interval": [float(low), float(high)], "neurons": total}
