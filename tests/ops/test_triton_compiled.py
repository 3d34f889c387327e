"""The Triton kernels compiled ahead of time for GPUs that are not there, with the arguments of a real launch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

from lape_fast.ops import ACTIVATIONS
from tests.ops import triton_helpers as helpers
from tests.ops.triton_helpers import Case, UpdateCase

ARCHS = (80, 90, 100)
# At most this many registers a thread leave room for six programs of four warps on a multiprocessor.
MOST_REGISTERS = 80

CASES = [
    *(
        Case(kernel, torch.bfloat16, activation, gated, extra)
        for kernel in ("forward", "backward")
        for activation in ACTIVATIONS
        for gated in (True, False)
        for extra in (True, False)
    ),
    *(
        Case(kernel, dtype, activation, gated=True, extra=True)
        for kernel in ("forward", "backward")
        for dtype, activation in (
            (torch.float16, "silu"),
            (torch.float32, "gelu_tanh"),
            (torch.float64, "gelu"),
        )
    ),
    # Short tiles.
    Case("forward", torch.bfloat16, "silu", gated=True, extra=True, tokens=1024),
]


def case_id(case: Case) -> str:
    words = [case.kernel, str(case.dtype).removeprefix("torch."), case.activation]
    words += ["gated" if case.gated else "ungated"]
    words += [{"forward": "counting", "backward": "selecting"}[case.kernel]] if case.extra else []
    return "-".join([*words, f"T{case.tokens}"])


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with helpers.compiler_processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def compilations(compilers) -> dict[tuple[Case, int], Future]:
    """Every case for every GPU, compiling at the same time as the tests look at the results."""
    return {(case, arch): compilers.submit(helpers.compile_case, case, arch) for arch in ARCHS for case in CASES}


def elementwise_operands(case: Case) -> int:
    """How many [T, F] tensors the kernel reads."""
    return (1 if case.kernel == "forward" else 2) + case.gated


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_compiles_without_spills_and_with_wide_accesses(compilations, case, arch):
    compiled = compilations[case, arch].result()
    # Shown by pytest -rA.
    sys.stdout.write(
        f"sm_{arch} {case_id(case)}: {compiled.registers} registers, {compiled.stack_bytes} bytes spilled, "
        f"{compiled.shared_bytes} bytes shared, {compiled.cubin_bytes} bytes of machine code\n"
    )
    assert compiled.cubin_bytes > 0
    assert compiled.stack_bytes == 0
    assert compiled.registers <= MOST_REGISTERS

    loads = re.findall(r"\bld\.global\S*", compiled.ptx)
    wide_loads = [load for load in loads if load.endswith(("v4.b32", "v2.b64"))]
    # The forward kernel loads its first step ahead of the loop. What is left are language ids and slots.
    assert len(wide_loads) == elementwise_operands(case) * (2 if case.kernel == "forward" else 1)
    assert len(loads) - len(wide_loads) <= (2 if case.extra else 0)
    stores = re.findall(r"\bst\.global\S*", compiled.ptx)
    wide_stores = [store for store in stores if store.endswith(("v4.b32", "v2.b64"))]
    assert len(wide_stores) == (1 if case.kernel == "forward" else elementwise_operands(case) - 1)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_arithmetic_has_the_right_width(compilations, case):
    compiled = compilations[case, 90].result()
    assert ("f64" in compiled.ptx) == (case.dtype == torch.float64)
    # Row numbers times row strides: T x F passes 2^31. Within a tile the selected columns' offsets are small.
    products = set(re.findall(r"arith\.muli .*: tensor<\d+x1xi(\d+)>", compiled.ttir))
    assert products == ({"64", "32"} if case.kernel == "backward" and case.extra else {"64"})


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_an_odd_width_compiles(compilers, kernel, arch):
    case = Case(kernel, torch.bfloat16, "silu", gated=True, extra=True, neurons=431)
    assert compilers.submit(helpers.compile_case, case, arch).result().cubin_bytes > 0


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_another_length_language_count_or_selection_does_not_recompile(compilers, kernel):
    case = Case(kernel, torch.bfloat16, "silu", gated=True, extra=True)
    others = [case._replace(tokens=16383), case._replace(languages=1), case._replace(selected=1)]
    assert len(set(compilers.map(helpers.cache_key, [case, *others]))) == 1


UPDATES = [UpdateCase(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]


@pytest.fixture(scope="module")
def updates(compilers) -> dict[tuple[UpdateCase, int], Future]:
    """The AdamW kernel for every GPU."""
    return {(case, arch): compilers.submit(helpers.compile_case, case, arch) for arch in ARCHS for case in UPDATES}


@pytest.mark.parametrize("case", UPDATES, ids=lambda case: str(case.dtype))
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_the_update_compiles_without_spills_and_with_wide_accesses(updates, case, arch):
    compiled = updates[case, arch].result()
    assert compiled.stack_bytes == 0
    assert compiled.registers <= MOST_REGISTERS
    # A thread owns 32 bytes of each operand, and as many entries of the weight.
    loads = re.findall(r"\bld\.global\.(?:v4\.b32|v2\.b64)", compiled.ptx)
    assert len(loads) == 4 * 2
    stores = re.findall(r"\bst\.global\.(?:v4\.b32|v2\.b64)", compiled.ptx)
    assert len(stores) == 3 * 2 + 2 * case.dtype.itemsize // case.wide.itemsize


@pytest.mark.parametrize("case", UPDATES, ids=lambda case: str(case.dtype))
def test_the_updates_arithmetic_has_the_right_width(updates, case):
    compiled = updates[case, 90].result()
    assert ("f64" in compiled.ptx) == (case.dtype == torch.float64)
    # Entries of a column stand F apart, and F x D passes 2^31.
    products = set(re.findall(r"arith\.muli .*: tensor<\d+xi(\d+)>", compiled.ttir))
    assert products == {"64"}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_the_update_compiles_for_an_odd_width_and_without_clipping(compilers, arch):
    case = UpdateCase(torch.bfloat16, clipped=False, width=431)
    assert compilers.submit(helpers.compile_case, case, arch).result().stack_bytes == 0


def test_other_sizes_steps_and_rates_do_not_recompile_the_update(compilers):
    case = UpdateCase(torch.bfloat16)
    others = [
        case._replace(selected=1),
        case._replace(neurons=16, width=64),
        case._replace(step=2, lr=0.0),
        case._replace(weight_decay=0.0),
    ]
    assert len(set(compilers.map(helpers.cache_key, [case, *others]))) == 1
