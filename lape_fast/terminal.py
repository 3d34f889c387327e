"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection
from statistics import fmean, median
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_json(value: Any) -> None:
    """Prints JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def new_table(*headers: str, words: Collection[str] = ()) -> Table:
    """A table whose first column holds names, which stay on one line, and whose others hold figures.

    Args:
        headers: of the columns.
        words: the headers of the other columns that hold words.
    """
    table = Table()
    for number, header in enumerate(headers):
        left = number == 0 or header in words
        table.add_column(header, justify="left" if left else "right", no_wrap=number == 0)
    return table


def _print_whole(table: Table) -> None:
    """Prints a table that is wider than a narrow terminal rather than cut a name or a figure."""
    console = Console()
    for column in table.columns:
        column.min_width = max(cell_len(word) for cell in (column.header, *column.cells) for word in cell.split())
    needed, natural = Measurement.get(console, console.options.update(max_width=sys.maxsize), table)
    if natural > console.width:
        # Headers and names of several words wrap.
        table.width = max(console.width, needed)
    Console(width=max(console.width, natural)).print(table)


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
HALVES = "Halves agree: Jaccard index of the neurons that the two halves of a language's text select."

# LAPE's own thresholds leave a small model's languages without neurons.
NONE_SELECTED = (
    "{without} of {languages} languages have no neurons by this rule. `lape-fast select COUNTS --rule budget --output "
    "FILE` gives each as many as the others, in a second; with LAPE, raise top_rate and lower both quantiles."
)


def print_neuron_table(summary: dict[str, Any]) -> None:
    """Prints the summary of a neuron set, with ``counted`` and ``selectivity`` per language if it has them."""
    from lape_fast.text import language_name

    counted, selectivity = summary.get("counted"), summary.get("selectivity")
    headers = ["tokens counted", "halves agree"] * bool(counted) + [*SELECTIVITY.values()] * bool(selectivity)
    table = new_table("language", "name", "neurons", *headers, words=("name",))
    for language, size in summary["per_language"].items():
        cells = [f"{counted[language]['tokens']:,}", _share(counted[language]["jaccard"])] if counted else []
        if selectivity:
            cells += [_signed(selectivity.get(language, {}).get(name)) for name in SELECTIVITY]
        table.add_row(language, language_name(language), f"{size:,}", *cells)
    _print_whole(table)
    total = summary["layers"] * summary["neurons_per_layer"]
    Console().print(f"{summary['union']:,} of {total:,} neurons belong to at least one language.")
    if without := list(summary["per_language"].values()).count(0):
        Console().print(NONE_SELECTED.format(without=without, languages=len(summary["per_language"])))
    if counted:
        Console().print(HALVES)
    if selectivity:
        Console().print(COST_UNIT)


def print_selections(selections: dict[str, Any], as_json: bool, ablations: dict[str, dict[str, Any]]) -> None:
    """Prints how several selections from the same counts compare, one row each; what they cost in a second table.

    Args:
        selections: name -> neuron set.
        as_json: whether a machine reads it.
        ablations: name -> what ``ablate`` wrote about these neurons, where it did.
    """
    if as_json:
        measured = {name: {"selectivity": ablation["selectivity"]} for name, ablation in ablations.items()}
        print_json({name: each.summary() | measured.get(name, {}) for name, each in selections.items()})
        return
    table = _new_rule_table("neurons", "least", "median", "most", "without")
    for name, neurons in selections.items():
        sizes = list(neurons.per_language().values())
        counted = (neurons.union_count(), min(sizes), median(sizes), max(sizes), sizes.count(0))
        table.add_row(name, *(f"{count:,}" for count in counted))
    Console().print("Neurons in all, then per language; without: languages that have none.")
    _print_whole(table)
    if not ablations:
        return
    table = _new_rule_table("own", "over next", "over mean")
    for name, ablation in ablations.items():
        table.add_row(name, *(_signed(ablation["mean_selectivity"].get(each)) for each in SELECTIVITY))
    Console().print("\nMean over the languages of own cost, over next worst, over mean of others.")
    _print_whole(table)
    Console().print(COST_UNIT)


def _new_rule_table(*headers: str) -> Table:
    """A table of rules, without the frame: their names are long."""
    table = new_table("rule", *headers)
    table.box, table.show_edge, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, False, 0
    return table


def _share(value: float | None) -> str:
    # Rounded down: 0.9499 has not reached 0.95.
    return "unknown" if value is None else f"{math.floor(100 * value) / 100:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def print_counts(path: Any, summary: dict[str, Any], as_json: bool) -> None:
    """Prints the summary of counts: how much of each language was counted, and how far its two halves agree."""
    if as_json:
        print_json(summary)
        return
    from lape_fast.text import language_name

    stability = summary["metadata"].get("stability", {})
    headers = ("language", "name", "tokens", "halves agree", "95 % interval", "ended by")
    table = new_table(*headers, words=("name", "ended by"))
    for language, tokens in summary["tokens"].items():
        measured = stability.get(language, {})
        interval = "{:.2f}–{:.2f}".format(*measured["interval"]) if measured.get("interval") else ""
        cells = (_share(measured.get("jaccard")), interval, measured.get("ended", ""))
        table.add_row(language, language_name(language), f"{tokens:,}", *cells)
    _print_whole(table)
    Console().print(HALVES)
    total = sum(summary["tokens"].values())
    Console().print(f"{path}: {len(summary['languages'])} languages, {total:,} tokens.", highlight=False)
    if summary["metadata"].get("until_stable"):
        pending = [code for code, measured in stability.items() if not measured["stable"]]
        names = f"; not yet: {', '.join(pending)}" if pending else ""
        Console().print(f"{len(stability) - len(pending)} languages are stable{names}.", highlight=False)


def print_scores(columns: dict, as_json: bool, tasks=None) -> None:
    """Prints the scores of each language, one column per model: the base first, then what came of it.

    Args:
        columns: model -> language -> score; may be empty.
        as_json: whether a machine reads it.
        tasks: ``TaskResults``, printed after them.
    """
    measured = {
        name: {
            language: {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity, **vars(score)}
            for language, score in scores.items()
        }
        for name, scores in columns.items()
    }
    if as_json:
        print_json(measured | ({} if tasks is None else {"tasks": tasks.to_json()}))
        return
    if measured:
        _print_score_table(measured)
    if tasks is not None:
        _print_tasks(tasks)


def _print_score_table(measured: dict) -> None:
    if len(measured) > 2:
        # Side by side, the change stands behind each value.
        table = new_table("language", *measured)
        for language in measured["base"]:
            base, *values = (scores[language]["bits_per_byte"] for scores in measured.values())
            table.add_row(language, f"{base:.4f}", *(f"{value:.4f} ({value - base:+.4f})" for value in values))
        _print_whole(table)
        Console().print("Bits per byte, and in brackets how they differ from the base.")
        return
    table = new_table(
        "language", *(f"{name}: bits per byte" for name in measured), "change", f"{list(measured)[-1]}: perplexity"
    )
    for language in measured["base"]:
        values = [scores[language]["bits_per_byte"] for scores in measured.values()]
        last = list(measured.values())[-1][language]
        change = f"{values[-1] - values[0]:+.4f}" if len(values) > 1 else ""
        table.add_row(language, *(f"{value:.4f}" for value in values), change, f"{last['perplexity']:.2f}")
    _print_whole(table)


def _print_tasks(results) -> None:
    table = new_table("task", "metric", "model", "score", "±", "n", "change", "±", words=("metric", "model"))
    for row in results.rows:
        if row.why is None:
            scores = (_figure(row.value), _figure(row.stderr), f"{row.n:,}")
            table.add_row(
                row.task, row.metric, row.adapter, *scores, _signed(row.difference), _figure(row.difference_stderr)
            )
    if table.row_count:
        _print_whole(table)
        Console().print("±: standard error over documents; of a change, paired by document.")
    for row in results.failed:
        Console().print(f"Failed: {row.task} ({row.adapter}). {row.why}", highlight=False, markup=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def print_ablation(matrix, as_json: bool) -> None:
    """Prints what each language's neurons are worth to it and to the others."""
    if as_json:
        print_json(matrix.to_json())
        return
    table = new_table(
        "switched off", "neurons", "costs itself (bits per byte)", "over the next worst", "over the mean of the others"
    )
    selectivity = matrix.selectivity()
    sizes = {
        language: size for language, size in zip(matrix.ablated, matrix.neurons, strict=True) if language in selectivity
    }
    # To switch nothing off costs exactly nothing, which says nothing of the rule.
    costs = {language: selectivity[language] for language, size in sizes.items() if size}
    for language, size in sizes.items():
        table.add_row(language, f"{size:,}", *(_signed(costs.get(language, {}).get(name)) for name in SELECTIVITY))
    if costs:
        table.add_section()
        known = [[each[name] for each in costs.values() if each[name] is not None] for name in SELECTIVITY]
        means = [_signed(fmean(values) if values else None) for values in known]
        table.add_row("mean", f"{fmean(sizes[language] for language in costs):,.1f}", *means)
    _print_whole(table)
    none = len(sizes) - len(costs)
    without = f" {none} {'has' if none == 1 else 'have'} no neurons and no part in the mean." if none else ""
    Console().print(
        f"{len(matrix.hits_own_hardest())} of {len(selectivity)} languages are hit hardest by the loss of their own "
        f"neurons.{without}"
    )


def print_alignment(alignment, as_json: bool) -> None:
    """Prints the alignment of target and pivot in every layer, a block of columns per stage."""
    if as_json:
        print_json(alignment.to_json())
        return
    names = ("cosine", "cosine_misaligned", "cka", "cka_misaligned", "retrieval_from_target", "retrieval_to_target")
    for stage in alignment.stages:
        table = new_table("layer", *(name.replace("_", " ") for name in names))
        curves = [alignment.to_pivot(name, stage).tolist() for name in names]
        for layer, row in enumerate(zip(*curves, strict=True)):
            table.add_row(str(layer), *(f"{value:.3f}" for value in row))
        Console().print(f"{stage}: {alignment.target} against {alignment.pivot}", highlight=False)
        _print_whole(table)
    Console().print(
        f"{alignment.sentences:,} sentences; retrieval by chance is {1 / alignment.sentences:.3f}. "
        f"{len(alignment.languages)} languages were compared with {alignment.target}.",
        highlight=False,
    )


def print_weight_change(change, as_json: bool) -> None:
    """Prints what each adapter changed in all layers, and how far the adapters agree."""
    if as_json:
        print_json(change.to_json())
        return
    table = new_table("adapter", "projection", "neurons", "norm", "relative", "cosine", "moved", words=("projection",))
    for row in change.totals():
        cells = (f"{row['norm']:.4g}", f"{row['relative_norm']:.4g}", f"{row['cosine']:.6f}", f"{row['moved']:.2%}")
        table.add_row(row["adapter"], row["projection"], f"{row['neurons']:,}", *cells)
    _print_whole(table)
    Console().print("Relative: to the norm of the same weights before. Cosine: of a neuron's weights before and after.")
    known = [each for each in change.shared if each.cosine is not None]
    if known:
        shared = sum(each.shared for each in known)
        mean = sum(each.cosine * each.shared for each in known) / shared
        Console().print(f"Changes of {shared:,} shared rows agree by a cosine of {mean:+.3f} on average.")


def print_steering(steering, as_json: bool) -> None:
    """Prints what was written without and with steering, and in which languages."""
    if as_json:
        print_json(steering.to_json())
        return
    texts = zip(
        *(getattr(steering, name) for name in ("prompts", "plain", "plain_languages", "steered", "steered_languages")),
        strict=True,
    )
    for prompt, plain, plain_language, steered, steered_language in texts:
        lines = [prompt, f"  without ({plain_language}): {plain}", f"  with ({steered_language}): {steered}"]
        Console().print("\n".join(lines), highlight=False, markup=False)
    Console().print(
        f"In {steering.language}: {steering.plain_accuracy:.1%} of {len(steering.prompts):,} texts without steering, "
        f"{steering.steered_accuracy:.1%} with it.",
        highlight=False,
    )


def print_facts(name: Any, facts: dict[str, Any], as_json: bool) -> None:
    """Prints names and values, those of ``metadata`` last and by name: a safetensors file keeps them in no order."""
    if as_json:
        print_json(facts)
        return
    table = Table("", str(name))
    rows = {**facts, **dict(sorted(facts.get("metadata", {}).items()))}
    for key, value in rows.items():
        if key != "metadata" and value not in (None, [], {}):
            needed, in_words = WORDINGS.get(key, (set(), _in_words))
            # Metadata may be anybody's.
            known = not needed or (isinstance(value, dict) and value.keys() >= needed)
            table.add_row(key.replace("_", " "), in_words(value) if known else _in_words(value))
    Console().print(table)


def print_plan(plan, as_json: bool) -> None:
    """Prints a memory plan: what stays, each policy's peak, and what fits on which GPU."""
    if as_json:
        print_json(plan.to_dict())
        return
    for headers, rows in plan.tables():
        table = new_table(*headers)
        for row in rows:
            table.add_row(*row)
        _print_whole(table)
    Console().print(plan.summary(), highlight=False, markup=False, soft_wrap=True)


def print_study_plan(name: Any, facts: dict[str, Any], plan, as_json: bool) -> None:
    """Prints what a study would run, and the memory plan of its subnetwork runs if there is one."""
    if as_json:
        print_json({**facts, "memory": plan.to_dict()} if plan else facts)
        return
    print_facts(name, facts, False)
    if plan:
        print_plan(plan, False)


def print_study(summary: dict[str, Any], table: tuple[list[str], list[list[str]]], folder: Any, as_json: bool) -> None:
    """Prints the summary table of a study and what it says."""
    if as_json:
        print_json(summary)
        return
    header, rows = table
    printed = new_table(*header)
    for row in rows:
        printed.add_row(*row)
    _print_whole(printed)
    sentences = [*summary["verdict"], f"Wrote {folder}/report.html."]
    Console().print("\n".join(sentences), highlight=False, markup=False, soft_wrap=True)


def _corpus_in_words(corpus: dict[str, Any]) -> str:
    # Lines 1- are all of them.
    lines = f", lines {corpus['lines']}" if corpus["lines"] != "1-" else ""
    column = f", column {corpus['text_column']}" if corpus["text_column"] else ""
    return f"{corpus['spec']}{lines}{column}"


def _speed_in_words(speed: dict[str, Any]) -> str:
    rate = f"{speed['tokens_per_s']:,.0f} tokens/s in " if speed["tokens_per_s"] else ""
    return f"{rate}{speed['seconds']:,.1f} s"


def _memory_in_words(memory: dict[str, Any]) -> str:
    predicted, measured = (_mebibytes(memory[name]) for name in ("predicted_bytes", "measured_bytes"))
    return f"policy {memory['policy']}; {predicted} predicted, {measured} measured ({memory['measured']})"


def _mebibytes(size: int | None) -> str:
    return "none" if size is None else f"{size / 2**20:,.1f} MiB"


def _neurons_in_words(neurons: Any) -> str:
    # An adapter names them, a line per layer: thousands in a large model.
    if not isinstance(neurons, list):
        return _in_words(neurons)
    sizes = [len(str(line).split()) for line in neurons]
    return f"{sum(sizes):,} in {sum(map(bool, sizes)):,} of {len(sizes):,} layers"


# How facts that are more than a value are told, and the values that this takes.
WORDINGS = {
    "corpus": ({"spec", "lines", "text_column"}, _corpus_in_words),
    "memory": ({"policy", "measured", "predicted_bytes", "measured_bytes"}, _memory_in_words),
    "neurons": (set(), _neurons_in_words),
    "speed": ({"seconds", "tokens_per_s"}, _speed_in_words),
}


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
