"""One optimizer step of a subnetwork, with the write into the base: python -m pytest benchmarks/ops/bench_optimizer.py

94 neurons in each of 8 layers of Llama-3.2-1B's width, 4.6 million trained entries, on the device that is there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lape_fast.tune import IndexedAdamW, Part

HIDDEN, NEURONS, LAYERS, SELECTED = 2048, 8192, 8, 94
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def parts(request) -> list[Part]:
    """Gate rows, up rows and down columns of every layer, with gradients."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(LAYERS):
        neurons = torch.randperm(NEURONS, generator=generator)[:SELECTED].sort().values.to(DEVICE)
        gate, up, down = (torch.randn(NEURONS, HIDDEN, generator=generator).to(DEVICE, request.param) for _ in range(3))
        for weight in (gate, up, down.view(HIDDEN, NEURONS).T):
            master = nn.Parameter(weight[neurons].float())
            master.grad = torch.randn(master.shape, generator=generator).to(DEVICE)
            parts.append(Part(master, lambda weight=weight: weight, neurons))
    return parts


def torch_step(parts: list[Part], **options: bool) -> Callable[[], None]:
    """torch's AdamW on the masters, and then a write per part."""
    optimizer = torch.optim.AdamW([part.parameter for part in parts], **options)

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for part in parts:
                weight = part.weight()
                weight.index_copy_(0, part.neurons, part.parameter.to(weight.dtype))

    return step


@pytest.mark.parametrize("name", ["ours", "reference", "torch foreach, index_copy_", "torch fused, index_copy_"])
def test_step(benchmark, parts, name, monkeypatch):
    if name == "reference":
        monkeypatch.setenv("LAPE_FAST_BACKEND", "reference")
    steps = {
        "ours": lambda: IndexedAdamW(parts).step,
        "reference": lambda: IndexedAdamW(parts).step,
        "torch foreach, index_copy_": lambda: torch_step(parts, foreach=True),
        "torch fused, index_copy_": lambda: torch_step(parts, fused=True),
    }
    step = steps[name]()

    def timed() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
