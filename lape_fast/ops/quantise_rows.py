"""Rows in 8 bits: q = x / scale in float8_e4m3fn, with the scale of each row that makes its largest value 448.

What an fp8 product wants of the activations that it is given, anew in every product. The CPU has no kernel of its own:
there a product in fp8 takes many times as long as its operands' rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops.backend import LIBRARY, Backend, resolve_backend
from lape_fast.ops.gated_activation import as_rows

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max  # 448

# The least that a row's largest value is taken for: rows of zeros are divided by something, and no scale is subnormal.
SMALLEST = 2.0**-100

LIBRARY.define("quantise_rows(Tensor x, Tensor? column_scales) -> (Tensor, Tensor)")


def reference(
    x: Tensor,  # [T, M]
    column_scales: Tensor | None,  # [M] fp32
) -> tuple[Tensor, Tensor]:  # [T, M] fp8, [T, 1] fp32
    """The formula in plain PyTorch, in fp32."""
    wide = x.float()
    if column_scales is not None:
        wide = wide * column_scales
    largest = torch.clamp(wide.abs().amax(1, keepdim=True), min=SMALLEST)
    return (wide * (LARGEST / largest)).to(DTYPE), largest / LARGEST


def quantise_rows(
    x: Tensor, column_scales: Tensor | None = None, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds rows to float8_e4m3fn, each by a scale of its own: q * scale is about x, or x * column_scales.

    A row with a NaN or an infinity in it comes back as one whose products are NaN; no value is clipped.

    Args:
        x: ``[..., M]`` floating point, M > 0.
        column_scales: fp32 ``[M]``, multiplied in before anything is rounded.
        backend: overrides ``LAPE_FAST_BACKEND`` and the automatic choice.

    Returns:
        q in float8_e4m3fn ``[T, M]``, contiguous, and the scales in fp32 ``[T, 1]``. Not differentiable.

    Raises:
        ShapeError: x is no floating-point matrix, or the column scales do not fit it.
        BackendError: the backend cannot run here.

    Example:
        >>> q, scale = quantise_rows(torch.randn(3, 16))
        >>> approximate = q.float() * scale
    """
    if x.dim() == 0 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ShapeError(
            f"x must be a floating-point tensor [..., M] with M > 0, but it has shape {list(x.shape)} and dtype "
            f"{x.dtype}; pass the input of a projection."
        )
    if column_scales is not None and (column_scales.shape != x.shape[-1:] or column_scales.dtype != torch.float32):
        raise ShapeError(
            f"column_scales must be float32 [{x.shape[-1]}], one per column of x, but it is {column_scales.dtype} "
            f"{list(column_scales.shape)}; pass one scale for each column."
        )
    arguments = as_rows(x.detach()), column_scales
    chosen = resolve_backend(backend, x.device)
    if chosen == "reference":
        return reference(*arguments)
    if chosen == "triton" and x.device.type == "cpu":
        return _triton(*arguments)
    return torch.ops.lape_fast.quantise_rows(*arguments)


def _triton(x: Tensor, column_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    from lape_fast.kernels import quantise_rows as kernel

    return kernel.launch(x, column_scales)


def _fake(x: Tensor, column_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=DTYPE), x.new_empty((len(x), 1), dtype=torch.float32)


torch.library.register_fake("lape_fast::quantise_rows", _fake, lib=LIBRARY)
LIBRARY.impl("quantise_rows", _triton, "CUDA")
LIBRARY.impl("quantise_rows", reference, "CPU")
