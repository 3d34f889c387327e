"""The activation ops against eager torch, one op at a time: python -m pytest benchmarks/ops

Rows of one language and 1,024 tokens of Llama-3.1-8B's FFN width, on the device that is there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lape_fast.ops import gated_activation, gated_activation_backward, slot_map

TOKENS, NEURONS, SELECTED = 1024, 14336, 94
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def tensors(request):
    """gate, up and grad_h."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, TOKENS, NEURONS)
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, request.param))


def run(benchmark, step, *inputs):
    """Times a step on fresh copies of its inputs: what is overwritten in place would decay to subnormal numbers."""

    def timed(*copies):
        step(*copies)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, setup=lambda: ([each.clone() for each in inputs], {}), rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("name", ["ours, counting", "eager, counting", "eager"])
def test_forward(benchmark, tensors, name):
    gate, up, _ = tensors
    language_ids = torch.zeros(TOKENS, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(1, NEURONS, dtype=torch.int64, device=DEVICE)

    def eager_counting():
        counts[0] += (gate > 0).sum(0)
        return F.silu(gate) * up

    steps = {
        "ours, counting": lambda: gated_activation(gate, up, "silu", language_ids, counts),
        "eager, counting": eager_counting,
        "eager": lambda: F.silu(gate) * up,
    }
    run(benchmark, steps[name])


@pytest.mark.parametrize("name", ["ours, selecting", "eager"])
def test_backward(benchmark, tensors, name):
    gate, up, grad_h = tensors
    neurons = torch.arange(0, NEURONS, NEURONS // SELECTED, device=DEVICE)[:SELECTED]
    slots = slot_map(neurons, NEURONS)

    def eager(grad_h, gate, up):
        grad_gate = torch.ops.aten.silu_backward(grad_h * up, gate)
        return grad_gate, grad_h * F.silu(gate)

    steps = {
        "ours, selecting": lambda grad_h, gate, up: gated_activation_backward(
            grad_h, gate, up, "silu", slots, SELECTED
        ),
        "eager": eager,
    }
    run(benchmark, steps[name], grad_h, gate, up)
