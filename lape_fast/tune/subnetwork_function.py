"""The forward and the backward pass of the subnetwork FFN.

    y = W_down h,   h = act(W_gate n) * (W_up n),   n = norm(x)

with gradients for x and for the selected rows and columns only. The function is cut at h into two autograd nodes. The
second keeps nothing, so a checkpointed layer that is computed again may stop before its down projection; it hands
dL/dy to the first, which forms the three weight gradients as products of ``[T, K]`` operands. Where x needs no
gradient, as in the lowest trained layer, one node reads k columns and forms no gradient of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lape_fast.errors import TrainingError
from lape_fast.ops import gated_activation, gated_activation_backward
from lape_fast.ops.backend import device_type
from lape_fast.tune.norms import normalise

if TYPE_CHECKING:
    from lape_fast.tune.subnetwork_ffn import SubnetworkFFN


# The autograd functions read and write Python state, which Dynamo would have to trace. (torch.compiler.disable would
# import Dynamo here and now.)
@_disable_dynamo
def compute(layer: SubnetworkFFN, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
    """The block's output; differentiable in x and in the masters of the language that the layer holds."""
    layer.synchronize_if_changed()
    masters = layer.trained()
    trained = any(master is not None and master.requires_grad for master in masters)
    if not torch.is_grad_enabled() or not (trained or x.requires_grad):
        if layer.training or _overlays(layer):
            return _output(layer, _hidden(layer, *_projections(layer, _normed(layer, x))))
        # The model's own code, so that it is evaluated as it was loaded, bit for bit.
        return layer.ffn.compute(x if layer.ffn.norm is None else layer.ffn.norm(x))
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        raise TrainingError(
            f"A base weight of the FFN of layer {layer.ffn.layer} requires a gradient, but a subnetwork FFN forms none "
            "for it; call requires_grad_(False) on the base, and train the subnetwork's parameters."
        )
    call = _Call(layer, x)
    if not x.requires_grad:
        return _LowestFFN.apply(x, *masters, call)
    return _DownProjection.apply(_GatedProjection.apply(x, *masters, call), call)


class _Call:
    """One forward pass of a layer, shared by its autograd nodes."""

    def __init__(self, layer: SubnetworkFFN, x: Tensor):
        self.layer, self.state = layer, (layer.held, layer.writes[layer.held])
        self.spent = False
        self.grad_y: Tensor | None = None
        self.device = device_type(x)
        self._autocast = (torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device))

    def as_in_forward(self):
        """The forward pass's mixed precision, for what backward computes a second time."""
        dtype, enabled = self._autocast
        return torch.autocast(self.device, dtype=dtype, enabled=enabled)

    def check_unchanged(self) -> None:
        self.layer.synchronize_if_changed()
        if self.state != (self.layer.held, self.layer.writes[self.layer.held]):
            raise TrainingError(
                f"The weights of layer {self.layer.ffn.layer} were changed between its forward and its backward pass; "
                "call backward() before the optimizer's step or a switch of the subnetwork."
            )

    def spend(self) -> None:
        """Marks the saved gate and up as overwritten."""
        if self.spent:
            raise TrainingError(
                f"The backward pass of layer {self.layer.ffn.layer} ran twice over values that it overwrites in place; "
                "use policy='recompute' if you need retain_graph=True."
            )
        self.spent = True


def _outside_autocast(backward: Callable) -> Callable:
    """A backward pass that may run inside autocast: its products have their operands' dtypes all the same."""

    @torch.autograd.function.once_differentiable
    @functools.wraps(backward)
    def outside(ctx, grad: Tensor):
        with torch.autocast(ctx.call.device, enabled=False):
            return backward(ctx, grad)

    return outside


class _GatedProjection(torch.autograd.Function):
    """x -> h."""

    @staticmethod
    def forward(ctx, x, gate_rows, up_rows, down_columns, call: _Call):
        gate, up = _projections(call.layer, _normed(call.layer, x))
        ctx.call = call
        ctx.save_for_backward(x, *((None, None) if call.layer.policy == "recompute" else (gate, up)))
        return _hidden(call.layer, gate, up)

    @staticmethod
    @_outside_autocast
    def backward(ctx, grad_h):
        call: _Call = ctx.call
        layer, (grad_y, call.grad_y) = call.layer, (call.grad_y, None)
        call.check_unchanged()
        x, gate, up = ctx.saved_tensors
        if gate is not None:
            call.spend()
        with call.as_in_forward():
            leaf = x.detach().requires_grad_(layer.ffn.norm is not None)
            with torch.enable_grad():
                normed = _normed(layer, leaf)
            if gate is None:
                gate, up = _projections(layer, normed.detach())
        grad_normed, gradients = _differentiate(layer, normed.detach(), gate, up, grad_h, grad_y)
        if normed is leaf:
            return grad_normed.to(x.dtype), *gradients, None
        # Nested in a backward pass; torch's FLOP counter cannot follow autograd.grad there.
        normed.backward(grad_normed.to(normed.dtype))
        return leaf.grad, *gradients, None


class _DownProjection(torch.autograd.Function):
    """h -> y."""

    @staticmethod
    def forward(ctx, h, call: _Call):
        ctx.call = call
        return _output(call.layer, h)

    @staticmethod
    @_outside_autocast
    def backward(ctx, grad_y):
        call: _Call = ctx.call
        call.check_unchanged()
        # The only node behind this one is the gated projection's, which takes it from there.
        call.grad_y = grad_y
        layer = call.layer
        grad_h = layer.ffn.input_gradient("down", grad_y)
        if _overlays(layer):
            grad_h[..., layer.neurons()] = grad_y @ _rounded(layer, 2, grad_y.dtype).T
        return grad_h, None


class _LowestFFN(torch.autograd.Function):
    """x -> y where x needs no gradient: k columns of gate and up are all that backward reads."""

    @staticmethod
    def forward(ctx, x, gate_rows, up_rows, down_columns, call: _Call):
        layer = call.layer
        gate, up = _projections(layer, _normed(layer, x))
        kept = (None if values is None else values[..., layer.neurons()] for values in (gate, up))
        ctx.call = call
        ctx.save_for_backward(x, *kept)
        return _output(layer, _hidden(layer, gate, up))

    @staticmethod
    @_outside_autocast
    def backward(ctx, grad_y):
        call: _Call = ctx.call
        layer, neurons = call.layer, call.layer.neurons()
        call.check_unchanged()
        x, gate, up = ctx.saved_tensors
        with torch.no_grad(), call.as_in_forward():
            normed = _normed(layer, x)
        if layer.overlay:
            columns = _rounded(layer, 2, grad_y.dtype).T
        else:
            columns = layer.ffn.down_weight[:, neurons].to(grad_y.dtype)
        # Copies, for they are small: what is kept stays valid for a second backward pass.
        gate, up = gate.clone(), None if up is None else up.clone()
        every = torch.arange(len(neurons), dtype=torch.int32, device=x.device)
        hidden, grads = gated_activation_backward(grad_y @ columns, gate, up, layer.ffn.activation, every, len(neurons))
        return None, *_weight_gradients(layer, normed, hidden, grads, grad_y), None


def _overlays(layer: SubnetworkFFN) -> bool:
    """Whether some neurons are computed from the masters instead of the base."""
    return layer.overlay and layer.held is not None and len(layer.neurons()) > 0


def _rounded(layer: SubnetworkFFN, part: int, dtype: torch.dtype) -> Tensor:  # [K, D]
    """A part's masters as the base's dtype would hold them, in the dtype of a product."""
    return layer.trained()[part].detach().to(layer.ffn.dtype).to(dtype)


def _normed(layer: SubnetworkFFN, x: Tensor) -> Tensor:
    return x if layer.ffn.norm is None else normalise(layer.ffn.norm, x)


def _projections(layer: SubnetworkFFN, normed: Tensor) -> tuple[Tensor, Tensor | None]:
    """gate before its activation and up, ``[..., F]``; fresh, so that backward may write over them."""
    ffn = layer.ffn
    gate, up = ffn.project(normed)
    if _overlays(layer):
        for part, values, bias in ((0, gate, ffn.gate_bias), (1, up, ffn.up_bias)):
            if values is not None:
                columns = normed.to(values.dtype) @ _rounded(layer, part, values.dtype).T
                values[..., layer.neurons()] = columns if bias is None else columns + bias[layer.neurons()]
    return gate, up


def _hidden(layer: SubnetworkFFN, gate: Tensor, up: Tensor | None) -> Tensor:
    return gated_activation(gate, up, layer.ffn.activation)


def _output(layer: SubnetworkFFN, h: Tensor) -> Tensor:
    """y; in overlay storage h is changed, which nobody else reads."""
    if not _overlays(layer):
        return layer.ffn.project_down(h)
    selected = h[..., layer.neurons()]
    h[..., layer.neurons()] = 0
    y = layer.ffn.project_down(h)
    return y + (selected @ _rounded(layer, 2, selected.dtype)).to(y.dtype)


def _differentiate(
    layer: SubnetworkFFN, normed: Tensor, gate: Tensor, up: Tensor | None, grad_h: Tensor, grad_y: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """dL/dn, and the gradients of the three parts; gate and up are overwritten."""
    ffn = layer.ffn
    neurons = layer.neurons() if layer.held is not None else None
    selected = 0 if neurons is None else len(neurons)
    slots = layer.selections[layer.held].slots if selected else None
    hidden, grads = gated_activation_backward(grad_h, gate, up, ffn.activation, slots, selected)
    # gate and up now hold their gradients.
    overlays = _overlays(layer)
    grad_normed = None
    for part, values in enumerate((gate,) if up is None else (gate, up)):
        if overlays:
            values[..., neurons] = 0
        # One at a time, for a quantised weight is made anew.
        grad_normed = ffn.input_gradient("up" if part else "gate", values, grad_normed)
        if overlays:
            columns = grads[:, part * selected : (part + 1) * selected]
            grad_normed.view(-1, grad_normed.shape[-1]).addmm_(columns, _rounded(layer, part, columns.dtype))
    return grad_normed, _weight_gradients(layer, normed, hidden, grads, grad_y)


def _weight_gradients(layer: SubnetworkFFN, normed: Tensor, hidden: Tensor, grads: Tensor, grad_y: Tensor):
    """The gradients of gate rows, up rows and down columns, ``[K, D]`` each in the masters' dtype."""
    masters = layer.trained()
    if not any(master is not None and master.requires_grad for master in masters):
        return None, None, None
    selected, dtype = hidden.shape[1], masters[0].dtype
    rows = _product(grads, normed.reshape(-1, normed.shape[-1]), dtype)  # [2K, D], or [K, D] if ungated
    down_columns = _product(hidden, grad_y.reshape(-1, grad_y.shape[-1]), dtype)  # [K, D]
    return rows[:selected], rows[selected:] if layer.ffn.gated else None, down_columns


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left^T right for ``[T, K]`` and ``[T, D]``, accumulated and returned in the masters' dtype."""
    if left.dtype == right.dtype != dtype and device_type(left) == "cuda":
        return torch.mm(left.T, right, out_dtype=dtype)
    return left.to(dtype).T @ right.to(dtype)
