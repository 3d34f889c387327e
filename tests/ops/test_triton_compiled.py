"""The Triton kernels compiled ahead of time for GPUs that are not there, with the arguments of a real launch."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version

import pytest
import torch

from benchmarks import ahead_of_time, static
from benchmarks.ahead_of_time import TARGETS, Case, UpdateCase
from lape_fast.files import read_json
from lape_fast.ops import ACTIVATIONS
from tests.ops import triton_helpers as helpers

# At most this many registers a thread leave room for six programs of four warps on a multiprocessor, which the memory's
# latency asks for (kernels/triton/launching.py).
MOST_REGISTERS = 80

# Every way through the kernels' code, for one GPU; `static.CASES` are compiled for all.
WAYS = [
    *(
        Case(kernel, torch.bfloat16, activation, gated, extra)
        for kernel in ("forward", "backward")
        for activation in ACTIVATIONS
        for gated in (True, False)
        for extra in (True, False)
    ),
    *(Case(kernel, torch.float64, "gelu", gated=True, extra=True) for kernel in ("forward", "backward")),
    UpdateCase(torch.float64),
]
EVERY_CASE = list(dict.fromkeys([*itertools.product(WAYS, ["sm_90"]), *itertools.product(static.CASES, TARGETS)]))


def case_id(case: Case | UpdateCase) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    if isinstance(case, UpdateCase):
        return f"update-{dtype}"
    words = [case.kernel, dtype, case.activation, "gated" if case.gated else "ungated"]
    words += [{"forward": "counting", "backward": "selecting"}[case.kernel]] if case.extra else []
    return "-".join([*words, str(case.configuration)])


def every_case(function):
    return pytest.mark.parametrize(
        "case, target", EVERY_CASE, ids=[f"{target}-{case_id(case)}" for case, target in EVERY_CASE]
    )(function)


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with ahead_of_time.compiler_processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def compilations(compilers) -> dict[tuple[Case | UpdateCase, str], Future]:
    """Every case, compiling at the same time as the tests look at the results."""
    return {(case, target): compilers.submit(ahead_of_time.compile_case, case, target) for case, target in EVERY_CASE}


@every_case
def test_compiles_without_spills_and_with_few_registers(compilations, case, target):
    compiled = compilations[case, target].result()
    # Shown by pytest -rA.
    sys.stdout.write(f"{target} {case_id(case)}: {compiled[2:]}\n")
    assert compiled.spilled_bytes == 0
    # Nobody trains in double precision, and what only the autotuner may choose is judged by its time.
    if case.dtype != torch.float64 and (isinstance(case, UpdateCase) or case.configuration == 0):
        assert compiled.registers <= MOST_REGISTERS


@every_case
def test_every_operand_is_read_and_written_16_bytes_at_a_time(compilations, case, target):
    compiled = compilations[case, target].result()
    if isinstance(case, UpdateCase):
        # A program reads 4 KiB of four operands and writes three. The rest of the loads is for the program as a whole.
        accesses = 4096 // (16 * TARGETS[target].lanes * compiled.warps)
        assert compiled.loads[16] >= 4 * accesses
        assert compiled.stores[16] >= 3 * accesses
        return
    loads, stores = dict(compiled.loads), dict(compiled.stores)
    written = 1 if case.kernel == "forward" else 1 + case.gated
    read = 1 + case.gated + (case.kernel == "backward")
    # The compiler unrolls the shortest loops.
    steps = stores.pop(16) // written
    assert steps > 0 and loads.pop(16) == read * steps
    if case.kernel == "forward":
        # What is left are language ids, in the order of the rows and in that of the threads.
        assert sum(loads.values()) <= 2 * case.extra and set(loads) <= {4}
        assert not stores
    else:
        assert not loads
        # Selected columns are stored one by one.
        assert set(stores) == ({case.dtype.itemsize} if case.extra else set())


def test_the_committed_table_is_what_the_compiler_makes(compilations):
    committed = read_json(static.RESULTS / "kernels.json")
    if committed["triton"] != version("triton"):
        pytest.skip(f"the table was made with Triton {committed['triton']}, and this is {version('triton')}")
    rows = [
        static.table_row(case, target, compilations[case, target].result())
        for case in static.CASES
        for target in TARGETS
    ]
    assert rows == committed["rows"], "run `python -m benchmarks.static` and commit what it writes"
    assert (static.RESULTS / "kernels.md").read_text() == static.markdown(rows, version("triton"))


@pytest.mark.parametrize("case", WAYS, ids=case_id)
def test_arithmetic_has_the_right_width(compilations, case):
    compiled = compilations[case, "sm_90"].result()
    assert ("f64" in compiled.assembly) == (case.dtype == torch.float64)
    # Row numbers times row strides: T x F passes 2^31, as F x D does for the entries of a column.
    products = set(re.findall(r"arith\.muli .*: tensor<\d+(?:x1)?xi(\d+)>", compiled.ttir))
    # Within a tile the selected columns' offsets are small.
    selecting = isinstance(case, Case) and case.kernel == "backward" and case.extra
    assert products == ({"64", "32"} if selecting else {"64"})


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_width_compiles(compilers, kernel, target):
    case = Case(kernel, torch.bfloat16, "silu", gated=True, extra=True, neurons=431)
    assert compilers.submit(ahead_of_time.compile_case, case, target).result().spilled_bytes == 0


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_another_length_language_count_or_selection_does_not_recompile(compilers, kernel):
    case = Case(kernel, torch.bfloat16, "silu", gated=True, extra=True)
    others = [
        case._replace(tokens=16383),
        case._replace(tokens=1),
        case._replace(languages=1),
        case._replace(selected=1),
    ]
    assert len(set(compilers.map(ahead_of_time.cache_key, [case, *others]))) == 1


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_autotuner_tries_every_configuration_once_for_similar_lengths(compilers, kernel):
    case = Case(kernel, torch.bfloat16, "silu", gated=True, extra=True)
    cases = [case, case._replace(tokens=16383), case._replace(tokens=512), case._replace(tokens=400)]
    every = static.CONFIGURATIONS
    assert compilers.submit(helpers.trials, cases).result() == [every, 0, every, 0]
    assert compilers.submit(helpers.trials_after_a_restart, cases).result() == [0, 0, 0, 0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_update_compiles_for_an_odd_width_and_without_clipping(compilers, target):
    case = UpdateCase(torch.bfloat16, clipped=False, width=431)
    assert compilers.submit(ahead_of_time.compile_case, case, target).result().spilled_bytes == 0


def test_other_sizes_steps_and_rates_do_not_recompile_the_update(compilers):
    case = UpdateCase(torch.bfloat16)
    others = [
        case._replace(selected=1),
        case._replace(neurons=16, width=64),
        case._replace(step=2, lr=0.0),
        case._replace(weight_decay=0.0),
    ]
    assert len(set(compilers.map(ahead_of_time.cache_key, [case, *others]))) == 1
