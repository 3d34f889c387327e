"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """Prints JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def new_table(*headers: str) -> Table:
    """A table whose first column holds names and whose others hold figures."""
    table = Table()
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number == 0 else "right")
    return table


def print_neurons(
    neurons, as_json: bool, counted: dict[str, Any] | None = None, ablation: dict[str, Any] | None = None
) -> None:
    """Prints how many neurons each language has.

    Args:
        neurons: the set.
        as_json: whether a machine reads it.
        counted: "tokens" and "jaccard" of each language's halves, if they were just counted.
        ablation: what ``ablate`` wrote about these neurons, if it did.
    """
    summary = neurons.summary()
    if counted:
        summary["counted"] = counted
    if ablation:
        summary["selectivity"] = ablation["selectivity"]
    if as_json:
        print_json(summary)
    else:
        print_neuron_table(summary)


# How the selectivity of an ablation is headed, in bits per byte.
SELECTIVITY = {
    "own": "own cost",
    "over_next_worst": "over next worst",
    "over_mean_of_others": "over mean of others",
}
COST_UNIT = "Costs: bits per byte that switching the neurons off adds for the language itself, and what that exceeds."


def print_neuron_table(summary: dict[str, Any]) -> None:
    """Prints the summary of a neuron set, with ``counted`` and ``selectivity`` per language if it has them."""
    from lape_fast.text import language_name

    counted, selectivity = summary.get("counted"), summary.get("selectivity")
    headers = ["tokens counted", "halves agree"] * bool(counted) + [*SELECTIVITY.values()] * bool(selectivity)
    table = new_table("language", "name", "neurons", *headers)
    for language, size in summary["per_language"].items():
        cells = [f"{counted[language]['tokens']:,}", _share(counted[language]["jaccard"])] if counted else []
        if selectivity:
            cells += [_signed(selectivity.get(language, {}).get(name)) for name in SELECTIVITY]
        table.add_row(language, language_name(language), f"{size:,}", *cells)
    Console().print(table)
    total = summary["layers"] * summary["neurons_per_layer"]
    Console().print(f"{summary['union']:,} of {total:,} neurons belong to at least one language.")
    if selectivity:
        Console().print(COST_UNIT)


def print_selections(selections: dict[str, Any], as_json: bool, ablations: dict[str, dict[str, Any]]) -> None:
    """Prints how several selections from the same counts compare, one row each.

    Args:
        selections: name -> neuron set.
        as_json: whether a machine reads it.
        ablations: name -> what ``ablate`` wrote about these neurons, where it did.
    """
    if as_json:
        measured = {name: {"selectivity": ablation["selectivity"]} for name, ablation in ablations.items()}
        print_json({name: each.summary() | measured.get(name, {}) for name, each in selections.items()})
        return
    headers = [f"mean {header}" for header in SELECTIVITY.values()] if ablations else []
    table = new_table("rule", "neurons", "per language: least", "median", "most", "languages without", *headers)
    for name, neurons in selections.items():
        sizes = list(neurons.per_language().values())
        counted = (neurons.union_count(), min(sizes), median(sizes), max(sizes), sizes.count(0))
        means = ablations.get(name, {}).get("mean_selectivity", {})
        costs = [_signed(means.get(each)) for each in SELECTIVITY] if ablations else []
        table.add_row(name, *(f"{count:,}" for count in counted), *costs)
    Console().print(table)
    if ablations:
        Console().print(COST_UNIT)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def print_counts(path: Any, summary: dict[str, Any], as_json: bool) -> None:
    """Prints the summary of counts: how much of each language was counted, and how far its two halves agree."""
    if as_json:
        print_json(summary)
        return
    from lape_fast.text import language_name

    stability = summary["metadata"].get("stability", {})
    table = new_table("language", "name", "tokens", "halves agree", "95 %", "ended by")
    for language, tokens in summary["tokens"].items():
        measured = stability.get(language, {})
        interval = "{:.2f}–{:.2f}".format(*measured["interval"]) if measured.get("interval") else ""
        cells = (_share(measured.get("jaccard")), interval, measured.get("ended", ""))
        table.add_row(language, language_name(language), f"{tokens:,}", *cells)
    Console().print(table)
    total = sum(summary["tokens"].values())
    Console().print(f"{path}: {len(summary['languages'])} languages, {total:,} tokens.", highlight=False)
    if summary["metadata"].get("until_stable"):
        pending = [code for code, measured in stability.items() if measured["ended"] != "stable"]
        names = f"; not yet: {', '.join(pending)}" if pending else ""
        Console().print(f"{len(stability) - len(pending)} languages are stable{names}.", highlight=False)


def print_scores(columns: dict, as_json: bool) -> None:
    """Prints the scores of each language, one column per model: the base first, then what came of it."""
    measured = {
        name: {
            language: {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity, **vars(score)}
            for language, score in scores.items()
        }
        for name, scores in columns.items()
    }
    if as_json:
        print_json(measured)
        return
    table = new_table("language", *(f"{name}: bits per byte" for name in columns), "change", "perplexity")
    for language in measured["base"]:
        values = [scores[language]["bits_per_byte"] for scores in measured.values()]
        last = list(measured.values())[-1][language]
        change = f"{values[-1] - values[0]:+.4f}" if len(values) > 1 else ""
        table.add_row(language, *(f"{value:.4f}" for value in values), change, f"{last['perplexity']:.2f}")
    Console().print(table)


def print_ablation(matrix, as_json: bool) -> None:
    """Prints what each language's neurons are worth to it and to the others."""
    if as_json:
        print_json(matrix.to_json())
        return
    table = new_table(
        "switched off", "neurons", "costs itself (bits per byte)", "over the next worst", "over the mean of the others"
    )
    selectivity = matrix.selectivity()
    for language, size in zip(matrix.ablated, matrix.neurons, strict=True):
        if language in selectivity:
            table.add_row(language, f"{size:,}", *map(_signed, selectivity[language].values()))
    table.add_section()
    table.add_row(
        "mean", f"{sum(matrix.neurons) / len(matrix.neurons):,.1f}", *map(_signed, matrix.mean_selectivity().values())
    )
    Console().print(table)
    none = matrix.neurons.count(0)
    without = f" {none} {'has' if none == 1 else 'have'} no neurons." if none else ""
    Console().print(
        f"{len(matrix.hits_own_hardest())} of {len(selectivity)} languages are hit hardest by the loss of their own "
        f"neurons.{without}"
    )


def print_facts(name: Any, facts: dict[str, Any], as_json: bool) -> None:
    """Prints names and values."""
    if as_json:
        print_json(facts)
        return
    table = Table("", str(name))
    metadata = facts.get("metadata", {})
    for key, value in {**{key: value for key, value in facts.items() if key != "metadata"}, **metadata}.items():
        table.add_row(key.replace("_", " "), _in_words(value))
    Console().print(table)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
