"""How the elementwise kernels are launched: their configurations, and which one runs.

What a configuration must do is keep the memory busy. By Little's law a multiprocessor needs bandwidth x latency bytes
under way. An H200 moves 4.8 TB/s for 132 multiprocessors and an A100 2.0 TB/s for 108; taking the latency for 1 us, to
be on the safe side, that is 36 KB and 19 KB, of which the forward kernel reads 2/3 and the backward 3/5 (the rest are
stores, which nobody waits for): 24 and 22 KB on an H200. A warp asks for 16 bytes a thread of every operand before it
works on any, 1 KB forward and 1.5 KB backward, so 24 and 15 warps must be waiting at a time. 80 registers a thread
leave room for 24 warps of any kernel, which is what the tests hold them to; the forward kernel takes 56 or fewer, so
that of its 36 warps some can work while the others wait (benchmarks/results/static). Larger steps were compiled too.
They cost registers, so fewer warps are resident, and ptxas moves their loads down between the computations again, to
where they are used.

A wavefront of 64 threads reads twice the columns, so that 16 bytes a thread stay.

The programs of a last, partly filled wave cannot fill the memory's bandwidth. Tiles are therefore cut as low as it
takes to give every multiprocessor its programs. Their height is an argument of the kernel and not a constant, so that
another number of tokens compiles nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

AUTOTUNE = "LAPE_FAST_AUTOTUNE"

THREAD_BYTES = 16
# From the tallest, which ends least often: the end of a tile is where counts are written.
TILE_ROWS = (128, 64, 32, 16)
# About two waves of the programs that are resident at a time.
PROGRAMS_PER_MULTIPROCESSOR = 16


class Device(NamedTuple):
    """What a choice depends on."""

    multiprocessors: int
    # Threads of a warp (wavefront).
    lanes: int


# An H200: stands for every tensor that is on no GPU, whose kernel is interpreted or compiled ahead of time.
ASSUMED_DEVICE = Device(132, 32)


class Configuration(NamedTuple):
    """What an elementwise kernel is compiled for."""

    # That a warp reads at a time: with more, the tiles are narrower.
    rows_per_warp: int
    warps: int

    def options(self, itemsize: int, lanes: int) -> dict[str, int]:
        """The kernel's constants for entries of so many bytes."""
        return {
            "STEP_ROWS": self.rows_per_warp * self.warps,
            "TILE_COLUMNS": THREAD_BYTES * lanes // self.rows_per_warp // itemsize,
            "num_warps": self.warps,
        }


def device_of(values: Tensor) -> Device:
    """The device that a kernel runs on."""
    return _device(values.device) if values.is_cuda else ASSUMED_DEVICE


@functools.cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.warp_size)


def tile_rows(tokens: int, neurons: int, tile_columns: int, multiprocessors: int) -> int:
    """The height of the tiles: the tallest with enough programs for every multiprocessor, else the lowest."""
    columns = triton.cdiv(neurons, tile_columns)
    enough = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    return next((rows for rows in TILE_ROWS if triton.cdiv(tokens, rows) * columns >= enough), TILE_ROWS[-1])


def launch_tiles(
    kernel: Any, configurations: Sequence[Configuration], restored: Sequence[str], arguments: dict[str, Any]
) -> None:
    """Launches an elementwise kernel over the tiles of ``arguments["gate"]``, [T, F].

    It runs in the first configuration. With ``LAPE_FAST_AUTOTUNE=1`` it runs in the one that Triton's autotuner finds
    fastest for the width, the activation, the dtypes and the height of the tiles, which stands for the number of
    tokens; what is found is kept in Triton's cache on disk.

    Args:
        kernel: the kernel.
        configurations: what it can be compiled for.
        restored: the arguments that the kernel changes in place, which the autotuner puts back after each trial.
        arguments: name -> argument, but for ``tile_rows`` and the constants of a configuration.
    """
    gate = arguments["gate"]
    tokens, neurons = gate.shape
    device = device_of(gate)
    options = configurations[0].options(gate.element_size(), device.lanes)
    rows = tile_rows(tokens, neurons, options["TILE_COLUMNS"], device.multiprocessors)
    if os.environ.get(AUTOTUNE) == "1":
        present = tuple(name for name in restored if arguments[name] is not None)
        kernel, options = _autotuned(kernel, tuple(configurations), gate.element_size(), device.lanes, present), {}

    def programs(constants: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(tokens, rows) * triton.cdiv(neurons, constants["TILE_COLUMNS"]),)

    with torch.cuda.device_of(gate):
        kernel[programs](**arguments, tokens=tokens, neurons=neurons, tile_rows=rows, **options)


@functools.cache
def _autotuned(
    kernel: Any, configurations: tuple[Configuration, ...], itemsize: int, lanes: int, restored: tuple[str, ...]
) -> Any:
    configs = []
    for configuration in configurations:
        constants = configuration.options(itemsize, lanes)
        configs.append(triton.Config(constants, num_warps=constants.pop("num_warps")))
    key = ["neurons", "tile_rows", "ACTIVATION"]
    return triton.autotune(configs, key, restore_value=list(restored), cache_results=True)(kernel)
