"""The subnetwork FFN against dense autograd: same gradients, same updates, and nothing else moves."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from lape_fast.errors import ArchitectureError, ConfigError, TrainingError
from lape_fast.models import find_ffns
from lape_fast.tune import attach_subnetwork
from tests.tiny_models import DENSE_TYPES, VOCABULARY, tiny_model


def neurons_of(model, sizes=None, seed=0):
    """Random sorted neurons per layer; by default 5 in the first layer, none in the next, 7 in the others."""
    ffns = find_ffns(model)
    sizes = sizes or [5, 0] + [7] * (len(ffns) - 2)
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(ffn.neurons, generator=generator)[:size].sort().values
        for ffn, size in zip(ffns, sizes, strict=True)
    ]


def batch(seed=0, rows=2, length=17):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def dense_gradients(model, neurons):
    """The rows and columns of dense autograd's gradients that belong to the neurons."""
    model.requires_grad_(True)
    model(**batch()).loss.backward()
    gradients = []
    for ffn, chosen in zip(find_ffns(model), neurons, strict=True):
        weights = {"trained_gate_rows": ffn.gate_weight, "trained_down_columns": ffn.down_weight.T}
        if ffn.gated:
            weights["trained_up_rows"] = ffn.up_weight
        # A view's gradient is the same view of its base's gradient.
        gradients.append({part: _gradient(weight)[chosen] for part, weight in weights.items()})
    return gradients


def _gradient(view):
    base = view if view._base is None else view._base
    gradient = base.grad
    return gradient.as_strided(view.shape, view.stride(), view.storage_offset())


@pytest.mark.parametrize("storage", ["resident", "overlay"])
@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_gradients_equal_dense_autograd_in_fp64(model_type, policy, storage):
    # None of the tiny models has dropout, so the training mode only switches the checkpoints on.
    model = tiny_model(model_type, dtype=torch.float64, layers=3).train()
    neurons = neurons_of(model)
    expected = dense_gradients(copy.deepcopy(model), neurons)
    before = copy.deepcopy(model.state_dict())
    subnetwork = attach_subnetwork(model, neurons, policy, storage=storage)
    model(**batch()).loss.backward()
    # fp64 rounding of sums in another order; BLOOM's own GELU writes sqrt(2 / pi) with eight digits.
    tolerance = {"rtol": 1e-5, "atol": 1e-9} if model_type == "bloom" else {"rtol": 1e-9, "atol": 1e-14}
    for layer in subnetwork.layers:
        for part, master in layer.masters().items():
            torch.testing.assert_close(master.grad, expected[layer.ffn.layer][part], **tolerance)
    subnetwork.detach(keep=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_neuron_all_neurons_and_only_the_last_layer():
    model = tiny_model("llama", dtype=torch.float64, layers=3)
    width = find_ffns(model)[0].neurons
    for sizes in ([0, 0, 1], [width] * 3, [1, 0, 0], [0, 1, width]):
        fresh = copy.deepcopy(model)
        neurons = neurons_of(fresh, sizes)
        expected = dense_gradients(copy.deepcopy(model), neurons)
        subnetwork = attach_subnetwork(fresh, neurons)
        fresh(**batch()).loss.backward()
        assert len(subnetwork.neurons()) == sum(size > 0 for size in sizes)
        for layer in subnetwork.layers:
            for part, master in layer.masters().items():
                torch.testing.assert_close(master.grad, expected[layer.ffn.layer][part], rtol=1e-9, atol=1e-14)


def test_the_output_is_bit_identical_when_attached_and_after_detaching():
    model = tiny_model("llama", layers=3)
    expected = model(batch()["input_ids"]).logits
    names = list(model.state_dict())
    subnetwork = attach_subnetwork(model, neurons_of(model))
    # The kernel and torch's own SiLU round differently; the projections are the same.
    torch.testing.assert_close(model(batch()["input_ids"]).logits, expected, rtol=1e-5, atol=1e-6)
    subnetwork.detach(keep=False)
    assert torch.equal(model(batch()["input_ids"]).logits, expected)
    assert list(model.state_dict()) == names


def test_frozen_weights_are_bit_identical_after_fifty_steps_and_the_chosen_ones_move():
    model = tiny_model("llama", dtype=torch.bfloat16, layers=3)
    neurons = neurons_of(model)
    before = copy.deepcopy(model.state_dict())
    subnetwork = attach_subnetwork(model, neurons)
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-3)
    for step in range(50):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
    subnetwork.detach(keep=True)
    after = model.state_dict()
    for layer, chosen in enumerate(neurons):
        frozen = torch.ones(find_ffns(model)[layer].neurons, dtype=torch.bool)
        frozen[chosen] = False
        for name, by_neuron in (("gate_proj", lambda w: w), ("up_proj", lambda w: w), ("down_proj", lambda w: w.T)):
            key = f"model.layers.{layer}.mlp.{name}.weight"
            old, new = by_neuron(before.pop(key)), by_neuron(after[key])
            assert torch.equal(old[frozen], new[frozen])
            assert len(chosen) == 0 or not torch.equal(old[chosen], new[chosen])
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_follows_dense_masked_adamw_step_for_step(dtype):
    """The oracle: dense gradients times a mask, dense AdamW on masters, weight decay on the chosen entries only."""
    model = tiny_model("llama", dtype=dtype, layers=3)
    dense = copy.deepcopy(model)
    neurons = neurons_of(model)
    subnetwork = attach_subnetwork(model, neurons)
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2, weight_decay=0.1)
    weights = [w for ffn in find_ffns(dense) for w in (ffn.gate_weight, ffn.up_weight, ffn.down_weight)]
    masks = []
    for ffn, chosen in zip(find_ffns(dense), neurons, strict=True):
        rows = torch.zeros_like(ffn.gate_weight)
        rows[chosen] = 1
        masks += [rows, rows, rows.T]
    dense_optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    # fp64 rounding; in fp32 the two orders of summation drift apart, amplified by Adam's division, over the steps.
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-4}
    for step in range(8):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
        dense_optimizer.zero_grad()
        dense(**batch(step)).loss.backward()
        frozen = [weight.detach().clone() for weight in weights]
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad.mul_(mask)
        dense_optimizer.step()
        with torch.no_grad():
            for weight, mask, old in zip(weights, masks, frozen, strict=True):
                weight.copy_(torch.where(mask.bool(), weight, old))
        subnetwork.synchronize()
        for layer in subnetwork.layers:
            ffn, reference = layer.ffn, find_ffns(dense)[layer.ffn.layer]
            torch.testing.assert_close(ffn.gate_weight, reference.gate_weight, **tolerance)
            torch.testing.assert_close(ffn.up_weight, reference.up_weight, **tolerance)
            torch.testing.assert_close(ffn.down_weight, reference.down_weight, **tolerance)


def test_bf16_weights_are_the_rounded_fp32_masters():
    model = tiny_model("llama", dtype=torch.bfloat16, layers=2)
    neurons = neurons_of(model, [4, 4])
    subnetwork = attach_subnetwork(model, neurons)
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-5)
    for step in range(20):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        optimizer.step()
    subnetwork.synchronize()
    for layer, chosen in zip(subnetwork.layers, neurons, strict=True):
        master = layer.masters()["trained_gate_rows"]
        assert master.dtype == torch.float32
        assert torch.equal(layer.ffn.gate_weight[chosen], master.bfloat16())
        # Steps too small for bf16 are not lost: the masters moved everywhere.
        assert (master.bfloat16().float() != master).float().mean() > 0.9


def test_disabled_is_the_base_bit_for_bit_and_comes_back():
    model = tiny_model("llama", layers=3)
    base = copy.deepcopy(model)
    subnetwork = attach_subnetwork(model, neurons_of(model))
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    tuned = model(batch()["input_ids"]).logits
    with subnetwork.disabled():
        for ffn, reference in zip(subnetwork.layers, find_ffns(base), strict=True):
            assert torch.equal(ffn.ffn.gate_weight, reference.gate_weight)
            assert torch.equal(ffn.ffn.down_weight, reference.down_weight)
        assert not torch.equal(model(batch()["input_ids"]).logits, tuned)
    assert torch.equal(model(batch()["input_ids"]).logits, tuned)


def test_layers_below_the_lowest_trained_one_are_untouched_and_outside_the_graph():
    model = tiny_model("llama", layers=3)
    originals = [layer.mlp for layer in model.model.layers]
    attach_subnetwork(model, neurons_of(model, [0, 0, 3]))
    assert [layer.mlp is original for layer, original in zip(model.model.layers, originals, strict=True)] == [
        True,
        True,
        False,
    ]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        hidden = model.model.layers[1](
            torch.randn(1, 4, model.config.hidden_size),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 4, 1), torch.arange(4)[None]),
        )
    assert not saved
    assert not hidden.requires_grad


def test_gradient_accumulation_over_eight_rows_equals_one_batch_of_eight():
    model = tiny_model("llama", dtype=torch.float64, layers=2)
    subnetwork = attach_subnetwork(model, neurons_of(model, [3, 4]))
    rows = batch(rows=8)
    model(**rows).loss.backward()
    together = [parameter.grad.clone() for parameter in subnetwork.parameters()]
    for parameter in subnetwork.parameters():
        parameter.grad = None
    for row in range(8):
        (model(**{name: values[row : row + 1] for name, values in rows.items()}).loss / 8).backward()
    for parameter, expected in zip(subnetwork.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_activation_checkpointing_gives_the_same_gradients(policy, reentrant):
    plain = tiny_model("llama", dtype=torch.float64, layers=3)
    checkpointed = copy.deepcopy(plain)
    expected = attach_subnetwork(plain, neurons_of(plain), policy)
    actual = attach_subnetwork(checkpointed, neurons_of(checkpointed), policy)
    plain.train()(**batch()).loss.backward()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    checkpointed.train()(**batch()).loss.backward()
    for left, right in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-14)


def test_a_second_backward_is_refused_under_save_and_right_under_recompute():
    for policy in ("save", "recompute"):
        model = tiny_model("llama", dtype=torch.float64)
        subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]), policy)
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        once = [parameter.grad.clone() for parameter in subnetwork.parameters()]
        if policy == "save":
            with pytest.raises(TrainingError, match="ran twice"):
                loss.backward()
        else:
            loss.backward()
            for parameter, gradient in zip(subnetwork.parameters(), once, strict=True):
                torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("storage", ["resident", "overlay"])
def test_weights_changed_between_forward_and_backward_are_noticed(storage, fused):
    model = tiny_model("llama")
    subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]), storage=storage)
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2, fused=fused)
    model(**batch()).loss.backward()
    for change in (subnetwork.disabled, contextlib.nullcontext):
        loss = model(**batch()).loss
        with change():
            optimizer.step()
        with pytest.raises(TrainingError, match="between its forward and its backward"):
            loss.backward()
    loss = model(**batch()).loss
    with subnetwork.disabled(), pytest.raises(TrainingError, match="between its forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("storage", ["resident", "overlay"])
def test_masters_edited_between_forward_and_backward_are_noticed(storage):
    model = tiny_model("llama")
    subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]), storage=storage)
    loss = model(**batch()).loss
    with torch.no_grad():
        subnetwork.parameters()[0].mul_(2)
    with pytest.raises(TrainingError, match="between its forward and its backward"):
        loss.backward()


def test_a_reference_may_be_computed_between_forward_and_backward():
    model = tiny_model("llama", dtype=torch.bfloat16)
    subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]))
    model(**batch()).loss.backward()
    expected = [parameter.grad.clone() for parameter in subnetwork.parameters()]
    model.zero_grad()
    loss = model(**batch()).loss
    with subnetwork.disabled(), torch.no_grad():
        model(**batch())
    loss.backward()
    assert all(torch.equal(left.grad, right) for left, right in zip(subnetwork.parameters(), expected, strict=True))


def test_memory_saved_for_backward_holds_no_weight_and_shrinks_with_recompute():
    def saved_elements(policy):
        model = tiny_model("llama", hidden=32, neurons=96, layers=2)
        attach_subnetwork(model, neurons_of(model, [3, 3]), policy)
        sizes = {}

        def note(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**batch(rows=1, length=16))
        return sum(sizes.values())

    # Only the upper layer sees a gradient at its input: it keeps gate and up, 2 x 16 x 96 elements, or nothing.
    assert saved_elements("save") - saved_elements("recompute") == 2 * 16 * 96


@pytest.mark.parametrize(
    ("neurons", "error", "match"),
    [
        ([torch.tensor([1])], ArchitectureError, "1 layers, but the model has 2"),
        ([torch.tensor([1]), torch.tensor([5000])], ArchitectureError, "neurons 5000 to 5000 of layer 1"),
        ([torch.empty(0, dtype=torch.int64)] * 2, TrainingError, "No layer has a neuron"),
    ],
)
def test_neurons_that_do_not_fit_are_refused(neurons, error, match):
    with pytest.raises(error, match=match):
        attach_subnetwork(tiny_model("llama"), neurons)


def test_an_unknown_policy_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="'offload' is unknown"):
        attach_subnetwork(model, neurons_of(model, [1, 1]), "offload")
    with pytest.raises(ConfigError, match="'disk' is unknown"):
        attach_subnetwork(tiny_model("llama"), neurons_of(model, [1, 1]), storage="disk")


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_every_kind_of_optimizer_reaches_the_base_weight(options):
    model = tiny_model("llama")
    subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]))
    optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-2, **options)
    model(**batch()).loss.backward()
    optimizer.step()
    for layer in subnetwork.layers:
        gate_rows = layer.masters()["trained_gate_rows"]
        assert torch.equal(layer.ffn.gate_weight[layer.neurons()], gate_rows)
        assert not torch.equal(gate_rows, layer.originals()["trained_gate_rows"])


def test_a_deep_copy_of_an_attached_model_trains_by_itself():
    model = tiny_model("llama")
    attach_subnetwork(model, neurons_of(model, [2, 2]))
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=1.0)
    copied(**batch()).loss.backward()
    optimizer.step()
    layer, original = copied.model.layers[1].mlp, model.model.layers[1].mlp
    gate_rows, original_rows = (each.masters()["trained_gate_rows"] for each in (layer, original))
    assert torch.equal(layer.ffn.gate_weight[layer.neurons()], gate_rows)
    # The original was not touched.
    assert not torch.equal(gate_rows, original_rows)
    assert torch.equal(original.ffn.gate_weight[original.neurons()], original_rows)


def test_values_written_without_a_trace_are_in_the_weights_that_are_kept():
    model = tiny_model("llama")
    neurons = neurons_of(model, [2, 2])
    subnetwork = attach_subnetwork(model, neurons)
    rows = subnetwork.parameters()[0]
    rows.data.mul_(2)
    subnetwork.detach(keep=True)
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight[neurons[0]], rows)


@pytest.mark.parametrize("storage", ["resident", "overlay"])
@pytest.mark.parametrize("before, after", [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_masters_keep_their_bits_when_the_model_changes_its_dtype(before, after, storage):
    model = tiny_model("llama", dtype=getattr(torch, before))
    subnetwork = attach_subnetwork(model, neurons_of(model, [2, 2]), storage=storage)
    optimizer = subnetwork.optimizer(lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    values = [parameter.detach().clone() for parameter in subnetwork.parameters()]
    model.to(getattr(torch, after))
    for parameter, value in zip(subnetwork.parameters(), values, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, value)
    # And training goes on, with weights that are the rounded masters.
    for step in range(2):
        if storage == "resident":
            for layer in subnetwork.layers:
                for part, master in layer.masters().items():
                    assert torch.equal(layer.base_weight(part)[layer.neurons()], master.to(layer.ffn.dtype)), step
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    assert not torch.equal(subnetwork.parameters()[0], values[0])


def test_a_mixture_of_experts_is_refused_and_left_as_it_was():
    model = tiny_model("mixtral")
    with pytest.raises(ArchitectureError, match="mixtral model is a mixture of experts.*not tuned"):
        attach_subnetwork(model, [torch.tensor([1]), torch.tensor([2])])
    assert all(parameter.requires_grad for parameter in model.parameters())
