"""What a subnetwork FFN keeps and computes under each policy, in each storage, and under torch's own switches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lape_fast.models import find_ffns
from lape_fast.tune import attach_subnetwork
from tests.tiny_models import DENSE_TYPES, tiny_model
from tests.tune.test_subnetwork import batch, neurons_of


def gradients_of(model, rows=None):
    loss = model(**(rows or batch())).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def trained(subnetwork, steps=3, **options):
    """A few steps of AdamW; the losses."""
    model, optimizer = options.pop("model"), torch.optim.AdamW(subnetwork.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_overlay_trains_as_resident_does_and_never_writes_the_base(model_type):
    resident, overlay = (tiny_model(model_type, dtype=torch.float64, layers=3).train() for _ in range(2))
    base = copy.deepcopy(overlay.state_dict())
    neurons = neurons_of(resident)
    written = attach_subnetwork(resident, neurons)
    laid_over = attach_subnetwork(overlay, neurons, storage="overlay")
    # The same sums in another order.
    assert trained(laid_over, model=overlay) == pytest.approx(trained(written, model=resident), rel=1e-9)
    for left, right in zip(laid_over.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    with laid_over.disabled():
        untouched = overlay(batch()["input_ids"]).logits
    tuned = overlay(batch()["input_ids"]).logits
    laid_over.detach(keep=False)
    assert all(torch.equal(value, base[name]) for name, value in overlay.state_dict().items())
    # BLOOM's own GELU writes sqrt(2 / pi) with eight digits.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if model_type == "bloom" else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(untouched, overlay(batch()["input_ids"]).logits, **tolerance)
    assert not torch.allclose(tuned, untouched)


def test_overlay_in_bf16_computes_with_the_rounded_masters():
    resident, overlay = (tiny_model("llama", dtype=torch.bfloat16, layers=3) for _ in range(2))
    neurons = neurons_of(resident)
    subnetworks = [attach_subnetwork(resident, neurons), attach_subnetwork(overlay, neurons, storage="overlay")]
    with torch.no_grad():
        for subnetwork in subnetworks:
            for parameter in subnetwork.parameters():
                parameter.add_(0.01)
            subnetwork.synchronize()
    logits = [model(batch()["input_ids"]).logits for model in (resident, overlay)]
    # Both hold the same 16-bit weights; the k neurons' share of a sum is added last instead of in its place.
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
@pytest.mark.parametrize("storage", ["resident", "overlay"])
def test_mixed_precision_gives_gradients_as_good_as_dense_autograds(policy, storage):
    model = tiny_model("llama", layers=3).train()
    truth, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    neurons = neurons_of(model)
    exact = attach_subnetwork(truth, neurons)
    truth(**batch()).loss.backward()
    ffns = find_ffns(dense)
    dense.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense(**batch()).loss
    loss.backward()
    subnetwork = attach_subnetwork(model, neurons, policy, storage=storage)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    error, allowed = 0.0, 0.0
    for layer, right in zip(subnetwork.layers, exact.layers, strict=True):
        ffn, chosen = ffns[layer.ffn.layer], layer.neurons()
        weights = (ffn.gate_weight.grad[chosen], ffn.up_weight.grad[chosen], ffn.down_weight.grad[:, chosen].T)
        for mine, dense_gradient, true in zip(layer.trained(), weights, right.trained(), strict=True):
            if mine is not None:
                assert mine.grad.dtype == torch.float32
                error = max(error, (mine.grad - true.grad).abs().max().item())
                allowed = max(allowed, (dense_gradient - true.grad).abs().max().item())
    assert 0 < error <= 2 * allowed


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
@pytest.mark.parametrize("storage", ["resident", "overlay"])
def test_a_backward_pass_inside_autocast_is_that_of_the_forward_pass(policy, storage):
    def gradients(enabled_in_forward, enabled_in_backward):
        model = tiny_model("llama", layers=3).train()
        subnetwork = attach_subnetwork(model, neurons_of(model), policy, storage=storage)
        # The layer alone, for the model's other products follow autocast in backward.
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        layer = subnetwork.layers[-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled_in_forward):
            y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled_in_backward):
            y.float().square().sum().backward()
        return [x.grad, *(master.grad for master in layer.masters().values())]

    for forward in (True, False):
        for outside, inside in zip(gradients(forward, False), gradients(forward, True), strict=True):
            assert torch.equal(outside, inside)


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
def test_a_compiled_model_gives_the_same_gradients(policy):
    model = tiny_model("llama", dtype=torch.float64, layers=3).train()
    attach_subnetwork(model, neurons_of(model), policy)
    loss, gradients = gradients_of(model)
    compiled = copy.deepcopy(model)
    compiled.zero_grad()
    with torch._dynamo.config.patch(suppress_errors=False):
        torch.compile(compiled, backend="aot_eager")(**batch()).loss.backward()
    again = [parameter.grad for parameter in compiled.parameters() if parameter.grad is not None]
    assert len(again) == len(gradients) > 0
    for left, right in zip(again, gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-13)
    torch._dynamo.reset()


def test_a_checkpointed_layer_is_computed_again_without_its_down_projection():
    def flops(policy):
        model = tiny_model("llama", hidden=32, neurons=96, layers=3).train()
        attach_subnetwork(model, neurons_of(model, [2, 2, 2]), policy)
        with FlopCounterMode(display=False) as counter:
            model(**batch(rows=1, length=16)).loss.backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(
            number
            for op, number in counts.items()
            if op is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        )

    # Two layers are checkpointed: 4 attention projections (k and v of half the width), gate and up; 16 tokens.
    again = 2 * 2 * 16 * (3 * 32 * 32 + 2 * 96 * 32)
    assert flops("checkpoint") - flops("save") == again


def test_checkpointing_is_a_matter_of_training():
    model = tiny_model("llama", layers=3)
    subnetwork = attach_subnetwork(model, neurons_of(model), "checkpoint")
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    saved = []
    model.train()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True, True]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        model(**batch()).loss.backward()
    subnetwork.detach(keep=False)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


class SizesOfNewStorages(TorchDispatchMode):
    """The number of elements of every tensor whose memory an operator allocated."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.sizes.add(value.numel())
        return result


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
def test_no_gradient_of_a_weights_size_is_formed(policy):
    # 5 tokens of 96 neurons, 8 x 5 x 5 attention weights and 5 x 300 logits are all smaller than 96 x 32 weights.
    model = tiny_model("llama", hidden=32, neurons=96, layers=3).train()
    attach_subnetwork(model, neurons_of(model, [3, 0, 4]), policy)
    with SizesOfNewStorages() as storages:
        model(**batch(rows=1, length=5)).loss.backward()
    assert max(storages.sizes) < 96 * 32
