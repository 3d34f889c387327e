"""Rows in float8_e4m3fn: the nearest values, whatever is in a row, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks import ahead_of_time
from lape_fast.errors import ShapeError
from lape_fast.ops import quantise_rows
from lape_fast.ops.quantise_rows import reference
from tests.ops import triton_helpers as helpers


def nearest(values: Tensor) -> Tensor:
    """The float8_e4m3fn values next to some of at most 448, by search among all that there are."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()
    return every[(values.double().flatten()[:, None] - every).abs().argmin(1)].view(values.shape)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose largest values lie far apart, in one of which every other one is small."""
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    x *= 10.0 ** torch.tensor([[-20], [-3], [0], [2], [4], [0]])
    x[5, 0] = 1e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_value_becomes_the_nearest_one_at_its_rows_scale(dtype):
    x = rows(dtype)
    q, scale = quantise_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == (6, 1) and scale.dtype == torch.float32
    torch.testing.assert_close(scale * 448, x.float().abs().amax(1, keepdim=True))
    assert (q.float().abs().amax(1) == 448).all()
    # A product with the reciprocal is off by 2 roundings of 2^-24 from the quotient, which then lies so near the middle
    # of two values that the other one is as good.
    quotient = x.double() / scale.double()
    distance = (q.double() - quotient).abs() - (nearest(quotient) - quotient).abs()
    assert (distance <= quotient.abs() * 2**-22).all()


def test_column_scales_are_multiplied_in_before_the_rounding():
    x, columns = rows(), torch.rand(50) + 0.01
    for got, expected in zip(quantise_rows(x, columns), quantise_rows(x * columns), strict=True):
        assert torch.equal(got, expected)


def test_rows_of_zeros_and_of_the_smallest_numbers_are_finite():
    x = torch.zeros(3, 16)
    x[1] = 1e-45
    x[2, 3] = 2.0**-120
    q, scale = quantise_rows(x)
    assert (q.float() * scale).isfinite().all() and (scale > 0).all() and (q[0].float() == 0).all()
    # Below the least that a row is scaled for they are rounded away, which moves them by less than that.
    torch.testing.assert_close(q.float() * scale, x, rtol=0, atol=2.0**-100)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(bad):
    x = rows()
    expected = quantise_rows(x)
    x[2, 7] = bad
    q, scale = quantise_rows(x)
    assert (q.float() * scale)[2].isnan().any()
    assert (q.float() @ torch.ones(50, 1) * scale)[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(q[others], expected[0][others]) and torch.equal(scale[others], expected[1][others])


def test_leading_dimensions_strides_and_no_rows():
    x = torch.randn(2, 3, 40)
    q, scale = quantise_rows(x[..., ::2])
    assert q.shape == (6, 20) and q.is_contiguous()
    assert all(map(torch.equal, (q, scale), quantise_rows(x[..., ::2].reshape(6, 20).clone())))
    q, scale = quantise_rows(torch.empty(0, 16))
    assert q.shape == (0, 16) and scale.shape == (0, 1)


def test_the_op_is_registered_as_it_behaves():
    for columns in (None, torch.rand(50)):
        torch.library.opcheck(torch.ops.lape_fast.quantise_rows.default, (rows(), columns))


@pytest.mark.parametrize(
    ("x", "columns", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), None, "must be a floating-point tensor"),
        (torch.zeros(3, 0), None, "M > 0"),
        (
            torch.zeros(3, 4),
            torch.ones(3),
            r"must be float32 \[4\], one per column of x, but it is torch.float32 \[3\]",
        ),
        (torch.zeros(3, 4), torch.ones(4, dtype=torch.float64), r"but it is torch\.float64"),
    ],
)
def test_what_does_not_fit(x, columns, message):
    with pytest.raises(ShapeError, match=message):
        quantise_rows(x, columns)


@pytest.fixture(scope="module")
def interpreter():
    with helpers.interpreter_process() as process:
        yield process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_gives_the_references_bits(interpreter, dtype, scaled):
    # More columns than a tile has, in rows that do not lie side by side.
    x = torch.randn(5, 4200, generator=torch.Generator().manual_seed(1)).to(dtype)[:, :4100]
    x[1], x[2, 5], x[3, 4000] = 0, math.nan, math.inf
    columns = torch.rand(4100) + 0.1 if scaled else None
    q, scale = helpers.call(interpreter, helpers.quantise, x, columns)
    expected_q, expected_scale = reference(x, columns)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q.float(), expected_q.float(), rtol=0, atol=0, equal_nan=True)


# Older GPUs and gfx942 have no float8_e4m3fn.
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_kernel_compiles_with_wide_accesses(target):
    with ahead_of_time.compiler_processes() as compilers:
        for scaled in (False, True):
            case = ahead_of_time.RowsCase(torch.bfloat16, scaled)
            compiled = compilers.submit(ahead_of_time.compile_case, case, target).result()
            assert compiled.spilled_bytes == 0 and compiled.registers <= 80
            assert "cvt.rn.satfinite.e4m3x2" in compiled.assembly
            # Two passes over the row.
            assert compiled.loads[16] >= 4 and compiled.stores[16] >= 1
