"""The loss at both vocabularies, and the optimizer: its time, and which updates reach weights in bf16."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import loss
from benchmarks.gpu.shapes import LANGUAGES, SIZES, Shape
from benchmarks.gpu.stage import free_memory, is_out_of_memory, missing_library
from benchmarks.gpu.steps import GIB, Workbench, WrongAnswer
from benchmarks.measure import interleave
from benchmarks.peers import build_peer
from lape_fast.ops.linear_cross_entropy import CHUNK_ROWS

TOKENS = {"true": (4096, 1024, 16_384), "toy": (64,)}
ROUNDS = 5

# Of the precision's experiment: weights as a model has them, the learning rates, and when it is looked at.
WEIGHTS, DEVIATION, RATES, STEPS = {"true": 2**24, "toy": 2**14}, 0.02, (1e-4, 1e-5), (1, 20)


def run(bench: Workbench, options: argparse.Namespace) -> None:
    """The losses of both heads, then the optimizer."""
    stage = bench.stage
    for tokens in TOKENS[options.size]:
        for shape in SIZES[options.size]:
            measure = functools.partial(time_losses, bench, shape, tokens)
            stage.measure(f"loss {tokens} x {shape.vocabulary}", measure, tokens=tokens, vocabulary=shape.vocabulary)
    for rate in RATES:
        measure = functools.partial(measure_precision, bench.device, WEIGHTS[options.size], rate)
        stage.measure(f"updates that arrive at lr {rate:g}", measure, learning_rate=rate)
    small = SIZES[options.size][0]
    stage.measure(f"{small.name} optimizer", functools.partial(time_optimizers, bench, small, LANGUAGES[0]))


def liger() -> loss.Loss:
    """Liger's fused loss, which takes the head first; its kernels run on a GPU only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: fused(weight, hidden, labels)


def time_losses(bench: Workbench, shape: Shape, tokens: int) -> dict[str, Any]:
    """Forward and backward of the loss of a frozen head, every implementation in turn.

    Returns:
        "peers": per implementation "ms", "ms_of_rounds" and "added_gib", or why there is none.
    """
    device = bench.device
    sizes = argparse.Namespace(tokens=tokens, hidden=shape.hidden, dtype="bfloat16", device=device)
    inputs = loss.draw_inputs(sizes, shape.vocabulary)
    peers = loss.losses(torch.bfloat16)
    found: dict[str, dict[str, Any]] = {}
    if device.type == "cuda":
        try:
            peers["liger"] = liger()
        except ImportError as error:
            found["liger"] = {"status": f"{missing_library(error)} is not installed"}
    steps: dict[str, Callable[[], Any]] = {}
    right = loss.step(peers["transformers"], *inputs)
    for name, peer in peers.items():
        run_step = functools.partial(loss.step, peer, *inputs)
        try:
            # Once for the compilers and the allocator.
            result = run_step()
            if not _close(result, right):
                raise WrongAnswer(f"The loss or the gradient of {name} is wrong.")
            del result
            added = loss.added_bytes(run_step, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found[name] = {"status": "out of memory"}
            continue
        steps[name] = run_step
        found[name] = {"added_gib": added / GIB}
    free_memory(device)
    for name, times in interleave(steps, ROUNDS, device, lambda: None).items():
        found[name] |= {"ms": statistics.median(times), "ms_of_rounds": times}
    ours = f"ours-{CHUNK_ROWS}"
    fastest = min(steps, key=lambda name: found[name]["ms"])
    shown = (
        f"{ours} {found[ours]['ms']:,.1f} ms, {fastest} {found[fastest]['ms']:,.1f} ms" if ours in steps else fastest
    )
    return {"peers": found, "shown": shown}


def _close(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    tolerance = loss.TOLERANCE[torch.bfloat16]
    (value, gradient), (expected, expected_gradient) = found, right
    difference = (gradient.float() - expected_gradient.float()).abs().max()
    near = difference <= tolerance * expected_gradient.float().abs().max()
    return bool(near & torch.isclose(value.float(), expected.float(), rtol=tolerance))


def measure_precision(device: torch.device, size: int, rate: float) -> dict[str, Any]:
    """How much of AdamW's updates bf16 weights take: by themselves, rounded stochastically, or from fp32 masters.

    The gradients have a part that stays and as much noise. All start from the same bf16 weights.

    Returns:
        Per way and number of steps "moved", the share of weights that are no longer what they were, and "arrived", the
        part of the fp32 update that the weights made, which is 1 where nothing is lost.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    start = torch.empty(size, device=device).normal_(0, DEVIATION, generator=generator).bfloat16()
    lasting = torch.randn(size, device=device, generator=generator)
    weights = {
        "bf16": nn.Parameter(start.clone()),
        "stochastic": nn.Parameter(start.float()),
        "fp32 master": nn.Parameter(start.float()),
    }
    optimizers = [torch.optim.AdamW([weight], lr=rate, weight_decay=0.0, fused=True) for weight in weights.values()]
    found: dict[str, Any] = {}
    for step in range(1, STEPS[-1] + 1):
        gradient = lasting + torch.randn(size, device=device, generator=generator)
        for weight, optimizer in zip(weights.values(), optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
        weights["stochastic"].data = round_stochastically(weights["stochastic"].data, generator)
        if step in STEPS:
            update = weights["fp32 master"].detach() - start.float()
            for name, weight in weights.items():
                made = weight.detach().bfloat16().float() - start.float()
                found[f"{name} after {step}"] = {
                    "moved": float((made != 0).float().mean()),
                    "arrived": float((made * update).sum() / update.square().sum()),
                }
    shown = ", ".join(f"{name} {found[f'{name} after {STEPS[0]}']['moved']:.0%}" for name in weights)
    return {"ways": found, "shown": f"moved by the first step: {shown}"}


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds fp32 values to what bf16 holds, up or down with the probability that keeps their mean."""
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # bf16 is the upper half of fp32.
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32)


def time_optimizers(bench: Workbench, shape: Shape, language: str) -> dict[str, Any]:
    """One step of our optimizer, and of torch's fused AdamW on the same number of values.

    ``torch`` updates masters that stand for nothing; ``torch and write`` also brings them into the base's weights,
    which ours does in the same pass.

    Returns:
        "peers": "ms" and "ms_of_rounds" by name; "trainable".
    """
    free_memory(bench.device)
    peer = build_peer("ours-save", bench.base(shape), bench.neurons(shape, language), copied=False)
    try:
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in peer.parameters]
        for parameter in [*peer.parameters, *copies]:
            parameter.grad = torch.randn_like(parameter)
        options = {"lr": 0.0, "weight_decay": 0.0, "fused": True}
        steps = {
            "ours": peer.optimizer.step,
            "torch": torch.optim.AdamW(copies, **options).step,
            "torch and write": torch.optim.AdamW(peer.parameters, **options).step,
        }
        interleave(steps, 2, bench.device, lambda: None)
        times = interleave(steps, 2 * ROUNDS, bench.device, lambda: None)
    finally:
        peer.close()
    found = {name: {"ms": statistics.median(taken), "ms_of_rounds": taken} for name, taken in times.items()}
    shown = ", ".join(f"{name} {row['ms']:.2f} ms" for name, row in found.items())
    return {"peers": found, "trainable": peer.trainable, "shown": shown}
