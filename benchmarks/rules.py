"""Which rule finds neurons that matter to their own language most: every rule measured by switching its neurons off.

    python -m benchmarks.rules --model DIR --counts FILE --corpus DIR --workspace DIR --json FILE

All rules select from the same counts, restricted to the languages that are measured. LAPE gives every language another
number of neurons, so each of its selections is followed by a budget and a percentile of the same mean size; the sizes
of ``--sizes`` are measured too, and ``exclusive`` variants. A row's costs are means over all languages, those without
neurons included: own is what a language's neurons are worth to it, in bits per byte; over next worst and over mean of
others are what that exceeds. Every finished ablation is kept in the workspace, so the same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.maltese import BASE_LANGUAGES
from benchmarks.measure import machine_facts, report
from lape_fast.identify import (
    ActivationCounts,
    Budget,
    NeuronSet,
    Percentile,
    Rule,
    parse_rules,
    rule_name,
    select_many,
)
from lape_fast.models import load_model
from lape_fast.study import AblationMatrix, ablate_to_file, prepare_text
from lape_fast.text import open_corpus

LAPE_TEXTS = ("lape:top_rate=0.01/0.05", "lape:top_rate=0.2,filter_rate=0.8,activation_bar=0.8")

COLUMNS = {
    "own": lambda row: f"{row['mean_own']:+.4f}",
    "over next worst": lambda row: f"{row['mean_over_next_worst']:+.4f}",
    "over mean of others": lambda row: f"{row['mean_over_mean_of_others']:+.4f}",
    "own hardest": lambda row: f"{row['own_hardest']} of {row['languages']}",
    "without": lambda row: f"{row['languages_without']}",
    "neurons": lambda row: "{} {:g} {}".format(*row["neurons_per_language"]),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model that was counted")
    parser.add_argument("--counts", type=Path, required=True, help="its counts")
    parser.add_argument("--corpus", required=True, help="folder of text that was not counted")
    parser.add_argument("--lines", default="1798-1997", help="which lines of it to measure on")
    parser.add_argument("--languages", nargs="+", default=BASE_LANGUAGES, metavar="CODE")
    parser.add_argument("--sizes", type=int, nargs="*", default=(50, 150), metavar="NEURONS")
    parser.add_argument("--workspace", type=Path, default=Path("build/rules"), help="where ablations are kept")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)

    counts = ActivationCounts.load(options.counts).restrict(options.languages)
    selections = {rule_name(rule): neurons for rule, neurons in select_all(counts, options.sizes)}
    model, tokenizer = load_model(options.model, device="cpu")
    corpus = open_corpus(options.corpus, lines=options.lines, languages=counts.languages)
    text = prepare_text(model, tokenizer, corpus, context_length=256)
    rows = []
    for name, neurons in selections.items():
        matrix = ablate_to_file(model, neurons, text, options.workspace / f"{name}.ablation.json")
        rows.append(row_of(name, neurons, matrix))
    settings = {"lines": options.lines, "languages": len(counts.languages), "model": Path(options.model).name}
    report(
        "Rules by ablation, bits per byte", rows, COLUMNS, settings, machine_facts(torch.device("cpu")), options.json
    )


def select_all(counts: ActivationCounts, sizes: Sequence[int]) -> list[tuple[Rule, NeuronSet]]:
    """Every rule with its selection: those of each size, LAPE with others of its mean size, and exclusive ones."""
    total = counts.layers * counts.neurons_per_layer
    lape = [rule for text in LAPE_TEXTS for rule in parse_rules(text)]
    rules = [rule for size in sizes for rule in rules_of_size(size, total)]
    exclusive = [replace(rule, exclusive=True) for rule in [*rules, *lape]]
    for rule, neurons in zip(lape, select_many(counts, lape), strict=True):
        size = max(1, round(fmean(neurons.per_language().values())))
        rules += [rule, *rules_of_size(size, total)]
    # A mean size may be one of the sizes.
    rules = list(dict.fromkeys([*rules, *exclusive]))
    return list(zip(rules, select_many(counts, rules), strict=True))


def rules_of_size(size: int, total: int) -> list[Rule]:
    """The rules that give every language that many of the model's neurons."""
    return [Budget(size), Percentile(round(1 - size / total, 6))]


def row_of(name: str, neurons: NeuronSet, matrix: AblationMatrix) -> dict[str, Any]:
    sizes = list(neurons.per_language().values())
    return {
        "name": name,
        **{f"mean_{field}": value for field, value in matrix.mean_selectivity().items()},
        "own_hardest": len(matrix.hits_own_hardest()),
        "languages": len(sizes),
        "languages_without": sizes.count(0),
        "neurons_per_language": [min(sizes), median(sizes), max(sizes)],
        "neurons": neurons.union_count(),
        "selectivity": matrix.selectivity(),
    }


if __name__ == "__main__":
    main()
