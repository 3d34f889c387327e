"""The subnetwork as a PEFT method, one adapter: what PEFT expects of every method, over every dense layout."""

from __future__ import annotations

import copy
import importlib
import io
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file

from lape_fast.errors import AdapterError, ArchitectureError, ConfigError
from lape_fast.models import find_ffns
from lape_fast.tune import peft_tuner
from lape_fast.tune.subnetwork import installed_layers
from tests.tiny_models import save_tiny
from tests.tune.peft_models import (
    DEPRECATED,
    NEURONS,
    base_model,
    both_storages,
    config,
    every_kind,
    every_layout,
    logits,
    masters,
    modules,
    move,
    rows,
    same_state,
    state,
    tuned,
)

# No warning in normal use.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings(DEPRECATED)]


@both_storages
@every_layout
def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(model_type, storage, capsys):
    base = base_model(model_type)
    expected, parameters = logits(base), base.num_parameters()
    ffn, chosen = find_ffns(base)[0], NEURONS["mlt_Latn"]
    model = get_peft_model(base, config(model_type, storage=storage))
    if storage == "resident":
        assert torch.equal(logits(model), expected)
    else:
        # The k neurons reach the output last instead of in their place of the sum.
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    trained = {id(master) for master in masters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    number = sum(map(len, chosen)) * (3 if ffn.gated else 2) * ffn.hidden_size
    assert model.get_nb_trainable_parameters() == (number, parameters + number)
    model.print_trainable_parameters()
    assert f"trainable params: {number:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["default", "maltese"])
@every_layout
def test_a_saved_adapter_is_three_files_and_comes_back_bit_for_bit(model_type, name, tmp_path):
    model = tuned(model_type, name=name)
    model.save_pretrained(tmp_path)
    assert model.active_adapters == [name]
    folder = tmp_path if name == "default" else tmp_path / name
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for key, values in load_file(folder / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        assert name not in key
        assert values.dtype == torch.float32
    written = PeftConfig.from_pretrained(folder)
    expected = {**model.peft_config[name].to_dict(), "inference_mode": True}
    assert written.to_dict() == expected == json.loads((folder / "adapter_config.json").read_text())
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(base_model(model_type), folder, is_trainable=trainable)
        assert torch.equal(logits(loaded), logits(model))
        assert {p.requires_grad for p in masters(loaded)} == {trainable}
        assert sum(p.requires_grad for p in loaded.parameters()) == (len(masters(loaded)) if trainable else 0)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_storages
def test_masters_are_fp32_however_they_are_loaded(dtype, options, storage, tmp_path):
    model = tuned(dtype=dtype, storage=storage)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(dtype=dtype), tmp_path, is_trainable=True, **options)
    for left, right in zip(masters(loaded), masters(model), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)
        assert left.requires_grad
    assert torch.equal(logits(loaded), logits(model))
    frozen = PeftModel.from_pretrained(base_model(dtype=dtype), tmp_path, **options)
    assert not any(p.requires_grad for p in frozen.parameters())
    fresh = get_peft_model(base_model(dtype=dtype), config(storage=storage), autocast_adapter_dtype=False)
    assert {master.dtype for master in masters(fresh)} == {torch.float32}


@both_storages
@every_layout
def test_a_disabled_adapter_is_the_base_bit_for_bit_and_gets_no_gradient(model_type, storage):
    base = base_model(model_type)
    expected = logits(base)
    model = move(get_peft_model(base, config(model_type, storage=storage)))
    adapted = logits(model)
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("default")
        assert not model(**rows()).loss.requires_grad
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    model(**rows()).loss.backward()
    assert all(master.grad.abs().sum() > 0 for master in masters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_layout
def test_merging_gives_a_plain_model_with_the_adapters_logits(model_type, dtype):
    base = base_model(model_type, dtype=dtype)
    made_of, names = modules(base), list(base.state_dict())
    model = move(get_peft_model(base, config(model_type, policy="checkpoint")))
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged is base
    assert torch.equal(logits(merged), expected)
    assert modules(merged) == made_of
    assert list(merged.state_dict()) == names
    assert not hasattr(merged, "peft_config")
    # A model to tune again.
    assert torch.equal(logits(get_peft_model(merged, config(model_type))), expected)


@both_storages
@every_layout
def test_unloading_gives_the_base_back_bit_for_bit(model_type, storage):
    base = base_model(model_type).train()
    made_of, before, expected = modules(base), state(base), logits(base)
    model = move(get_peft_model(base, config(model_type, storage=storage, policy="recompute")))
    model(**rows()).loss.backward()
    unloaded = model.unload()
    assert same_state(unloaded, before)
    assert modules(unloaded) == made_of
    assert torch.equal(logits(unloaded), expected)


@both_storages
@every_kind
def test_merging_in_place_is_idempotent_and_unmerging_exact(model_type, storage):
    base = base_model(model_type)
    expected = logits(base)
    model = move(get_peft_model(base, config(model_type, storage=storage)))
    adapted, before = logits(model), state(model)
    model.merge_adapter()
    model.merge_adapter(["default"], safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    merged = logits(model)
    if storage == "resident":
        assert torch.equal(merged, adapted)
    else:
        torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)
    if storage == "resident":
        assert same_state(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(value):
    base = base_model(dtype=torch.float16)
    model = get_peft_model(base, config())
    with torch.no_grad():
        masters(model)[-1][0, 0] = value
    logits(model)
    before, made_of = state(model), modules(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match=r"layer 2 that are not finite in torch.float16"):
            merge(safe_merge=True)
        assert modules(model) == made_of
        assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
        assert model.get_model_status().merged_adapters == []


@both_storages
@every_layout
def test_training_moves_the_adapter_and_nothing_else(model_type, storage):
    base = base_model(model_type).train()
    before = state(base)
    model = get_peft_model(base, config(model_type, storage=storage))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = [master.detach().clone() for master in masters(model)]
    for _ in range(3):
        optimizer.zero_grad()
        model(**rows()).loss.backward()
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(start, masters(model), strict=True))
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(master) for master in masters(model)}
    assert same_state(model.unload(), before)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_generation_equals_the_merged_models(model_type, dtype, use_cache):
    model = tuned(model_type, dtype=dtype)
    prompt = torch.arange(3, 10)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "pad_token_id": 2}
    written = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert written.shape[1] > prompt.shape[1]
    merged = copy.deepcopy(model).merge_and_unload()
    again = merged.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(written, again)


@every_layout
def test_the_status_of_layers_and_model(model_type):
    model = tuned(model_type, name="maltese")
    status = model.get_model_status()
    assert status.peft_types == {"maltese": PeftType.SUBNETWORK}
    assert status.adapter_model_type == "SubnetworkTuner"
    assert status.active_adapters == status.available_adapters == ["maltese"]
    assert (status.enabled, status.merged_adapters, status.num_adapter_layers) == (True, [], 2)
    assert status.requires_grad == {"maltese": True}
    assert status.devices == {"maltese": ["cpu"]}
    assert status.trainable_params == sum(master.numel() for master in masters(model, "maltese"))
    assert [layer.module_type for layer in model.get_layer_status()] == ["SubnetworkLayer"] * 2
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@every_kind
def test_a_deep_copy_and_a_pickled_state_stand_on_their_own(model_type, tmp_path):
    model = tuned(model_type)
    expected = logits(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    pickled = pickle.dumps(model.state_dict())
    move(copied)
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), expected)
    for saved in (torch.load(io.BytesIO(file.getvalue()), weights_only=True), pickle.loads(pickled)):
        fresh = get_peft_model(base_model(model_type), config(model_type))
        unadapted = logits(fresh)
        fresh.load_state_dict(saved)
        assert torch.equal(logits(fresh), expected)
        with fresh.disable_adapter():
            assert torch.equal(logits(fresh), unadapted)


def test_values_that_were_loaded_stand_in_the_base_at_once():
    model, fresh = tuned(), get_peft_model(base_model(), config())
    saved = {name: value for name, value in model.state_dict().items() if "trained_" in name}
    fresh.load_state_dict(saved, strict=False)
    for left, right in zip(find_ffns(fresh.get_base_model()), find_ffns(model.get_base_model()), strict=True):
        logits(model)
        assert torch.equal(left.gate_weight, right.gate_weight)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_another_base_is_refused_and_left_as_it_was(model_type, tmp_path):
    tuned(model_type).save_pretrained(tmp_path)
    others = [
        (base_model(model_type, seed=1), "the weights it replaces"),
        (base_model("opt"), "load it on its own base"),
    ]
    for other, message in others:
        before, made_of, expected = state(other), modules(other), logits(other)
        grads = [p.requires_grad for p in other.parameters()]
        with pytest.raises(ArchitectureError, match=message):
            PeftModel.from_pretrained(other, tmp_path)
        assert same_state(other, before)
        assert modules(other) == made_of
        assert [p.requires_grad for p in other.parameters()] == grads
        assert torch.equal(logits(other), expected)
        assert not hasattr(other, "peft_config")
        get_peft_model(other, config(other.config.model_type))


@pytest.mark.parametrize("name", ["has.a.dot", "keys", "copy", "training"])
def test_a_name_that_torch_cannot_have_and_an_unknown_policy_are_refused(name):
    base = base_model()
    made_of, before = modules(base), state(base)
    with pytest.raises(AdapterError, match=f"cannot be named {name!r}"):
        get_peft_model(base, config(), name)
    with pytest.raises(ConfigError, match="policy 'offload' is unknown"):
        get_peft_model(base, config(policy="offload"))
    assert modules(base) == made_of
    assert same_state(base, before)


def test_the_policy_of_checkpoints_needs_no_gradient_of_the_inputs():
    model = get_peft_model(base_model(), config(policy="checkpoint")).train()
    assert [layer.gradient_checkpointing for layer in model.model.model.layers] == [False, False, True]
    assert not model.get_input_embeddings()._forward_hooks
    model.eval()
    assert not any(layer.gradient_checkpointing for layer in model.model.model.layers)


def test_a_users_own_checkpoints_outlast_the_policy():
    def switches():
        return [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in base.model.layers]

    base = base_model().train()
    base.activation_checkpointing_enable({"use_reentrant": False})
    before = switches()
    assert all(enabled for enabled, _ in before)
    model = get_peft_model(base, config(policy="checkpoint"))
    assert switches() != before
    model.unload()
    assert switches() == before
    # And so do those of a user who changes his mind while a subnetwork is attached.
    model = get_peft_model(base, config(policy="checkpoint"))
    base.activation_checkpointing_disable()
    model.train().unload()
    assert not any(enabled for enabled, _ in switches())


def test_the_method_is_registered_once_however_often_it_is_imported():
    importlib.import_module("lape_fast.tune.peft_tuner")
    module = importlib.reload(peft_tuner)
    assert PeftType("SUBNETWORK") is PeftType.SUBNETWORK is module.PEFT_TYPE
    assert [name for name in PeftType.__members__ if name == "SUBNETWORK"] == ["SUBNETWORK"]
    assert copy.deepcopy(PeftType.SUBNETWORK) is pickle.loads(pickle.dumps(PeftType.SUBNETWORK)) is PeftType.SUBNETWORK
    chosen = module.SubnetworkConfig(neurons=config().neurons, language="mlt_Latn", neurons_per_layer=48)
    model = get_peft_model(base_model(), chosen)
    assert all(type(layer) is module.SubnetworkLayer for layer in installed_layers(model))
    with model.disable_adapter():
        pass


def test_a_model_that_was_dispatched_to_devices(tmp_path):
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "base", layers=3)
    tuned().save_pretrained(tmp_path / "adapter")
    expected = logits(PeftModel.from_pretrained(base_model(), tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
