"""h = act(gate) * up, counting per language how often each gate is positive, in one pass over gate and up.

A program owns a tile of rows and columns. It walks down the rows with one integer counter per column in registers and
adds them to the counts when the language changes and at the end of the tile. Neighbouring tokens are nearly always of
one language, so that is about one atomic addition per column and tile; a kernel with a program per row, as is usual
for an elementwise op, would need one per element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lape_fast.kernels.activations import activate, widen
from lape_fast.kernels.launching import Configuration, launch_tiles

CONFIGURATIONS = (
    Configuration(rows_per_warp=1, warps=4),
    Configuration(rows_per_warp=1, warps=8),
    Configuration(rows_per_warp=2, warps=4),
)


def launch(
    gate: Tensor,  # [T, F], unit stride in F
    up: Tensor | None,  # [T, F], unit stride in F
    activation: int,
    language_ids: Tensor | None,  # [T] int32
    counts: Tensor | None,  # [G, F] int64
) -> Tensor:  # [T, F]
    """Runs the kernel. Language ids outside 0 to G - 1 are not counted."""
    tokens, neurons = gate.shape
    h = gate.new_empty(tokens, neurons)
    if h.numel() == 0:
        return h
    arguments = {
        "h": h,
        "gate": gate,
        "up": up,
        "language_ids": language_ids,
        "counts": counts,
        "languages": 0 if counts is None else counts.shape[0],
        "gate_stride": gate.stride(0),
        "up_stride": 0 if up is None else up.stride(0),
        "ACTIVATION": activation,
    }
    launch_tiles(gated_activation_kernel, CONFIGURATIONS, ("counts",), arguments)
    return h


@triton.jit(do_not_specialize=["tokens", "languages", "tile_rows"])
def gated_activation_kernel(
    h,  # [T, F]
    gate,  # [T, F]
    up,  # [T, F] or None
    language_ids,  # [T] or None
    counts,  # [G, F] or None
    tokens,
    neurons,
    languages,
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
    if counts is not None:
        # G stands for no language.
        language = languages
        counters = tl.zeros([STEP_ROWS, TILE_COLUMNS], tl.int32)

    # 64 bits, because T x F passes 2^31. Later rows are reached by addition, which takes fewer instructions.
    wide_rows = (first_row + steps).to(tl.int64)[:, None]
    gate_rows = gate + wide_rows * gate_stride
    h_rows = h + wide_rows * neurons
    if up is not None:
        up_rows = up + wide_rows * up_stride
    for row in range(first_row, end_row, STEP_ROWS):
        rows = row + steps
        inside = (rows < end_row)[:, None] & (columns < neurons)[None, :]
        # All loads come before all work: one at a time, each would wait for the memory.
        gate_values = tl.load(gate_rows + columns[None, :], mask=inside, other=0)
        gate_rows += tl.cast(gate_stride, tl.int64) * STEP_ROWS
        if up is not None:
            up_values = tl.load(up_rows + columns[None, :], mask=inside, other=0)
            up_rows += tl.cast(up_stride, tl.int64) * STEP_ROWS
        if counts is not None:
            ids = tl.load(language_ids + rows, mask=rows < end_row, other=-1)

        wide_gate = widen(gate_values)
        product = activate(wide_gate, ACTIVATION)
        if up is not None:
            product *= widen(up_values)
        tl.store(h_rows + columns[None, :], product.to(h.dtype.element_ty), mask=inside)
        h_rows += tl.cast(neurons, tl.int64) * STEP_ROWS

        if counts is not None:
            # The gate is compared in fp32: the interpreter compares bf16 as raw bits.
            fires = wide_gate > 0
            # Usually once round: the step is of one language, the one that is being counted.
            step_language = _next_language(ids, -1, languages)
            while step_language < languages:
                if step_language != language:
                    _add_to_counts(counts, counters, language, columns, neurons, languages)
                    counters = tl.zeros_like(counters)
                    language = step_language
                counters += (fires & (ids == language)[:, None]).to(tl.int32)
                step_language = _next_language(ids, language, languages)

    if counts is not None:
        _add_to_counts(counts, counters, language, columns, neurons, languages)


@triton.jit
def _next_language(ids, language, languages):
    """The smallest language in ids above ``language``; G or more where none is left to count."""
    return tl.min(tl.where(ids > language, ids, languages), axis=0)


@triton.jit
def _add_to_counts(counts, counters, language, columns, neurons, languages):
    """counts[language] += the column sums of counters, with one atomic addition per column."""
    if language < languages:
        total = tl.sum(counters, axis=0).to(tl.int64)
        address = counts + language.to(tl.int64) * neurons + columns
        tl.atomic_add(address, total, mask=columns < neurons, sem="relaxed")
