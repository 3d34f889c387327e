"""The native kernels under every instruction set that this processor has; the other tests here run the best one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.oracles import needs_extension

pytestmark = needs_extension

NAMES = ["baseline", "avx2", "avx512"]
FOLDER = Path(__file__).parent

REPORT = "from tests.ops.test_instruction_set import instruction_set; print(instruction_set())"
USE = "import torch; from lape_fast.ops import gated_activation; gated_activation(torch.zeros(2, 3), None, 'silu')"


def instruction_set() -> str:
    """The one in use, as the extension names it."""
    report = ctypes.CDLL(importlib.util.find_spec("lape_fast._C").origin).lape_fast_instruction_set
    report.restype = ctypes.c_char_p
    return report().decode()


def run(*arguments: str, isa: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LAPE_FAST_ISA"}
    environment["OMP_NUM_THREADS"] = "1"
    if isa is not None:
        environment["LAPE_FAST_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def best() -> str:
    return run("-c", REPORT, isa=None).stdout.strip()


def test_the_best_set_of_the_processor_is_the_default(best):
    flags = set()
    if platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    expected = "baseline"
    if {"avx2", "fma"} <= flags:
        expected = "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "avx2"
    assert best == expected


@pytest.mark.parametrize("isa", NAMES[:-1])
def test_the_kernels_pass_their_tests_under_lesser_sets(isa, best):
    if NAMES.index(isa) >= NAMES.index(best):
        pytest.skip(f"the best set of this processor is {best}")
    assert run("-c", REPORT, isa=isa).stdout.strip() == isa
    ops = ("gated_activation", "gated_activation_backward", "indexed_adamw")
    files = [str(FOLDER / f"test_{op}.py") for op in ops]
    chosen = "cpp and (counts_are_exact or within_budget or rounded_once or rounded_masters)"
    finished = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files, isa=isa)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert " passed" in finished.stdout


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_an_unknown_set_is_an_error(isa):
    finished = run("-c", USE, isa=isa)
    assert finished.returncode != 0
    assert f'LAPE_FAST_ISA is "{isa}"; set it to baseline, avx2 or avx512, or unset it.' in finished.stderr
