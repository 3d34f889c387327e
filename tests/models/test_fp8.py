"""FP8: products of rounded operands and nothing else, gradients of what was computed, and where it runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.identify.counting import CountingSettings, run_identity
from lape_fast.models import Fp8Linear, dequantise_model, find_ffns, is_fp8, load_model, quantise_layers
from lape_fast.models.fp8 import check_fp8
from lape_fast.ops import quantise_rows
from lape_fast.text import open_corpus
from tests.tiny_models import DENSE_TYPES, quantised_tiny_model, save_tiny, tiny_model

# fp32 sums of up to M products, each of which is exact: every addition rounds by at most 2^-24 of a partial sum, which
# is no more than the sum of all magnitudes.
SUM = 2.0**-24


def projection(inputs=64, outputs=96, bias=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias)


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, column_scales=None):
    """What rounding makes of rows, in fp64; products of such values and fp32's scales are exact there."""
    q, scale = quantise_rows(x, column_scales)
    return (q.double() * scale.double()).view(x.shape)


def dense(layer):
    """The layer's weight, exact in fp64."""
    return layer.weight.view(torch.float8_e4m3fn).double() * layer.scale.double()[:, None]


def within_rounding_of_sums(found, left, right):
    """Whether found is left @ right but for fp32's rounding of sums and of three scalings."""
    terms = left.shape[-1] + 3
    return bool(((found.double() - left @ right).abs() <= terms * SUM * (left.abs() @ right.abs())).all())


# Sizes that are multiples of 16 and of nothing more among them.
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(64, 96, 7), (16, 16, 1), (48, 112, 33), (512, 80, 3)])
def test_both_products_are_exact_but_for_the_order_of_sums(inputs, outputs, rows):
    layer = Fp8Linear(projection(inputs, outputs))
    x = sample(rows, inputs).requires_grad_()
    grad = sample(rows, outputs, seed=1) * 10.0 ** sample(rows, 1, seed=2)
    y = layer(x)
    y.backward(grad)
    assert within_rounding_of_sums(y.detach(), rounded(x.detach()), dense(layer).T)
    # The outputs' scales are in the gradient before it is rounded, and the weight's bytes have none left.
    plain = layer.weight.view(torch.float8_e4m3fn).double()
    assert within_rounding_of_sums(x.grad, rounded(grad, layer.scale), plain)


def test_what_rounding_costs():
    layer, linear = Fp8Linear(projection(512, 512)), projection(512, 512)
    x = sample(256, 512).requires_grad_()
    y = layer(x)
    grad = sample(256, 512, seed=1)
    y.backward(grad)
    with torch.no_grad():
        forward = (y - linear(x)).norm() / y.norm()
        backward = (x.grad - grad @ linear.weight).norm() / x.grad.norm()
        of_weight = (layer.dense() - linear.weight).norm() / linear.weight.norm()
    # e4m3 keeps 3 digits: a significand from 1 to 2 is off by at most 1/16 and by 1 / 8 / sqrt(12) in the root mean
    # square, which is 2.4 to 2.7 % of its value in the mean. The two operands' errors are independent.
    assert 0.02 < of_weight < 0.03
    assert 0.03 < forward < 0.042
    assert 0.03 < backward < 0.042


def test_the_gradient_is_that_of_a_linear_map_with_the_rounded_weight():
    """With operands that fp8 holds exactly, there is nothing but the map."""
    integers = torch.randint(-8, 9, (96, 64), generator=torch.Generator().manual_seed(0)).float()
    linear = projection()
    # The largest of each row is 448 / 32 or 448 / 64, so that all scales are powers of two.
    integers[:, 0] = torch.where(torch.arange(96) % 2 == 0, 14.0, 7.0)
    integers[1::2] = integers[1::2].clamp(-7, 7)
    linear.weight.data = integers
    layer = Fp8Linear(linear)
    assert torch.equal(layer.dense(), integers)
    x = torch.zeros(3, 64)
    x[0, 5], x[1, 6], x[2, 0] = 7, -14, 28
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y, F.linear(x, integers))
    grad = torch.zeros(3, 96)
    grad[0, 3], grad[1, 4], grad[2, 95] = 1, -2, 4
    y.backward(grad)
    assert torch.equal(x.grad, grad @ integers)


def test_part_of_the_outputs_has_its_own_gradient():
    layer = Fp8Linear(projection(64, 96))
    grad = sample(5, 48)
    whole = torch.zeros(5, 96)
    whole[:, 48:] = grad
    torch.testing.assert_close(layer.input_gradient(grad, slice(48, 96)), layer.input_gradient(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_and_leading_dimensions(dtype):
    layer = Fp8Linear(projection(bias=True).to(dtype))
    x = sample(2, 3, 64).to(dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (2, 3, 96) and y.dtype == dtype
    without = copy.deepcopy(layer)
    without.bias = None
    assert torch.equal(y, without(x) + layer.bias)
    y.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6))


def test_autocast_decides_the_dtype_of_a_product():
    layer = Fp8Linear(projection())
    x = sample(3, 64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_nothing_is_kept_for_backward():
    layer, kept = Fp8Linear(projection()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value), lambda value: value):
        layer(sample(3, 64).requires_grad_())
    assert not kept


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_nan_in_its_row_alone(bad):
    layer = Fp8Linear(projection())
    x, grad = sample(4, 64), sample(4, 96)
    x[1, 5], grad[2, 7] = bad, bad
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert y.isnan().all(1).tolist() == [False, True, False, False]
    assert x.grad.isnan().all(1).tolist() == [False, False, True, False]
    assert y[[0, 2, 3]].isfinite().all() and x.grad[[0, 1, 3]].isfinite().all()


def test_zeros_stay_zeros():
    linear = projection()
    linear.weight.data[3] = 0
    layer = Fp8Linear(linear)
    x = sample(2, 64)
    x[0] = 0
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.zeros_like(y))
    assert (y[0] == 0).all() and (y[:, 3] == 0).all() and (x.grad == 0).all()
    assert layer(torch.empty(0, 64)).shape == (0, 96)


def test_no_conversion_changes_the_weight():
    layer = Fp8Linear(projection(bias=True))
    weight, scale = layer.weight.clone(), layer.scale.clone()
    layer(sample(3, 64).requires_grad_()).sum().backward()
    layer.to(torch.bfloat16).half().double()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.scale, scale) and layer.bias.dtype == torch.float64
    assert torch.equal(layer.transposed, weight.T)
    assert layer.to("meta").weight.is_meta and layer.scale.is_meta and layer.transposed.is_meta


def test_the_second_copy_is_made_when_a_gradient_is_asked_for():
    model = quantised_tiny_model("fp8").train().requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    ids = torch.arange(3, 14)[None]
    model(input_ids=ids)
    assert all(layer.transposed is None for layer in layers)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert all(torch.equal(layer.transposed, layer.weight.T) for layer in layers)
    assert "transposed" not in " ".join(model.state_dict())


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_every_projection_of_the_layers_is_fp8_and_nothing_else(model_type):
    model = quantised_tiny_model("fp8", model_type)
    plain = tiny_model(model_type, dtype=torch.bfloat16, hidden=64, neurons=128)
    for (name, module), (_, before) in zip(model.named_modules(), plain.named_modules(), strict=True):
        weight = getattr(before, "weight", None)
        in_a_layer = weight is not None and weight.dim() == 2 and any(part.isdigit() for part in name.split("."))
        if isinstance(module, Fp8Linear):
            assert in_a_layer
        else:
            assert type(module) is type(before)
            # A vision tower is no part of the decoder.
            assert not in_a_layer or "vision" in name
    assert is_fp8(model) and not is_fp8(plain)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_an_ffns_input_gradients_go_through_the_fp8_products(model_type):
    model = quantised_tiny_model("fp8", model_type, torch.float32)
    ffn = find_ffns(model)[0]
    for part in ("gate", "up", "down") if ffn.gated else ("gate", "down"):
        weight = getattr(ffn, f"{part}_weight")
        grad = sample(5, weight.shape[0])
        total = sample(5, weight.shape[1], seed=1)
        found = ffn.input_gradient(part, grad)
        exact = grad @ weight
        # Of the gradient's rounding alone, see above; a product with the dequantised weight would have none.
        assert 0.01 < (found - exact).norm() / exact.norm() < 0.042
        before = total.clone()
        assert ffn.input_gradient(part, grad, total) is total
        torch.testing.assert_close(total, before + found)


def test_projections_of_odd_sizes_stay_as_they_are():
    model = quantise_layers(tiny_model(hidden=64, neurons=120))
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    assert type(mlp.gate_proj) is nn.Linear and type(attention.q_proj) is Fp8Linear
    assert find_ffns(model)[0].quantised is None
    with pytest.raises(ArchitectureError, match=r"No projection of this llama model .* multiples of 32"):
        quantise_layers(tiny_model(hidden=48, neurons=40))


def test_a_model_in_fp8_is_not_saved_and_one_that_is_dequantised_is(tmp_path):
    model = quantised_tiny_model("fp8")
    with pytest.raises(ConfigError, match=r"cannot be saved.*quantise='fp8'.*dequantise_model"):
        model.save_pretrained(tmp_path / "fp8")
    assert not list(tmp_path.rglob("*.safetensors"))
    dequantise_model(model).save_pretrained(tmp_path / "plain")
    assert not is_fp8(model)


def test_its_counts_are_told_from_those_of_the_plain_model(tmp_path):
    folder = save_tiny(tmp_path, dtype=torch.bfloat16, hidden=64, neurons=128)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mlt_Latn.txt").write_text("Il-qattus.\n", encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "text"))
    identities = {}
    for quantise in (None, "fp8"):
        model, tokenizer = load_model(folder, device="cpu", quantise=quantise)
        identities[quantise] = run_identity(model, tokenizer, corpus, CountingSettings())
    assert identities[None]["dtype"] == "bfloat16" and identities["fp8"]["dtype"] == "fp8"
    assert identities[None]["weights_hash"] != identities["fp8"]["weights_hash"]
    assert identities[None]["config_hash"] == identities["fp8"]["config_hash"]


def test_a_gpu_without_fp8_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0, but .* need 8\.9; load the model"):
        check_fp8(torch.device("cuda"))
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        check_fp8(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"no product in float8_e4m3fn for the device 'mps'"):
        check_fp8(torch.device("mps"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ConfigError, match=r"no product in float8_e4m3fn for the device 'cuda'"):
        check_fp8(torch.device("cuda"))
