"""Tuning on quantised bases: the trained values lie over the base, whose bytes never change."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch

from lape_fast.errors import AdapterError, ArchitectureError
from lape_fast.identify import NeuronSet
from lape_fast.models import dequantise_model, find_ffns
from lape_fast.ops import quantise_rows
from lape_fast.tune import SubnetworkConfig, attach_subnetwork, load_adapter, merge_adapter, write_adapter
from tests.tiny_models import quantised_tiny_model, tiny_model
from tests.tune.test_subnetwork import batch, neurons_of

KINDS = ["nf4", "int8", "torchao-int8", "fp8"]

# Of the norm, what a product of two fp8 operands of 3 digits is off by: each digit's step of 1/8 is missed by
# 1 / 8 / sqrt(12) in the root mean square, of significands of 1.4 in the mean, in either operand.
FP8_PRODUCT = 2**0.5 / 8 / 12**0.5 / 1.4


def base_bytes(model) -> str:
    """A hash of every byte of the base, its scales among them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor) and "trained_" not in name:
            plain = value.tensor_impl if hasattr(value, "tensor_impl") else value
            for part in _plain_tensors(plain):
                digest.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain_tensors(value):
    if hasattr(value, "__tensor_flatten__") and type(value) not in (torch.Tensor, torch.nn.Parameter):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _plain_tensors(getattr(value, name))]
    return [value]


def dense_gradients(model, neurons):
    """Gradients of the same rows and columns by autograd on the dequantised model."""
    plain = dequantise_model(model).requires_grad_(True).train()
    plain(**batch()).loss.backward()
    return [
        (ffn.gate_weight.grad[chosen], ffn.up_weight.grad[chosen], ffn.down_weight.grad[:, chosen].T)
        for ffn, chosen in zip(find_ffns(plain), neurons, strict=True)
    ]


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_model(kind, policy):
    model = quantised_tiny_model(kind, dtype=torch.float32, layers=3).train()
    neurons = neurons_of(model)
    expected = dense_gradients(quantised_tiny_model(kind, dtype=torch.float32, layers=3), neurons)
    subnetwork = attach_subnetwork(model, neurons, policy)
    model(**batch()).loss.backward()
    for layer in subnetwork.layers:
        for master, right in zip(layer.trained(), expected[layer.ffn.layer], strict=True):
            if master is not None:
                error = (master.grad - right).norm() / right.norm()
                # int8 kernels quantise the activations too: to 8 bits, 1 part in 254 at the largest of a row. In fp8
                # independent errors add up over two passes through 3 layers of 6 products one after the other.
                assert error <= {"int8": 0.05, "fp8": FP8_PRODUCT * (2 * 3 * 6) ** 0.5}.get(kind, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_leaves_every_byte_of_the_base(kind):
    model = quantised_tiny_model(kind, layers=3).train()
    before = base_bytes(model)
    subnetwork = attach_subnetwork(model, neurons_of(model))
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.dtype == torch.float32 for parameter in subnetwork.parameters())
    with pytest.raises(AdapterError, match="quantised or sharded.*lape-fast merge"):
        subnetwork.detach(keep=True)
    subnetwork.detach(keep=False)
    assert base_bytes(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_merging_writes_the_values_into_a_16_bit_copy(kind, tmp_path):
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    neurons = NeuronSet.from_lists({"mlt_Latn": [[1, 5], [], [0, 100]]}, neurons_per_layer=128)
    config = SubnetworkConfig(neurons=neurons, language="mlt_Latn")
    tuned = get_peft_model(quantised_tiny_model(kind, layers=3), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="quantised or sharded.*lape-fast merge"):
        tuned.merge_and_unload()
    with torch.no_grad():
        expected = tuned.eval()(batch()["input_ids"]).logits
    again = PeftModel.from_pretrained(quantised_tiny_model(kind, layers=3), tmp_path / "adapter")
    assert torch.equal(again.eval()(batch()["input_ids"]).logits, expected)
    merged = merge_adapter(quantised_tiny_model(kind, layers=3), tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16 and not hasattr(plain.config, "quantization_config")
    for ffn, chosen in zip(find_ffns(plain), neurons["mlt_Latn"], strict=True):
        if len(chosen):
            path = f"base_model.model.model.layers.{ffn.layer}.mlp.trained_gate_rows.default"
            assert torch.equal(ffn.gate_weight[chosen], tuned.state_dict()[path].bfloat16())
    assert torch.equal(plain(batch()["input_ids"]).logits, merged.eval()(batch()["input_ids"]).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_computes_what_the_adapter_on_the_quantised_base_does(kind, tmp_path):
    config = SubnetworkConfig(neurons=[torch.tensor([1, 5]), torch.tensor([100])], language="mlt_Latn")
    base = quantised_tiny_model(kind, dtype=torch.float32)
    subnetwork = config.attach(base)
    with torch.no_grad():
        for parameter in subnetwork.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    write_adapter(subnetwork, tmp_path, config.to_dict())
    expected = base(batch()["input_ids"]).logits
    merged = merge_adapter(quantised_tiny_model(kind, dtype=torch.float32), tmp_path)
    error = (merged(batch()["input_ids"]).logits - expected).norm() / expected.norm()
    # fp32 sums in another order; bitsandbytes' int8 products also round activations, to 1 part in 254 of the largest,
    # and fp8's do so in 2 layers of 6.
    assert error <= {"int8": 0.03, "fp8": FP8_PRODUCT * (2 * 6) ** 0.5}.get(kind, 1e-5)


def test_an_adapter_of_a_quantised_base_is_refused_by_the_plain_one(tmp_path):
    from peft import get_peft_model

    config = SubnetworkConfig(neurons=[torch.tensor([1]), torch.tensor([2])], language="mlt_Latn")
    get_peft_model(quantised_tiny_model("nf4"), config).save_pretrained(tmp_path)
    plain = tiny_model("llama", hidden=64, neurons=128, dtype=torch.bfloat16)
    with pytest.raises(ArchitectureError, match="weights it replaces are not those"):
        load_adapter(plain, tmp_path)


class RoundedProduct(torch.autograd.Function):
    """What an fp8 projection computes, in fp64 on operands that are rounded as its are."""

    @staticmethod
    def forward(ctx, x, projection):
        ctx.projection = projection
        q, scale = quantise_rows(x.float())
        return ((q.double() * scale.double()) @ projection.dense().double().T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        q, scale = quantise_rows(grad.float(), ctx.projection.scale)
        weight = ctx.projection.weight.view(torch.float8_e4m3fn).double()
        return ((q.double() * scale.double()) @ weight).view(*grad.shape[:-1], -1), None


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_a_block_in_fp8_multiplies_rounded_operands_in_both_directions(policy):
    model = quantised_tiny_model("fp8", dtype=torch.float32).train()
    mlp = model.model.layers[0].mlp
    projections, norm = [mlp.gate_proj, mlp.up_proj, mlp.down_proj], model.model.layers[0].post_attention_layernorm
    layer = attach_subnetwork(model, neurons_of(model, [5, 5]), policy).layers[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 64, generator=generator).requires_grad_()
    grad_y = torch.randn(3, 11, 64, generator=generator)
    with torch.no_grad():
        for master in layer.trained():
            master += 0.1 * torch.randn(master.shape, generator=generator)
    y = layer(x)
    y.backward(grad_y)

    leaf = x.detach().double().requires_grad_()
    rows = [master.detach().double().requires_grad_() for master in layer.trained()]
    normed = copy.deepcopy(norm).double()(leaf)
    chosen, others = layer.neurons(), torch.ones(128, dtype=torch.float64)
    others[chosen] = 0
    gate, up = (
        (RoundedProduct.apply(normed, projection) * others).index_add(2, chosen, normed @ trained.T)
        for projection, trained in zip(projections[:2], rows[:2], strict=True)
    )
    h = torch.nn.functional.silu(gate) * up
    expected = RoundedProduct.apply(h * others, projections[2]) + h[..., chosen] @ rows[2]
    expected.backward(grad_y.double())
    found = [y.detach(), x.grad, *(master.grad for master in layer.trained())]
    right = [expected.detach(), leaf.grad, *(each.grad for each in rows)]
    for name, one, other in zip(("y", "dx", "gate", "up", "down"), found, right, strict=True):
        error = (one - other).norm() / other.norm()
        # fp32 against fp64, unless a value's last digit decided how it is rounded to fp8: one step of 1/8 among the
        # 33 x 128 values of a block is 2e-3 of their norm, and as rare as 2^-24 to 2^-4.
        assert error <= 1e-5, f"{name}: {error}"
