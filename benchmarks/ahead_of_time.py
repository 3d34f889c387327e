"""The Triton kernels compiled for GPUs that are not there, with the arguments of a real launch, and what came out.

A launch on meta tensors gets as far as Triton's compiler, which needs no GPU; what it would have compiled is compiled
here for any target. Registers, spills and the width of each access are read from the machine code: for NVIDIA's GPUs
with the disassembler that Triton's wheel carries, for AMD's from the assembly and the metadata at its end.

Triton remembers whether it interprets when it is imported, so each process either interprets or compiles: call
``compile_case`` in the processes of ``compiler_processes``.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lape_fast.ops import ACTIVATIONS


class Target(NamedTuple):
    """A kind of GPU to compile for, with the limits that decide how many warps (wavefronts) are resident."""

    backend: str
    arch: int | str
    lanes: int
    multiprocessors: int
    # Per multiprocessor (compute unit): 32-bit registers, how many a warp gets at least, shared memory, warps.
    registers: int
    register_unit: int
    shared_bytes: int
    warps: int


# The vendors' figures for the A100, the H200, the B200 and the MI300X.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 65536, 256, 164 * 1024, 64),
    "sm_90": Target("cuda", 90, 32, 132, 65536, 256, 228 * 1024, 64),
    "sm_100": Target("cuda", 100, 32, 148, 65536, 256, 228 * 1024, 64),
    "gfx942": Target("hip", "gfx942", 64, 304, 4 * 512 * 64, 8 * 64, 64 * 1024, 32),
}


class Case(NamedTuple):
    """One launch of an elementwise kernel, by what changes its code."""

    kernel: str
    dtype: torch.dtype
    activation: str
    gated: bool
    # Counting for the forward kernel, selecting for the backward.
    extra: bool
    configuration: int = 0
    tokens: int = 16384
    neurons: int = 14336
    languages: int = 100
    selected: int = 94

    def launch(self) -> None:
        """Launches on meta tensors of these sizes."""
        from lape_fast.kernels import gated_activation, gated_activation_backward

        def values(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        shape = (self.tokens, self.neurons)
        gate, up = values(*shape), values(*shape) if self.gated else None
        activation = ACTIVATIONS.index(self.activation)
        kernel = {"forward": gated_activation, "backward": gated_activation_backward}[self.kernel]
        configurations = kernel.CONFIGURATIONS[self.configuration :]
        with mock.patch.object(kernel, "CONFIGURATIONS", configurations):
            if self.kernel == "forward":
                language_ids = values(self.tokens, dtype=torch.int32) if self.extra else None
                counts = values(self.languages, self.neurons, dtype=torch.int64) if self.extra else None
                kernel.launch(gate, up, activation, language_ids, counts)
            else:
                slots = values(self.neurons, dtype=torch.int32) if self.extra else None
                kernel.launch(values(*shape), gate, up, activation, slots, self.selected if self.extra else 0)


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


# A launch that can be compiled.
AnyCase = Case | UpdateCase | RowsCase


class Compiled(NamedTuple):
    """What the compiler made of a case."""

    ttir: str
    # PTX, or the assembly of an AMD GPU.
    assembly: str
    warps: int
    # Of a thread.
    registers: int
    spilled_bytes: int
    # Of a program.
    shared_bytes: int
    # Bytes of a thread's access -> how many such accesses to global memory the loop over the rows holds, or the kernel
    # where it has none.
    loads: dict[int, int]
    stores: dict[int, int]
    # Warps that registers and shared memory let a multiprocessor hold.
    resident_warps: int


class CompileOnlyDriver:
    """Stands in for the GPU driver, so that a launch gets as far as the compiler."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.name = target
        self.target = GPUTarget(*TARGETS[target][:3])

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps one cache per device.
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_benchmarker(self) -> Callable:
        def benchmark(launch: Callable, quantiles: tuple[float, ...]) -> list[float]:
            launch()
            return [0.0] * len(quantiles)

        return benchmark


@contextmanager
def compiler_processes() -> Iterator[ProcessPoolExecutor]:
    """Processes in which Triton compiles its kernels for GPUs that are not there."""
    with tempfile.TemporaryDirectory() as cache, processes(2, _start_compiler, cache) as compilers:
        yield compilers


@contextmanager
def processes(number: int, initializer: Callable, *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """New processes that have called ``initializer(*arguments)``; nothing more is started once the context ends."""
    executor = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer, arguments)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def launches(case: AnyCase, target: str) -> list[dict]:
    """What a real launch of the case hands to Triton's compiler: the arguments' types, constants and alignments.

    One launch is one entry; while Triton tunes there is one for each trial.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    from lape_fast.kernels import launching

    captured = []

    def capture(*, key: Any, fn: Any, compile: dict, **_: Any) -> bool:
        captured.append({**compile, "function": fn.jit_function, "key": key})
        # True: do not compile, and do not launch.
        return True

    device = launching.Device(TARGETS[target].multiprocessors, TARGETS[target].lanes)
    driver.set_active(CompileOnlyDriver(target))
    with (
        mock.patch.object(launching, "ASSUMED_DEVICE", device),
        mock.patch.object(knobs.runtime, "jit_cache_hook", capture),
    ):
        case.launch()
    return captured


def cache_key(case: AnyCase) -> str:
    """The key under which Triton keeps the compiled kernel: another key is another compilation."""
    (launch,) = launches(case, "sm_90")
    return str(launch["key"])


def compile_case(case: AnyCase, target: str) -> Compiled:
    """Compiles the kernel of a case down to machine code for a target."""
    import triton

    (launch,) = launches(case, target)
    source = triton.compiler.ASTSource(
        launch["function"], launch["signature"], launch["constants"], launch["configs"][0]
    )
    options = {name: launch[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
    compiled = triton.compile(source, target=CompileOnlyDriver(target).target, options=options)
    read = {"cuda": _read_nvidia, "hip": _read_amd}[TARGETS[target].backend]
    assembly, registers, spilled, lines = read(compiled.asm)
    # The AdamW kernel has no loop (a branch back leads to code that was put out of the way), that of rows has two.
    instructions = _hot_loop(lines) if isinstance(case, Case) else lines
    shared, warps = compiled.metadata.shared, launch["num_warps"]
    return Compiled(
        compiled.asm["ttir"],
        assembly,
        warps,
        registers,
        spilled,
        shared,
        _widths(instructions, "load"),
        _widths(instructions, "store"),
        _resident_warps(TARGETS[target], registers, shared, warps),
    )


def _read_nvidia(asm: dict[str, Any]) -> tuple[str, int, int, list[str]]:
    """PTX, registers, spilled bytes, and the machine code's lines: labels and instructions."""
    from triton import knobs

    def disassemble(*command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout

    report = disassemble(knobs.nvidia.cuobjdump.path, "-res-usage")
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    code = disassemble(knobs.nvidia.nvdisasm.path, "-c")
    lines = re.findall(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(\.L\w+:|[^.\s/].*;)", code, re.MULTILINE)
    return asm["ptx"], usage["REG"], usage["STACK"] + usage["LOCAL"], lines


def _read_amd(asm: dict[str, Any]) -> tuple[str, int, int, list[str]]:
    """Assembly, vector registers, spilled bytes, and the lines of the code: labels and instructions."""
    code = asm["amdgcn"]
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    spilled = 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"]) + usage["private_segment_fixed_size"]
    lines = re.findall(r"^(\.LBB\w+:|\s+[a-z].*)", code, re.MULTILINE)
    return code, usage["vgpr_count"], spilled, [line.strip() for line in lines]


def _hot_loop(lines: list[str]) -> list[str]:
    """The lines from a label to the branch back to it, of the loop that holds the most loads and then the most lines.

    A loop's rarer blocks may lie behind its end, so the longest way back need not be that of the loop over the rows.
    """
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    loops = [[]]
    for number, line in enumerate(lines):
        target = re.search(r"(?:BRA.*|s_c?branch\w*\s+)(\.L\w+)", line)
        if target and labels[target[1]] < number:
            loops.append(lines[labels[target[1]] : number + 1])
    return max(loops, key=lambda loop: (sum(_widths(loop, "load").values()), len(loop)))


_ACCESSES = {
    "load": r"\bLDG\.\S+|\b(?:global|buffer)_load_\w+",
    "store": r"\bSTG\.\S+|\b(?:global|buffer)_store_\w+",
}
# The word of an access that tells its bytes, where they are not 4, in both vendors' assembly.
_BYTES = {
    **{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},
    **{"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
}


def _widths(instructions: list[str], access: str) -> dict[int, int]:
    widths = Counter()
    for found in re.findall(_ACCESSES[access], "\n".join(instructions)):
        words = re.split(r"[._]", found)
        widths[next((_BYTES[word] for word in words if word in _BYTES), 4)] += 1
    return dict(sorted(widths.items()))


def _resident_warps(target: Target, registers: int, shared: int, warps: int) -> int:
    unit = target.register_unit
    of_warp = -(-registers * target.lanes // unit) * unit
    # A SIMD of an AMD GPU has a quarter of the registers, as has an NVIDIA one; a warp's must come from one of them.
    by_registers = 4 * (target.registers // 4 // of_warp)
    by_shared = target.shared_bytes // shared * warps if shared else target.warps
    return min(by_registers, by_shared, target.warps) // warps * warps


def _start_compiler(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="TRITON_DEFAULT_FP_FUSION")
