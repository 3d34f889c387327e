"""Tuning one language end to end: adapters, resuming, merging, and the bases they belong to."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from lape_fast.errors import (
    ArchitectureError,
    ConfigError,
    CorpusError,
    FileExistsAlreadyError,
    FileFormatError,
    LanguageError,
    TrainingError,
)
from lape_fast.identify import NeuronSet
from lape_fast.models import load_model
from lape_fast.text import open_corpus
from lape_fast.tune import SubnetworkConfig, TrainingSettings, callbacks, load_adapter, tune_language
from lape_fast.tune.training import pack_documents, train
from tests.tiny_models import save_tiny, tiny_model

SETTINGS = TrainingSettings(context_length=32, rows_per_step=2, steps=6, learning_rate=1e-2, save_every=2)
NEURONS = NeuronSet.from_lists({"mlt_Latn": [[1, 5, 40], [0, 2]], "eng_Latn": [[], [3]]}, neurons_per_layer=48)


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


def tuned(base, corpus, output, settings=SETTINGS, **config):
    model, tokenizer = load_model(base, device="cpu")
    choice = SubnetworkConfig(neurons=NEURONS, language="mlt_Latn", **config)
    subnetwork, report = tune_language(model, tokenizer, corpus, choice, output, settings)
    return model, subnetwork, report


def peft_model_and_rows(base, corpus):
    model, tokenizer = load_model(base, device="cpu")
    rows = pack_documents(model, tokenizer, list(corpus.documents("mlt_Latn")), 32)
    return get_peft_model(model, SubnetworkConfig(neurons=NEURONS, language="mlt_Latn")), rows


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_tuning_lowers_the_loss_and_the_adapter_brings_it_back(base, corpus, tmp_path):
    settings = TrainingSettings(context_length=32, rows_per_step=4, steps=30, learning_rate=2e-2)
    model, subnetwork, report = tuned(base, corpus, tmp_path / "adapter", settings)
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert report["steps"] == 30
    fresh, _ = load_model(base, device="cpu")
    before = logits(fresh)
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    with loaded.disabled():
        torch.testing.assert_close(logits(fresh), before, rtol=1e-5, atol=1e-5)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dynamics.jsonl",
        "training.json",
    }
    assert not list(tmp_path.glob("*.checkpoints"))


def test_a_merged_model_is_a_plain_hugging_face_model(base, corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    model, subnetwork, _ = tuned(base, corpus, tmp_path / "adapter")
    expected = logits(model)
    subnetwork.detach(keep=True)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert old.keys() == new.keys()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {f"model.layers.{n}.mlp.{p}_proj.weight" for n in (0, 1) for p in ("gate", "up", "down")}


def test_an_interrupted_run_resumes_to_the_same_values(base, corpus, tmp_path, monkeypatch, capfd):
    undisturbed, _, _ = tuned(base, corpus, tmp_path / "straight")
    expected = load_file(tmp_path / "straight" / "adapter_model.safetensors")

    class Killed(Exception):
        pass

    def killing(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.Progress, "on_step_begin", killing)
        tuned(base, corpus, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    assert (tmp_path / "resumed.checkpoints" / "checkpoint-4").is_dir()
    assert "Saved at step 4 of 6: loss " in capfd.readouterr().err
    tuned(base, corpus, tmp_path / "resumed")
    assert "Going on from step 4 of 6." in capfd.readouterr().err
    actual = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        assert torch.equal(values, actual[name]), name


def test_checkpoints_hold_the_adapter_and_not_the_model(base, corpus, tmp_path):
    model, rows = peft_model_and_rows(base, corpus)
    train(model, rows, tmp_path / "work", SETTINGS)
    names = {path.name for path in (tmp_path / "work" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


def test_other_settings_do_not_resume_a_run(base, corpus, tmp_path):
    model, rows = peft_model_and_rows(base, corpus)
    train(model, rows, tmp_path / "work", SETTINGS)
    other = TrainingSettings(**{**vars(SETTINGS), "learning_rate": 5e-3})
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.01 and is 0\.005"):
        train(model, rows, tmp_path / "work", other)
    with pytest.raises(TrainingError, match="identity was '' and is 'another'"):
        train(model, rows, tmp_path / "work", SETTINGS, identity="another")


def test_the_best_values_on_validation_text_are_kept(base, tmp_path):
    # Training text that teaches nothing but one letter: the longer the training, the worse on any other text.
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / "mlt_Latn.txt").write_text("qqqqqqqqqqqqqqqqqqqqqqqqqq\n" * 40, encoding="utf-8")
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "mlt_Latn.txt").write_text("Il-bieb u l-mejda.\n" * 8, encoding="utf-8")
    training, validation = open_corpus(str(tmp_path / "narrow")), open_corpus(str(tmp_path / "held-out"))
    model, tokenizer = load_model(base, device="cpu")
    settings = TrainingSettings(context_length=32, rows_per_step=8, steps=12, learning_rate=0.1, evaluate_every=2)
    choice = SubnetworkConfig(neurons=NEURONS, language="mlt_Latn")
    _, report = tune_language(model, tokenizer, training, choice, tmp_path / "adapter", settings, validation)
    measured = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    assert min(measured) < measured[-1]
    assert report["validation_loss"] == min(measured)
    assert report["best_step"] == 2 * (1 + measured.index(min(measured)))
    rows = pack_documents(model, tokenizer, list(validation.documents("mlt_Latn")), 32)
    with torch.no_grad():
        losses = [_loss(model, rows[row]) for row in range(len(rows))]
    # The Trainer's losses are in fp32.
    assert float(sum(losses) / len(losses)) == pytest.approx(min(measured), rel=1e-4)


def _loss(model, row):
    logits = model(row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, row["labels"][1:])


def test_the_random_control_has_as_many_neurons_and_none_of_the_languages(base, corpus, tmp_path):
    _, subnetwork, _ = tuned(base, corpus, tmp_path / "random", method="random", seed=3)
    drawn = {(layer, neuron) for layer, chosen in subnetwork.neurons().items() for neuron in chosen.tolist()}
    own = {(layer, neuron) for layer, chosen in enumerate(NEURONS["mlt_Latn"]) for neuron in chosen.tolist()}
    assert len(drawn) == len(own)
    assert not drawn & own


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "opt", "bloom"])
def test_other_layouts_are_tuned_and_loaded_too(model_type, corpus, tmp_path):
    base = save_tiny(tmp_path / "base", model_type, neurons=128)
    neurons = NeuronSet.from_lists({"mlt_Latn": [[1, 5], [0]]}, neurons_per_layer=128)
    model, tokenizer = load_model(base, device="cpu")
    tune_language(
        model, tokenizer, corpus, SubnetworkConfig(neurons=neurons, language="mlt"), tmp_path / "adapter", SETTINGS
    )
    fresh, _ = load_model(base, device="cpu")
    before = logits(fresh)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), before)


def test_an_adapter_is_refused_by_another_base(base, corpus, tmp_path):
    tuned(base, corpus, tmp_path / "adapter")
    other_weights, _ = load_model(save_tiny(tmp_path / "other", seed=1), device="cpu")
    before = copy.deepcopy(other_weights.state_dict())
    with pytest.raises(ArchitectureError, match="the weights it replaces"):
        load_adapter(other_weights, tmp_path / "adapter")
    assert all(torch.equal(value, before[name]) for name, value in other_weights.state_dict().items())
    with pytest.raises(ArchitectureError, match="2 layers of 48 neurons"):
        load_adapter(tiny_model("llama", layers=3), tmp_path / "adapter")


def test_broken_adapters_are_named(base, corpus, tmp_path):
    tuned(base, corpus, tmp_path / "adapter")
    model, _ = load_model(base, device="cpu")
    with pytest.raises(FileFormatError, match="is not an adapter folder"):
        load_adapter(model, tmp_path)
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        load_adapter(model, tmp_path / "adapter")
    tensors.write_bytes(content)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for field, value, match in (
        ("neurons", None, "not the configuration"),
        ("neurons", "1 5 7", "not the configuration"),
        ("base", None, "does not describe its base"),
        ("base", {"config_hash": "0"}, "does not describe its base"),
    ):
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(FileFormatError, match=match):
            load_adapter(model, tmp_path / "adapter")
    path.write_text(json.dumps({"language": "mlt_Latn"}))
    with pytest.raises(FileFormatError, match="not the configuration"):
        load_adapter(model, tmp_path / "adapter")


def test_wrong_requests_are_refused_in_words(base, corpus, tmp_path):
    model, tokenizer = load_model(base, device="cpu")
    with pytest.raises(ConfigError, match="'lora' is unknown"):
        SubnetworkConfig(neurons=NEURONS, language="mlt_Latn", method="lora")
    with pytest.raises(CorpusError, match="no text in eng_Latn"):
        tune_language(
            model, tokenizer, corpus, SubnetworkConfig(neurons=NEURONS, language="eng"), tmp_path / "adapter", SETTINGS
        )
    with pytest.raises(LanguageError, match="deu_Latn"):
        SubnetworkConfig(neurons=NEURONS, language="deu_Latn").attach(model)
    wide = NeuronSet.from_lists({"mlt_Latn": [[1], [2]]}, neurons_per_layer=64)
    with pytest.raises(ArchitectureError, match="2 x 48|2 layers x 64"):
        SubnetworkConfig(neurons=wide, language="mlt_Latn").attach(model)
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsAlreadyError, match="taken"):
        tune_language(
            model, tokenizer, corpus, SubnetworkConfig(neurons=NEURONS, language="mlt"), tmp_path / "taken", SETTINGS
        )
