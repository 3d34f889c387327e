"""The runs of a study: which there are, in what order, and the folder that keeps each one's result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lape_fast.errors import StoppedError
from lape_fast.files import lacks_room, read_json, write_json
from lape_fast.study.recipe import Recipe, slug

RESULT_NAME = "run.json"
DONE, FAILED, OUT_OF_MEMORY = "done", "failed", "out of memory"


@dataclass(frozen=True)
class Run:
    """One training: a language, a method, a learning rate and a seed."""

    language: str
    method: str
    learning_rate: float
    seed: int

    def folder(self, runs: Path) -> Path:
        """Where its result is."""
        return runs / self.language / slug(self.method) / f"rate-{self.learning_rate:g}-seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.language} {self.method} at {self.learning_rate:g}, seed {self.seed}"


def sweep(recipe: Recipe, language: str, method: str) -> list[Run]:
    """Every learning rate of a method, with the first seed."""
    return [Run(language, method, rate, recipe.seeds[0]) for rate in recipe.rates(method)]


def count_runs(recipe: Recipe) -> int:
    """How many runs the study has."""
    repeated = len(recipe.seeds) - 1
    return len(recipe.targets) * sum(len(recipe.rates(method)) + repeated for method in recipe.methods)


def choose(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run whose best measurement of the target is the lowest; None if every run failed."""
    done = [result for result in results if result["status"] == DONE]
    return min(done, key=lambda result: min(point["target"] for point in result["points"]), default=None)


def finished(run: Run, runs: Path) -> dict[str, Any] | None:
    """The result of a run, or None if it has none yet."""
    path = run.folder(runs) / RESULT_NAME
    return read_json(path) if path.exists() else None


def perform(run: Run, runs: Path, train: Callable[[Run, Path], dict[str, Any]]) -> dict[str, Any]:
    """Performs a run and writes its result; one that fails has a result that says so.

    Args:
        run: which.
        runs: folder of all.
        train: trains in a folder and returns what it measured; it goes on with what an interrupted one left there.

    Raises:
        StoppedError: a signal came; the same call goes on.
    """
    folder = run.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch()
    try:
        result = {"status": DONE, **train(run, folder)}
    # What a method may raise has no end, and none of it may end the others.
    except Exception as error:
        # What is asked to stop or has no room goes on when it is started again.
        if isinstance(error, StoppedError) or lacks_room(error):
            raise
        shutil.rmtree(folder)
        folder.mkdir()
        result = {"status": status_of(error), "error": f"{type(error).__name__}: {error}"}
    result = {**asdict(run), **result, **watch.spent()}
    write_json(folder / RESULT_NAME, result)
    return result


class Stopwatch:
    """The time since it was made, on the clock and of all threads on processors."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        """``wall_seconds`` and ``processor_seconds``."""
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return {"wall_seconds": round(wall, 1), "processor_seconds": round(processor, 1)}


def status_of(error: Exception) -> str:
    """Whether an error is want of memory, on whatever device."""
    lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    return OUT_OF_MEMORY if lacking else FAILED


def all_results(recipe: Recipe, runs: Path) -> Iterator[tuple[Run, dict[str, Any], bool]]:
    """The results there are so far, in the order of the recipe, and whether each is at the chosen learning rate."""
    for language in recipe.targets:
        for method in recipe.methods:
            swept = {run: result for run in sweep(recipe, language, method) if (result := finished(run, runs))}
            best = choose(list(swept.values()))
            rate = best and best["learning_rate"]
            yield from ((run, result, run.learning_rate == rate) for run, result in swept.items())
            for seed in recipe.seeds[1:] if best else ():
                run = Run(language, method, rate, seed)
                result = finished(run, runs)
                if result:
                    yield run, result, True


def chosen_runs(recipe: Recipe, runs: Path, language: str) -> list[Run]:
    """The run of every method whose adapter is kept: the first seed at the chosen learning rate."""
    return [
        run
        for run, result, chosen in all_results(recipe, runs)
        if chosen and result["status"] == DONE and (run.language, run.seed) == (language, recipe.seeds[0])
    ]
