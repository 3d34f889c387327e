"""Where the Triton kernels run without a GPU: in Triton's interpreter and through its compiler.

Triton decides when it is imported whether it interprets, and transformers imports Triton, so the tests cannot switch
either on in their own process. Each runs in a process of its own, and one call there is one test here.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lape_fast.ops import ACTIVATIONS, gated_activation, gated_activation_backward, indexed_adamw_, quantise_rows


class Case(NamedTuple):
    """One launch of a kernel, by what changes its code."""

    kernel: str
    dtype: torch.dtype
    activation: str
    gated: bool
    # Counting for the forward kernel, selecting for the backward.
    extra: bool
    tokens: int = 16384
    neurons: int = 14336
    languages: int = 100
    selected: int = 94

    def launch(self) -> None:
        """Launches on meta tensors of these sizes."""
        _launch_activation(self)


class UpdateCase(NamedTuple):
    """One launch of the AdamW kernel for a row part and a column part, by what changes its code."""

    dtype: torch.dtype
    clipped: bool = True
    width: int = 4096
    neurons: int = 14336
    selected: int = 94
    step: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the masters."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def launch(self) -> None:
        """Launches on meta tensors of these sizes."""
        from lape_fast.kernels import indexed_adamw as kernel

        def values(*shape: int, dtype: torch.dtype = self.wide) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        weights = [
            values(self.neurons, self.width, dtype=self.dtype),
            values(self.width, self.neurons, dtype=self.dtype).T,
        ]
        neurons = values(self.selected, dtype=torch.int64)
        operands = [[values(self.selected, self.width) for _ in range(4)] for _ in weights]
        parts = [(weight, neurons, *each) for weight, each in zip(weights, operands, strict=True)]
        clip = values() if self.clipped else None
        kernel.launch(parts, clip, self.lr, 0.9, 0.999, 1e-8, self.weight_decay, self.step)


class RowsCase(NamedTuple):
    """One launch of the kernel that rounds rows to fp8, by what changes its code."""

    dtype: torch.dtype
    scaled: bool
    tokens: int = 4096
    width: int = 14336

    def launch(self) -> None:
        """Launches on meta tensors of these sizes."""
        from lape_fast.kernels import quantise_rows as kernel

        columns = torch.empty(self.width, device="meta") if self.scaled else None
        kernel.launch(torch.empty(self.tokens, self.width, dtype=self.dtype, device="meta"), columns)


class Compiled(NamedTuple):
    """What the compiler made of a case."""

    ttir: str
    ptx: str
    cubin_bytes: int
    registers: int
    stack_bytes: int
    shared_bytes: int


class CompileOnlyDriver:
    """Stands in for the GPU driver, so that a launch gets as far as the compiler."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps one cache per device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def interpreter_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels on CPU tensors."""
    with _processes(1, _start_interpreter) as process:
        yield process


@contextmanager
def compiler_processes() -> Iterator[ProcessPoolExecutor]:
    """Processes in which Triton compiles its kernels for GPUs that are not there."""
    with tempfile.TemporaryDirectory() as cache, _processes(2, _start_compiler, cache) as processes:
        yield processes


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
    from lape_fast.kernels import gated_activation as kernel

    with mock.patch.object(kernel, "TALL_FROM_ELEMENTS", 0):
        return forward(*arguments)


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


def launches(case: Case | UpdateCase | RowsCase, arch: int) -> dict:
    """What a real launch of the case hands to Triton's compiler: the arguments' types, constants and alignments."""
    from triton import knobs
    from triton.runtime.driver import driver

    captured = []

    def capture(*, key: Any, fn: Any, compile: dict, **_: Any) -> bool:
        captured.append({**compile, "function": fn.jit_function, "key": key})
        # True: do not compile, and do not launch.
        return True

    driver.set_active(CompileOnlyDriver(arch))
    with mock.patch.object(knobs.runtime, "jit_cache_hook", capture):
        case.launch()
    (launch,) = captured
    return launch


def cache_key(case: Case | UpdateCase | RowsCase) -> str:
    """The key under which Triton keeps the compiled kernel: another key is another compilation."""
    return str(launches(case, arch=90)["key"])


def compile_case(case: Case | UpdateCase | RowsCase, arch: int) -> Compiled:
    """Compiles the kernel of a case down to machine code for compute capability arch / 10."""
    import triton

    launch = launches(case, arch)
    source = triton.compiler.ASTSource(
        launch["function"], launch["signature"], launch["constants"], launch["configs"][0]
    )
    options = {name: launch[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=CompileOnlyDriver(arch).target, options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        compiled.asm["ttir"],
        compiled.asm["ptx"],
        len(compiled.asm["cubin"]),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared,
    )


def _launch_activation(case: Case) -> None:
    from lape_fast.kernels import gated_activation, gated_activation_backward

    def values(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tokens, neurons = case.tokens, case.neurons
    gate, up = values(tokens, neurons), values(tokens, neurons) if case.gated else None
    activation = ACTIVATIONS.index(case.activation)
    if case.kernel == "forward":
        language_ids = values(tokens, dtype=torch.int32) if case.extra else None
        counts = values(case.languages, neurons, dtype=torch.int64) if case.extra else None
        gated_activation.launch(gate, up, activation, language_ids, counts)
    else:
        slots = values(neurons, dtype=torch.int32) if case.extra else None
        selected = case.selected if case.extra else 0
        gated_activation_backward.launch(values(tokens, neurons), gate, up, activation, slots, selected)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


@contextmanager
def _processes(number: int, initializer: Callable, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(number, context, initializer, arguments)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


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


def _start_compiler(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="TRITON_DEFAULT_FP_FUSION")


def _serve(function: Callable, packed: bytes) -> bytes:
    return _pack(function(*_unpack(packed)))


def _pack(values: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed))
