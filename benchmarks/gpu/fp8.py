"""A training step on a base that multiplies in 8 bits, over the same step in bf16."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.stage import NotMeasured
from benchmarks.gpu.steps import Case, Workbench, time_peer
from lape_fast.errors import ArchitectureError, ConfigError

PEER = "ours-save"


def measure_fp8(bench: Workbench, shape: Shape, batch: tuple[int, int], language: str) -> dict[str, Any]:
    """Times ours in bf16, in fp8 and in bf16 again, so that what drifts meanwhile falls on both.

    Args:
        batch: rows and their length.

    Returns:
        "step_ms" in fp8, "ratio" to the mean of the two medians in bf16, both losses, and the peaks in GiB.

    Raises:
        NotMeasured: the device has no product in fp8.
    """
    measured = []
    for quantise in (None, "fp8", None):
        case = Case(shape, *batch, language, {PEER: (PEER, {"fused_loss": True})}, PEER, 1, quantise=quantise)
        try:
            measured.append(time_peer(bench, case, PEER, *batch))
        except (ConfigError, ArchitectureError) as error:
            raise NotMeasured(str(error)) from error
    before, fp8, after = measured
    ratio = fp8["step_ms"] / statistics.mean([before["step_ms"], after["step_ms"]])
    return {
        **fp8,
        "bf16_step_ms": [before["step_ms"], after["step_ms"]],
        "bf16_loss": before["loss"],
        "ratio": ratio,
        "goals": {"fp8-step": ratio},
        "shown": f"{ratio:.2f} x bf16, loss {fp8['loss']:.4f} ({before['loss']:.4f} in bf16)",
    }
