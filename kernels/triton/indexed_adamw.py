"""AdamW for the selected rows of many weights, all in one launch.

The parts of a model differ in their addresses and sizes, so the kernel finds its tensors by address in a table of one
line per part. A program owns up to 4 KiB of one master row. The tables are kept on the device as long as nothing in
them changes; a step then uploads nothing but its seven constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lape_fast.errors import BackendError

NUM_WARPS = 4
# What a program reads of each operand: 128 threads twice 16 bytes.
BLOCK_BYTES = 4096
# A line of the table, padded to one line of the cache.
LINE_NUMBERS = tl.constexpr(16)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}

# Of one part: weight, neurons, grad, master, exp_avg, exp_avg_sq.
Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def launch(
    parts: Sequence[Part],
    clip: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Runs the kernel, once for each dtype that the weights have. Neurons outside a weight are not written."""
    constants = (
        1 - lr * weight_decay,
        # Interpolation from the nearer end, which is exact at both.
        float(beta1 > 0.5),
        1 - beta1 if beta1 > 0.5 else -beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
    groups: dict[tuple[torch.dtype, torch.dtype], list[Part]] = {}
    for part in parts:
        weight, master = part[0], part[3]
        if master.numel():
            groups.setdefault((weight.dtype, master.dtype), []).append(part)
    for group in groups.values():
        _launch_group(group, clip, constants)


def _launch_group(parts: Sequence[Part], clip: Tensor | None, constants: tuple[float, ...]) -> None:
    weight, master = parts[0][0], parts[0][3]
    device = master.device
    if device.type == "cuda" and not isinstance(indexed_adamw_kernel, triton.JITFunction):
        raise BackendError(
            "Triton's interpreter cannot follow addresses on a GPU; unset TRITON_INTERPRET, or move the tensors to "
            "the CPU."
        )
    block = BLOCK_BYTES // master.element_size()
    shapes = tuple(tuple(part[3].shape) for part in parts)
    # A table that one stream uploads may not be there yet when another one reads it, so each stream has its own.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    programs = _part_of_programs(tuple(rows * triton.cdiv(width, block) for rows, width in shapes), device, stream)
    lines = _lines(parts, block)
    with torch.cuda.device_of(master):
        indexed_adamw_kernel[(len(programs),)](
            programs,
            _table(lines, device, stream),
            _upload(constants, master.dtype, device),
            clip,
            WEIGHT=_TYPES[weight.dtype],
            MASTER=_TYPES[master.dtype],
            ALIGNED=_aligned(parts),
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _lines(parts: Iterable[Part], block: int) -> tuple[int, ...]:
    """The numbers of the table: per part its addresses, strides and sizes, and its first program."""
    numbers: list[int] = []
    first_program = 0
    for weight, *others in parts:
        selected, width = others[1].shape
        written = weight.dim() == 2
        numbers += [weight.data_ptr() if written else 0, *(tensor.data_ptr() for tensor in others)]
        numbers += [*(weight.stride() if written else (0, 0)), weight.shape[0], others[0].stride(0), width]
        numbers += [first_program] + [0] * 4
        first_program += selected * triton.cdiv(width, block)
    return tuple(numbers)


def _aligned(parts: Iterable[Part]) -> bool:
    """Whether all rows start on multiples of 16 bytes (those of a weight if they are contiguous) and end on eights."""

    def row_aligned(values: Tensor, stride: int) -> bool:
        return (values.data_ptr() | stride * values.element_size()) % 16 == 0

    return all(
        (weight.dim() != 2 or weight.stride(1) != 1 or row_aligned(weight, weight.stride(0)))
        and operands[0].shape[1] % 8 == 0
        and all(row_aligned(values, values.shape[1]) for values in operands)
        for weight, _, *operands in parts
    )


@functools.lru_cache(maxsize=64)
def _part_of_programs(programs: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Which part each program works on, for so many programs per part."""
    numbers = torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32), torch.tensor(programs))
    return numbers.to(device)


@functools.lru_cache(maxsize=64)
def _table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _upload(numbers, torch.int64, device)


def _upload(numbers: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pinned memory the copy is queued like a kernel, and the host does not wait.
    values = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return values.to(device, non_blocking=True)


@triton.jit(do_not_specialize=["clip"])
def indexed_adamw_kernel(
    programs,  # [programs] int32
    table,  # [parts, LINE_NUMBERS] int64
    constants,  # [8]
    clip,  # [] or None
    WEIGHT: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    line = table + tl.load(programs + program).to(tl.int64) * LINE_NUMBERS
    width = tl.load(line + 10)
    # Divided in 32 bits, which takes a few instructions instead of a routine.
    tile = program - tl.load(line + 11).to(tl.int32)
    blocks = tl.cdiv(width.to(tl.int32), BLOCK)
    row = (tile // blocks).to(tl.int64)
    first = (tile % blocks) * BLOCK
    start = row * width + first
    count = tl.minimum(width - first, BLOCK).to(tl.int32)
    if ALIGNED:
        count = tl.multiple_of(count, 8)
    # 32 bits inside the block: 64-bit offsets would double the registers.
    columns = tl.arange(0, BLOCK)
    inside = columns < count

    # All loads come before all stores: the compiler cannot know that they do not overlap, and moves none up across one.
    grad = tl.load(_row(line + 2, start, MASTER, ALIGNED) + columns, mask=inside, other=0)
    exp_avg_address = _row(line + 4, start, MASTER, ALIGNED) + columns
    exp_avg = tl.load(exp_avg_address, mask=inside, other=0)
    exp_avg_sq_address = _row(line + 5, start, MASTER, ALIGNED) + columns
    exp_avg_sq = tl.load(exp_avg_sq_address, mask=inside, other=0)
    master_address = _row(line + 3, start, MASTER, ALIGNED) + columns
    master = tl.load(master_address, mask=inside, other=0)

    if clip is not None:
        grad *= tl.load(clip).to(MASTER)
    nearer_end = tl.where(tl.load(constants + 1) != 0, exp_avg, grad)
    exp_avg = nearer_end + tl.load(constants + 2) * (grad - exp_avg)
    tl.store(exp_avg_address, exp_avg, mask=inside)
    exp_avg_sq = tl.load(constants + 3) * exp_avg_sq + tl.load(constants + 4) * grad * grad
    denominator = tl.sqrt(exp_avg_sq) * tl.load(constants + 6) + tl.load(constants + 7)
    master = master * tl.load(constants) - tl.load(constants + 5) * (exp_avg / denominator)
    tl.store(exp_avg_sq_address, exp_avg_sq, mask=inside)
    tl.store(master_address, master, mask=inside)

    neurons = tl.load(line + 1).to(tl.pointer_type(tl.int64))
    neuron = tl.load(neurons + row * tl.load(line + 9))
    if (tl.load(line) != 0) & (neuron >= 0) & (neuron < tl.load(line + 8)):
        entry_stride = tl.load(line + 7)
        target = neuron * tl.load(line + 6) + first * entry_stride
        rounded = master.to(WEIGHT)
        # Known to be contiguous, entries are stored several at a time.
        if entry_stride == 1:
            tl.store(_row(line, target, WEIGHT, ALIGNED) + columns, rounded, mask=inside)
        else:
            scattered = _row(line, target, WEIGHT, False) + columns.to(tl.int64) * entry_stride
            tl.store(scattered, rounded, mask=inside)


@triton.jit
def _row(address, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that stands at an address of the table, moved on by ``start`` entries."""
    row = tl.load(address).to(tl.pointer_type(TYPE)) + start
    return tl.multiple_of(row, 16) if ALIGNED else row
