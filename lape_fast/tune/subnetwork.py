"""The subnetwork FFN: a feed-forward block that trains k of its F neurons, with exact gradients for those only.

A neuron's weights are its row of the gate projection, its row of the up projection and its column of the down
projection. The base weight itself holds the current values (resident mode), so the forward pass costs nothing extra
and there is nothing to merge; the small parameters are masters in fp32, rounded into the base after each optimizer
step. The k original values are kept, so switching the subnetwork off and on is a copy of k rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lape_fast.errors import ConfigError, TrainingError
from lape_fast.models import FFN, check_neurons, dense_ffns, model_identity
from lape_fast.ops import gated_activation, gated_activation_backward, slot_map

# What a subnetwork FFN keeps for its backward pass: `save` its input, gate and up; `recompute` its input alone, and
# the two projections are computed a second time.
Policy = Literal["save", "recompute"]

PARTS = ("gate_rows", "up_rows", "down_columns")

# Every subnetwork FFN that is in a model, for the optimizer hook at the end of this file.
_ATTACHED: weakref.WeakSet[SubnetworkFFN] = weakref.WeakSet()


class SubnetworkFFN(nn.Module):
    """One feed-forward block with k trained neurons (k may be 0: then it only passes gradients through).

    Args:
        ffn: the block, in its model.
        neurons: int64 ``[K]``, sorted and unique.
        policy: what is kept for backward.
    """

    def __init__(self, ffn: FFN, neurons: Tensor, policy: Policy):
        super().__init__()
        self.ffn = ffn
        self.policy = policy
        # The projections stay submodules, so that .to(), .train() and state dicts still reach the base weights.
        self.projections = nn.ModuleDict(ffn.projections)
        # Whether the base holds the trained values, and how often they were written.
        self.active, self.writes = True, 0
        device = ffn.gate_weight.device
        neurons = neurons.to(device=device, dtype=torch.int64)
        self.register_buffer("neurons", neurons, persistent=False)
        self.register_buffer("slots", slot_map(neurons, ffn.neurons), persistent=False)
        originals = {part: self._read(part) for part in self.parts}
        for part, values in originals.items():
            self.register_buffer(f"original_{part}", values, persistent=False)
            # A copy even where the dtype is the same: the original must not move with the master.
            master = values.to(master_dtype(values.dtype), copy=True)
            self.register_parameter(part, nn.Parameter(master) if len(neurons) else None)
        _ATTACHED.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A deep copy is made without __init__, and its optimizer must find it too.
        super().__setstate__(state)
        _ATTACHED.add(self)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the trained parameters; an ungated FFN has no up rows."""
        return PARTS if self.ffn.gated else (PARTS[0], PARTS[2])

    def extra_repr(self) -> str:
        return f"layer={self.ffn.layer}, neurons={len(self.neurons)} of {self.ffn.neurons}, policy={self.policy}"

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        # Unpacked so that autograd sees the parameters; an absent one is None.
        masters = [getattr(self, part, None) for part in PARTS]
        return _SubnetworkFunction.apply(x, *masters, self)

    def synchronize(self) -> None:
        """Rounds the masters into the base weight; every torch optimizer's step does this by itself."""
        if self.active:
            self.write(self.masters())

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        """Writes ``[K, D]`` values into the base weight's rows and columns, rounded to its dtype."""
        for part, rows in values.items():
            weight = self._weight(part)
            # .data: the base is frozen, and a graph that must not see this write is caught by counting writes.
            weight.data.index_copy_(0, self.neurons, rows.detach().to(weight.dtype))
        self.writes += 1

    def originals(self) -> dict[str, Tensor]:
        """The ``[K, D]`` values that the base had before training, in its dtype."""
        return {part: getattr(self, f"original_{part}") for part in self.parts}

    def masters(self) -> dict[str, Tensor]:
        """The ``[K, D]`` trained values; empty where the layer has no neurons."""
        return {part: getattr(self, part) for part in self.parts if getattr(self, part) is not None}

    def _read(self, part: str) -> Tensor:
        return self._weight(part).detach()[self.neurons].clone()

    def _weight(self, part: str) -> Tensor:
        # [F, D] for all three: a column of the down projection is a row of its transpose.
        weights = {
            "gate_rows": self.ffn.gate_weight,
            "up_rows": self.ffn.up_weight,
            "down_columns": self.ffn.down_weight.T,
        }
        return weights[part]


class Subnetwork:
    """The subnetwork of a whole model, attached by ``attach_subnetwork``.

    Attributes:
        layers: its FFNs, from the lowest trained layer up.
        base: the identity of the model it is attached to.
    """

    def __init__(self, layers: Sequence[SubnetworkFFN], base: dict[str, Any]):
        self.layers = list(layers)
        self.base = base

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: fp32 masters of ``[K, D]`` per layer and part."""
        return [parameter for layer in self.layers for parameter in layer.masters().values()]

    def trainable(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def synchronize(self) -> None:
        """Makes the base weights hold the trained values, after masters were changed by anything but an optimizer."""
        for layer in self.layers:
            layer.synchronize()

    def detach(self, *, keep: bool) -> None:
        """Gives the model its own modules back, with the trained values in its weights or the original ones."""
        for layer in self.layers:
            layer.write(layer.masters() if keep else layer.originals())
            layer.active = False
            layer.ffn.restore()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model computes with its original weights, bit for bit."""
        for layer in self.layers:
            layer.active = False
            layer.write(layer.originals())
        try:
            yield
        finally:
            for layer in self.layers:
                layer.active = True
                layer.synchronize()

    def neurons(self) -> dict[int, Tensor]:
        """The neurons per layer, on the CPU, where there are any."""
        return {layer.ffn.layer: layer.neurons.cpu() for layer in self.layers if len(layer.neurons)}

    def fingerprint(self) -> str:
        """SHA-256 over the original values that the subnetwork replaces, to know the base again."""
        digest = hashlib.sha256()
        for layer in self.layers:
            for part, values in layer.originals().items():
                digest.update(f"{layer.ffn.layer}.{part}{list(values.shape)}{values.dtype}".encode())
                digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def attach_subnetwork(model: nn.Module, neurons: Sequence[Tensor], policy: Policy = "save") -> Subnetwork:
    """Freezes the model and replaces its FFNs, from the lowest trained layer up, by subnetwork FFNs.

    Layers below the lowest trained one are left as they are: nothing in them needs a gradient, so autograd never
    enters them. Layers above it that have no neurons are replaced too, since they then save less for backward.

    Args:
        model: a causal language model of a known architecture.
        neurons: one sorted index tensor per layer.
        policy: what is kept for backward, ``save`` or ``recompute``.

    Raises:
        ArchitectureError: the number of layers or a neuron index does not fit the model, or it is a mixture of experts.
        ConfigError: the policy is unknown.
        TrainingError: no layer has a neuron.

    Example:
        >>> subnetwork = attach_subnetwork(model, neurons["mlt_Latn"])
        >>> optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-4)
    """
    if policy not in get_args(Policy):
        raise ConfigError(f"The policy {policy!r} is unknown; choose one of {', '.join(get_args(Policy))}.")
    ffns = dense_ffns(model)
    check_neurons(ffns, neurons)
    trained = [layer for layer, chosen in enumerate(neurons) if len(chosen)]
    if not trained:
        raise TrainingError("No layer has a neuron to train; select neurons with a higher top_rate.")
    base = model_identity(model)
    model.requires_grad_(False)
    layers = []
    for ffn, chosen in zip(ffns[trained[0] :], neurons[trained[0] :], strict=True):
        layer = SubnetworkFFN(ffn, chosen, policy)
        ffn.replace(layer)
        layers.append(layer)
    return Subnetwork(layers, base)


def master_dtype(base: torch.dtype) -> torch.dtype:
    """fp32, in which small updates are not rounded away; fp64 for an fp64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


class _SubnetworkFunction(torch.autograd.Function):
    """y = W_down (act(W_gate x) * W_up x), with gradients for x and for the selected rows and columns only."""

    @staticmethod
    def forward(ctx, x, gate_rows, up_rows, down_columns, layer: SubnetworkFFN):
        ffn = layer.ffn
        gate, up = ffn.project(x)
        y = ffn.project_down(gated_activation(gate, up, ffn.activation))
        ctx.layer, ctx.writes, ctx.spent = layer, layer.writes, False
        # In the lowest trained layer x needs no gradient, and k columns are all that backward reads.
        if not ctx.needs_input_grad[0]:
            kept = tuple(None if values is None else values[..., layer.neurons] for values in (gate, up))
        else:
            kept = (gate, up) if layer.policy == "save" else (None, None)
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        layer: SubnetworkFFN = ctx.layer
        if ctx.spent:
            raise TrainingError(
                f"The backward pass of layer {layer.ffn.layer} ran twice over values that it overwrites in place; use "
                "policy='recompute' if you need retain_graph=True."
            )
        if ctx.writes != layer.writes:
            raise TrainingError(
                f"The weights of layer {layer.ffn.layer} were changed between its forward and its backward pass; call "
                "backward() before the optimizer's step or a switch of the subnetwork."
            )
        x, gate, up = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return _backward_lowest(layer, x, gate, up, grad_y)
        if gate is None:
            gate, up = layer.ffn.project(x)
        else:
            ctx.spent = True
        return _backward_through(layer, x, gate, up, grad_y)


def _backward_through(layer: SubnetworkFFN, x: Tensor, gate: Tensor, up: Tensor | None, grad_y: Tensor):
    ffn, selected = layer.ffn, len(layer.neurons)
    grad_h = grad_y @ ffn.down_weight
    slots = layer.slots if selected else None
    hidden, grads = gated_activation_backward(grad_h, gate, up, ffn.activation, slots, selected)
    # gate and up now hold their gradients.
    grad_x = gate @ ffn.gate_weight
    if up is not None:
        width = grad_x.shape[-1]
        grad_x.view(-1, width).addmm_(up.reshape(-1, up.shape[-1]), ffn.up_weight)
    return grad_x, *_weight_gradients(layer, x, hidden, grads, grad_y), None


def _backward_lowest(layer: SubnetworkFFN, x: Tensor, gate: Tensor, up: Tensor | None, grad_y: Tensor):
    """Only the k columns are needed where x has no gradient; ``gate`` and ``up`` hold just those."""
    ffn, selected = layer.ffn, len(layer.neurons)
    grad_h = grad_y @ ffn.down_weight[:, layer.neurons]
    every = torch.arange(selected, dtype=torch.int32, device=x.device)
    # Copies, for they are small: what is kept stays valid for a second backward pass.
    gate, up = gate.clone(), None if up is None else up.clone()
    hidden, grads = gated_activation_backward(grad_h, gate, up, ffn.activation, every, selected)
    return None, *_weight_gradients(layer, x, hidden, grads, grad_y), None


def _weight_gradients(layer: SubnetworkFFN, x: Tensor, hidden: Tensor, grads: Tensor, grad_y: Tensor):
    """The gradients of gate rows, up rows and down columns, ``[K, D]`` each in the masters' dtype."""
    selected = len(layer.neurons)
    if not selected:
        return None, None, None
    rows = _product(grads, x.reshape(-1, x.shape[-1]))  # [2K, D], or [K, D] if ungated
    down_columns = _product(hidden, grad_y.reshape(-1, grad_y.shape[-1]))  # [K, D]
    up_rows = rows[selected:] if layer.ffn.gated else None
    return rows[:selected], up_rows, down_columns


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right for ``[T, K]`` and ``[T, D]``, accumulated and returned in the masters' dtype."""
    wide = master_dtype(left.dtype)
    if left.dtype == wide:
        return left.T @ right
    if left.device.type == "cuda":
        return torch.mm(left.T, right, out_dtype=wide)
    return left.to(wide).T @ right.to(wide)


def _write_after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Brings what an optimizer did to masters into the base weights. Fused optimizers leave no other trace of it."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_ATTACHED):
        if any(id(master) in stepped for master in layer.masters().values()):
            layer.synchronize()


register_optimizer_step_post_hook(_write_after_step)
