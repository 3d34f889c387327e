"""The backward op on the CPU: in place, within budget, with the selected columns and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops import ACTIVATIONS, gated_activation, gated_activation_backward, slot_map
from tests.ops.oracles import (
    BACKENDS,
    DTYPES,
    assert_within_budget,
    eager_gradients,
    needs_extension,
    random,
)
from tests.ops.test_gated_activation import rows_far_apart

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# [T, F]; 19 neurons are selected where there are more
SIZES = [(0, 63), (63, 0), (1, 1), (1, 431), (431, 1), (257, 19), (77, 431)]


def some_neurons(neurons: int, selected: int) -> Tensor:
    return torch.randperm(neurons, generator=torch.Generator().manual_seed(1))[:selected].sort().values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_error_is_within_budget(backend, dtype, activation, gated):
    gate, grad_h = random(431, 77, dtype=dtype, scale=3), random(431, 77, dtype=dtype, seed=2)
    up = random(431, 77, dtype=dtype, seed=1) if gated else None
    wide = (gate.double(), up.double() if gated else None, activation, grad_h.double())
    torchs, truth = eager_gradients(gate, up, activation, grad_h), eager_gradients(*wide)
    gated_activation_backward(grad_h, gate, up, activation, backend=backend)
    assert_within_budget(gate, torchs[0], truth[0])
    if gated:
        assert_within_budget(up, torchs[1], truth[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp64_equals_autograd(backend, activation):
    gate, up, grad_h = random(3, 77, 63).double()
    expected = eager_gradients(gate, up, activation, grad_h)
    gated_activation_backward(grad_h, gate, up, activation, backend=backend)
    torch.testing.assert_close((gate, up), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_selected_columns_are_those_of_the_whole(backend, dtype, gated):
    for tokens, neurons in SIZES:
        for selected in {0, min(19, neurons)}:
            gate, up, grad_h = random(3, tokens, neurons, dtype=dtype)
            up = up if gated else None
            h = gated_activation(gate, up, "silu", backend=backend)
            chosen = some_neurons(neurons, selected)
            hidden, grads = gated_activation_backward(
                grad_h, gate, up, "silu", slot_map(chosen, neurons), selected, backend=backend
            )
            # gate and up now hold the gradients. The columns must be theirs bit for bit.
            assert torch.equal(hidden, h[:, chosen]), (tokens, neurons, selected)
            expected = torch.cat([values[:, chosen] for values in (gate, up) if values is not None], dim=1)
            assert torch.equal(grads, expected), (tokens, neurons, selected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_may_stand_in_any_order(backend):
    neurons, order = 600, torch.randperm(600, generator=torch.Generator().manual_seed(0))[:300]
    slots = torch.full((neurons,), -1, dtype=torch.int32)
    slots[order] = torch.arange(len(order), dtype=torch.int32)
    gate, up, grad_h = random(3, 40, neurons)
    h = gated_activation(gate, up, "gelu", backend=backend)
    hidden, grads = gated_activation_backward(grad_h, gate, up, "gelu", slots, len(order), backend=backend)
    assert torch.equal(hidden, h[:, order])
    assert torch.equal(grads, torch.cat([gate[:, order], up[:, order]], dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_a_fused_projection_change_and_their_neighbours_do_not(backend):
    tokens, neurons = 63, 77
    fused, grad_rows = random(tokens, 2 * neurons + 5), random(tokens, 2 * neurons, seed=1)
    before = fused.clone()
    gate, up, grad_h = fused[:, :neurons], fused[:, neurons : 2 * neurons], grad_rows[:, neurons:]
    expected = eager_gradients(gate, up, "silu", grad_h)
    gated_activation_backward(grad_h, gate, up, "silu", backend=backend)
    torch.testing.assert_close((gate, up), expected)
    assert torch.equal(fused[:, 2 * neurons :], before[:, 2 * neurons :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_broadcast_gradients(backend):
    gate, up = random(2, 3, 5, 31)
    grad_h = torch.ones(1).expand(3, 5, 31)
    expected = eager_gradients(gate, up, "gelu_tanh", grad_h)
    hidden, grads = gated_activation_backward(
        grad_h, gate, up, "gelu_tanh", slot_map(torch.tensor([4, 30]), 31), 2, backend=backend
    )
    torch.testing.assert_close((gate, up), expected)
    assert hidden.shape == (15, 2) and grads.shape == (15, 4)


@needs_extension
@pytest.mark.parametrize("shape", [(2, 5000), (900, 257)])
def test_results_do_not_depend_on_the_number_of_threads(set_threads, shape):
    chosen = some_neurons(shape[1], 50)
    results = []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        gate, up, grad_h = random(3, *shape)
        columns = gated_activation_backward(grad_h, gate, up, "silu", slot_map(chosen, shape[1]), 50, backend="cpp")
        results.append((gate, up, *columns))
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


@needs_extension
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_have_finite_slopes(activation):
    values = torch.tensor([-3e38, -1e20, -200.0, -89.0, 89.0, 200.0, 1e20, 3e38]).repeat(3, 7)
    gate = values.clone()
    gated_activation_backward(torch.ones_like(gate), gate, None, activation, backend="cpp")
    torch.testing.assert_close(gate, (values > 0).float(), rtol=0, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_nan_spreads(backend, activation):
    gate, up, grad_h = random(3, 5, 40)
    gate[2, 3] = up[3, 4] = grad_h[4, 5] = float("nan")
    gated_activation_backward(grad_h, gate, up, activation, backend=backend)
    assert gate.isnan().nonzero().tolist() == [[2, 3], [3, 4], [4, 5]]
    assert up.isnan().nonzero().tolist() == [[2, 3], [4, 5]]


@needs_extension
def test_rows_beyond_two_to_the_31_elements(tmp_path):
    gate, up = (rows_far_apart(tmp_path / name, stride=2**31 + 64, width=64) for name in ("gate", "up"))
    values, grad_h = random(2, 2, 64, dtype=torch.bfloat16), random(2, 64, dtype=torch.bfloat16, seed=1)
    gate.copy_(values[0]), up.copy_(values[1])
    gated_activation_backward(grad_h, gate, up, "silu", backend="cpp")
    gated_activation_backward(grad_h, values[0], values[1], "silu", backend="cpp")
    assert torch.equal(gate, values[0]) and torch.equal(up, values[1])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("selecting", [True, False])
def test_opcheck(gated, selecting):
    gate, up, grad_h = random(3, 9, 13)
    slots, selected = (slot_map(torch.tensor([2, 3, 11]), 13), 3) if selecting else (None, 0)
    arguments = (grad_h, gate, up if gated else None, 1, slots, selected)
    torch.library.opcheck(torch.ops.lape_fast.gated_activation_backward.default, arguments)


def test_slot_map_numbers_the_neurons_in_order():
    assert slot_map(torch.tensor([1, 4]), 6).tolist() == [-1, 0, -1, -1, 1, -1]


VALUES = torch.zeros(4, 6)
SLOTS = torch.tensor([-1, 0, -1, 1, -1, -1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUES[:3], VALUES.clone(), None, "silu"), r"grad_h must match gate \(\[4, 6\]"),
        ((VALUES, VALUES.clone(), VALUES.double(), "silu"), "up must match gate"),
        ((VALUES, VALUES.clone(), None, "tanh"), "'tanh' is unknown"),
        ((VALUES, VALUES.clone(), None, "silu", None, 2), "selected is 2, but there are no slots"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS.long(), 2), r"slots must be int32 \[6\]"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS[:5], 2), r"slots must be int32 \[6\]"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS, 3), r"each of 0 to 2 once \(selected is 3\).*holds 2 slots"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS, 1), "holds 2 slots"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS.clamp(max=0), 2), r"the lowest \[0, 0\]"),
        ((VALUES, VALUES.clone(), None, "silu", SLOTS - 1, 2), r"the lowest \[-2, -2, -2, -2\]"),
        ((VALUES, torch.zeros(6, 4).t(), None, "silu"), "unit stride"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ShapeError, match=message):
        gated_activation_backward(*arguments)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUES, torch.zeros(6, 4).t(), None, 0, None, 0), "unit stride"),
        ((VALUES[:3], VALUES.clone(), None, 0, None, 0), "grad_h must be"),
        ((VALUES, VALUES.clone(), VALUES.double(), 0, None, 0), "up must be"),
        ((VALUES, VALUES.clone(), None, -1, None, 0), "activation number -1"),
        ((VALUES, VALUES.clone(), None, 0, None, 1), "there are no slots"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS, 2**40), "there are 6 neurons"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS, -1), "there are 6 neurons"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS, 3), "slots fills 2 of 3"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS, 1), "neuron 3 the slot 1"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS.clamp(max=0), 2), "neuron 3 the slot 0"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS - 1, 2), "neuron 0 the slot -2"),
        ((VALUES, VALUES.clone(), None, 0, SLOTS.long(), 2), "slots must be int32"),
        ((VALUES, VALUES[:1].clone().expand(4, 6), None, 0, None, 0), "rows of a tensor overwritten in place overlap"),
        ((VALUES, *[VALUES.clone()] * 2, 0, None, 0), "gate and up overlap"),
        ((VALUES, VALUES, None, 0, None, 0), "gate and grad_h overlap"),
        ((VALUES, *torch.zeros(30).unfold(0, 24, 6).view(2, 4, 6), 0, None, 0), "gate and up overlap"),
    ],
)
def test_the_native_op_itself_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lape_fast.gated_activation_backward(*arguments)
