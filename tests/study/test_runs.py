"""A study from end to end on a tiny base: what it measures, what it goes on with, and what fails in it."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lape_fast.study.study as study_module
from lape_fast.errors import ConfigError, StoppedError
from lape_fast.models import load_model
from lape_fast.study import evaluate_languages, run_study
from lape_fast.study.measuring import Yardstick, first_lines
from lape_fast.study.recipe import parse_recipe
from lape_fast.study.runs import DONE, Run, choose, count_runs, perform, status_of, sweep
from lape_fast.text import open_corpus
from lape_fast.tune import load_adapter

LANGUAGES = ["mlt_Latn", "eng_Latn", "deu_Latn"]
TINY = {
    "base": {
        "hidden_size": 16,
        "neurons_per_layer": 32,
        "layers": 2,
        "heads": 2,
        "vocabulary": 320,
        "languages": LANGUAGES,
        "steps": 2,
        "rows_per_step": 2,
        "context_length": 32,
    },
    "text": {"corpus": "cldr", "train": "1-30", "validation": "31-34", "test": "35-38"},
    "targets": ["mlt_Latn"],
    "others": LANGUAGES,
    "identify": {"rule": "budget:neurons=6,floor=0.0", "languages": LANGUAGES, "context_length": 32},
    "methods": ["subnetwork", "full"],
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 1],
    "training": {"steps": 4, "rows_per_step": 2, "context_length": 32, "evaluate_every": 2},
    "evaluation": {"other_lines": 2, "test_other_lines": 3, "context_length": 32},
}
# What depends on the clock, and not on the run.
CLOCK = {"wall_seconds", "processor_seconds", "seconds", "tokens_per_second", "memory"}


def tiny(**changes):
    return parse_recipe({**copy.deepcopy(TINY), **changes})


def timeless(results):
    """The results without what the clock decides."""
    if isinstance(results, dict):
        return {name: timeless(value) for name, value in results.items() if name not in CLOCK}
    return [timeless(each) for each in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("study") / "out"
    run_study(tiny(), output)
    return output


@pytest.fixture
def with_base(undisturbed, tmp_path) -> Path:
    """A folder in which the base is trained and the neurons are found, and no run was performed."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output, ignore=lambda folder, names: {"runs", "results.json"} & set(names))
    return output


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_every_run_is_there_and_each_methods_best_rate_is_tested_with_every_seed(undisturbed):
    results = results_of(undisturbed)
    runs = results["runs"]
    assert len(runs) == count_runs(tiny()) == 6
    for method in ("subnetwork", "full"):
        mine = [run for run in runs if run["method"] == method]
        assert [run["status"] for run in mine] == ["done"] * 3
        swept = [run for run in mine if run["seed"] == 0]
        assert [run["learning_rate"] for run in swept] == [1e-3, 1e-2]
        best = min(swept, key=lambda run: min(point["target"] for point in run["points"]))["learning_rate"]
        assert {(run["learning_rate"], run["seed"]) for run in mine if "test" in run} == {(best, 0), (best, 1)}
        for run in mine:
            assert [point["step"] for point in run["points"]] == [0, 2, 4]
            assert [point["tokens"] for point in run["points"]] == [0, 2 * 64, 4 * 64]
            assert run["points"][0]["target"] == results["before"]["validation_targets"]["mlt_Latn"]
            assert run["points"][0]["elsewhere"] == 0
    assert [run["trainable"] for run in runs if run["method"] == "subnetwork"] == [6 * 3 * 16] * 3


def test_what_is_measured_is_what_an_independent_evaluation_measures(undisturbed):
    results = results_of(undisturbed)
    run = next(run for run in results["runs"] if "test" in run and run["method"] == "full" and run["seed"] == 0)
    folder = Run("mlt_Latn", "full", run["learning_rate"], 0).folder(undisturbed / "runs")
    model, tokenizer = load_model(undisturbed / "base", device="cpu")

    def measured(lines: str, language: str) -> float:
        corpus = open_corpus("cldr", lines=lines, languages=[language])
        return evaluate_languages(model, tokenizer, corpus, context_length=32)[language].bits_per_byte

    others = {language: measured("35-37", language) for language in LANGUAGES[1:]}
    target = measured("35-38", "mlt_Latn")
    # Results are kept to six digits.
    assert results["before"]["test_targets"]["mlt_Latn"] == pytest.approx(target, abs=2e-6)
    load_adapter(model, folder / "adapter")
    assert run["test"]["target"] == pytest.approx(measured("35-38", "mlt_Latn"), abs=5e-5)
    changes = [measured("35-37", language) - before for language, before in others.items()]
    assert run["test"]["elsewhere"] == pytest.approx(sum(changes) / 2, abs=5e-5)


def test_only_the_adapter_of_the_first_seed_at_the_best_rate_stays_and_no_checkpoint(undisturbed):
    for method in ("subnetwork", "full"):
        assert len(list((undisturbed / "runs" / "mlt_Latn" / method).glob("*/adapter"))) == 1
    assert not list(undisturbed.rglob("*.checkpoints"))


def test_an_interrupted_study_goes_on_and_ends_as_an_undisturbed_one(undisturbed, with_base, monkeypatch):
    """A signal in the middle of the fourth run: what the three before it have measured is not measured again."""
    original, calls = Yardstick.measure, []

    def interrupting(self, before, target):
        measured = original(self, before, target)

        def measure(model):
            calls.append(target)
            if len(calls) == 3 * 3 + 2:
                os.kill(os.getpid(), signal.SIGINT)
            return measured(model)

        return measure

    monkeypatch.setattr(Yardstick, "measure", interrupting)
    with pytest.raises(StoppedError):
        run_study(tiny(), with_base)
    done = {path: path.stat().st_mtime_ns for path in (with_base / "runs").rglob("run.json")}
    assert len(done) == 3
    assert list((with_base / "runs").rglob("*.checkpoints"))
    run_study(tiny(), with_base)
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    assert not list(with_base.rglob("*.checkpoints"))
    assert timeless(results_of(with_base)) == timeless(results_of(undisturbed))


def test_a_finished_study_is_not_run_again_and_may_get_more_methods(undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    written = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*.json")}
    more = run_study(tiny(methods=["subnetwork", "full", "ia3"]), output)
    assert all(path.stat().st_mtime_ns == earlier for path, earlier in written.items())
    assert len(more["runs"]) == 9
    assert more["runs"][:6] == results_of(undisturbed)["runs"]


def test_a_folder_of_another_study_is_refused(undisturbed):
    longer = tiny(training={**TINY["training"], "steps": 6})
    with pytest.raises(ConfigError, match="training.steps was 4 and is 6"):
        run_study(longer, undisturbed)


def test_a_method_that_fails_is_a_row_and_the_others_run_on_a_whole_base(undisturbed, with_base, monkeypatch):
    """Random neurons fail by themselves, IA3 is made to run out of memory with the model in its hands."""
    original = study_module.tune_language

    def short_of_memory(model, tokenizer, corpus, config, *args, **options):
        if config.method.name == "ia3":
            with torch.no_grad():
                next(model.parameters()).zero_()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return original(model, tokenizer, corpus, config, *args, **options)

    monkeypatch.setattr(study_module, "tune_language", short_of_memory)
    # Of 64 neurons the language would have 40, and no 40 others are there.
    neurons = {**TINY["identify"], "rule": "budget:neurons=40,floor=0.0"}
    shutil.rmtree(with_base / "identify")
    (with_base / "recipe.json").unlink()
    results = run_study(tiny(methods=["random", "ia3", "full"], identify=neurons), with_base)
    by_method = {}
    for run in results["runs"]:
        by_method.setdefault(run["method"], []).append(run)
    assert [run["status"] for run in by_method["random"]] == ["failed"] * 2
    assert "SelectionError" in by_method["random"][0]["error"]
    assert [run["status"] for run in by_method["ia3"]] == ["out of memory"] * 2
    full = [run for run in results_of(undisturbed)["runs"] if run["method"] == "full"]
    assert timeless(by_method["full"]) == timeless(full)


def test_tasks_measure_the_base_and_the_chosen_run_of_every_method_once(undisturbed, tmp_path):
    pytest.importorskip("lape_fast.study.tasks")
    pytest.importorskip("lm_eval")
    output, tasks = tmp_path / "out", tmp_path / "tasks"
    shutil.copytree(undisturbed, output)
    tasks.mkdir()
    questions = [{"question": f"{number} =", "choices": ["one", "two"], "answer": number % 2} for number in range(6)]
    (tasks / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tasks / "questions.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "letters.yaml").write_text(json.dumps(task))
    asked = tiny(tasks={"names": ["letters", "unheard_of"], "folder": str(tasks)})
    rows = run_study(asked, output)["tasks"]
    scored = [row for row in rows if row["task"] == "letters"]
    assert [row["adapter"] for row in scored] == ["base", "subnetwork", "full"]
    assert all(row["n"] == 6 and 0 <= row["value"] <= 1 for row in scored)
    assert all("unheard_of" in row["why"] for row in rows if row["task"] == "unheard_of")
    written = (output / "runs" / "mlt_Latn" / "tasks.json").stat().st_mtime_ns
    run_study(asked, output)
    assert (output / "runs" / "mlt_Latn" / "tasks.json").stat().st_mtime_ns == written


def test_the_run_whose_best_measurement_is_the_lowest_is_chosen():
    """It need not be the one that ends lowest, nor may a failed one be chosen."""
    runs = [
        {"status": "done", "name": "ends low", "points": [{"target": 3.0}, {"target": 2.5}]},
        {"status": "done", "name": "was lowest", "points": [{"target": 3.0}, {"target": 2.0}, {"target": 4.0}]},
        {"status": "failed", "name": "failed"},
    ]
    assert choose(runs)["name"] == "was lowest"
    assert choose(runs[2:]) is None


def test_runs_have_folders_of_their_own():
    recipe = tiny(methods=["lora:rank=2,alpha=4", "lora:rank=4,alpha=4"])
    runs = [run for method in recipe.methods for run in sweep(recipe, "mlt_Latn", method)]
    assert len({run.folder(Path("runs")) for run in runs}) == 4


def test_want_of_memory_is_told_from_other_failures():
    assert status_of(MemoryError()) == "out of memory"
    assert status_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")) == "out of memory"
    assert status_of(RuntimeError("shapes cannot be multiplied")) == "failed"


def test_the_first_lines_of_a_range():
    assert first_lines("1598-1797", 10) == "1598-1607"
    assert first_lines("1598-1600", 10) == "1598-1600"
    assert first_lines("5-", 2) == "5-6"
    assert first_lines("5-9", None) == "5-9"


def test_a_run_without_room_on_the_disk_is_not_a_failed_one(tmp_path):
    run = Run("mlt_Latn", "subnetwork", 1e-3, 0)

    def full(run, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        perform(run, tmp_path, full)
    assert perform(run, tmp_path, lambda run, folder: {"points": []})["status"] == DONE
