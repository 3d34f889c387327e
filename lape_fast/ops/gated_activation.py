"""h = act(gate) * up, counting in the same pass how often each neuron fires for each language.

A neuron fires on a token where its gate is positive: for SiLU, GELU and ReLU that is where act(gate) is positive
(arXiv 2402.16438 counts act(gate) > 0). NaN never fires.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lape_fast.errors import ShapeError
from lape_fast.ops.backend import EXTENSION_LOADED, LIBRARY, Backend, resolve_backend

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

# The position in this tuple is the number that every backend knows the activation by.
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

LIBRARY.define(
    "gated_activation(Tensor gate, Tensor? up, int activation, Tensor? language_ids, Tensor(a!)? counts) -> Tensor"
)


def reference(
    gate: Tensor,  # [T, F]
    up: Tensor | None,  # [T, F]
    activation: int,
    language_ids: Tensor | None,  # [T] int32
    counts: Tensor | None,  # [G, F] int64
) -> Tensor:  # [T, F]
    """The formula in plain PyTorch: fp32 inside (fp64 for fp64), rounded once."""
    wide = widen(gate)
    h = apply_activation(wide, ACTIVATIONS[activation])
    if up is not None:
        h = h * widen(up)
    if counts is not None:
        counted = (language_ids >= 0) & (language_ids < counts.shape[0])
        counts.index_add_(0, language_ids[counted], (wide[counted] > 0).to(counts.dtype))
    return h.to(gate.dtype)


def apply_activation(gate: Tensor, activation: Activation) -> Tensor:
    """act(gate), elementwise."""
    match activation:
        case "silu":
            return F.silu(gate)
        case "gelu":
            return F.gelu(gate)
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh")
        case "relu":
            return F.relu(gate)


def widen(values: Tensor) -> Tensor:
    """The dtype to compute in: fp64 stays, everything else becomes fp32."""
    return values if values.dtype == torch.float64 else values.float()


def gated_activation(
    gate: Tensor,
    up: Tensor | None,
    activation: Activation,
    language_ids: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """h = act(gate) * up; with ``counts``, also counts[language, neuron] += (gate > 0), exactly.

    Args:
        gate: ``[..., F]`` floating point, contiguous in its last dimension or copied.
        up: the same shape and dtype; None for an ungated FFN, where h = act(gate).
        activation: one of ``ACTIVATIONS``.
        language_ids: int32 ``[...]``, the language of each token; -1 is not counted.
        counts: int64 ``[G, F]``, added to in place.
        backend: overrides ``LAPE_FAST_BACKEND`` and the automatic choice.

    Returns:
        h, ``[..., F]``, in the dtype of ``gate``. Differentiable once in ``gate`` and ``up``.

    Raises:
        ShapeError: shapes, dtypes or language ids do not fit together.
        BackendError: the backend cannot run here.

    Example:
        >>> counts = torch.zeros(2, 16, dtype=torch.int64)
        >>> language_ids = torch.tensor([0, 1, -1], dtype=torch.int32)
        >>> h = gated_activation(torch.randn(3, 16), torch.randn(3, 16), "silu", language_ids, counts)
    """
    number = activation_number(activation)
    _check(gate, up, language_ids, counts)
    chosen = resolve_backend(backend, gate.device)
    rows = as_rows(gate)
    arguments = (
        rows,
        None if up is None else as_rows(up),
        number,
        None if language_ids is None else language_ids.reshape(-1).contiguous(),
        counts,
    )
    return _run(chosen, arguments).view(gate.shape)


def activation_number(activation: str) -> int:
    """The number that the backends know an activation by.

    Raises:
        ShapeError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ShapeError(f"The activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS.index(activation)


def as_rows(values: Tensor) -> Tensor:
    """``[..., F]`` as ``[T, F]`` with unit stride in F; a view wherever the layout allows it."""
    # Not -1, which is ambiguous for F = 0.
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _run(backend: str, arguments: tuple) -> Tensor:
    if backend == "reference":
        return reference(*arguments)
    if backend == "triton" and arguments[0].device.type == "cpu":
        return _triton(*arguments)
    return torch.ops.lape_fast.gated_activation(*arguments)


def _check(gate: Tensor, up: Tensor | None, language_ids: Tensor | None, counts: Tensor | None) -> None:
    if gate.dim() == 0 or not gate.is_floating_point():
        raise ShapeError(
            f"gate must be a floating-point tensor [..., F], but it has shape {list(gate.shape)} and dtype "
            f"{gate.dtype}; pass the output of the gate projection."
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device):
        raise ShapeError(
            f"up must match gate ({list(gate.shape)}, {gate.dtype}, {gate.device}), but it is {list(up.shape)}, "
            f"{up.dtype}, {up.device}; pass the output of the up projection of the same tokens."
        )
    if (language_ids is None) != (counts is None):
        raise ShapeError("language_ids and counts belong together; pass both to count, or neither.")
    if counts is None:
        return
    if counts.dtype != torch.int64 or counts.dim() != 2 or counts.shape[1] != gate.shape[-1]:
        raise ShapeError(
            f"counts must be int64 [languages, {gate.shape[-1]}], but it is {counts.dtype} {list(counts.shape)}; "
            "allocate it with torch.zeros(languages, neurons, dtype=torch.int64)."
        )
    if not counts.is_contiguous() or counts.device != gate.device or language_ids.device != gate.device:
        raise ShapeError(
            f"counts and language_ids must be on {gate.device} with counts contiguous, but counts is on "
            f"{counts.device} and language_ids on {language_ids.device}; move or copy them first."
        )
    if language_ids.dtype != torch.int32 or language_ids.shape != gate.shape[:-1]:
        raise ShapeError(
            f"language_ids must be int32 {list(gate.shape[:-1])}, one per token, but it is {language_ids.dtype} "
            f"{list(language_ids.shape)}; convert it with .to(torch.int32)."
        )
    # On CUDA this would wait for the device; there the kernel leaves ids outside the range uncounted.
    if language_ids.device.type == "cpu" and language_ids.numel() and not torch.compiler.is_compiling():
        low, high = int(language_ids.min()), int(language_ids.max())
        if low < -1 or high >= counts.shape[0]:
            raise ShapeError(
                f"language_ids run from {low} to {high}, but counts has {counts.shape[0]} languages; ids must be -1 "
                f"(not counted) or 0 to {counts.shape[0] - 1}."
            )


def _triton(
    gate: Tensor, up: Tensor | None, activation: int, language_ids: Tensor | None, counts: Tensor | None
) -> Tensor:
    from lape_fast.kernels import gated_activation as kernel

    return kernel.launch(gate, up, activation, language_ids, counts)


def _fake(
    gate: Tensor, up: Tensor | None, activation: int, language_ids: Tensor | None, counts: Tensor | None
) -> Tensor:
    return gate.new_empty(gate.shape)


class _Differentiable(torch.autograd.Function):
    """The op above its device kernels. torch.library.register_autograd refuses ops that mutate an argument."""

    @staticmethod
    def forward(ctx, gate, up, activation, language_ids, counts):
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.lape_fast.gated_activation(gate, up, activation, language_ids, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        gate, up = ctx.saved_tensors
        grad_gate = gate.clone(memory_format=torch.contiguous_format)
        grad_up = None if up is None else up.clone(memory_format=torch.contiguous_format)
        torch.ops.lape_fast.gated_activation_backward(grad_h.contiguous(), grad_gate, grad_up, ctx.activation, None, 0)
        return grad_gate, grad_up, None, None, None


torch.library.register_fake("lape_fast::gated_activation", _fake, lib=LIBRARY)
LIBRARY.impl("gated_activation", _Differentiable.apply, "Autograd")
LIBRARY.impl("gated_activation", _triton, "CUDA")
if not EXTENSION_LOADED:
    LIBRARY.impl("gated_activation", reference, "CPU")
