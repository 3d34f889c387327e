"""A study: methods, languages, learning rates and seeds on one base, from a recipe to a file of results.

OUTPUT/base/ base-training.json     the base, where the recipe trains one
OUTPUT/identify/                    counts and neurons
OUTPUT/base.json                    the base's bits per byte, with which every run is compared
OUTPUT/runs/LANGUAGE/METHOD/RUN/    run.json of each run, and test.json and the adapter of the chosen ones
OUTPUT/results.json                 all of it in one file, from which the report is made
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lape_fast
from lape_fast.errors import ConfigError, TrainingError
from lape_fast.files import read_json, write_json
from lape_fast.identify import CountingSettings, NeuronSet, identify_neurons
from lape_fast.identify.identification import NEURONS_NAME
from lape_fast.models import load_model
from lape_fast.progress import Advance, log, progress_bar
from lape_fast.study.measuring import Corpora, Yardstick, open_corpora
from lape_fast.study.recipe import ALL, TARGETS, Recipe
from lape_fast.study.runs import (
    DONE,
    Run,
    Stopwatch,
    all_results,
    choose,
    chosen_runs,
    count_runs,
    finished,
    perform,
    sweep,
)
from lape_fast.tune import TuningConfig, load_adapter, train_base_model, tune_language

RECIPE_NAME, BASE_NAME, TEST_NAME, TASKS_NAME, RESULTS_NAME = (
    "recipe.json",
    "base.json",
    "test.json",
    "tasks.json",
    "results.json",
)

# What may differ when a study goes on: more of it is run, or its report compares at other levels.
MAY_CHANGE = {"preset", "architecture", "targets", "methods", "learning_rates", "seeds", "tasks"}
LEVELS = {"gain_shares", "forgetting_levels"}

# Of the training report, what a run keeps; of the records, what is drawn.
REPORTED = ("trainable", "neurons", "flops_per_token", "tokens_per_second", "steps", "best_step", "seconds", "memory")
# A method's own kernels may round otherwise than the base's; what a run before it left behind is more than this.
SAME = 1e-4

RECORDED = ("loss", "gradient_norm", "update_norm", "change_norm", "validation_loss")


def run_study(recipe: Recipe, output: str | os.PathLike) -> dict[str, Any]:
    """Performs what is missing of a study, and writes its results.

    The same call goes on with an interrupted one, or with one whose recipe got more languages, methods, rates or
    seeds. A run that fails has a result that says so; remove its folder to try it again.

    Args:
        recipe: the study.
        output: its folder.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: the folder holds a study with other settings.
        CorpusError: the text lacks a language.
        StoppedError: a signal came; the same call goes on.

    Example:
        >>> run_study(read_recipe("recipes/small.yaml"), "build/study-small")
    """
    output = Path(output)
    claim(output, recipe)
    corpora = open_corpora(recipe, output)
    base = _Base(recipe, corpora, output)
    neurons = find_neurons(recipe, corpora, base, output)
    with progress_bar("study", count_runs(recipe), "run") as advance:
        study = _Study(recipe, corpora, base, neurons, measure_base(base, output), output / "runs", advance)
        for language in recipe.targets:
            for method in recipe.methods:
                study.compare(language, method)
            study.evaluate_tasks(language)
            # After every language, so that a long study can be reported on before its end.
            write_json(output / RESULTS_NAME, collect_results(recipe, neurons, output))
    return read_json(output / RESULTS_NAME)


def claim(output: Path, recipe: Recipe) -> None:
    """Remembers the recipe of a study's folder, and refuses another one.

    Raises:
        ConfigError: what has been run there was run with other settings.
    """
    path, settings = output / RECIPE_NAME, recipe.to_json()
    if path.exists():
        earlier, now = (_decisive(each) for each in (read_json(path), settings))
        changed = [name for name in now if earlier.get(name) != now[name]]
        if changed:
            differences = ", ".join(f"{name} was {earlier.get(name)!r} and is {now[name]!r}" for name in changed)
            raise ConfigError(
                f"{output} holds a study with other settings ({differences}); go on with its own, or choose another "
                "--output."
            )
    write_json(path, settings)


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that runs must share, flat."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in MAY_CHANGE:
            flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name.rpartition(".")[2] not in LEVELS}


class _Base:
    """The base, loaded once for all runs, and anew after one that failed in the middle."""

    def __init__(self, recipe: Recipe, corpora: Corpora, output: Path) -> None:
        self._recipe = recipe
        self._name = recipe.model or str(train_base(recipe, corpora, output))
        self._loaded: tuple[nn.Module, Any] | None = None
        self._yardstick: Yardstick | None = None
        self._corpora = corpora

    @property
    def model(self) -> nn.Module:
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        return self._load()[1]

    @property
    def yardstick(self) -> Yardstick:
        if self._yardstick is None:
            self._yardstick = Yardstick(self._recipe, self._corpora, self.model, self.tokenizer)
        return self._yardstick

    def discard(self) -> None:
        """Gives the memory back; what needs the model next loads it."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> tuple[nn.Module, Any]:
        if self._loaded is None:
            self._loaded = load_model(self._name, dtype=self._recipe.dtype)
        return self._loaded


def train_base(recipe: Recipe, corpora: Corpora, output: Path) -> Path:
    """The base that the recipe describes, trained on all languages unless it is there already."""
    path, workspace = output / "base", output / "base.checkpoints"
    if not path.exists():
        corpus = corpora.train(None if recipe.base.languages == ALL else recipe.base.languages)
        rare = recipe.base.under_represented or recipe.targets
        documents = {}
        for language in corpus.languages:
            texts = list(corpus.documents(language))
            share = recipe.base.target_share if language in rare else 1.0
            documents[language] = texts[: max(1, int(share * len(texts)))]
        watch = Stopwatch()
        report = train_base_model(documents, path, recipe.base.size, recipe.base.settings, workspace)
        write_json(output / "base-training.json", {**report, **watch.spent()})
    shutil.rmtree(workspace, ignore_errors=True)
    return path


def find_neurons(recipe: Recipe, corpora: Corpora, base: _Base, output: Path) -> NeuronSet:
    """Every target's neurons, as the recipe says they are found.

    Raises:
        ConfigError: a target has none.
    """
    asked, found = recipe.identify, output / "identify" / NEURONS_NAME
    # The folder's recipe vouches for what is found there already, wherever it was moved from.
    if asked.neurons or found.exists():
        neurons = NeuronSet.load(asked.neurons or found)
    else:
        languages = {ALL: None, TARGETS: recipe.targets}.get(asked.languages, asked.languages)
        settings = CountingSettings(
            context_length=asked.context_length, tokens_per_language=asked.tokens_per_language, rule=asked.rule
        )
        corpus = corpora.train(languages)
        _, neurons = identify_neurons(base.model, base.tokenizer, corpus, output / "identify", settings)
    for language in recipe.targets:
        if language not in neurons.languages or not neurons.count(language):
            raise ConfigError(
                f"No neuron of {language} was selected by {asked.rule!r}; choose a rule that gives it some."
            )
    return neurons


def measure_base(base: _Base, output: Path) -> dict[str, Any]:
    """The base's bits per byte, measured once."""
    path = output / BASE_NAME
    if not path.exists():
        write_json(path, base.yardstick.base(base.model))
    return read_json(path)


class _Study:
    """The runs of a study; it tells of every run that there is a result of, and how long the rest will take."""

    def __init__(self, recipe, corpora, base, neurons, before, runs: Path, advance: Advance) -> None:
        self._recipe: Recipe = recipe
        self._corpora: Corpora = corpora
        self._base: _Base = base
        self._neurons: NeuronSet = neurons
        self._before: Mapping[str, Any] = before
        self._runs, self._advance = runs, advance
        self._told, self._performed, self._began = 0, 0, time.perf_counter()

    def compare(self, language: str, method: str) -> None:
        """The sweep of one method on one language, its other seeds at the best rate, and their tests."""
        swept = sweep(self._recipe, language, method)
        best = choose([self._result(run) for run in swept])
        others = self._recipe.seeds[1:]
        if best is None:
            self._told += len(others)
            self._advance(len(others))
            return
        chosen = Run(language, method, best["learning_rate"], best["seed"])
        self._test(chosen)
        for run in swept:
            if run != chosen:
                self._remove_adapter(run)
        for seed in others:
            run = Run(language, method, best["learning_rate"], seed)
            if self._result(run)["status"] == DONE:
                self._test(run)
                self._remove_adapter(run)

    def evaluate_tasks(self, language: str) -> None:
        """Measures the base and the chosen run of every method on the recipe's tasks, once."""
        asked = self._recipe.tasks
        if asked is None:
            return
        from lape_fast.study.tasks import evaluate_tasks

        path = self._runs / language / TASKS_NAME
        chosen = chosen_runs(self._recipe, self._runs, language)
        methods = {str(run.folder(self._runs) / "adapter"): run.method for run in chosen}
        # As JSON has them, so that they can be compared with what is written.
        setting = json.loads(json.dumps({"tasks": asdict(asked), "runs": [asdict(run) for run in chosen]}))
        if path.exists() and read_json(path)["setting"] == setting:
            return
        results = evaluate_tasks(
            self._base.model,
            self._base.tokenizer,
            asked.names,
            [language],
            adapters=list(methods),
            include_path=asked.folder,
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            batch_size=asked.batch_size,
        ).to_json()
        rows = [
            {**row, "language": language, "adapter": methods.get(row["adapter"], "base")} for row in results["rows"]
        ]
        write_json(path, {"setting": setting, "rows": rows})

    def _result(self, run: Run) -> dict[str, Any]:
        found = finished(run, self._runs)
        result = found or perform(run, self._runs, self._train)
        self._told += 1
        self._performed += found is None
        if result["status"] == DONE:
            first, last = result["points"][0], result["points"][-1]
            outcome = (
                f"target {last['target'] - first['target']:+.4f}, elsewhere {last['elsewhere']:+.4f} bits per byte"
            )
        else:
            outcome = f"{result['status']}: {result['error']}"
        self._advance(1, 1, f"{run}: {outcome}")
        if not found:
            left = (time.perf_counter() - self._began) / self._performed * (count_runs(self._recipe) - self._told) / 60
            log(f"Run {self._told} of {count_runs(self._recipe)}: {run}: {outcome}; about {left:.0f} min left.")
        return result

    def _train(self, run: Run, folder: Path) -> dict[str, Any]:
        """Trains one run and measures it on the way; the adapter stays in its folder."""
        from lape_fast.tune import read_dynamics

        adapter = folder / "adapter"
        if not adapter.exists():
            try:
                self._tune(run, adapter)
            # Whatever it was, the next run needs a base that is whole.
            except Exception:
                self._base.discard()
                raise
        report, records = read_json(adapter / "training.json"), read_dynamics(adapter)
        points = [
            {"step": record["step"], "tokens": record["tokens"], **record["measured"]}
            for record in records
            if "measured" in record
        ]
        start, unchanged = points[0]["target"], self._before["validation_targets"][run.language]
        if abs(start - unchanged) > SAME * unchanged:
            raise TrainingError(
                f"{run} began at {start} bits per byte, where the base has {unchanged}: the run before it left the "
                "base changed; remove the folder of the run to try it again."
            )
        curves = [{"step": each["step"], **{name: each[name] for name in RECORDED if name in each}} for each in records]
        return {**{name: report.get(name) for name in REPORTED}, "points": points, "records": curves}

    def _tune(self, run: Run, adapter: Path) -> None:
        base, recipe = self._base, self._recipe
        tuned, _ = tune_language(
            base.model,
            base.tokenizer,
            self._corpora.train([run.language]),
            TuningConfig(method=run.method, language=run.language, neurons=self._neurons, seed=run.seed),
            adapter,
            recipe.training.settings(recipe.training.total_steps, run.learning_rate, run.seed),
            self._corpora.validation([run.language], recipe.evaluation.lines),
            measure=base.yardstick.measure(self._before, run.language),
        )
        tuned.detach(keep=False)

    def _test(self, run: Run) -> None:
        """Measures a chosen run on the test lines, once."""
        path = run.folder(self._runs) / TEST_NAME
        if not path.exists():
            loaded = load_adapter(self._base.model, run.folder(self._runs) / "adapter")
            try:
                watch = Stopwatch()
                measured = self._base.yardstick.test(self._base.model, self._before, run.language)
                write_json(path, {**measured, **watch.spent()})
            finally:
                loaded.detach(keep=False)

    def _remove_adapter(self, run: Run) -> None:
        shutil.rmtree(run.folder(self._runs) / "adapter", ignore_errors=True)


def collect_results(recipe: Recipe, neurons: NeuronSet, output: str | os.PathLike) -> dict[str, Any]:
    """Everything that a report needs, of the runs there are so far."""
    output = Path(output)
    runs = []
    for run, result, chosen in all_results(recipe, output / "runs"):
        tested = run.folder(output / "runs") / TEST_NAME
        test = {"test": read_json(tested)} if chosen and tested.exists() else {}
        runs.append({**_condensed(result), **test})
    tasks = [output / "runs" / language / TASKS_NAME for language in recipe.targets]
    trained = output / "base-training.json"
    report = read_json(trained) if trained.exists() else {}
    return {
        "recipe": recipe.to_json(),
        "machine": machine(),
        "base": {"name": recipe.model or "base", **{name: report[name] for name in sorted(report) if name != "log"}},
        "neurons": {language: neurons.count(language) for language in recipe.targets},
        "neurons_total": neurons.layers * neurons.neurons_per_layer,
        "before": read_json(output / BASE_NAME),
        "runs": _rounded(runs),
        "tasks": [row for path in tasks if path.exists() for row in read_json(path)["rows"]],
    }


def _condensed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A run without what is not drawn: of its records the loss and the gradient's norm, of the changes the last."""
    trained = [record for record in result.get("records", []) if "loss" in record]
    records = [
        {"step": record["step"], "loss": record["loss"], "gradient_norm": record["gradient_norm"]["total"]}
        for record in trained
    ]
    return {**result, "records": records, "change_norm": trained[-1]["change_norm"] if trained else {}}


def machine() -> dict[str, Any]:
    """What the runs ran on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lape_fast": lape_fast.__version__,
    }


def _rounded(value: Any, digits: int = 8) -> Any:
    """Floats to so many significant digits: what is kept in git need not hold noise."""
    if isinstance(value, Mapping):
        return {name: _rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
