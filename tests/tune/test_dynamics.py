"""Training dynamics: every number against one that was computed apart from it, and a run that was interrupted."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from lape_fast.errors import FileFormatError, StoppedError
from lape_fast.identify import NeuronSet
from lape_fast.models import load_model
from lape_fast.text import open_corpus
from lape_fast.tune import TrainingSettings, TuningConfig, callbacks, load_adapter, read_dynamics, tune_language
from tests.tiny_models import save_tiny

NEURONS = NeuronSet.from_lists({"mlt_Latn": [[1, 5, 40], [0, 2]]}, neurons_per_layer=48)
SETTINGS = TrainingSettings(context_length=32, rows_per_step=2, steps=6, learning_rate=1e-2, evaluate_every=2)
METHODS = ["subnetwork", "ffn", "full", "lora:rank=4"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"Il-qattus numru {number} qagħad fuq it-tapit il-kbir." for number in range(40)]
    (folder / "mlt_Latn.txt").write_text("\n".join(lines), encoding="utf-8")
    return open_corpus(str(folder))


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


def tuned(base, corpus, output, method="subnetwork", settings=SETTINGS, **options):
    model, tokenizer = load_model(base, device="cpu")
    config = TuningConfig(method, "mlt_Latn", NEURONS, policy="save")
    _, report = tune_language(model, tokenizer, corpus, config, output, settings, **options)
    return model, report, read_dynamics(output)


def logit_sum(model):
    """Some number that depends on all that is trained."""
    assert not model.training
    with torch.no_grad():
        return {"sum": float(model(torch.arange(3, 20)[None]).logits.square().sum())}


def without_seconds(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("method", METHODS)
def test_the_last_record_measures_the_adapter_and_the_first_the_base(method, base, corpus, tmp_path):
    _, report, records = tuned(base, corpus, tmp_path / "adapter", method, measure=logit_sum)
    model, _ = load_model(base, device="cpu")
    assert records[0]["measured"] == logit_sum(model)
    load_adapter(model, tmp_path / "adapter")
    assert records[-1]["measured"] == logit_sum(model)
    assert [record["step"] for record in records if "measured" in record] == [0, 2, 4, 6]
    assert [record["step"] for record in records] == list(range(7))
    assert [record["tokens"] for record in records] == [step * 2 * 32 for step in range(7)]
    assert report["training_seconds"] == records[-1]["seconds"]


@pytest.mark.parametrize("method", ["subnetwork", "ffn", "lora:rank=4"])
def test_norms_are_those_of_the_saved_values(method, base, corpus, tmp_path):
    # One run of each length: the same steps, if the rate does not depend on how many there are.
    values, records = {}, {}
    for steps in (2, 3):
        settings = TrainingSettings(
            **{**vars(SETTINGS), "steps": steps, "schedule": "constant", "warmup": 0.0, "learning_rate": 3e-3}
        )
        output = tmp_path / f"{steps}"
        _, _, records[steps] = tuned(base, corpus, output, method, settings)
        (path,) = [*output.glob("adapter_model.safetensors"), *output.glob("trained_weights.safetensors")]
        values[steps] = load_file(path)

    def parts(name):
        return next(part for part in ("gate", "up", "down") if part in name)

    def norms(squares_by_name):
        found = {}
        for name, square in squares_by_name.items():
            found[parts(name)] = found.get(parts(name), 0) + square
        return {name: square**0.5 for name, square in {**found, "total": sum(found.values())}.items()}

    def squares(others):
        return {name: float((value - others[name]).double().square().sum()) for name, value in values[3].items()}

    update = norms(squares(values[2]))
    # Norms of fp32 values, which are saved as they are.
    assert records[3][3]["update_norm"] == pytest.approx(update, rel=1e-6)
    if not method.startswith("lora"):
        weights = load_file(base / "model.safetensors")
        original = {name: _original(weights, name) for name in values[3]}
        change = norms(squares(original))
        assert records[3][3]["change_norm"] == pytest.approx(change, rel=1e-6)


def _original(weights, name):
    """What the base has for a tensor of an adapter of either kind."""
    if name in weights:
        return weights[name]
    layer = int(name.split("layers.")[1].split(".")[0])
    part = next(part for part in ("gate", "up", "down") if f"_{part}_" in name)
    weight, neurons = weights[f"model.layers.{layer}.mlp.{part}_proj.weight"], NEURONS["mlt_Latn"][layer]
    return weight[:, neurons].T if part == "down" else weight[neurons]


def test_gradient_norms_are_those_before_clipping(base, corpus, tmp_path):
    free, clipped = (
        tuned(
            *(base, corpus, tmp_path / f"{norm}", "ffn"),
            TrainingSettings(**{**vars(SETTINGS), "max_grad_norm": norm, "steps": 1}),
        )[2][1]["gradient_norm"]
        for norm in (1e9, 1e-3)
    )
    # Scaled down and up again in fp32.
    assert clipped == pytest.approx(free, rel=1e-5)
    assert free["total"] ** 2 == pytest.approx(sum(free[part] ** 2 for part in ("gate", "up", "down")), rel=1e-5)
    assert free["total"] > 1e-2


def test_the_loss_is_the_mean_since_the_record_before_and_validation_starts_at_step_0(base, corpus, tmp_path, capfd):
    settings = TrainingSettings(**{**vars(SETTINGS), "steps": 60, "evaluate_every": 20, "learning_rate": 0.0})
    _, report, records = tuned(base, corpus, tmp_path / "adapter", "ffn", settings, validation=corpus)
    # Every twentieth of the run, and where it is measured.
    assert [record["step"] for record in records] == sorted({*range(0, 61, 3), 20, 40})
    losses = [record["loss"] * (record["step"] - before["step"]) for before, record in itertools.pairwise(records)]
    assert sum(losses) / 60 == pytest.approx(report["train_loss"], rel=1e-6)
    # Nothing is learnt at a rate of 0, so that each measurement is that of step 0.
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert len(validation) == 4
    assert validation == pytest.approx([validation[0]] * 4, rel=1e-6)
    printed = capfd.readouterr().err
    assert printed.index("Measuring the base on the validation lines.") < printed.index("validation loss")


@pytest.mark.parametrize("method", ["subnetwork", "full", "lora:rank=4,dropout=0.1"])
def test_an_interrupted_run_loses_and_repeats_no_line(method, base, corpus, tmp_path, monkeypatch):
    options = {"measure": logit_sum, "validation": corpus}
    *_, expected = tuned(base, corpus, tmp_path / "straight", method, **options)

    class Killed(Exception):
        pass

    def killing(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.Progress, "on_step_begin", killing)
        tuned(base, corpus, tmp_path / "resumed", method, **options)
    path = tmp_path / "resumed.checkpoints" / "dynamics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    *_, actual = tuned(base, corpus, tmp_path / "resumed", method, **options)
    assert without_seconds(actual) == without_seconds(expected)
    assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(actual))


def test_a_run_that_a_signal_stops_between_records_ends_with_the_same_ones(base, corpus, tmp_path, monkeypatch):
    settings = TrainingSettings(**{**vars(SETTINGS), "steps": 40, "evaluate_every": 20})
    *_, expected = tuned(base, corpus, tmp_path / "straight", settings=settings)
    stop = callbacks.Interruption.on_step_end

    def stopping(self, args, state, control, **kwargs):
        self._signalled |= state.global_step == 5
        stop(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="after step 5 of 40"):
        patch.setattr(callbacks.Interruption, "on_step_end", stopping)
        tuned(base, corpus, tmp_path / "resumed", settings=settings)
    *_, actual = tuned(base, corpus, tmp_path / "resumed", settings=settings)
    assert [record["step"] for record in actual] == list(range(0, 41, 2))
    assert without_seconds(actual) == without_seconds(expected)
    assert all(before["seconds"] < after["seconds"] for before, after in itertools.pairwise(actual))


def test_a_run_that_was_killed_behind_its_last_step_ends_as_if_it_never_was(base, corpus, tmp_path, monkeypatch):
    def without_times(report):
        timed = {"seconds", "training_seconds", "tokens_per_second", "memory"}
        times = ("seconds", "_runtime", "_per_second")
        log = [{name: each for name, each in entry.items() if not name.endswith(times)} for entry in report["log"]]
        return {**{name: value for name, value in report.items() if name not in timed}, "log": log}

    _, expected, records = tuned(base, corpus, tmp_path / "straight", validation=corpus)

    class Killed(Exception):
        pass

    def killing(folder):
        raise Killed

    with pytest.raises(Killed):
        tuned(base, corpus, tmp_path / "resumed", validation=corpus, present=killing)
    assert not (tmp_path / "resumed").exists()
    _, actual, again = tuned(base, corpus, tmp_path / "resumed", validation=corpus)
    assert without_times(actual) == without_times(expected)
    assert without_seconds(again) == without_seconds(records)


def test_what_is_no_record_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        read_dynamics(tmp_path)
    (tmp_path / "dynamics.jsonl").write_text('{"step": 0, "tokens": 0, "seconds": 0.0}\nnonsense\n')
    with pytest.raises(FileFormatError, match="Line 2 of"):
        read_dynamics(tmp_path)
