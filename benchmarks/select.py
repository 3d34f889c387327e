"""Selecting neurons from counts of 100 languages x 40 layers x 14,336 neurons: seconds and peak memory per rule.

``plain`` is each rule's formula in tensor code on whole arrays, the other rows are ``select_many``. Each measurement is
the first selection of a fresh process that drew its counts itself; the peak is that process's, with torch and the 459
MB of counts in it. Rounds alternate between the rows; seconds are the median, the peak is the largest.

    python -m benchmarks.select --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.measure import machine_facts
from lape_fast.files import write_json
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.rules import Budget, Lape, Percentile, parse_rules
from lape_fast.identify.selection import select_many

LAPE, BUDGET, PERCENTILE = Lape(), Budget(), Percentile()


def draw_counts(languages: int, layers: int, neurons: int) -> ActivationCounts:
    """Binomial counts (their normal approximation): each neuron has its own rate, a few have favourite languages."""
    width = layers * neurons
    positive = torch.empty(languages, width, dtype=torch.int64)
    # A corpus has much text in few languages: 5 million tokens down to 50 thousand.
    tokens = np.geomspace(5e6, 5e4, languages).astype(np.int64)
    log_odds = np.random.default_rng(0).standard_normal(width, dtype=np.float32) - 2

    def draw(language: int) -> None:
        generator = np.random.default_rng([1, language])
        noise, chance = generator.standard_normal((2, width), dtype=np.float32)
        favoured = generator.random(width, dtype=np.float32) < 0.01
        rate = 1 / (1 + np.exp(-log_odds - 0.2 * noise - 3 * favoured))
        drawn = rate * tokens[language] + chance * np.sqrt(rate * (1 - rate) * tokens[language])
        positive[language] = torch.from_numpy(drawn.round().clip(0, tokens[language]).astype(np.int64))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(languages)))
    # Well-formed codes of no language, as ISO 639 keeps them for private use: qaa, qab ...
    codes = [f"q{chr(97 + language // 26)}{chr(97 + language % 26)}_Latn" for language in range(languages)]
    return ActivationCounts(positive.view(languages, layers, neurons), torch.from_numpy(tokens), codes)


def lape_plainly(counts: ActivationCounts) -> NeuronSet:
    """The formula of LAPE, step by step on whole arrays."""
    p = counts.probability().flatten(1)
    filter_threshold = p.flatten().kthvalue(round(LAPE.filter_rate * p.numel())).values
    q = p / p.sum(0)
    entropy = -(q * q.log()).nan_to_num(0).sum(0)
    entropy[(p <= filter_threshold).all(0)] = math.inf
    selected = entropy.topk(round(LAPE.top_rate * p.shape[1]), largest=False).indices.sort().values
    activation_threshold = p.flatten().kthvalue(round(LAPE.activation_bar * p.numel())).values
    active = p[:, selected] > activation_threshold
    return named(counts, [selected[row] for row in active])


def budget_plainly(counts: ActivationCounts) -> NeuronSet:
    """The formula of the budget rule on whole arrays."""
    p = counts.probability().flatten(1)
    ratio = p / ((p.sum(0) - p) / (len(p) - 1))
    ratio[p <= BUDGET.floor] = -math.inf
    return named(counts, ratio.topk(round(BUDGET.neurons * p.shape[1])).indices.sort().values)


def percentile_plainly(counts: ActivationCounts) -> NeuronSet:
    """The formula of the percentile rule on whole arrays."""
    p = counts.probability().flatten(1)
    threshold = p.kthvalue(round(PERCENTILE.percentile * p.shape[1]), dim=1, keepdim=True).values
    return named(counts, [row.nonzero().squeeze(1) for row in p > threshold])


def named(counts: ActivationCounts, members) -> NeuronSet:
    by_language = dict(zip(counts.languages, members, strict=True))
    return NeuronSet.from_flat(by_language, counts.layers, counts.neurons_per_layer)


FIVE_RATES = parse_rules("lape:top_rate=0.05/0.01/0.02/0.1/0.2")
THREE_SIZES = parse_rules("budget:neurons=0.01/0.005/0.02")

# The first set of every row of a group must be the same.
SELECTIONS = {
    "lape": {
        "plain": lambda counts: [lape_plainly(counts)],
        "ours": lambda counts: select_many(counts, [LAPE]),
        "ours, five rates": lambda counts: select_many(counts, FIVE_RATES),
    },
    "budget": {
        "plain": lambda counts: [budget_plainly(counts)],
        "ours": lambda counts: select_many(counts, [BUDGET]),
        "ours, three sizes": lambda counts: select_many(counts, THREE_SIZES),
    },
    "percentile": {
        "plain": lambda counts: [percentile_plainly(counts)],
        "ours": lambda counts: select_many(counts, [PERCENTILE]),
    },
    "all rules": {"ours": lambda counts: select_many(counts, [LAPE, BUDGET, PERCENTILE])},
}
ROWS = {f"{rule}: {name}": select for rule, rows in SELECTIONS.items() for name, select in rows.items()}


def measure(name: str, size: tuple[int, int, int]) -> dict:
    """One selection in this process."""
    counts = draw_counts(*size)
    start = time.perf_counter()
    first = ROWS[name](counts)[0]
    seconds = time.perf_counter() - start
    # ru_maxrss counts bytes on macOS and KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "counts_bytes": counts.positive.nbytes,
        "union": first.union_count(),
        "fingerprint": first.fingerprint(),
    }


def measure_apart(name: str, size: tuple[int, int, int]) -> dict:
    """One selection in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.select", "--measure", name, "--size", *map(str, size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=(100, 40, 14336), metavar=("G", "L", "F"))
    parser.add_argument("--measure", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = tuple(options.size)
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure, size)))
        return

    rounds = [{name: measure_apart(name, size) for name in ROWS} for _ in range(options.rounds)]
    found = {name: {each[name]["fingerprint"] for each in rounds} for name in ROWS}
    same = {
        rule: len(set.union(*(found[f"{rule}: {name}"] for name in rows))) == 1 for rule, rows in SELECTIONS.items()
    }
    rows = []
    for name in ROWS:
        measured = [each[name] for each in rounds]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(each["seconds"] for each in measured),
                "seconds_of_rounds": [each["seconds"] for each in measured],
                "peak_rss_bytes": max(each["peak_rss_bytes"] for each in measured),
                "counts_bytes": measured[0]["counts_bytes"],
                "union": measured[0]["union"],
                "same_neurons": same[name.partition(":")[0]],
                "size": list(size),
                **machine_facts(torch.device("cpu")),
            }
        )
        sys.stdout.write(
            f"{name:25} {rows[-1]['seconds']:6.2f} s  {rows[-1]['peak_rss_bytes'] / 2**30:5.2f} GiB peak  "
            f"{rows[-1]['union']} neurons\n"
        )
    if options.json:
        write_json(options.json, rows)
    differing = [rule for rule, equal in same.items() if not equal]
    if differing:
        sys.exit(f"The selections by {', '.join(differing)} differ: the speed of a wrong answer is worth nothing.")


if __name__ == "__main__":
    main()
