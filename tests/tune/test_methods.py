"""Every method by which a language is tuned: what it trains, what it writes, and that the base comes back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError, TrainingError
from lape_fast.identify import NeuronSet
from lape_fast.models import find_ffns, load_model
from lape_fast.text import open_corpus
from lape_fast.tune import (
    METHODS,
    TrainingSettings,
    TuningConfig,
    callbacks,
    load_adapter,
    merge_adapter,
    parse_method,
    tune_language,
)
from lape_fast.tune.dense import neuron_masks
from tests.tiny_models import quantised_tiny_model, save_tiny, tiny_tokenizer

HIDDEN, NEURONS_PER_LAYER = 32, 48
NEURONS = NeuronSet.from_lists(
    {"mlt_Latn": [[1, 5, 40], [0, 2]], "eng_Latn": [[], [3]]}, neurons_per_layer=NEURONS_PER_LAYER
)
SETTINGS = TrainingSettings(context_length=32, rows_per_step=2, steps=6, learning_rate=1e-2, save_every=2)
TEXT_FORMS = [*(name for name in METHODS if name != "lora"), "lora:rank=4,dropout=0.1", "ia3:targets=gate+down"]

# What each method trains of the tiny Llama, as a matter of counting.
FFN = 2 * 3 * HIDDEN * NEURONS_PER_LAYER
CHOSEN = 5 * 3 * HIDDEN
TRAINABLE = {
    "subnetwork": CHOSEN,
    "random": CHOSEN,
    "random-per-layer": CHOSEN,
    "masked": CHOSEN,
    "ffn": FFN,
    "lora:rank=4,dropout=0.1": 2 * 3 * 4 * (HIDDEN + NEURONS_PER_LAYER),
    # A factor per output of gate, and per input of down.
    "ia3:targets=gate+down": 2 * 2 * NEURONS_PER_LAYER,
    # PEFT's default: a factor per output of the keys and values of 2 heads of 8, and per input of down.
    "ia3": 2 * (16 + 16 + NEURONS_PER_LAYER),
}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [f"Il-qattus numru {number} qagħad fuq it-tapit il-kbir." for number in range(40)]
    (folder / "mlt_Latn.txt").write_text("\n".join(lines), encoding="utf-8")
    return open_corpus(str(folder))


def tuned(base, corpus, output, method, settings=SETTINGS, **options):
    model, tokenizer = load_model(base, device="cpu")
    config = TuningConfig(method, "mlt_Latn", NEURONS, policy="save", seed=3)
    adapter, report = tune_language(model, tokenizer, corpus, config, output, settings, **options)
    return model, adapter, report


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", TEXT_FORMS)
def test_a_method_trains_reloads_and_gives_the_base_back(method, dtype, corpus, tmp_path):
    base = save_tiny(tmp_path / "base", dtype=dtype)
    model, adapter, report = tuned(base, corpus, tmp_path / "adapter", method)
    after = logits(model)
    assert model.dtype == dtype
    assert report["method"] == str(parse_method(method))
    assert report["trainable"] == adapter.trainable()
    assert report["trainable"] == TRAINABLE.get(method, sum(p.numel() for p in model.parameters()))
    assert report["flops_per_token"] > 0 and report["training_seconds"] > 0
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["method"] == report["method"]

    fresh, _ = load_model(base, device="cpu")
    before, state = logits(fresh), copy.deepcopy(fresh.state_dict())
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), after) and not torch.equal(after, before)
    with loaded.disabled():
        assert torch.equal(logits(fresh), before)
    assert torch.equal(logits(fresh), after)
    for attached, its in ((loaded, fresh), (adapter, model)):
        attached.detach(keep=False)
        assert torch.equal(logits(its), before)
        assert same(its.state_dict(), state)
    merged = merge_adapter(fresh, tmp_path / "adapter")
    assert merged.state_dict().keys() == state.keys()
    # PEFT adds its update to the weights, where it added it to the outputs: rounded once in another place, and in 8
    # bits of mantissa over two layers.
    exact = method.partition(":")[0] not in ("lora", "ia3")
    tolerance = 0 if exact else {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(logits(merged), after, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", TEXT_FORMS)
def test_only_what_a_method_names_is_changed(method, corpus, tmp_path):
    base = save_tiny(tmp_path / "base")
    tuned(base, corpus, tmp_path / "adapter", method)
    model, _ = load_model(base, device="cpu")
    state = copy.deepcopy(model.state_dict())
    merged = merge_adapter(model, tmp_path / "adapter").state_dict()
    moved = {name: (merged[name] != value) for name, value in state.items() if not torch.equal(merged[name], value)}
    projections = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up", "down")}
    if method == "full":
        assert moved.keys() >= projections | {"model.embed_tokens.weight", "model.norm.weight"}
    elif method == "ia3":
        assert {name.split(".")[-2] for name in moved} == {"k_proj", "v_proj", "down_proj"}
    elif method.startswith("ia3"):
        assert {name.split(".")[-2] for name in moved} == {"gate_proj", "down_proj"}
    else:
        assert moved.keys() == projections
    if method in ("subnetwork", "masked"):
        masks = neuron_masks(load_model(base, device="cpu")[0], NEURONS["mlt_Latn"])
        assert sum(int(mask.sum()) for mask in masks.values()) == CHOSEN
        assert not any((changed & ~masks[name]).any() for name, changed in moved.items())


@pytest.mark.parametrize("method", ["masked", "ffn", "lora:rank=4,dropout=0.1", "ia3"])
def test_an_interrupted_run_resumes_to_the_same_values(method, corpus, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    straight, _, _ = tuned(base, corpus, tmp_path / "straight", method)
    expected = logits(straight)

    class Killed(Exception):
        pass

    def killing(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.Progress, "on_step_begin", killing)
        tuned(base, corpus, tmp_path / "resumed", method)
    checkpoint = tmp_path / "resumed.checkpoints" / "checkpoint-4"
    saved = next(path for path in checkpoint.glob("*model.safetensors"))
    # What is trained, and never the base.
    assert sum(value.numel() for value in load_file(saved).values()) < straight.num_parameters() / 2
    resumed, _, _ = tuned(base, corpus, tmp_path / "resumed", method)
    assert torch.equal(logits(resumed), expected)


def test_masked_dense_gradients_train_the_subnetwork(corpus, tmp_path):
    # Its oracle: both compute one function. In fp64 they differ by the order of sums, 1e-16 a step relative to the
    # gradient, which AdamW's quotient may enlarge where a gradient is small.
    base = save_tiny(tmp_path / "base", dtype=torch.float64)
    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=20, learning_rate=1e-2, weight_decay=0.1)
    for method in ("subnetwork", "masked"):
        tuned(base, corpus, tmp_path / method, method, settings)
    expected, actual = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("subnetwork", "masked"))
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        torch.testing.assert_close(actual[name], values, rtol=0, atol=1e-9)


def test_a_random_set_per_layer_has_as_many_neurons_in_each_layer(corpus, tmp_path):
    base = save_tiny(tmp_path / "base")
    _, subnetwork, _ = tuned(base, corpus, tmp_path / "adapter", "random-per-layer")
    drawn, own = subnetwork.neurons(), dict(enumerate(NEURONS["mlt_Latn"]))
    assert {layer: len(chosen) for layer, chosen in drawn.items()} == {layer: len(own[layer]) for layer in own}
    assert not any(set(drawn[layer].tolist()) & set(own[layer].tolist()) for layer in own)


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "opt"])
def test_masks_mark_the_neurons_of_every_layout(model_type, tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "base", model_type), device="cpu")
    before = copy.deepcopy(model.state_dict())
    masks = neuron_masks(model, NEURONS["mlt_Latn"])
    assert same(before, model.state_dict())
    ffns = find_ffns(model)
    matrices = 3 if ffns[0].gated else 2
    assert sum(int(mask.sum()) for mask in masks.values()) == 5 * matrices * HIDDEN
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name)[mask] = 7.0
    for ffn, chosen in zip(ffns, NEURONS["mlt_Latn"], strict=True):
        for weight in (ffn.gate_weight, ffn.up_weight, ffn.down_weight.T):
            assert weight is None or (weight[chosen] == 7).all()


def test_a_failed_run_gives_the_base_back(corpus, tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path / "base"), device="cpu")
    before, state = logits(model), copy.deepcopy(model.state_dict())

    def fails(model):
        raise MemoryError

    for method in ("subnetwork", "ffn", "lora", "masked"):
        config = TuningConfig(method, "mlt_Latn", NEURONS, policy="save")
        with pytest.raises(MemoryError):
            tune_language(model, tokenizer, corpus, config, tmp_path / method, SETTINGS, measure=fails)
        assert torch.equal(logits(model), before) and same(model.state_dict(), state)
        assert not (tmp_path / method).exists()


def test_a_run_of_another_method_is_not_resumed(corpus, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")

    def stops(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(base, corpus, tmp_path / "adapter", "lora:rank=4", measure=stops)
    with pytest.raises(TrainingError, match="identity was 'lora:rank=4,alpha=32"):
        tuned(base, corpus, tmp_path / "adapter", "lora:rank=8")


@pytest.mark.parametrize("method", ["ffn", "lora", "ia3"])
def test_an_adapter_is_refused_by_another_base(method, corpus, tmp_path):
    base = save_tiny(tmp_path / "base")
    tuned(base, corpus, tmp_path / "adapter", method)
    other, _ = load_model(save_tiny(tmp_path / "other", seed=1), device="cpu")
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ArchitectureError, match="was made for another base"):
        load_adapter(other, tmp_path / "adapter")
    assert same(other.state_dict(), state)
    larger, _ = load_model(save_tiny(tmp_path / "larger", layers=3), device="cpu")
    with pytest.raises(ArchitectureError, match="2 layers of 48 neurons"):
        load_adapter(larger, tmp_path / "adapter")


def test_a_damaged_dense_adapter_is_named(corpus, tmp_path):
    base = save_tiny(tmp_path / "base")
    tuned(base, corpus, tmp_path / "adapter", "ffn")
    model, _ = load_model(base, device="cpu")
    tensors = tmp_path / "adapter" / "trained_weights.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        load_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "dense_config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="not the configuration of a dense adapter"):
        load_adapter(model, tmp_path / "adapter")


def test_whole_weights_of_a_quantised_base_are_not_trained(corpus, tmp_path):
    model = quantised_tiny_model("int8")
    for method in ("ffn", "full"):
        config = TuningConfig(method, "mlt_Latn")
        with pytest.raises(ArchitectureError, match="quantised or sharded, so whole weights"):
            tune_language(model, tiny_tokenizer(), corpus, config, tmp_path / method, SETTINGS)


def test_text_forms_are_read_in_full():
    assert str(parse_method("lora")) == "lora:rank=16,alpha=32,dropout=0,targets=gate+up+down"
    method = parse_method("lora:targets=down+gate,rank=32,alpha=64,dropout=0.1")
    assert method.options == {"rank": 32, "alpha": 64, "dropout": 0.1, "targets": ("gate", "down")}
    for name in METHODS:
        assert parse_method(str(parse_method(name))) == parse_method(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "'lorra' is unknown; did you mean 'lora'"),
        ("xyz", "known are subnetwork, random, random-per-layer, masked, ffn, full, lora, ia3"),
        ("lora:rnk=3", "sets 'rnk', which lora does not know; did you mean 'rank'"),
        ("ffn:rank=3", "ffn has no options"),
        ("lora:rank=0", "rank to '0'; it must be a whole number of at least 1"),
        ("lora:rank=4,rank=8", "write rank=VALUE once"),
        ("lora:dropout=1", "at least 0 and below 1"),
        ("lora:targets=gate+q", "some of gate, up, down"),
        ("lora:alpha=nan", "a number above 0"),
    ],
)
def test_wrong_methods_are_refused_in_words(text, message):
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        parse_method(text)


def test_neurons_are_asked_for_where_they_are_needed():
    with pytest.raises(ConfigError, match="masked trains chosen neurons, but none were given"):
        TuningConfig("masked", "mlt_Latn")
    assert TuningConfig("full", "mt").language == "mlt_Latn"
