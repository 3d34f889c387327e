"""Counts and then tunes for a long time, and measures whether memory, open files and processes stay as they are.

    python -m benchmarks.long_run --minutes 60 --json FILE

Half of the time each. The slope of the resident memory is a least-squares fit over the samples behind the warm-up,
with the standard error that the samples' own correlation leaves it: neighbours are not independent, so the number of
samples is divided by (1 + r) / (1 - r), where r is the correlation of a residual with the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine_facts
from lape_fast.errors import StoppedError
from lape_fast.files import write_json
from lape_fast.identify import Budget, CountingSettings, count_activations, select_neurons
from lape_fast.text import open_corpus
from lape_fast.tune import SubnetworkConfig, TrainingSettings, tune_language

# Share of the time that is left out at the start: pools, caches and buffers are filled then.
WARM_UP = 0.25
LANGUAGES = ("eng_Latn", "mlt_Latn")


@dataclass
class Watch:
    """Samples of this process and its children.

    Attributes:
        samples: seconds since the start, resident bytes, open files, processes and threads.
    """

    samples: list[tuple[float, int, int, int, int]] = field(default_factory=list)

    def look(self, begun: float) -> None:
        """Takes one sample."""
        pids = [os.getpid(), *_children(os.getpid())]
        files = threads = memory = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                memory += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                files += len(os.listdir(f"/proc/{pid}/fd"))
                threads += len(os.listdir(f"/proc/{pid}/task"))
        self.samples.append((time.monotonic() - begun, memory, files, len(pids), threads))

    @contextlib.contextmanager
    def watching(self, interval: float) -> Iterator[None]:
        """Takes a sample every ``interval`` seconds inside the ``with`` block."""
        begun, ended = time.monotonic(), threading.Event()

        def repeat() -> None:
            while not ended.wait(interval):
                self.look(begun)

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def figures(self) -> dict[str, Any]:
        """What the samples behind the warm-up say."""
        last = self.samples[-1][0]
        kept = [sample for sample in self.samples if sample[0] >= WARM_UP * last]
        seconds, memory, files, processes, threads = zip(*kept, strict=True)
        slope, error = fit_slope(seconds, [each / 2**20 for each in memory])
        return {
            "seconds": round(last, 1),
            "samples": len(kept),
            "rss_mib": [round(memory[0] / 2**20, 1), round(memory[-1] / 2**20, 1)],
            "rss_mib_per_hour": round(3600 * slope, 3),
            "rss_mib_per_hour_standard_error": round(3600 * error, 3),
            # The most in the first half of the samples, and in the second.
            **{
                name: [max(values[: len(kept) // 2]), max(values[len(kept) // 2 :])]
                for name, values in (("open_files", files), ("processes", processes), ("threads", threads))
            },
        }


def fit_slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The least-squares slope of values over times, and its standard error."""
    x, y = (torch.tensor(each, dtype=torch.float64) for each in (times, values))
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    residuals = y - slope * x
    power = (residuals * residuals).sum()
    if len(x) < 4 or not power:
        return slope.item(), 0.0
    correlation = ((residuals[1:] * residuals[:-1]).sum() / power).clamp(0, 0.99)
    # As if only so many samples of the same spread had been taken.
    effective = max(3.0, (len(x) * (1 - correlation) / (1 + correlation)).item())
    return slope.item(), (power / (x * x).sum() / (effective - 2)).sqrt().item()


def left_open() -> int:
    """Files of this process that are open between two pieces of work; what the samples open for a moment is not."""
    counted = []
    for _ in range(20):
        counted.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.005)
    return min(counted)


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def run(seconds: float, folder: Path, interval: float) -> dict[str, dict[str, Any]]:
    """Counts for half of the time and tunes for the other half; returns the figures of both."""
    from tests.tiny_models import tiny_model, tiny_tokenizer

    texts = folder / "texts"
    texts.mkdir(parents=True)
    for language in LANGUAGES:
        lines = (f"{language} document {number} of a text that never changes" for number in range(5000))
        (texts / f"{language}.txt").write_text("\n".join(lines))
    model, tokenizer, corpus = tiny_model(), tiny_tokenizer(), open_corpus(texts)
    figures = {}

    deadline, runs, watch, left = time.monotonic() + seconds / 2, 0, Watch(), []
    settings = CountingSettings(context_length=64, batch_tokens=512)
    with watch.watching(interval):
        while time.monotonic() < deadline:
            counts = count_activations(
                model,
                tokenizer,
                corpus,
                settings,
                checkpoint=folder / f"checkpoint-{runs}",
                checkpoint_seconds=1.0,
                workers=1,
            )
            shutil.rmtree(folder / f"checkpoint-{runs}")
            runs += 1
            left.append(left_open())
    figures["count"] = {
        **watch.figures(),
        "runs": runs,
        "tokens": runs * int(counts.tokens.sum()),
        "left_open": [left[0], left[-1]],
    }

    config = SubnetworkConfig(neurons=select_neurons(counts, Budget(neurons=8, floor=0.0)), language=LANGUAGES[0])
    training = TrainingSettings(
        context_length=32, rows_per_step=4, steps=10**6, save_every=100, schedule="constant", learning_rate=1e-5
    )
    watch, before = Watch(), left_open()
    # The way out that every user has: a signal ends the run behind a step.
    timer = threading.Timer(seconds / 2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with watch.watching(interval), contextlib.suppress(StoppedError):
        tune_language(model, tokenizer, corpus, config, folder / "adapter", training)
    timer.join()
    steps = [int(path.name.rpartition("-")[2]) for path in (folder / "adapter.checkpoints").glob("checkpoint-*")]
    figures["tune"] = {**watch.figures(), "steps": max(steps), "left_open": [before, left_open()]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="counting and tuning together")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    options = parser.parse_args()
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="lape-fast-long.") as folder:
        figures = run(seconds, Path(folder), interval=seconds / 600)
    write_json(options.json, {**figures, "machine": machine_facts(torch.device("cpu"))})


if __name__ == "__main__":
    main()
