"""Where the Triton kernels run without a GPU: in Triton's interpreter and through its compiler.

Triton decides when it is imported whether it interprets, and transformers imports Triton, so the tests cannot switch
either on in their own process. Each runs in a process of its own, and one call there is one test here.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.ahead_of_time import Case, launches, processes
from lape_fast.ops import ACTIVATIONS, gated_activation, gated_activation_backward, indexed_adamw_, quantise_rows


@contextmanager
def interpreter_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels on CPU tensors."""
    with processes(1, _start_interpreter) as process:
        yield process


def call(process: ProcessPoolExecutor, function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in the process. Tensors travel as copies that keep their strides and storage."""
    return _unpack(process.submit(_serve, function, _pack(arguments)).result())


def forward(
    gate: Tensor, up: Tensor | None, activation: str, language_ids: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The public function on the Triton backend: h and counts."""
    with poisoned_outputs():
        return gated_activation(gate, up, activation, language_ids, counts, backend="triton"), counts


def forward_in_tall_tiles(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """``forward`` with the tiles that are otherwise kept for large inputs."""
    from lape_fast.kernels import launching

    with mock.patch.object(launching, "PROGRAMS_PER_MULTIPROCESSOR", 0):
        return forward(*arguments)


def autotuned(name: str, *arguments: Any) -> tuple[Any, int]:
    """``forward`` or ``backward``, autotuned on a device whose trials take no time, and how many trials were made."""
    from triton.runtime.driver import driver

    from lape_fast.kernels import launching

    trials = []

    def benchmark(launch: Callable, quantiles: tuple[float, ...]) -> list[float]:
        trials.append(launch)
        for _ in range(3):
            launch()
        # The last trial is the fastest.
        return [1 / len(trials)] * len(quantiles)

    launching._autotuned.cache_clear()
    driver.set_active(SimpleNamespace(get_benchmarker=lambda: benchmark))
    with mock.patch.dict(os.environ, {"LAPE_FAST_AUTOTUNE": "1"}):
        return {"forward": forward, "backward": backward}[name](*arguments), len(trials)


def launch_forward(
    gate: Tensor, up: Tensor | None, activation: str, language_ids: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel without the public function, which checks the language ids of CPU tensors."""
    from lape_fast.kernels import gated_activation as kernel

    return kernel.launch(gate, up, ACTIVATIONS.index(activation), language_ids, counts), counts


def backward(
    grad_h: Tensor, gate: Tensor, up: Tensor | None, activation: str, slots: Tensor | None = None, selected: int = 0
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The public function on the Triton backend: gate and up as it left them, hidden and grads."""
    with poisoned_outputs():
        hidden, grads = gated_activation_backward(grad_h, gate, up, activation, slots, selected, backend="triton")
    return gate, up, hidden, grads


def update(lists: list[list[Tensor]], options: dict[str, Any]) -> list[list[Tensor]]:
    """The public AdamW step on the Triton backend, in place; ``weights, neurons, grads, masters, ...`` afterwards."""
    indexed_adamw_(*lists, **options, backend="triton")
    return lists


def launch_update(lists: list[list[Tensor]], step: int) -> list[list[Tensor]]:
    """The AdamW kernel without the public function, which checks the neurons of CPU tensors."""
    from lape_fast.kernels import indexed_adamw as kernel

    kernel.launch(list(zip(*lists, strict=True)), None, 1e-3, 0.9, 0.999, 1e-8, 0.01, step)
    return lists


def quantise(x: Tensor, column_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """The public function on the Triton backend."""
    return quantise_rows(x, column_scales, backend="triton")


def trials(cases: list[Case]) -> list[int]:
    """How many configurations the autotuner tries for each launch, one launch after another."""
    with mock.patch.dict(os.environ, {"LAPE_FAST_AUTOTUNE": "1"}):
        # After the trials, each is launched once more.
        return [len(launches(case, "sm_90")) - 1 for case in cases]


def trials_after_a_restart(cases: list[Case]) -> list[int]:
    """``trials`` when what was found lives on the disk only."""
    from lape_fast.kernels import launching

    launching._autotuned.cache_clear()
    return trials(cases)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fills uninitialised floating-point tensors with NaN, so that an output nobody wrote is seen."""

    def poisoned(allocate: Callable) -> Callable:
        def allocate_poisoned(*arguments: Any, **options: Any) -> Tensor:
            values = allocate(*arguments, **options)
            return values.fill_(math.nan) if values.is_floating_point() else values

        return allocate_poisoned

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def _start_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    # The exponentials of large negative gates overflow to infinity, as they should.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    from triton.runtime import interpreter

    interpreter._convert_float = _converting_as_gpus_do(interpreter._convert_float)


def _converting_as_gpus_do(convert: Callable) -> Callable:
    # The interpreter of Triton 3.9 cuts off the digits that do not fit into bf16 and e4m3, and makes a number of e4m3's
    # NaN; GPUs round to nearest even.
    def convert_float(values, input_dtype, output_dtype, rounding_mode):
        if not input_dtype.is_fp32() or not (output_dtype.is_bf16() or output_dtype.is_fp8e4nv()):
            return convert(values, input_dtype, output_dtype, rounding_mode)
        wide = torch.from_numpy(values.copy())
        if output_dtype.is_bf16():
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    return convert_float


def _serve(function: Callable, packed: bytes) -> bytes:
    return _pack(function(*_unpack(packed)))


def _pack(values: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed))
