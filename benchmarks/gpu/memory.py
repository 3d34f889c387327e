"""The smallest GPU that trains: memory capped, and the largest batch that fits; and the peaks of one row of 4,096.

Ours with everything checkpointed and the loss without logits, on bf16, NF4 and int8 weights. The search begins with
what the planner predicts, which stands beside what was found. A cap leaves torch what a GPU of that size would: its
memory less the CUDA context. On the CPU, where nothing limits memory, the live bytes of a step are held against it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.shapes import LANGUAGES, SIZES, Shape, build_model
from benchmarks.gpu.stage import Stage, free_memory, is_out_of_memory
from benchmarks.gpu.steps import GIB, Workbench, close_after, peak_memory
from benchmarks.peers import Peer, prepare_ours
from lape_fast.models import without_logits
from lape_fast.tune.subnetwork_ffn import Policy
from lape_fast.tune.workload import CONTEXT_BYTES, Workload

LANGUAGE = LANGUAGES[0]

# By --size: GiB of a GPU, and tokens of a row.
CAPS = {"true": (12, 16, 24, 32, 48, 80), "toy": (0.0005, 0.002)}
LENGTH = {"true": 4096, "toy": 32}

# Shorter rows are tried in steps of this part of a row.
PIECES = 32

QUANTISATIONS = (None, "nf4", "int8")

# Policy, quantisation -> the goal that it is held against, for the large model and one row.
PEAKS = {
    ("save", None): "peak-12b-save",
    ("checkpoint", None): "peak-12b-checkpoint",
    ("checkpoint", "nf4"): "peak-12b-nf4",
}


def run(stage: Stage, options: argparse.Namespace) -> None:
    """The peaks, then every cap of every model; of each weight format all caps, as the model stays as it is."""
    bench = MemoryBench(stage, options)
    small, large = SIZES[options.size]
    for (policy, quantise), goal in PEAKS.items():
        measure = functools.partial(measure_peak, bench, large, policy, quantise, goal)
        labels = {"model": large.name, "policy": policy, "weights": quantise or "bfloat16"}
        stage.measure(f"{large.name} peak {policy} {quantise or 'bfloat16'}", measure, **labels)
    shapes = (small, large) if options.size == "true" else (small,)
    for quantise, shape in itertools.product(QUANTISATIONS, shapes):
        for cap in CAPS[options.size]:
            if not exists(stage.device, cap):
                continue
            labels = {"model": shape.name, "gib": cap, "weights": quantise or "bfloat16", "language": LANGUAGE}
            measure = functools.partial(measure_cap, bench, shape, quantise, cap)
            stage.measure(f"{shape.name} {quantise or 'bfloat16'} in {cap:g} GiB", measure, **labels)


class MemoryBench(Workbench):
    """With what was planned so far: the traces of a true size take seconds, and every cap asks for them."""

    def __init__(self, stage: Stage, options: argparse.Namespace):
        super().__init__(stage, options)
        self.plans: dict[tuple, Workload] = {}


def exists(device: torch.device, gib: float) -> bool:
    """Whether the device is as large as a GPU of so many nominal GiB, a little of which no program gets."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory > 0.95 * gib * GIB


def attach(bench: MemoryBench, shape: Shape, quantise: str | None, policy: Policy) -> Peer:
    """Ours on the base itself: a copy of quantised projections would copy what belongs to them."""
    model = bench.base(shape, quantise)
    peer = prepare_ours(model, bench.neurons(shape, LANGUAGE), policy)
    peer.undo.callback(without_logits(model).close)
    free_memory(bench.device)
    return peer


def measure_peak(
    bench: MemoryBench, shape: Shape, policy: Policy, quantise: str | None, goal: str | None
) -> dict[str, Any]:
    """The peak of a step on one row, beside the planner's."""
    length = LENGTH[bench.options.size]
    peer = attach(bench, shape, quantise, policy)
    input_ids = bench.tokens(shape, 1, length)
    row = close_after(peer, functools.partial(step_within, peer, input_ids, float("inf")))
    predicted = plan_workload(bench, shape, quantise, length)
    row["predicted_gib"] = predicted_bytes(predicted, policy, 1) / GIB
    row["goals"] = {} if goal is None else {goal: row["allocated_gib"]}
    row["shown"] = f"{row['allocated_gib']:.2f} GiB, predicted {row['predicted_gib']:.2f}"
    return row


def measure_cap(bench: MemoryBench, shape: Shape, quantise: str | None, cap: float) -> dict[str, Any]:
    """The largest batch within so many GiB: rows of full length, or the longest part of one.

    Returns:
        "rows" and "length", 0 where nothing fits, with the peaks of that batch; "predicted_rows" of full length, and
        "predicted_gib" for the batch that was found; "tried": every batch and whether it fitted.
    """
    full = LENGTH[bench.options.size]
    workload = plan_workload(bench, shape, quantise, full)
    resident = sum(workload.resident().values())
    predicted = workload.largest_rows("checkpoint", cap * GIB - resident)
    context = CONTEXT_BYTES if bench.device.type == "cuda" else 0
    room = cap * GIB - context
    tried: dict[str, bool] = {}
    peaks: dict[str, dict[str, Any]] = {}
    peer = attach(bench, shape, quantise, "checkpoint")

    def fits(rows: int, length: int) -> bool:
        key = f"{rows}x{length}"
        if key not in tried:
            found = try_batch(peer, bench.tokens(shape, rows, length), room)
            tried[key] = found is not None
            peaks[key] = found or {}
        return tried[key]

    def search() -> dict[str, Any]:
        rows, length = find_largest(lambda rows: fits(rows, full), predicted), full
        if not rows:
            piece = full // PIECES
            length = piece * find_largest(lambda pieces: fits(1, piece * pieces), PIECES // 2, below=PIECES)
            rows = int(length > 0)
        return {"rows": rows, "length": length, **peaks.get(f"{rows}x{length}", {})}

    row = close_after(peer, search)
    found = f"{row['rows']} x {row['length']:,}" if row["rows"] else "nothing"
    if row["rows"] and row["length"] != full:
        workload = plan_workload(bench, shape, quantise, row["length"])
    return {
        **row,
        "predicted_rows": predicted,
        "predicted_gib": predicted_bytes(workload, "checkpoint", max(1, row["rows"])) / GIB,
        "tried": tried,
        "shown": f"{found}, predicted {predicted} x {full:,}",
    }


def plan_workload(bench: MemoryBench, shape: Shape, quantise: str | None, length: int) -> Workload:
    """What `lape_fast.plan` predicts from."""
    key = (shape.name, quantise, length)
    if key not in bench.plans:
        bench.plans[key] = Workload(
            build_model(shape, torch.device("meta"), torch.bfloat16).config,
            torch.bfloat16,
            lambda layers, width: [chosen.cpu() for chosen in bench.neurons(shape, LANGUAGE)],
            1,
            length,
            packed=False,
            device=bench.device.type,
            accumulates=False,
            quantise=quantise,
            overlay=quantise is not None,
        )
    return bench.plans[key]


def predicted_bytes(workload: Workload, policy: Policy, rows: int) -> int:
    """The peak of what torch allocates, as ``PolicyPlan.allocated``."""
    resident = workload.resident()
    return sum(resident.values()) - resident.get("CUDA context", 0) + max(workload.phases(policy, rows).values())


def try_batch(peer: Peer, input_ids: torch.Tensor, room: float) -> dict[str, Any] | None:
    """The peaks of a batch; None where it does not fit."""
    try:
        with capped(input_ids.device, room):
            return step_within(peer, input_ids, room)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Here, where the error's frames and their tensors are gone.
    free_memory(input_ids.device)
    return None


def step_within(peer: Peer, input_ids: torch.Tensor, room: float) -> dict[str, Any]:
    """The peaks of two steps, the second of which finds the optimizer's states.

    Raises:
        torch.OutOfMemoryError: on the CPU, which has no allocator to be capped, where they are above ``room``.
    """
    device = input_ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        peer.step(input_ids)
    peaks = peak_memory(peer, input_ids)
    if peaks["allocated_gib"] * GIB > room:
        raise torch.OutOfMemoryError(f"{peaks['allocated_gib']} GiB is more than {room / GIB}.")
    return peaks


@contextlib.contextmanager
def capped(device: torch.device, room: float) -> Iterator[None]:
    """Within the context torch's allocator gets no more than ``room`` bytes of a GPU."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    free_memory(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def find_largest(fits: Callable[[int], bool], guess: int, below: int | None = None) -> int:
    """The largest number from 1 that fits, to one part in sixteen; 0 where none does.

    Args:
        fits: true up to some number, and false from there on.
        guess: where to begin.
        below: a number that is known not to fit.
    """
    low, high = 0, below
    number, stride = max(1, guess), max(1, guess // 8)
    while high is None or high - low > max(1, low // 16):
        if fits(number):
            low = number
        else:
            high = number
        if high is None:
            number = low + stride
        elif low == 0:
            number = max(1, high - stride)
        else:
            number = (low + high) // 2
        stride *= 2
    return low
