"""h = act(gate) * up, counting per language how often each gate is positive, in one pass over gate and up.

A program owns a tile of rows and columns. It walks down the rows with one integer counter per column in registers and
adds them to the counts when the language changes and at the end of the tile. Neighbouring tokens are nearly always of
one language, so that is about one atomic addition per column and tile; a kernel with a program per row, as is usual
for an elementwise op, would need one per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lape_fast.kernels.activations import activate, widen

NUM_WARPS = 4
# Each warp reads 512 contiguous bytes of one row at a time, 16 a thread.
SEGMENT_BYTES = 512
STEP_ROWS = NUM_WARPS
# Tall tiles add to the counts less often; short ones keep every multiprocessor busy on a small input.
TALL_TILE_ROWS, SHORT_TILE_ROWS = 128, 32
TALL_FROM_ELEMENTS = 2**26


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
    tile_rows = TALL_TILE_ROWS if h.numel() >= TALL_FROM_ELEMENTS else SHORT_TILE_ROWS
    tile_columns = SEGMENT_BYTES // gate.element_size()
    programs = triton.cdiv(tokens, tile_rows) * triton.cdiv(neurons, tile_columns)
    with torch.cuda.device_of(gate):
        gated_activation_kernel[(programs,)](
            h,
            gate,
            up,
            language_ids,
            counts,
            tokens,
            neurons,
            0 if counts is None else counts.shape[0],
            gate.stride(0),
            0 if up is None else up.stride(0),
            ACTIVATION=activation,
            TILE_ROWS=tile_rows,
            STEP_ROWS=STEP_ROWS,
            TILE_COLUMNS=tile_columns,
            num_warps=NUM_WARPS,
        )
    return h


@triton.jit(do_not_specialize=["tokens", "languages"])
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
    ACTIVATION: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(neurons, TILE_COLUMNS)
    first_row = (tl.program_id(0) // column_tiles) * TILE_ROWS
    end_row = tl.minimum(first_row + TILE_ROWS, tokens)
    columns = (tl.program_id(0) % column_tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    steps = tl.arange(0, STEP_ROWS)
    if counts is not None:
        # G stands for no language.
        language = languages
        counters = tl.zeros([STEP_ROWS, TILE_COLUMNS], tl.int32)

    # The next step's rows are loaded before this step's are used: otherwise the compiler waits for gate before it
    # even asks for up, and half of the memory's latency is exposed.
    next_gate = _load_rows(gate, gate_stride, first_row + steps, end_row, columns, neurons)
    if up is not None:
        next_up = _load_rows(up, up_stride, first_row + steps, end_row, columns, neurons)
    for row in range(first_row, end_row, STEP_ROWS):
        rows = row + steps
        wide_gate = widen(next_gate)
        next_gate = _load_rows(gate, gate_stride, rows + STEP_ROWS, end_row, columns, neurons)
        product = activate(wide_gate, ACTIVATION)
        if up is not None:
            product *= widen(next_up)
            next_up = _load_rows(up, up_stride, rows + STEP_ROWS, end_row, columns, neurons)

        if counts is not None:
            ids = tl.load(language_ids + rows, mask=rows < end_row, other=-1)

        address = h + rows.to(tl.int64)[:, None] * neurons + columns[None, :]
        inside = (rows < end_row)[:, None] & (columns < neurons)[None, :]
        tl.store(address, product.to(h.dtype.element_ty), mask=inside)

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
def _load_rows(values, stride, rows, end_row, columns, neurons):
    inside = (rows < end_row)[:, None] & (columns < neurons)[None, :]
    return tl.load(values + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0)


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
