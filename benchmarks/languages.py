"""Identification over every language of a corpus: what stopping when stable saves, and what it changes.

    python -m benchmarks.languages --model DIR --corpus DIR --workspace DIR --json FILE

The first row counts every language to the same budget, or to the end of its text; the others stop a language once the
neurons of its two halves agree to a Jaccard index. Each row says how many tokens that took, and how far the neurons
that it selects agree with those of the first row, over all languages. The workspace keeps the counts, so the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine_facts, report
from lape_fast.identify import ActivationCounts, CountingSettings, NeuronSet, count_to_file, select_neurons
from lape_fast.identify.stability import is_stable
from lape_fast.models import load_model
from lape_fast.text import open_corpus

COLUMNS = {
    "tokens": lambda row: f"{row['tokens']:,}",
    "of budget": lambda row: f"{row['tokens_over_budget_run']:.2f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "stable": lambda row: f"{len(row['stable'])}",
    "not yet": lambda row: f"{len(row['not_yet_stable'])}",
    "agrees: least": lambda row: f"{row['agreement_with_budget_run']['least']:.2f}",
    "mean": lambda row: f"{row['agreement_with_budget_run']['mean']:.2f}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--corpus", required=True, help="folder of text, one file a language")
    parser.add_argument("--tokens", type=int, default=40_000, help="the budget of each language")
    parser.add_argument("--thresholds", type=float, nargs="+", default=(0.9, 0.95), metavar="JACCARD")
    # A language's share of a small model by LAPE is a handful of neurons, of which no interval is narrow.
    parser.add_argument("--rule", default="budget:neurons=150", help="how neurons are selected")
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--workspace", type=Path, default=Path("build/languages"), help="where counts are kept")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    facts = machine_facts(torch.device("cpu"))
    model, tokenizer = load_model(options.model, device="cpu")
    corpus = open_corpus(options.corpus)
    rows: list[dict[str, Any]] = []
    full: ActivationCounts | None = None
    for threshold in (None, *sorted(options.thresholds)):
        plan = CountingSettings(
            context_length=options.context_length,
            tokens_per_language=options.tokens,
            until_stable=threshold,
            rule=options.rule,
            # Consecutive lines are of one article: an early stop must not depend on what it is about.
            seed=0,
        )
        name = "budget" if threshold is None else f"until-stable-{threshold}"
        counts = count_to_file(model, tokenizer, corpus, options.workspace / f"{name}.safetensors", plan)
        full = full or counts
        rows.append({"name": name, **describe(counts, full, plan, max(options.thresholds))})
    settings = {
        "model": Path(options.model).name,
        "corpus": Path(options.corpus).name,
        **{name: getattr(options, name) for name in ("tokens", "thresholds", "rule", "context_length")},
    }
    report(__doc__.partition("\n")[0], rows, COLUMNS, settings, facts, options.json)


def describe(
    counts: ActivationCounts, full: ActivationCounts, plan: CountingSettings, threshold: float
) -> dict[str, Any]:
    """The figures of a run beside those of the one that spends its budget.

    Args:
        counts, full: of both runs.
        plan: of the run.
        threshold: at which a language of the budget's run is called stable.
    """
    stability = counts.metadata["stability"]
    stable = [code for code, each in stability.items() if is_stable(each, plan.until_stable or threshold)]
    agreement = jaccards(*(select_neurons(each, plan.selection_rule()) for each in (counts, full)))
    halves = [each["jaccard"] for each in stability.values() if each["jaccard"] is not None]
    return {
        "languages": len(counts.languages),
        "tokens": int(counts.tokens.sum()),
        "tokens_over_budget_run": int(counts.tokens.sum()) / int(full.tokens.sum()),
        "tokens_per_s": counts.metadata["speed"]["tokens_per_s"],
        "waited_share": counts.metadata["speed"]["waited_share"],
        "ended_by": dict(Counter(each["ended"] for each in stability.values())),
        "halves_agree": {"least": min(halves), "median": median(halves), "most": max(halves)},
        "agreement_with_budget_run": {
            "least": min(agreement.values()),
            "mean": fmean(agreement.values()),
            "mean_of_stable": fmean(agreement[code] for code in stable) if stable else None,
        },
        "stable": stable,
        "not_yet_stable": [code for code in stability if code not in stable],
        "stability": stability,
    }


def jaccards(first: NeuronSet, second: NeuronSet) -> dict[str, float]:
    """The Jaccard index of each language's neurons in two sets."""
    found = {}
    for language in first.languages:
        one, other = first.flat(language), second.flat(language)
        total = len(np.union1d(one, other))
        found[language] = len(np.intersect1d(one, other)) / total if total else 1.0
    return found


if __name__ == "__main__":
    main()
