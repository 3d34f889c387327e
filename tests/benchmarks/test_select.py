"""The selection benchmark: what it compares selects the same neurons. No time is judged."""

from __future__ import annotations

import pytest

from benchmarks import select

COUNTS = select.draw_counts(languages=7, layers=3, neurons=997)


@pytest.mark.parametrize("rule", select.SELECTIONS)
def test_the_rows_of_a_rule_select_the_same_neurons(rule):
    found = {name: run(COUNTS)[0] for name, run in select.SELECTIONS[rule].items()}
    assert len({neurons.fingerprint() for neurons in found.values()}) == 1
    assert min(found["ours"].per_language().values()) > 0


def test_a_measurement_says_what_was_selected():
    measured = select.measure("budget: ours", (5, 2, 301))
    neurons = select.ROWS["budget: plain"](select.draw_counts(5, 2, 301))[0]
    assert (measured["fingerprint"], measured["union"]) == (neurons.fingerprint(), neurons.union_count())
    assert measured["seconds"] > 0 and measured["counts_bytes"] == 5 * 2 * 301 * 8
