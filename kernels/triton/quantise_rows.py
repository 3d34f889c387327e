"""Rows in float8_e4m3fn, each by its largest value: a program per row, which reads it twice.

A row is a few dozen KB, so that the second reading is answered by the multiprocessor's own cache: as much memory
traffic as one pass, without registers for a whole row or a limit to its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
# A thread reads 16 bytes at a time of 16-bit values, twice in flight.
TILE_COLUMNS = 2048


def launch(
    x: Tensor,  # [T, M], unit stride in M
    column_scales: Tensor | None,  # [M] fp32
) -> tuple[Tensor, Tensor]:  # [T, M] fp8, [T, 1] fp32
    """Runs the kernel, on GPUs that have float8_e4m3fn."""
    from lape_fast.ops.quantise_rows import DTYPE, LARGEST, SMALLEST

    rows, columns = x.shape
    q = x.new_empty(x.shape, dtype=DTYPE)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            quantise_rows_kernel[(rows,)](
                q,
                scales,
                x,
                column_scales,
                columns,
                x.stride(0),
                LARGEST=LARGEST,
                SMALLEST=SMALLEST,
                TILE_COLUMNS=TILE_COLUMNS,
                num_warps=NUM_WARPS,
            )
    return q, scales


@triton.jit
def quantise_rows_kernel(
    q,  # [T, M]
    scales,  # [T]
    x,  # [T, M]
    column_scales,  # [M] or None
    columns,
    stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([TILE_COLUMNS], SMALLEST, tl.float32)
    for first in range(0, columns, TILE_COLUMNS):
        values = _load(x + row * stride, column_scales, first + tl.arange(0, TILE_COLUMNS), columns)
        largest = tl.maximum(largest, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
    row_largest = tl.reduce(largest, 0, _larger)
    tl.store(scales + row, tl.div_rn(row_largest, LARGEST))
    # One exact division a row; the values are multiplied.
    factor = tl.div_rn(tl.full([], LARGEST, tl.float32), row_largest)
    for first in range(0, columns, TILE_COLUMNS):
        tile = first + tl.arange(0, TILE_COLUMNS)
        values = _load(x + row * stride, column_scales, tile, columns)
        tl.store(q + row * columns + tile, (values * factor).to(q.dtype.element_ty), mask=tile < columns)


@triton.jit
def _load(x, column_scales, tile, columns):
    values = tl.load(x + tile, mask=tile < columns, other=0).to(tl.float32)
    if column_scales is not None:
        values *= tl.load(column_scales + tile, mask=tile < columns, other=0)
    return values


@triton.jit
def _larger(left, right):
    # tl.max would drop NaN.
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
