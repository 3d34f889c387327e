"""What the suite is to reach on an H200, or the same ratios on another GPU.

A stage names a goal in the rows that measure it, ``{"goals": {"count-overhead": 0.003}}``; the worst of them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: what is measured.
        bound: "at least" or "at most".
        limit: what is to be reached.
        form: a format of the value.
    """

    text: str
    bound: str
    limit: float
    form: Callable[[float], str]

    def reached(self, value: float) -> bool:
        """Whether a value reaches the goal."""
        return value >= self.limit if self.bound == "at least" else value <= self.limit


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def times(value: float) -> str:
    return f"{value:.2f} x"


def gibibytes(value: float) -> str:
    return f"{value:.1f} GiB"


GOALS = {
    "forward-bandwidth": Goal("`gated_activation`, of the device copy's bandwidth", "at least", 0.85, percent),
    "backward-bandwidth": Goal("`gated_activation_backward`, of the copy's bandwidth", "at least", 0.85, percent),
    "count-overhead": Goal("counting, added to a forward pass of 4,096 tokens", "at most", 0.005, percent),
    "identify-roofline": Goal("identification of 8B, rows of 4,096, of the roofline", "at least", 0.80, percent),
    "identify-over-hooks": Goal("identification of 8B, over transformers with hooks", "at least", 1.35, times),
    "step-over-floor": Goal("training step, 8B, 1 x 4,096, over the floor", "at most", 1.05, times),
    "faster-than-masked": Goal("the same, faster than dense masked", "at least", 1.6, times),
    "faster-than-clone-scatter": Goal("the same, faster than clone and scatter", "at least", 1.6, times),
    "faster-than-full": Goal("the same, faster than all weights", "at least", 1.7, times),
    "faster-than-lora": Goal("the same, faster than PEFT LoRA r16", "at least", 1.4, times),
    "peak-12b-save": Goal("peak memory, 12B, 1 x 4,096, nothing recomputed", "at most", 40.0, gibibytes),
    "peak-12b-checkpoint": Goal("the same, checkpointed", "at most", 27.0, gibibytes),
    "peak-12b-nf4": Goal("the same, checkpointed on NF4", "at most", 12.5, gibibytes),
    "peak-12b-8x2048": Goal("peak memory, 12B, 8 x 2,048, nothing recomputed", "at most", 139.0, gibibytes),
    "fp8-step": Goal("training step in FP8, over bf16", "at most", 0.70, times),
}


def worst_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The worst value of each goal among measured rows.

    Args:
        rows: of any stages.
    """
    worst: dict[str, float] = {}
    for row in rows:
        for name, value in row.get("goals", {}).items():
            choose = min if GOALS[name].bound == "at least" else max
            worst[name] = choose(value, worst.get(name, value))
    return worst
