"""Quantised models: loaded, told apart, read as dense weights, never written to, and made plain again."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.models import (
    dequantise,
    dequantise_model,
    find_ffns,
    load_model,
    model_identity,
    quantisation_of,
    weights_hash,
)
from tests.tiny_models import DENSE_TYPES, EXPERT_TYPES, quantised_tiny_model, save_tiny, tiny_model, tiny_tokenizer

KINDS = {
    "nf4": "bitsandbytes NF4 or FP4",
    "int8": "bitsandbytes LLM.int8",
    "torchao-int8": "torchao int8 weight-only",
    "fp8": "FP8",
}
# FP8 rounds the other operand of every product too, and is a way to compute that is not saved; see test_fp8.py.
WEIGHT_ONLY = [kind for kind in KINDS if kind != "fp8"]

# Of each kind half of the widest step between two values, as a share of the largest: NF4 goes from -1 to -0.696, int8
# has 127 even steps, and fp8 goes from 448 to 416.
HALF_STEPS = {"nf4": 0.153, "int8": 0.5 / 127, "torchao-int8": 0.5 / 127, "fp8": 16 / 448}
# Rounding to bfloat16 moves a value, or a scale and then a value, by at most this share.
BFLOAT16_STEP = 2**-8

# bitsandbytes replaces GPT-2's Conv1D; torchao does not.
LOADABLE = [(kind, name) for kind in KINDS for name in DENSE_TYPES if (kind, name) != ("torchao-int8", "gpt2")]

PARTS = ("gate_weight", "up_weight", "down_weight")


def weights(model):
    return [getattr(ffn, part) for ffn in find_ffns(model) for part in PARTS if part != "up_weight" or ffn.gated]


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 25).reshape(2, 11), use_cache=False).logits


def stored(model):
    """A copy of what a model stores, by name: bytes, scales and whatever else."""
    # torchao's tensors are compared by what they stand for, since torch.equal does not know them.
    return {
        name: value.dequantize() if hasattr(value, "qdata") else value.clone()
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(("kind", "model_type"), LOADABLE)
def test_dense_weights_are_the_original_ones_within_a_quantisation_step(kind, model_type):
    model = quantised_tiny_model(kind, model_type)
    assert {ffn.quantised for ffn in find_ffns(model)} == {KINDS[kind]}
    originals = weights(tiny_model(model_type, dtype=torch.bfloat16, hidden=64, neurons=128))
    for dense, original in zip(weights(model), originals, strict=True):
        assert dense.shape == original.shape and dense.dtype == torch.bfloat16
        assert (dense - original).abs().max() <= original.abs().max() * (HALF_STEPS[kind] + BFLOAT16_STEP)
        assert not torch.equal(dense, original)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gpt_neox"])
def test_a_projection_computes_and_differentiates_with_the_dense_weight(kind, model_type):
    # Only in training do the kinds that quantise activations for speed compute with the weight itself.
    model = quantised_tiny_model(kind, model_type, torch.float32).train()
    for projection in find_ffns(model)[0].projections.values():
        dense = dequantise(projection, torch.float32)
        x = torch.randn(2, 5, projection.in_features, requires_grad=True)
        y = projection(x)
        grad_y = torch.randn_like(y)
        y.backward(grad_y)
        # Sums of up to 256 products in another order.
        torch.testing.assert_close(y, F.linear(x, dense, projection.bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, grad_y @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_running_a_model_writes_nothing_to_it(kind):
    model = quantised_tiny_model(kind)
    before, dense, digest = stored(model), weights(model), weights_hash(model)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 14)[None], use_cache=False)
    logits(model)
    assert all(torch.equal(now, then) for now, then in zip(weights(model), dense, strict=True))
    after = stored(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert weights_hash(model) == digest
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert all(torch.equal(now, before) for now, before in zip(weights(again), dense, strict=True))


def test_a_weight_that_bitsandbytes_reordered_for_the_cpu_is_read_all_the_same():
    import bitsandbytes

    model = quantised_tiny_model("nf4")
    projection = model.model.layers[0].mlp.gate_proj
    dense = dequantise(projection, torch.bfloat16)
    assert not projection.support_avx512bf16_for_cpu
    projection.support_avx512bf16_for_cpu = bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    logits(model)
    if not getattr(projection.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, without which bitsandbytes reorders nothing")
    # The scales, the codes and their products are rounded to bfloat16 one by one.
    torch.testing.assert_close(dequantise(projection, torch.bfloat16), dense, rtol=3 * BFLOAT16_STEP, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_be_written_through_a_quantised_ffn(kind):
    model = quantised_tiny_model(kind)
    dense = weights(model)
    ffn = find_ffns(model)[1]
    neurons = torch.tensor([3, 5])
    with pytest.raises(
        ArchitectureError, match=rf"down projection of layer 1 is quantised \({KINDS[kind]}\).*bfloat16"
    ):
        ffn.outgoing(neurons)
    with pytest.raises(ArchitectureError, match="cannot be changed in place"):
        ffn.set_outgoing(neurons, torch.zeros(2, 64))
    ffn.gate_weight.zero_()
    ffn.down_weight.zero_()
    assert all(torch.equal(now, before) for now, before in zip(weights(model), dense, strict=True))


def test_an_ffn_of_which_only_a_part_is_quantised():
    model = quantised_tiny_model("nf4")
    plain = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    model.model.layers[0].mlp.down_proj = plain
    ffn = find_ffns(model)[0]
    assert ffn.quantised == KINDS["nf4"]
    assert ffn.down_weight.data_ptr() == plain.weight.data_ptr()
    ffn.set_outgoing(torch.tensor([7]), torch.zeros(1, 64, dtype=torch.bfloat16))
    assert plain.weight[:, 7].eq(0).all()


def test_a_model_keeps_its_identity_and_not_its_weights_hash():
    plain = tiny_model(dtype=torch.bfloat16, hidden=64, neurons=128)
    models = [plain, *(quantised_tiny_model(kind) for kind in KINDS)]
    assert all(model_identity(model) == model_identity(plain) for model in models)
    hashes = [weights_hash(model) for model in models]
    assert len(set(hashes)) == len(models)
    assert [weights_hash(quantised_tiny_model(kind)) for kind in KINDS] == hashes[1:]


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_a_checkpoint_that_was_saved_quantised_stays_so(kind, tmp_path):
    model = quantised_tiny_model(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert {ffn.quantised for ffn in find_ffns(loaded)} == {KINDS[kind]}
    assert all(torch.equal(now, before) for now, before in zip(weights(loaded), weights(model), strict=True))
    with pytest.raises(ConfigError, match="saved quantised already"):
        load_model(tmp_path, quantise=kind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "gptq"}, "quantisation 'gptq' is unknown; use one of nf4, int8, torchao-int8, fp8"),
        ({"quantise": "nf4", "dtype": "float64"}, "compute in float64"),
        ({"quantise": "fp8", "dtype": "float64"}, "compute in float64"),
    ],
)
def test_what_cannot_be_quantised(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(save_tiny(tmp_path), **options)


@pytest.mark.parametrize(
    ("model_type", "kind"), [*((name, "nf4") for name in EXPERT_TYPES), ("mixtral", "fp8"), ("gpt2", "torchao-int8")]
)
def test_ffns_that_quantising_would_leave_as_they_are(tmp_path, model_type, kind):
    with pytest.raises(ArchitectureError, match=f"{kind} would leave the FFNs of this {model_type} model"):
        load_model(save_tiny(tmp_path, model_type), quantise=kind)


@pytest.mark.parametrize(("kind", "library"), [("int8", "bitsandbytes"), ("torchao-int8", "torchao")])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, kind, library):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == library else found(name, *rest)
    )
    with pytest.raises(ConfigError, match=rf"needs {library}, .*pip install 'lape-fast\[quantise\]'"):
        load_model(save_tiny(tmp_path), quantise=kind)


def test_a_plain_model_needs_no_library():
    program = (
        "import sys\n"
        "from lape_fast.models import find_ffns, load_model\n"
        "from tests.tiny_models import tiny_model\n"
        "find_ffns(tiny_model())\n"
        "sys.exit('bitsandbytes was imported' if 'bitsandbytes' in sys.modules else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(("kind", "model_type"), LOADABLE)
def test_a_dequantised_model_is_a_plain_one_with_the_same_weights(kind, model_type, tmp_path):
    model = quantised_tiny_model(kind, model_type)
    dense, before = weights(model), logits(model)
    assert dequantise_model(model) is model
    assert not any(quantisation_of(module) for module in model.modules())
    assert all(torch.equal(now, then) for now, then in zip(weights(model), dense, strict=True))
    if kind == "nf4":
        # Only here are activations and products rounded as in a plain model.
        torch.testing.assert_close(logits(model), before)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
    loaded, _ = load_model(tmp_path, device="cpu")
    expected = tiny_model(model_type, dtype=torch.bfloat16, hidden=64, neurons=128).state_dict()
    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert torch.equal(logits(loaded), logits(model))


def test_a_dequantised_model_can_be_written_to():
    model = dequantise_model(quantised_tiny_model("nf4"))
    ffn = find_ffns(model)[0]
    assert ffn.quantised is None
    ffn.set_outgoing(torch.tensor([3]), torch.zeros(1, 64, dtype=torch.bfloat16))
    assert model.model.layers[0].mlp.down_proj.weight[:, 3].eq(0).all()


@pytest.mark.parametrize("scheme", ["Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_other_tensors_of_torchao_are_refused(scheme):
    from torchao import quantization

    model = tiny_model(dtype=torch.bfloat16)
    quantization.quantize_(model.model.layers[1].mlp, getattr(quantization, scheme)())
    # Their dtype says bfloat16.
    assert model.model.layers[1].mlp.gate_proj.weight.dtype == torch.bfloat16
    with pytest.raises(ArchitectureError, match=r"mlp\.gate_proj of layer 1 .*8Tensor.* not supported.*LLM\.int8"):
        find_ffns(model)


def test_projections_of_other_libraries_are_refused():
    class QuantLinear(nn.Module):
        pass

    model = tiny_model()
    model.model.layers[0].mlp.up_proj = QuantLinear()
    with pytest.raises(ArchitectureError, match=r"mlp\.up_proj of layer 0 is a QuantLinear .*torchao int8 weight-only"):
        find_ffns(model)
    model = tiny_model()
    float8 = torch.zeros(48, 32, dtype=torch.float8_e4m3fn)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(float8, requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"torch\.float8_e4m3fn, a kind of quantisation that is not supported"):
        find_ffns(model)
