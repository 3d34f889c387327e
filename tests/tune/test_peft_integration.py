"""The PEFT method beside all else: transformers' own adapters, checkpoints, compilation, and lape_fast itself."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lape_fast import study
from lape_fast.errors import AdapterError, ArchitectureError
from lape_fast.identify import count_activations
from lape_fast.models import find_ffns, load_model, model_identity
from lape_fast.text import open_corpus
from lape_fast.tune import Subnetwork, load_adapter, write_adapter
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.tune.peft_models import (
    DEPRECATED,
    LANGUAGES,
    base_model,
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
    tuned_in_several,
)

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings(DEPRECATED),
    # PEFT says so of every second adapter that transformers adds.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


MALTESE, ICELANDIC, ENGLISH = LANGUAGES


@every_layout
def test_transformers_own_adapters(model_type, tmp_path):
    model = base_model(model_type)
    base = logits(model)
    model.add_adapter(config(model_type, MALTESE), MALTESE)
    model.add_adapter(config(model_type, ICELANDIC), ICELANDIC)
    assert torch.equal(logits(model), base)
    assert model.active_adapters() == [ICELANDIC]
    for language in (MALTESE, ICELANDIC):
        move(model, language, language)
    for language in (MALTESE, ICELANDIC, MALTESE):
        model.set_adapter(language)
        assert torch.equal(logits(model), logits(tuned(model_type, language)))
        assert {id(p) for p in masters(model, language) if p.requires_grad} == {id(p) for p in masters(model, language)}
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    expected = logits(model)
    assert torch.equal(expected, logits(tuned(model_type, MALTESE)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    again = base_model(model_type)
    again.load_adapter(tmp_path, ENGLISH)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in masters(again, ENGLISH))
    peft = PeftModel.from_pretrained(base_model(model_type), tmp_path)
    assert torch.equal(logits(peft), expected)
    with pytest.warns(UserWarning, match="Setting active adapter to isl_Latn"):
        model.delete_adapter(MALTESE)
    assert torch.equal(logits(model), logits(tuned(model_type, ICELANDIC)))
    model.delete_adapter(ICELANDIC)
    assert torch.equal(logits(model), base)
    model.add_adapter(config(model_type, ENGLISH))
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_transformers_loads_what_peft_saved_without_a_word(model_type, dtype, trainable, tmp_path, caplog):
    model = tuned(model_type, dtype=dtype)
    model.save_pretrained(tmp_path)
    native = base_model(model_type, dtype=dtype)
    logging.enable_propagation()
    try:
        native.load_adapter(tmp_path, is_trainable=trainable)
    finally:
        logging.disable_propagation()
    assert not caplog.records
    for left, right in zip(masters(native), masters(model), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)
        assert left.requires_grad == trainable
    assert torch.equal(logits(native), logits(model))


def test_transformers_finds_the_base_of_an_adapter(tmp_path):
    save_tiny(tmp_path / "base", layers=3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = move(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    for kind in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "adapter")), logits(model))


def test_transformers_refuses_an_adapter_of_another_base(tmp_path):
    tuned().save_pretrained(tmp_path)
    other = base_model(seed=1)
    before, made_of = state(other), modules(other)
    chosen = tuned().peft_config["default"]
    for attempt in (lambda: other.load_adapter(tmp_path), lambda: other.add_adapter(chosen)):
        with pytest.raises(ArchitectureError, match="the weights it replaces"):
            attempt()
        assert same_state(other, before)
        assert modules(other) == made_of
    other.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    other.add_adapter(config(), MALTESE)
    with pytest.raises(ArchitectureError, match="the weights it replaces"):
        other.load_adapter(tmp_path, "foreign")
    assert list(other.peft_config) == [MALTESE]
    with pytest.raises(ValueError, match="foreign"):
        other.set_adapter("foreign")
    other.add_adapter(config(language=ICELANDIC), ICELANDIC)
    with pytest.raises(AdapterError, match="one language at a time, but mlt_Latn, isl_Latn were asked for"):
        other.set_adapter([MALTESE, ICELANDIC])
    with pytest.raises(AdapterError, match="named 'isl_Latn' already"):
        inject_adapter_in_model(config(language=ICELANDIC), other, ICELANDIC)
    assert other.active_adapters() == [ICELANDIC]


@every_kind
def test_injecting_into_a_model(model_type):
    base = base_model(model_type)
    expected = logits(base)
    model = inject_adapter_in_model(config(model_type), base)
    assert model is base
    assert torch.equal(logits(model), expected)
    reference = tuned(model_type)
    values = get_peft_model_state_dict(reference)
    result = set_peft_model_state_dict(model, values)
    assert not result.unexpected_keys
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
@every_kind
def test_transformers_checkpoints_give_the_same_gradients(model_type, policy, reentrant):
    model = tuned(model_type, dtype=torch.float64, policy=policy).train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for each in (model, plain):
        each(**rows()).loss.backward()
    # fp64 rounding.
    for left, right in zip(masters(model), masters(plain), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-12)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in masters(model)}


def test_a_compiled_peft_model_follows_every_switch(recwarn):
    # The compiler has warnings of its own.
    warnings.simplefilter("ignore")
    model = tuned_in_several().double().train()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for language in (MALTESE, ICELANDIC):
        for each in (model, reference):
            each.set_adapter(language)
        for each in (compiled, reference):
            each(**rows()).loss.backward()
        for left, right in zip(masters(model, language), masters(reference, language), strict=True):
            # fp64 rounding: the compiled norms keep what the others compute again.
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_adapters_go_from_peft_to_lape_fast_and_back(model_type, dtype, tmp_path):
    model = tuned(model_type, dtype=dtype)
    model.save_pretrained(tmp_path / "peft")
    own = base_model(model_type, dtype=dtype)
    subnetwork = load_adapter(own, tmp_path / "peft")
    for left, right in zip(subnetwork.parameters(), masters(model), strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)
    assert torch.equal(logits(own), logits(model))
    # Written in the base's dtype.
    (tmp_path / "own").mkdir()
    write_adapter(
        Subnetwork(model.get_base_model(), "default"), tmp_path / "own", model.peft_config["default"].to_dict()
    )
    for options in ({}, {"autocast_adapter_dtype": False}, {"low_cpu_mem_usage": True}):
        peft = PeftModel.from_pretrained(base_model(model_type, dtype=dtype), tmp_path / "own", **options)
        assert torch.equal(logits(peft), logits(model))
        for left, right in zip(masters(peft), masters(model), strict=True):
            assert left.dtype == torch.float32
            assert torch.equal(left, right.to(dtype).float())
    native = base_model(model_type, dtype=dtype)
    native.load_adapter(tmp_path / "own")
    assert torch.equal(logits(native), logits(model))
    assert {master.dtype for master in masters(native)} == {torch.float32}


@every_kind
def test_lape_fasts_own_functions_take_the_base_of_a_peft_model(model_type, tmp_path):
    (tmp_path / "mlt_Latn.txt").write_text("Il-qattus qagħad fuq it-tapit.\n" * 8, encoding="utf-8")
    corpus = open_corpus(str(tmp_path))
    base = base_model(model_type)
    text = study.prepare_text(base, tiny_tokenizer(), corpus)
    identity, plain = model_identity(base), study.score(base, text)
    model = tuned_in_several(model_type)
    inner = model.get_base_model()
    assert model_identity(inner) == identity
    assert [ffn.gate_weight.shape for ffn in find_ffns(inner)] == [ffn.gate_weight.shape for ffn in find_ffns(base)]
    assert study.score(inner, text) != plain
    with model.disable_adapter():
        assert study.score(inner, text) == plain
    assert study.score(inner, text) == study.score(copy.deepcopy(model).merge_and_unload(), text)
    with pytest.raises(ArchitectureError, match="already replaced.*restore it first"):
        count_activations(inner, tiny_tokenizer(), corpus)
    assert study.score(inner, text) != plain
    for function in (find_ffns, model_identity):
        with pytest.raises(ArchitectureError, match="get_base_model"):
            function(model)
    unloaded = model.unload()
    assert (
        count_activations(unloaded, tiny_tokenizer(), corpus).tokens
        == count_activations(base, tiny_tokenizer(), corpus).tokens
    )


def test_the_trainer_saves_and_resumes_the_adapter_alone(tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "base", layers=3), device="cpu")
    model = move(get_peft_model(model, config()))
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load_model(tmp_path / "base", device="cpu")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True)
    for each in (model.train(), loaded.train()):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        each(**rows()).loss.backward()
        optimizer.step()
    assert all(torch.equal(left, right) for left, right in zip(masters(model), masters(loaded), strict=True))


def test_kernels_that_would_go_around_the_subnetwork_are_refused():
    # What the Trainer's use_liger_kernel does to these instances; all of it would exchange classes for other tests too.
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    lower, upper = tuned().get_base_model().model.layers[1:]
    _patch_swiglu_module(lower.mlp, LigerSwiGLUMLP)
    _patch_rms_norm_module(upper.post_attention_layernorm)
    for module in (lower.mlp, upper.post_attention_layernorm):
        with pytest.raises(ArchitectureError, match=r"another forward.*apply such kernels.*before.*'rms_norm': False"):
            module(torch.randn(1, 3, 32))
