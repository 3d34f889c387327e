"""The backward of h = act(gate) * up: in place over gate and up, with the selected columns stored compactly.

A program owns a tile of rows and columns and walks down the rows. The slots of its columns are read once. A tile with
no selected column is plain elementwise work; in the others a masked store scatters values that are in registers
already, so the selected columns cost no second pass over memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lape_fast.kernels.activations import activate_with_slope, widen

NUM_WARPS = 4
# Half a warp reads 256 contiguous bytes of one row at a time, 16 a thread: tiles half as wide as those of the forward
# kernel, so that fewer of them hold a selected column.
SEGMENT_BYTES = 256
STEP_ROWS = 2 * NUM_WARPS
TILE_ROWS = 64


def launch(
    grad_h: Tensor,  # [T, F], unit stride in F
    gate: Tensor,  # [T, F], unit stride in F, becomes dL/dgate
    up: Tensor | None,  # [T, F], unit stride in F, becomes dL/dup
    activation: int,
    slots: Tensor | None,  # [F] int32
    selected: int,
) -> tuple[Tensor, Tensor]:  # [T, K], [T, 2K] or [T, K]
    """Runs the kernel. Each slot 0 to K - 1 must be in ``slots`` once."""
    tokens, neurons = gate.shape
    hidden = gate.new_empty(tokens, selected)
    grads = gate.new_empty(tokens, selected if up is None else 2 * selected)
    if gate.numel() == 0:
        return hidden, grads
    selecting = slots is not None and selected > 0
    tile_columns = SEGMENT_BYTES // gate.element_size()
    programs = triton.cdiv(tokens, TILE_ROWS) * triton.cdiv(neurons, tile_columns)
    with torch.cuda.device_of(gate):
        gated_activation_backward_kernel[(programs,)](
            grad_h,
            gate,
            up,
            slots if selecting else None,
            hidden if selecting else None,
            grads if selecting else None,
            tokens,
            neurons,
            selected,
            grad_h.stride(0),
            gate.stride(0),
            0 if up is None else up.stride(0),
            ACTIVATION=activation,
            TILE_ROWS=TILE_ROWS,
            STEP_ROWS=STEP_ROWS,
            TILE_COLUMNS=tile_columns,
            num_warps=NUM_WARPS,
        )
    return hidden, grads


@triton.jit(do_not_specialize=["tokens", "selected"])
def gated_activation_backward_kernel(
    grad_h,  # [T, F]
    gate,  # [T, F]
    up,  # [T, F] or None
    slots,  # [F] or None
    hidden,  # [T, K] or None
    grads,  # [T, 2K], [T, K] or None
    tokens,
    neurons,
    selected,
    grad_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(neurons, TILE_COLUMNS)
    first_row = (tl.program_id(0) // column_tiles) * TILE_ROWS
    end_row = tl.minimum(first_row + TILE_ROWS, tokens)
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    if slots is not None:
        slot = tl.load(slots + columns, mask=columns < neurons, other=-1)
        # A slot beyond the outputs must not write outside them.
        slot = tl.where(slot < selected, slot, -1)
        any_selected = tl.max(slot, axis=0) >= 0
        # 64 bits to the tile and 32 inside it: a 64-bit offset per element would double the registers.
        tile_hidden = hidden + first_row.to(tl.int64) * selected
        tile_grads = grads + first_row.to(tl.int64) * selected * (1 if up is None else 2)

    for row in range(first_row, end_row, STEP_ROWS):
        rows = row + tl.arange(0, STEP_ROWS)
        wide_rows = rows.to(tl.int64)[:, None]
        inside = (rows < end_row)[:, None] & (columns < neurons)[None, :]
        grad_address = grad_h + wide_rows * grad_stride + columns[None, :]
        gate_address = gate + wide_rows * gate_stride + columns[None, :]
        wide_grad = widen(tl.load(grad_address, mask=inside, other=0))
        activated, slope = activate_with_slope(widen(tl.load(gate_address, mask=inside, other=0)), ACTIVATION)
        if up is not None:
            up_address = up + wide_rows * up_stride + columns[None, :]
            wide_up = widen(tl.load(up_address, mask=inside, other=0))
            product = activated * wide_up
            grad_gate = (wide_grad * wide_up * slope).to(gate.dtype.element_ty)
            grad_up = (wide_grad * activated).to(up.dtype.element_ty)
            tl.store(up_address, grad_up, mask=inside)
        else:
            product = activated
            grad_gate = (wide_grad * slope).to(gate.dtype.element_ty)
        tl.store(gate_address, grad_gate, mask=inside)

        if slots is not None and any_selected:
            kept = (rows < end_row)[:, None] & (slot >= 0)[None, :]
            skipped_rows = (rows - first_row)[:, None]
            target = skipped_rows * selected + slot[None, :]
            tl.store(tile_hidden + target, product.to(hidden.dtype.element_ty), mask=kept)
            if up is not None:
                # A row of grads holds dgate and dup side by side.
                target += skipped_rows * selected
                tl.store(tile_grads + target + selected, grad_up, mask=kept)
            tl.store(tile_grads + target, grad_gate, mask=kept)
