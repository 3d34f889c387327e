"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
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


def print_neurons(neurons, as_json: bool, tokens: dict[str, int] | None = None) -> None:
    """Prints how many neurons each language has, and from how many tokens if they were just counted."""
    summary = neurons.summary() | ({"tokens": tokens} if tokens else {})
    if as_json:
        print_json(summary)
        return
    from lape_fast.text import language_name

    table = new_table("language", "name", "neurons", "tokens counted")
    for language, size in summary["per_language"].items():
        table.add_row(language, language_name(language), f"{size:,}", f"{tokens[language]:,}" if tokens else "")
    Console().print(table)
    total = summary["layers"] * summary["neurons_per_layer"]
    Console().print(f"{summary['union']:,} of {total:,} neurons belong to at least one language.")


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


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


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
