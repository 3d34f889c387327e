"""Ceilings of the device, and how much of the copy's bandwidth each op reaches.

    product   8192^3 in bf16, and the products of a layer at 4,096 tokens
    copy      a device copy, its bytes counted read and written
    ops       the bytes that an op must read and write over the time it takes

The calls rotate among buffers that together exceed any cache several times. On a GPU they wait in its queue behind
other work, so that what is timed is the device and not the launch.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import SIZES, Shape, choose_neurons
from benchmarks.gpu.stage import Stage
from lape_fast.ops import gated_activation, gated_activation_backward, indexed_adamw_, slot_map

DTYPE = torch.bfloat16
LANGUAGE = "mlt_Latn"

# By --size: the ceilings' sizes, and how often each call is timed.
TOKENS = {"true": (4096, 2048, 16384), "toy": (32, 16, 48)}
PRODUCT = {"true": 8192, "toy": 64}
COPY_BYTES = {"true": 2**31, "toy": 2**16}
ROTATED_BYTES = {"true": 2**29, "toy": 2**16}
ROUNDS = {"true": 20, "toy": 3}
WARM_UP = 3
PACKED_LANGUAGES = 16


def run(stage: Stage, options: argparse.Namespace) -> None:
    """A row per ceiling, op and number of tokens."""
    size, device = options.size, stage.device
    product = stage.measure(
        f"product {PRODUCT[size]}^3", functools.partial(measure_product, device, size, *[PRODUCT[size]] * 3)
    )
    copy = stage.measure("copy", functools.partial(measure_copy, device, size))
    copied = copy["bytes_per_s"] if copy else None
    shape = SIZES[size][0]
    neurons, mask = choose_neurons(options, shape, LANGUAGE)
    sizes = [len(chosen) for chosen in neurons]
    for tokens in TOKENS[size]:
        labels = {"tokens": tokens, "neurons": shape.neurons, "dtype": str(DTYPE).removeprefix("torch.")}
        for languages in (0, 1, PACKED_LANGUAGES):
            stage.measure(
                f"gated_activation, {tokens} tokens, " + (f"counting {languages}" if languages else "not counting"),
                functools.partial(measure_forward, device, size, shape.neurons, tokens, languages, copied),
                languages=languages,
                **labels,
            )
        for selected in (0, round(sum(sizes) / len(sizes)), max(sizes)):
            stage.measure(
                f"gated_activation_backward, {tokens} tokens, {selected} selected",
                functools.partial(measure_backward, device, size, shape.neurons, tokens, selected, copied),
                selected=selected,
                **labels,
            )
    stage.measure(
        "indexed_adamw_, all layers",
        functools.partial(measure_adamw, device, size, shape, neurons, copied),
        neurons_per_layer=sizes,
        mask=mask,
    )
    for model in SIZES[size]:
        for name, rows, columns in products_of(model):
            stage.measure(
                f"product of {model.name}, {name}",
                functools.partial(
                    measure_product, device, size, TOKENS[size][0], rows, columns, product and product["flops_per_s"]
                ),
                tokens=TOKENS[size][0],
            )


def products_of(shape: Shape) -> list[tuple[str, int, int]]:
    """The name, the input's and the output's width of each product of a layer, and of the head."""
    heads, others = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    return [
        ("query", shape.hidden, heads),
        ("key or value", shape.hidden, others),
        ("attention's output", heads, shape.hidden),
        ("gate or up", shape.hidden, shape.neurons),
        ("down", shape.neurons, shape.hidden),
        ("head", shape.hidden, shape.vocabulary),
    ]


def time_calls(
    call: Callable[[int], Any],
    buffers: int,
    size: str,
    device: torch.device,
    refill: Callable[[int], Any] | None = None,
) -> float:
    """The median seconds of ``call(buffer)`` as the buffers take turns.

    Args:
        call: what to time, by the number of the buffers it works on.
        buffers: how many there are.
        size: decides the number of rounds.
        device: on a GPU, its own clock is read.
        refill: makes the contents of a buffer fit for another call. It is called for the next buffer before each call,
            so that what it leaves in a cache is not what is timed.
    """
    rounds = WARM_UP + ROUNDS[size]
    for buffer in range(buffers if refill else 0):
        refill(buffer)
    times = (_time_on_gpu if device.type == "cuda" else _time_on_cpu)(call, buffers, rounds, refill)
    return statistics.median(times[WARM_UP:])


def _time_on_cpu(
    call: Callable[[int], Any], buffers: int, rounds: int, refill: Callable[[int], Any] | None
) -> list[float]:
    times = []
    for number in range(rounds):
        if refill:
            refill((number + 1) % buffers)
        start = time.perf_counter()
        call(number % buffers)
        times.append(time.perf_counter() - start)
    return times


def _time_on_gpu(
    call: Callable[[int], Any], buffers: int, rounds: int, refill: Callable[[int], Any] | None
) -> list[float]:
    # Compiled and allocated before anything is queued.
    for buffer in range(buffers):
        call(buffer)
        if refill:
            refill(buffer)
    torch.cuda.synchronize()
    keep_busy()
    events = []
    for number in range(rounds):
        if refill:
            refill((number + 1) % buffers)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(number % buffers)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def keep_busy() -> None:
    """Gives the GPU some 30 milliseconds of work (on an H200), within which the calls to be timed are queued."""
    left = torch.ones(8192, 8192, dtype=DTYPE, device="cuda")
    for _ in range(25):
        torch.mm(left, left)


def rotated(size: str, bytes_each: int) -> int:
    """How many buffers take turns; three at least, so that one can be refilled while another is timed."""
    return max(3, -(-ROTATED_BYTES[size] // bytes_each))


def draw(*shape: int, device: torch.device, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normal values."""
    return torch.empty(shape, device=device, dtype=dtype).normal_()


def measure_product(
    device: torch.device, size: str, tokens: int, inner: int, columns: int, ceiling: float | None = None
) -> dict[str, Any]:
    """The operations per second of ``[T, inner] x [inner, columns]``, with the weight stored as a linear layer's."""
    buffers = rotated(size, 2 * (tokens * inner + tokens * columns))
    weight = draw(columns, inner, device=device)
    lefts = [draw(tokens, inner, device=device) for _ in range(buffers)]
    results = [torch.empty(tokens, columns, dtype=DTYPE, device=device) for _ in range(buffers)]
    seconds = time_calls(lambda buffer: torch.mm(lefts[buffer], weight.T, out=results[buffer]), buffers, size, device)
    reached = 2 * tokens * inner * columns / seconds
    row = {"ms": 1000 * seconds, "flops_per_s": reached, "shown": f"{reached / 1e12:,.4g} TFLOP/s"}
    if ceiling:
        row |= {"of_product": reached / ceiling, "shown": f"{row['shown']}, {reached / ceiling:.1%} of the ceiling"}
    return row


def measure_copy(device: torch.device, size: str) -> dict[str, Any]:
    """The bytes per second of a device copy, read and written."""
    source, *targets = (torch.empty(COPY_BYTES[size], dtype=torch.uint8, device=device).random_() for _ in range(3))
    seconds = time_calls(lambda buffer: targets[buffer].copy_(source), len(targets), size, device)
    return bandwidth(seconds, 2 * COPY_BYTES[size], None)


def bandwidth(seconds: float, moved: int, copied: float | None, goal: str | None = None) -> dict[str, Any]:
    """What a row says of bytes that were moved in some seconds."""
    reached = moved / seconds
    row = {"ms": 1000 * seconds, "bytes": moved, "bytes_per_s": reached, "shown": f"{reached / 1e12:,.4g} TB/s"}
    if copied:
        row |= {"of_copy": reached / copied, "shown": f"{row['shown']}, {reached / copied:.1%} of the copy"}
        if goal:
            row["goals"] = {goal: reached / copied}
    return row


def measure_forward(
    device: torch.device, size: str, neurons: int, tokens: int, languages: int, copied: float | None
) -> dict[str, Any]:
    """gate and up read, h written; where it counts, an id per token read and a count per language and neuron added."""
    buffers = rotated(size, 3 * 2 * tokens * neurons)
    pairs = [draw(2, tokens, neurons, device=device) for _ in range(buffers)]
    counting = ()
    if languages:
        # Documents of one language each, of equal lengths.
        language_ids = (torch.arange(tokens, device=device) * languages // tokens).int()
        counting = (language_ids, torch.zeros(languages, neurons, dtype=torch.int64, device=device))
    # Kept, so that the outputs are written to memory in turn, too.
    outputs: list[Tensor | None] = [None] * buffers

    def call(buffer: int) -> None:
        outputs[buffer] = gated_activation(*pairs[buffer], "silu", *counting)

    seconds = time_calls(call, buffers, size, device)
    moved = 3 * 2 * tokens * neurons + (4 * tokens + 16 * languages * neurons if languages else 0)
    return bandwidth(seconds, moved, copied, "forward-bandwidth")


def measure_backward(
    device: torch.device, size: str, neurons: int, tokens: int, selected: int, copied: float | None
) -> dict[str, Any]:
    """grad_h, gate and up read, the gradients written over gate and up, and three columns per selected neuron."""
    buffers = rotated(size, 3 * 2 * tokens * neurons)
    original = draw(2, tokens, neurons, device=device)
    grads = [draw(tokens, neurons, device=device) for _ in range(buffers)]
    pairs = [torch.empty_like(original) for _ in range(buffers)]
    slots = None
    if selected:
        chosen = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))[:selected].sort().values
        slots = slot_map(chosen.to(device), neurons)
    seconds = time_calls(
        lambda buffer: gated_activation_backward(grads[buffer], *pairs[buffer], "silu", slots, selected),
        buffers,
        size,
        device,
        # Else the gradients of gradients would vanish.
        refill=lambda buffer: pairs[buffer].copy_(original),
    )
    moved = 5 * 2 * tokens * neurons + (3 * 2 * tokens * selected + 4 * neurons if selected else 0)
    return bandwidth(seconds, moved, copied, "backward-bandwidth")


def measure_adamw(
    device: torch.device, size: str, shape: Shape, neurons: list[Tensor], copied: float | None
) -> dict[str, Any]:
    """A step of all layers: gradients read, masters and moments read and written, rounded weights written."""
    chosen = [each.to(device) for each in neurons if len(each)]
    weights, places = [], []
    for each in chosen:
        gate, up = (draw(shape.neurons, shape.hidden, device=device) for _ in range(2))
        weights += [gate, up, draw(shape.hidden, shape.neurons, device=device).T]
        places += [each] * 3
    operands = [
        [draw(len(each), shape.hidden, device=device, dtype=torch.float32) for each in places] for _ in range(4)
    ]
    # Squares are not negative.
    operands[3] = [values.square_() for values in operands[3]]
    options = {"lr": 1e-4, "weight_decay": 0.01, "step": 10}
    seconds = time_calls(lambda buffer: indexed_adamw_(weights, places, *operands, **options), 1, size, device)
    trained = 3 * shape.hidden * sum(map(len, chosen))
    return {"trained": trained, **bandwidth(seconds, (4 + 3 * 8 + 2) * trained, copied)}
