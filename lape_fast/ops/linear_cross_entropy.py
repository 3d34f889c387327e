"""The cross entropy of a frozen linear head without ever holding its ``[T, V]`` logits.

A few rows at a time: their logits, the loss, and in the place of the logits their gradient softmax(z) - onehot(label),
which the head turns into the hidden states' gradient. The head is frozen, so nothing has to wait for backward: that
only scales what forward has found. Forward and backward together are two products, 4 * T * D * V operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lape_fast.errors import ShapeError, TrainingError
from lape_fast.ops.gated_activation import as_rows, widen

# The label of a token that is not to be predicted, as everywhere in torch and transformers.
IGNORED = -100

# Rows whose logits are held at once. On the CPU in fp32, 256 rows have the longest median step at 32,000 to 131,072
# words, and 512 to 2,048 cannot be told apart on the busy machine that measured them (benchmarks/loss.py). Every chunk
# reads the whole head twice, which asks for many rows; memory asks for few.
CHUNK_ROWS = 1024


def reference(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    bias: Tensor | None = None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:  # []
    """The formula in plain PyTorch, as transformers computes it: logits in the model's dtype, their loss in fp32."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    total = F.cross_entropy(widen(logits), labels, ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items is None else num_items)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """The loss of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, a few rows of it at a time.

    Without gradients, as under ``no_grad``, only the loss is computed, which is half of the operations. In autocast
    the products are computed in its dtype. It never waits for the device.

    Args:
        hidden: ``[..., D]`` floating point.
        weight: ``[V, D]`` in the dtype of ``hidden``, and frozen.
        labels: int64 ``[...]``, what to predict from each row; -100 is ignored.
        bias: ``[V]``, frozen, or None.
        scale: of the logits (Cohere's ``logit_scale``).
        softcap: what no logit exceeds (Gemma 2's ``final_logit_softcapping``), or None.
        num_items: what divides the sum of the tokens' losses, in nats; None for the number of labelled tokens, 1 for
            the sum itself.

    Returns:
        The loss, 0-dimensional, fp64 for fp64 and else fp32; NaN if it is the mean over no token. Differentiable once
        in ``hidden``.

    Raises:
        ShapeError: shapes, dtypes, devices or labels do not fit together.
        TrainingError: the weight or the bias needs a gradient.

    Example:
        >>> hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([7, -100, 49])).backward()
    """
    _check(hidden, weight, labels, bias)
    labels = labels.reshape(-1)
    dtype = _autocast_dtype(hidden) or hidden.dtype
    hidden, weight, bias = (value if value is None else value.to(dtype) for value in (hidden, weight, bias))
    with_gradient = hidden.requires_grad and torch.is_grad_enabled()
    total = _SumOfLosses.apply(as_rows(hidden), weight, labels, bias, scale, softcap, with_gradient)
    if num_items is None:
        num_items = (labels != IGNORED).sum()
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class _SumOfLosses(torch.autograd.Function):
    """The sum of the tokens' losses; forward has formed the gradient of it, which is not divided so that fp16 holds it.

    Memory: ``CHUNK_ROWS`` rows of logits; with a softcap, or in bf16 and fp16, a copy of them in fp32; with both, two.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, scale, softcap, with_gradient):
        ignored = labels == IGNORED
        targets = labels.masked_fill(ignored, 0)[:, None]  # [T, 1]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        in_place = hidden.dtype == dtype and softcap is None
        # One buffer for all chunks, so that no two are ever alive.
        narrow_buffer = hidden.new_empty(min(CHUNK_ROWS, len(hidden)), len(weight))
        wide_buffer = narrow_buffer if in_place else torch.empty_like(narrow_buffer, dtype=dtype)
        losses = torch.empty_like(labels, dtype=dtype)
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, min(start + CHUNK_ROWS, len(hidden)))
            narrow, wide = narrow_buffer[: rows.stop - start], wide_buffer[: rows.stop - start]  # [C, V]
            _logits(hidden[rows], weight, bias, narrow)
            if scale != 1:
                narrow.mul_(scale)
            if softcap is not None:
                narrow.div_(softcap).tanh_()
                torch.mul(narrow, softcap, out=wide)
            elif not in_place:
                wide.copy_(narrow)
            losses[rows] = _to_softmax(wide, targets[rows])
            if not with_gradient:
                continue
            wide.scatter_add_(1, targets[rows], wide.new_full((len(wide), 1), -1.0))
            if softcap is not None:
                torch.ops.aten.tanh_backward(wide, narrow.to(dtype), grad_input=wide)
            if not in_place:
                narrow.copy_(wide)
            torch.mm(narrow, weight, out=gradient[rows])
        if with_gradient:
            ctx.save_for_backward(gradient, ignored)
            ctx.scale = scale
        return losses.masked_fill_(ignored, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        gradient, ignored = ctx.saved_tensors
        # Not zero times the upstream gradient, which is infinite where the loss is the mean over no token.
        return (gradient * (grad_total * ctx.scale)).masked_fill_(ignored[:, None], 0), *[None] * 6


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast computes products in, if it is on; it leaves fp64 alone."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _to_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Writes the softmax over the logits [C, V], and returns the loss of each row's target [C, 1]: [C]."""
    largest, target = logits.amax(1, keepdim=True), logits.gather(1, targets)
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.div_(sums)
    return (sums.log() + (largest - target)).squeeze(1)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0 or not hidden.is_floating_point():
        raise ShapeError(
            f"hidden must be a floating-point tensor [..., D], but it has shape {list(hidden.shape)} and dtype "
            f"{hidden.dtype}; pass what the model gives its head."
        )
    for name, value, shape in (("weight", weight, "[V, D]"), ("bias", bias, "[V]")):
        if value is None:
            continue
        fits = value.shape[1:] == hidden.shape[-1:] if name == "weight" else value.shape == weight.shape[:1]
        if not fits or value.device != hidden.device:
            raise ShapeError(
                f"The head's {name} must be {shape} on {hidden.device} for hidden {list(hidden.shape)} and the weight "
                f"{list(weight.shape)}, but it is {list(value.shape)} on {value.device}; pass the model's own head."
            )
        if value.dtype != hidden.dtype and _autocast_dtype(hidden) is None:
            raise ShapeError(
                f"hidden is {hidden.dtype} but the head's {name} is {value.dtype}; convert one of them or use autocast."
            )
        if value.requires_grad and torch.is_grad_enabled():
            raise TrainingError(
                f"The head's {name} needs a gradient, which linear_cross_entropy does not compute; freeze it with "
                "requires_grad_(False), or use torch.nn.functional.cross_entropy on the logits."
            )
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        raise ShapeError(
            f"labels must be int64 {list(hidden.shape[:-1])} on {hidden.device}, one per row, but they are "
            f"{labels.dtype} {list(labels.shape)} on {labels.device}; convert or move them first."
        )
    # On CUDA this would wait for the device; there the indexing itself stops at a label outside the range.
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        kept = labels.masked_fill(labels == IGNORED, 0)
        low, high = int(kept.min()), int(kept.max())
        if low < 0 or high >= len(weight):
            raise ShapeError(
                f"The labels run from {low} to {high}, but the head has {len(weight)} words; labels must be -100 "
                f"(ignored) or 0 to {len(weight) - 1}."
            )
