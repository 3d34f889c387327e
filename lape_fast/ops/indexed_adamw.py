"""AdamW for the selected rows of many weights at once: masters and moments in place, and rounded into the weights.

A part is what one weight trains: the gate rows, up rows or down columns of a layer's K neurons. Its master, gradient
and moments are ``[K, D]``; its weight is ``[F, D]``, and only the rows of its neurons are ever touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops.backend import EXTENSION_LOADED, LIBRARY, Backend, resolve_backend

LIBRARY.define(
    "indexed_adamw_(Tensor(a!)[] weights, Tensor[] neurons, Tensor[] grads, Tensor(b!)[] masters, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor? clip, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int step) -> ()"
)

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def reference(
    weights: Sequence[Tensor],  # [F, D], or [0] for none
    neurons: Sequence[Tensor],  # [K] int64
    grads: Sequence[Tensor],  # [K, D]
    masters: Sequence[Tensor],  # [K, D]
    exp_avgs: Sequence[Tensor],  # [K, D]
    exp_avg_sqs: Sequence[Tensor],  # [K, D]
    clip: Tensor | None,  # []
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Algorithm 2 of Loshchilov and Hutter 2017 in plain PyTorch, in the dtype of the masters."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    parts = zip(weights, neurons, grads, masters, exp_avgs, exp_avg_sqs, strict=True)
    for weight, chosen, grad, master, exp_avg, exp_avg_sq in parts:
        if clip is not None:
            grad = grad * clip
        master.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(eps)
        master.addcdiv_(exp_avg, denominator, value=-lr / correction1)
        if has_weight(weight):
            weight.index_copy_(0, chosen, master.to(weight.dtype))


def has_weight(weight: Tensor) -> bool:
    """Whether a part's weight is to be written: an empty vector stands for none."""
    return weight.dim() != 1 or weight.shape[0] != 0


def indexed_adamw_(
    weights: Sequence[Tensor],
    neurons: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    step: int,
    clip: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, in the order of torch.optim.AdamW) for every part, in place.

    Per entry: g = clip * grad; master *= 1 - lr * weight_decay; exp_avg and exp_avg_sq move to g and g * g;
    master -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps); and the weight's row of
    the neuron becomes the master, rounded to nearest. Gradients and all other rows stay as they are.

    Args:
        weights: per part ``[F, D]`` of any strides (columns are the rows of a transpose), bf16, fp16, fp32 or fp64; a
            vector of no elements where the part has no weight to write.
        neurons: per part int64 ``[K]``, sorted and unique.
        grads: per part ``[K, D]``, contiguous, fp32 (fp64 for an fp64 weight), like the next three.
        masters: per part ``[K, D]``, the values that are trained.
        exp_avgs: per part ``[K, D]``, the mean of the gradient.
        exp_avg_sqs: per part ``[K, D]``, the mean of its square.
        lr: learning rate.
        beta1: decay of exp_avg per step.
        beta2: decay of exp_avg_sq per step.
        eps: added to the denominator.
        weight_decay: share of the master taken off per step, in units of lr.
        step: how many steps the moments hold with this one, from 1.
        clip: a factor for all gradients, fp32 or fp64 with no dimension, on their device; None for 1.
        backend: overrides ``LAPE_FAST_BACKEND`` and the automatic choice.

    Raises:
        ShapeError: shapes, dtypes, devices or neurons do not fit together.
        BackendError: the backend cannot run here.

    Example:
        >>> down, neurons = torch.randn(8, 32), torch.tensor([3, 7])  # [D, F], [K]
        >>> master = down.T[neurons]
        >>> grad, exp_avg, exp_avg_sq = torch.randn(2, 8), torch.zeros(2, 8), torch.zeros(2, 8)
        >>> indexed_adamw_([down.T], [neurons], [grad], [master], [exp_avg], [exp_avg_sq], lr=1e-3, step=1)
    """
    if step < 1:
        raise ShapeError(f"step is {step}, but it counts from 1; pass the number of steps with this one.")
    lists = [list(tensors) for tensors in (weights, neurons, grads, masters, exp_avgs, exp_avg_sqs)]
    if len({len(tensors) for tensors in lists}) > 1:
        raise ShapeError(
            f"weights, neurons, grads, masters, exp_avgs and exp_avg_sqs have {[len(tensors) for tensors in lists]} "
            "tensors; pass one of each for every part."
        )
    if not masters:
        return
    device = masters[0].device
    _check_clip(clip, device)
    for part in zip(*lists, strict=True):
        _check_part(*part, device)
    _check_neurons(weights, neurons, device)
    chosen = resolve_backend(backend, device)
    arguments = (*lists, clip, float(lr), float(beta1), float(beta2), float(eps), float(weight_decay), step)
    if chosen == "reference":
        reference(*arguments)
    elif chosen == "triton" and device.type == "cpu":
        _triton(*arguments)
    else:
        torch.ops.lape_fast.indexed_adamw_(*arguments)


def _check_clip(clip: Tensor | None, device: torch.device) -> None:
    if clip is None:
        return
    if clip.dim() or clip.dtype not in (torch.float32, torch.float64) or clip.device != device:
        raise ShapeError(
            f"clip must be an fp32 or fp64 tensor of no dimensions on {device}, but it is {clip.dtype} "
            f"{list(clip.shape)} on {clip.device}; convert it with torch.as_tensor."
        )


def _check_part(
    weight: Tensor,
    chosen: Tensor,
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    device: torch.device,
) -> None:
    written = has_weight(weight)
    if weight.dtype not in WEIGHT_DTYPES or weight.device != device or (written and weight.dim() != 2):
        raise ShapeError(
            f"A weight must be floating point [F, D] on {device}, but one is {weight.dtype} {list(weight.shape)} on "
            f"{weight.device}; pass a vector of no elements for a weight that cannot be written."
        )
    if chosen.dtype != torch.int64 or chosen.dim() != 1 or chosen.device != device:
        raise ShapeError(
            f"neurons must be int64 [K] on {device}, but one is {chosen.dtype} {list(chosen.shape)} on "
            f"{chosen.device}; convert it with .to({str(device)!r}, torch.int64)."
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    fits = master.dtype == wide if written else master.dtype in (torch.float32, torch.float64)
    width = weight.shape[1] if written else master.shape[-1] if master.dim() else 0
    if not fits or master.shape != (len(chosen), width) or not master.is_contiguous() or master.device != device:
        raise ShapeError(
            f"A master must be contiguous {wide} [{len(chosen)}, {width}] on {device} for its {len(chosen)} neurons "
            f"and its {weight.dtype} weight, but one is {_described(master)}."
        )
    for name, values in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        alike = values.shape == master.shape and values.dtype == master.dtype and values.device == device
        if not alike or not values.is_contiguous():
            raise ShapeError(
                f"{name} must be contiguous and match its master, {_described(master)}, but it is "
                f"{_described(values)}; convert it or call .contiguous()."
            )


def _described(values: Tensor) -> str:
    return f"{values.dtype} {list(values.shape)} with strides {list(values.stride())} on {values.device}"


def _check_neurons(weights: Sequence[Tensor], neurons: Sequence[Tensor], device: torch.device) -> None:
    # On CUDA this would wait for the device; there the kernel leaves neurons outside the weight unwritten.
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    for weight, chosen in zip(weights, neurons, strict=True):
        if len(chosen) == 0:
            continue
        # Sorted, so that the ends are the range.
        low, high = chosen[0].item(), chosen[-1].item()
        inside = low >= 0 and (not has_weight(weight) or high < weight.shape[0])
        if not inside or (len(chosen) > 1 and not (chosen[1:] > chosen[:-1]).all()):
            raise ShapeError(
                f"neurons must increase strictly within the {weight.shape[0]} rows of their weight, but {len(chosen)} "
                f"of them run from {low} to {high}; pass torch.unique of indices that are in range."
            )


def _triton(
    weights: list[Tensor],
    neurons: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    clip: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    from lape_fast.kernels import indexed_adamw as kernel

    parts = list(zip(weights, neurons, grads, masters, exp_avgs, exp_avg_sqs, strict=True))
    kernel.launch(parts, clip, lr, beta1, beta2, eps, weight_decay, step)


def _fake(*arguments: object) -> None:
    return None


torch.library.register_fake("lape_fast::indexed_adamw_", _fake, lib=LIBRARY)
LIBRARY.impl("indexed_adamw_", _triton, "CUDA")
if not EXTENSION_LOADED:
    LIBRARY.impl("indexed_adamw_", reference, "CPU")
