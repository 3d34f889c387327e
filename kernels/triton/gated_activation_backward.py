"""The backward of h = act(gate) * up: in place over gate and up, with the selected columns stored compactly.

A program owns a tile of rows and columns and walks down the rows. The slots of its columns are read once. A tile with
no selected column is plain elementwise work; in the others a masked store scatters values that are in registers
already, so the selected columns cost no second pass over memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lape_fast.kernels.activations import activate_with_slope, widen
from lape_fast.kernels.launching import Configuration, launch_tiles

# Tiles half as wide as the forward kernel's, so that fewer of them hold a selected column.
CONFIGURATIONS = (
    Configuration(rows_per_warp=2, warps=4),
    Configuration(rows_per_warp=1, warps=4),
    Configuration(rows_per_warp=4, warps=4),
)


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
    arguments = {
        "grad_h": grad_h,
        "gate": gate,
        "up": up,
        "slots": slots if selecting else None,
        "hidden": hidden if selecting else None,
        "grads": grads if selecting else None,
        "selected": selected,
        "grad_stride": grad_h.stride(0),
        "gate_stride": gate.stride(0),
        "up_stride": 0 if up is None else up.stride(0),
        "ACTIVATION": activation,
    }
    launch_tiles(gated_activation_backward_kernel, CONFIGURATIONS, ("gate", "up"), arguments)
    return hidden, grads


@triton.jit(do_not_specialize=["tokens", "selected", "tile_rows"])
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
    tile_rows,
    ACTIVATION: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(neurons, TILE_COLUMNS)
    first_row = (tl.program_id(0) // column_tiles) * tile_rows
    end_row = tl.minimum(first_row + tile_rows, tokens)
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    steps = tl.arange(0, STEP_ROWS)
    if slots is not None:
        slot = tl.load(slots + columns, mask=columns < neurons, other=-1)
        # A slot beyond the outputs must not write outside them.
        slot = tl.where(slot < selected, slot, -1)
        any_selected = tl.max(slot, axis=0) >= 0
        # 64 bits to the tile and 32 inside it: a 64-bit offset per element would double the registers.
        tile_hidden = hidden + first_row.to(tl.int64) * selected
        tile_grads = grads + first_row.to(tl.int64) * selected * (1 if up is None else 2)

    # 64 bits, because T x F passes 2^31. Later rows are reached by addition, which takes fewer instructions.
    wide_rows = (first_row + steps).to(tl.int64)[:, None]
    grad_rows = grad_h + wide_rows * grad_stride
    gate_rows = gate + wide_rows * gate_stride
    if up is not None:
        up_rows = up + wide_rows * up_stride
    for row in range(first_row, end_row, STEP_ROWS):
        rows = row + steps
        inside = (rows < end_row)[:, None] & (columns < neurons)[None, :]
        gate_address = gate_rows + columns[None, :]
        # All loads come before all work: one at a time, each would wait for the memory.
        grad_values = tl.load(grad_rows + columns[None, :], mask=inside, other=0)
        gate_values = tl.load(gate_address, mask=inside, other=0)
        grad_rows += tl.cast(grad_stride, tl.int64) * STEP_ROWS
        gate_rows += tl.cast(gate_stride, tl.int64) * STEP_ROWS
        if up is not None:
            up_address = up_rows + columns[None, :]
            up_values = tl.load(up_address, mask=inside, other=0)
            up_rows += tl.cast(up_stride, tl.int64) * STEP_ROWS

        wide_grad = widen(grad_values)
        activated, slope = activate_with_slope(widen(gate_values), ACTIVATION)
        if up is not None:
            wide_up = widen(up_values)
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
