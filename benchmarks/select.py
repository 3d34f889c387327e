"""Selecting neurons from counts of 100 languages x 32 layers x 14,336 neurons: seconds and peak memory.

``plain`` is the formula in tensor code (the quantile taken twice, the entropy of every neuron), ``ours`` is
``select_neurons``. Each measurement is the first selection of a fresh process that drew its counts itself; the peak is
that process's, with torch and the 367 MB of counts in it. Rounds alternate between the two; seconds are the median,
the peak is the largest.

    python -m benchmarks.select --json FILE
"""

from __future__ import annotations

import argparse
import hashlib
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
from lape_fast.identify.selection import select_neurons

TOP_RATE, FILTER_RATE, ACTIVATION_BAR = 0.05, 0.95, 0.95


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
    codes = [f"lang{language:03d}" for language in range(languages)]
    return ActivationCounts(positive.view(languages, layers, neurons), torch.from_numpy(tokens), codes)


def select_plainly(counts: ActivationCounts) -> NeuronSet:
    """The formula of LAPE, step by step on whole arrays."""
    p = counts.probability().flatten(1)
    filter_threshold = p.flatten().kthvalue(round(FILTER_RATE * p.numel())).values
    q = p / p.sum(0)
    entropy = -(q * q.log()).nan_to_num(0).sum(0)
    entropy[(p <= filter_threshold).all(0)] = math.inf
    selected = entropy.topk(round(TOP_RATE * p.shape[1]), largest=False).indices.sort().values
    activation_threshold = p.flatten().kthvalue(round(ACTIVATION_BAR * p.numel())).values
    active = p[:, selected] > activation_threshold
    members = {language: selected[row] for language, row in zip(counts.languages, active, strict=True)}
    return NeuronSet.from_flat(members, counts.layers, counts.neurons_per_layer)


def select_ours(counts: ActivationCounts) -> NeuronSet:
    return select_neurons(counts, TOP_RATE, FILTER_RATE, ACTIVATION_BAR)


SELECTIONS = {"plain": select_plainly, "ours": select_ours}


def measure(name: str, size: tuple[int, int, int]) -> dict:
    """One selection in this process."""
    counts = draw_counts(*size)
    start = time.perf_counter()
    neurons = SELECTIONS[name](counts)
    seconds = time.perf_counter() - start
    # ru_maxrss counts bytes on macOS and KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    digest = hashlib.sha256(neurons.offsets.numpy().tobytes() + neurons.indices.numpy().tobytes()).hexdigest()
    return {
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "counts_bytes": counts.positive.nbytes,
        "union": neurons.union(),
        "neurons_sha256": digest,
    }


def measure_apart(name: str, size: tuple[int, int, int]) -> dict:
    """One selection in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.select", "--measure", name, "--size", *map(str, size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=(100, 32, 14336), metavar=("G", "L", "F"))
    parser.add_argument("--measure", choices=sorted(SELECTIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = tuple(options.size)
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure, size)))
        return

    rounds = [{name: measure_apart(name, size) for name in SELECTIONS} for _ in range(options.rounds)]
    same = len({measured["neurons_sha256"] for each in rounds for measured in each.values()}) == 1
    rows = []
    for name in SELECTIONS:
        measured = [each[name] for each in rounds]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(each["seconds"] for each in measured),
                "seconds_of_rounds": [each["seconds"] for each in measured],
                "peak_rss_bytes": max(each["peak_rss_bytes"] for each in measured),
                "counts_bytes": measured[0]["counts_bytes"],
                "union": measured[0]["union"],
                "same_neurons": same,
                "size": list(size),
                **machine_facts(torch.device("cpu")),
            }
        )
        sys.stdout.write(
            f"{name:6} {rows[-1]['seconds']:6.2f} s  {rows[-1]['peak_rss_bytes'] / 2**30:5.2f} GiB peak  "
            f"{rows[-1]['union']} neurons\n"
        )
    if options.json:
        write_json(options.json, rows)
    if not same:
        sys.exit("The two selections differ: the speed of a wrong answer is worth nothing.")


if __name__ == "__main__":
    main()
