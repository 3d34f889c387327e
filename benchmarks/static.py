"""What the Triton kernels compile to: registers, spills, shared memory and the width of their accesses.

Run with ``python -m benchmarks.static``; it needs no GPU, and writes kernels.json and kernels.md. A test compares them
with what the installed Triton compiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.ahead_of_time import TARGETS, Case, Compiled, UpdateCase, compile_case, compiler_processes
from lape_fast.files import write_json, write_text

RESULTS = Path(__file__).parent / "results" / "static"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How many configurations each elementwise kernel has.
CONFIGURATIONS = 3

CASES: tuple[Case | UpdateCase, ...] = (
    *(
        Case(kernel, dtype, "silu", gated=True, extra=True, configuration=number)
        for kernel in ("forward", "backward")
        for number in range(CONFIGURATIONS)
        for dtype in DTYPES
    ),
    *(UpdateCase(dtype) for dtype in DTYPES),
)

KERNELS = {"forward": "gated_activation", "backward": "gated_activation_backward"}
HEADINGS = {
    "kernel": "kernel",
    "configuration": "configuration",
    "dtype": "dtype",
    "target": "target",
    "warps": "warps",
    "registers": "registers",
    "spilled_bytes": "spilled bytes",
    "shared_bytes": "shared bytes",
    "loads": "loads",
    "stores": "stores",
    "resident_warps": "resident warps",
}
NOTE = """\
Made by `python -m benchmarks.static` with Triton {triton}, without a GPU.

Each kernel counts or selects, is gated and has SiLU. Registers and spilled bytes are a thread's, shared bytes a
program's. Loads and stores are those of the loop over the rows (of the whole kernel for indexed_adamw), as number x
bytes of a thread. What is narrower than 16 bytes is no [T, F] operand: language ids, selected columns, the table of the
parts and scattered weights. Resident warps (wavefronts of 64 threads on gfx942) are what registers and shared memory
let a multiprocessor hold.
"""


def compile_all(compilers: ProcessPoolExecutor) -> dict[tuple[Case | UpdateCase, str], Future]:
    """Starts to compile every case of the table for every target."""
    return {(case, target): compilers.submit(compile_case, case, target) for case in CASES for target in TARGETS}


def table_row(case: Case | UpdateCase, target: str, compiled: Compiled) -> dict[str, Any]:
    """A line of the table."""
    return {
        "kernel": KERNELS[case.kernel] if isinstance(case, Case) else "indexed_adamw",
        "configuration": case.configuration if isinstance(case, Case) else 0,
        "dtype": str(case.dtype).removeprefix("torch."),
        "target": target,
        "warps": compiled.warps,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "loads": _accesses(compiled.loads),
        "stores": _accesses(compiled.stores),
        "resident_warps": compiled.resident_warps,
    }


def _accesses(widths: Mapping[int, int]) -> str:
    return ", ".join(f"{number} x {width}" for width, number in sorted(widths.items(), reverse=True))


def markdown(rows: Iterable[Mapping[str, Any]], triton: str) -> str:
    """The table with its headings and what they mean."""
    lines = [list(HEADINGS.values()), ["---"] * len(HEADINGS), *([row[name] for name in HEADINGS] for row in rows)]
    return NOTE.format(triton=triton) + "\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for kernels.json and kernels.md")
    folder = parser.parse_args().results
    with compiler_processes() as compilers:
        rows = [table_row(*case, compiled.result()) for case, compiled in compile_all(compilers).items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "kernels.json", {"triton": version("triton"), "rows": rows})
    write_text(folder / "kernels.md", markdown(rows, version("triton")))


if __name__ == "__main__":
    main()
