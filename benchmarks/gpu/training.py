"""Training steps at true size: every way to train beside ours, in time and in memory.

In its order: gradients are checked; 8B on one row of 4,096 tokens against everything, with a profile, and in fp8; 12B
the same, and on eight rows of 2,048, where most others run out of memory; all of them checkpointed and with the fused
loss; what each part of ours brings; the kernels of the loss and the optimizer; other batches and languages.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import losses
from benchmarks.gpu.fp8 import measure_fp8
from benchmarks.gpu.kernels import PRODUCT, measure_product
from benchmarks.gpu.ladder import ladder
from benchmarks.gpu.shapes import LANGUAGES, SIZES, Shape
from benchmarks.gpu.stage import Stage, free_memory
from benchmarks.gpu.steps import Case, Workbench, check_gradients, run_case
from benchmarks.peers import build_peer

# As `lape-fast tune` runs ours; the floor beside it has the same parts. The others as their libraries set them up.
FUSED = {"fused_loss": True}
PEERS = {
    "ours-save": ("ours-save", FUSED),
    "floor-fused": ("floor-fused", FUSED),
    "masked": ("masked", {}),
    "clone-scatter": ("clone-scatter", {}),
    "lora": ("lora", {}),
    "full": ("full", {}),
    "ours-recompute": ("ours-recompute", FUSED),
    "ours-checkpoint": ("ours-checkpoint", FUSED),
    "floor": ("floor", {}),
    "ffn": ("ffn", {}),
    "lora-bf16": ("lora-bf16", {}),
    "shira": ("shira", {}),
}
IMPORTANT = {name: PEERS[name] for name in ("ours-save", "floor-fused", "masked", "clone-scatter", "lora")}

# Method without policy: each keeps of a layer its input alone, and none holds all logits.
ALIKE = {"checkpointed": True, "fused_loss": True}
SAME_POLICY = {
    name: (method, ALIKE)
    for name, method in {
        "ours": "ours-checkpoint",
        "floor-fused": "floor-fused",
        "masked": "masked",
        "clone-scatter": "clone-scatter",
        "lora": "lora",
        "lora-bf16": "lora-bf16",
        "full": "full",
        "ffn": "ffn",
        "shira": "shira",
    }.items()
}
LADDER = {name: (method, {}) for name, method in ladder().items()}

# What the rows of a case say of it -> all peers of it.
POLICIES = {"default": PEERS, "same policy": SAME_POLICY, "ladder": LADDER}

# Rows x length: one long row, a large batch, a small one.
BATCHES = {"true": ((1, 4096), (8, 2048), (2, 512)), "toy": ((1, 32), (4, 16), (2, 8))}

STEP_GOALS = {
    "floor-fused": {"step-over-floor": "baseline_over_this"},
    "masked": {"faster-than-masked": "ratio"},
    "clone-scatter": {"faster-than-clone-scatter": "ratio"},
    "full": {"faster-than-full": "ratio"},
    "lora": {"faster-than-lora": "ratio"},
}

# Of NVIDIA's data sheets: dense bf16 operations per second, by part of the device's name.
DATASHEET = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}

# Kernels of a profile that are written down.
TOP = 15


def run(stage: Stage, options: argparse.Namespace) -> None:
    """Measures everything that is not in the stage's file yet, the most important first."""
    bench = Workbench(stage, options)
    small, large = SIZES[options.size]
    ceilings = measure_ceilings(stage, options.size)
    long, wide, short = BATCHES[options.size]
    mt, cy, ka = LANGUAGES

    def case(shape: Shape, batch: tuple[int, int], language: str, peers: dict, rounds: int, **details: Any) -> None:
        rounds = rounds if options.size == "true" else 1
        measured = Case(shape, *batch, language, peers, next(iter(peers)), rounds, **details)
        run_case(bench, measured, check(bench, shape, measured.policy), ceilings)

    case(small, long, mt, PEERS, 3, goals=STEP_GOALS)
    stage.measure(f"{small.name} profile", functools.partial(profile_step, bench, small, long, mt), peer="ours-save")
    stage.measure(f"{small.name} fp8", functools.partial(measure_fp8, bench, small, long, mt), peer="ours-save")
    case(large, long, mt, PEERS, 2)
    case(large, wide, mt, IMPORTANT, 1, goals={"ours-save": {"peak-12b-8x2048": "allocated_gib"}})
    case(small, long, mt, SAME_POLICY, 2, policy="same policy")
    case(small, long, mt, LADDER, 2, policy="ladder")
    losses.run(bench, options)
    if options.size == "toy":
        # What follows is more of the same, at other batches and languages.
        return
    case(small, short, mt, IMPORTANT, 3)
    case(small, wide, mt, IMPORTANT, 1)
    case(small, long, cy, IMPORTANT, 1)
    case(small, long, ka, IMPORTANT, 1)
    case(large, long, mt, SAME_POLICY, 1, policy="same policy")
    case(large, short, mt, IMPORTANT, 2)
    for language in (cy, ka):
        case(large, long, language, IMPORTANT, 1)


def check(bench: Workbench, shape: Shape, policy: str) -> Sequence[str]:
    """The peers whose gradients are wrong, which are not timed; all of them where that could not be measured."""
    measure = functools.partial(check_gradients, bench, shape, LANGUAGES[0], POLICIES[policy])
    row = bench.stage.measure(f"{shape.name} {policy} gradients", measure, model=shape.name, policy=policy)
    return row["wrong"] if row else list(POLICIES[policy])


def measure_ceilings(stage: Stage, size: str) -> dict[str, float]:
    """Operations per second of a large bf16 product here, and of the device's data sheet where it is known."""
    sides = [PRODUCT[size]] * 3
    row = stage.measure(f"product {sides[0]}^3", functools.partial(measure_product, stage.device, size, *sides))
    ceilings = {} if row is None else {"product": row["flops_per_s"]}
    name = stage.facts.get("device", "")
    known = next((speed for part, speed in DATASHEET.items() if part in name), None)
    return ceilings if known is None else {**ceilings, "datasheet": known}


def profile_step(bench: Workbench, shape: Shape, batch: tuple[int, int], language: str) -> dict[str, Any]:
    """The kernels that a step of ours spends its time in, by their share of all kernels' time.

    Returns:
        "kernels": name, milliseconds, share and calls of the longest; "kernels_ms", the sum over all; "step_ms".
    """
    free_memory(bench.device)
    method, setting = PEERS["ours-save"]
    input_ids = bench.tokens(shape, *batch)
    peer = build_peer(method, bench.base(shape), bench.neurons(shape, language), copied=False, **setting)
    on_gpu = bench.device.type == "cuda"
    try:
        for _ in range(2):
            peer.step(input_ids)
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            peer.step(input_ids)
            if on_gpu:
                torch.cuda.synchronize(bench.device)
    finally:
        peer.close()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    took = {id(event): (event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events}
    total = sum(took.values())
    events.sort(key=lambda event: took[id(event)], reverse=True)
    kernels = [
        {
            "name": event.key[:120],
            "ms": took[id(event)] / 1000,
            "share": took[id(event)] / total,
            "calls": event.count,
        }
        for event in events[:TOP]
    ]
    return {
        "kernels": kernels,
        "kernels_ms": total / 1000,
        "shown": f"{kernels[0]['share']:.0%} {kernels[0]['name'][:60]}",
    }
