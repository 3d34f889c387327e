"""The backward of h = act(gate) * up, in place, keeping the columns that the weight gradients of k neurons need.

The weight gradients of a subnetwork need h, dL/dgate and dL/dup only at its k neurons. They are stored compactly in
the pass that computes them, so the three weight gradients are small dense products of ``[T, k]`` operands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops.backend import EXTENSION_LOADED, LIBRARY, Backend, resolve_backend
from lape_fast.ops.gated_activation import (
    ACTIVATIONS,
    Activation,
    activation_number,
    apply_activation,
    as_rows,
    widen,
)

LIBRARY.define(
    "gated_activation_backward(Tensor grad_h, Tensor(a!) gate, Tensor(b!)? up, int activation, Tensor? slots, "
    "int selected) -> (Tensor, Tensor)"
)


def reference(
    grad_h: Tensor,  # [T, F]
    gate: Tensor,  # [T, F], becomes dL/dgate
    up: Tensor | None,  # [T, F], becomes dL/dup
    activation: int,
    slots: Tensor | None,  # [F] int32
    selected: int,
) -> tuple[Tensor, Tensor]:  # [T, K], [T, 2K] or [T, K]
    """The formula in plain PyTorch: fp32 inside (fp64 for fp64), rounded once."""
    name = ACTIVATIONS[activation]
    wide_gate, wide_grad = widen(gate), widen(grad_h)
    activated = apply_activation(wide_gate, name)
    slope = activation_slope(wide_gate, name)
    if up is None:
        hidden, grads = activated, [wide_grad * slope]
    else:
        wide_up = widen(up)
        hidden, grads = activated * wide_up, [wide_grad * wide_up * slope, wide_grad * activated]
    neurons = _neurons_by_slot(slots, selected, gate.device)
    selected_hidden = hidden[:, neurons].to(gate.dtype)
    selected_grads = torch.cat([grad[:, neurons] for grad in grads], dim=1).to(gate.dtype)
    gate.copy_(grads[0])
    if up is not None:
        up.copy_(grads[1])
    return selected_hidden, selected_grads


def activation_slope(gate: Tensor, activation: Activation) -> Tensor:
    """d act(gate) / d gate, elementwise."""
    match activation:
        case "silu":
            sigmoid = torch.sigmoid(gate)
            return sigmoid * (1 + gate * (1 - sigmoid))
        case "gelu":
            density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(gate / math.sqrt(2))) + gate * density
        case "gelu_tanh":
            scale, cubic = math.sqrt(2 / math.pi), 0.044715
            tanh = torch.tanh(scale * (gate + cubic * gate**3))
            return 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * scale * (1 + 3 * cubic * gate * gate)
        case "relu":
            return (gate > 0).to(gate.dtype)


def gated_activation_backward(
    grad_h: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: Activation,
    slots: Tensor | None = None,
    selected: int = 0,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Turns gate and up into dL/dgate and dL/dup in place, and returns the selected columns.

    Args:
        grad_h: ``[..., F]``, dL/dh.
        gate: ``[..., F]``, overwritten by dL/dgate. Must be viewable as ``[T, F]`` with unit stride in F.
        up: ``[..., F]``, overwritten by dL/dup; None for an ungated FFN.
        activation: one of ``ACTIVATIONS``.
        slots: int32 ``[F]``: the slot 0 to K - 1 of a selected neuron, each slot once, and -1 for the others.
        selected: K.
        backend: overrides ``LAPE_FAST_BACKEND`` and the automatic choice.

    Returns:
        h at the selected neurons, ``[T, K]``, and (dL/dgate | dL/dup) there, ``[T, 2K]`` (``[T, K]`` if ungated).

    Raises:
        ShapeError: shapes, dtypes or slots do not fit together.
        BackendError: the backend cannot run here.

    Example:
        >>> slots = slot_map(torch.tensor([3, 7]), 16)
        >>> gate, up, grad_h = torch.randn(3, 5, 16)
        >>> hidden, grads = gated_activation_backward(grad_h, gate, up, "silu", slots, selected=2)
    """
    number = activation_number(activation)
    _check(grad_h, gate, up, slots, selected)
    chosen = resolve_backend(backend, gate.device)
    arguments = (as_rows(grad_h), _rows_in_place(gate), _rows_in_place(up), number, slots, selected)
    if chosen == "reference":
        return reference(*arguments)
    if chosen == "triton" and gate.device.type == "cpu":
        return _triton(*arguments)
    return torch.ops.lape_fast.gated_activation_backward(*arguments)


def slot_map(neurons: Tensor, width: int) -> Tensor:
    """The slot map of sorted neuron indices: int32 ``[width]``, -1 where a neuron is not selected."""
    slots = torch.full((width,), -1, dtype=torch.int32, device=neurons.device)
    slots[neurons] = torch.arange(len(neurons), dtype=torch.int32, device=neurons.device)
    return slots


def _neurons_by_slot(slots: Tensor | None, selected: int, device: torch.device) -> Tensor:
    neurons = torch.empty(selected, dtype=torch.int64, device=device)
    if slots is not None:
        chosen = torch.nonzero(slots >= 0).squeeze(1)
        neurons[slots[chosen].long()] = chosen
    return neurons


def _rows_in_place(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    try:
        rows = values.view(math.prod(values.shape[:-1]), values.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or (rows.stride(1) != 1 and rows.shape[1] > 1):
        raise ShapeError(
            f"gate and up are overwritten in place and must have unit stride in their last dimension, but one has "
            f"strides {list(values.stride())}; call .contiguous() first."
        )
    return rows


def _check(grad_h: Tensor, gate: Tensor, up: Tensor | None, slots: Tensor | None, selected: int) -> None:
    for name, values in (("grad_h", grad_h), ("up", up)):
        if values is not None and (values.shape, values.dtype, values.device) != (gate.shape, gate.dtype, gate.device):
            raise ShapeError(
                f"{name} must match gate ({list(gate.shape)}, {gate.dtype}, {gate.device}), but it is "
                f"{list(values.shape)}, {values.dtype}, {values.device}."
            )
    if slots is None:
        if selected:
            raise ShapeError(f"selected is {selected}, but there are no slots; pass the slot map of the neurons.")
        return
    if slots.dtype != torch.int32 or slots.shape != gate.shape[-1:] or slots.device != gate.device:
        raise ShapeError(
            f"slots must be int32 [{gate.shape[-1]}] on {gate.device}, but it is {slots.dtype} {list(slots.shape)} on "
            f"{slots.device}; build it with slot_map(neurons, {gate.shape[-1]})."
        )
    # On CUDA this would wait for the device.
    if slots.device.type == "cpu" and not torch.compiler.is_compiling():
        used = slots[slots != -1].sort().values
        if len(used) != selected or not torch.equal(used, torch.arange(selected, dtype=torch.int32)):
            raise ShapeError(
                f"slots must hold each of 0 to {selected - 1} once (selected is {selected}) and -1 elsewhere, but it "
                f"holds {len(used)} slots, the lowest {used[:4].tolist()}; build it with slot_map(neurons, "
                f"{gate.shape[-1]})."
            )


def _triton(
    grad_h: Tensor, gate: Tensor, up: Tensor | None, activation: int, slots: Tensor | None, selected: int
) -> tuple[Tensor, Tensor]:
    from lape_fast.kernels import gated_activation_backward as kernel

    return kernel.launch(grad_h, gate, up, activation, slots, selected)


def _fake(
    grad_h: Tensor, gate: Tensor, up: Tensor | None, activation: int, slots: Tensor | None, selected: int
) -> tuple[Tensor, Tensor]:
    tokens, parts = gate.shape[0], 1 if up is None else 2
    return gate.new_empty(tokens, selected), gate.new_empty(tokens, parts * selected)


torch.library.register_fake("lape_fast::gated_activation_backward", _fake, lib=LIBRARY)
LIBRARY.impl("gated_activation_backward", _triton, "CUDA")
if not EXTENSION_LOADED:
    LIBRARY.impl("gated_activation_backward", reference, "CPU")
