"""The forward op on the CPU: exact counts, errors within budget, every layout, every entrance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops import ACTIVATIONS, gated_activation
from tests.ops.oracles import (
    BACKENDS,
    DTYPES,
    assert_within_budget,
    counted,
    eager,
    needs_extension,
    random,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# [T, F]
SIZES = [(0, 0), (0, 63), (63, 0), (1, 1), (1, 431), (431, 1), (63, 257), (257, 63), (77, 431), (431, 77)]
LANGUAGES = 11

LANGUAGE_IDS = {
    "one language": lambda tokens: torch.full((tokens,), 3, dtype=torch.int32),
    "none counted": lambda tokens: torch.full((tokens,), -1, dtype=torch.int32),
    "runs": lambda tokens: (torch.arange(tokens) // 20 % LANGUAGES).int(),
    "gaps": lambda tokens: torch.where(torch.arange(tokens) % 7 == 0, -1, torch.arange(tokens) // 30 % 3).int(),
    "shuffled": lambda tokens: torch.randint(-1, LANGUAGES, (tokens,), dtype=torch.int32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LANGUAGE_IDS)
def test_counts_are_exact(backend, dtype, layout):
    torch.manual_seed(0)
    for tokens, neurons in SIZES:
        gate, up = random(2, tokens, neurons, dtype=dtype)
        language_ids = LANGUAGE_IDS[layout](tokens)
        already = torch.randint(0, 2**40, (LANGUAGES, neurons))
        counts = already.clone()
        h = gated_activation(gate, up, "silu", language_ids, counts, backend=backend)
        assert torch.equal(counts, already + counted(gate, language_ids, LANGUAGES)), (tokens, neurons)
        assert h.shape == gate.shape and not h.isnan().any(), (tokens, neurons)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_counters_do_not_overflow(dtype):
    # The native kernel counts two-byte values in 16 bits between flushes.
    tokens = 2 * 65535 + 17
    gate = torch.ones(tokens, 3, dtype=dtype)
    counts = torch.zeros(1, 3, dtype=torch.int64)
    gated_activation(gate, None, "relu", torch.zeros(tokens, dtype=torch.int32), counts, backend="cpp")
    assert counts.tolist() == [[tokens] * 3]


@needs_extension
@pytest.mark.parametrize("neurons", [257, 431, 2000])
def test_counts_do_not_depend_on_the_number_of_threads(set_threads, neurons):
    # Where tokens are shared out, or there are more threads than columns, several threads add to the same counts.
    gate = random(900, neurons)
    for layout in ("one language", "gaps", "runs", "shuffled"):
        language_ids = LANGUAGE_IDS[layout](len(gate))
        expected = counted(gate, language_ids, LANGUAGES)
        for threads in (1, 2, 3, 8):
            set_threads(threads)
            counts = torch.zeros_like(expected)
            gated_activation(gate, None, "silu", language_ids, counts, backend="cpp")
            assert torch.equal(counts, expected), (layout, threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_error_is_within_budget(backend, dtype, activation, gated):
    gate, up = random(431, 77, dtype=dtype, scale=3), random(431, 77, dtype=dtype, seed=1) if gated else None
    h = gated_activation(gate, up, activation, backend=backend)
    truth = eager(gate.double(), up.double() if gated else None, activation)
    assert_within_budget(h, eager(gate, up, activation), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_finite_bfloat16_fires_exactly_when_positive(backend, activation):
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    gate = every[every.isfinite()].view(255, 256)
    counts = torch.zeros(1, 256, dtype=torch.int64)
    h = gated_activation(gate, None, activation, torch.zeros(255, dtype=torch.int32), counts, backend=backend)
    positive = gate.double() > 0
    assert torch.equal(counts[0], positive.sum(0))
    # act(gate) > 0 wherever gate > 0, but half of the smallest subnormal rounds to zero.
    smallest = gate == torch.finfo(torch.bfloat16).smallest_normal / 2**7
    unlike = (h > 0) != positive
    assert torch.equal(unlike, smallest if activation != "relu" else torch.zeros_like(smallest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_rounded_once_to_nearest_even(backend):
    # relu(gate) * up is exact in fp32 up to its rounding, so every bit is known: ties, subnormals, overflow, NaN.
    torch.manual_seed(0)
    gate, up = torch.randint(0, 2**16, (2, 700, 431)).to(torch.uint16).view(torch.bfloat16)
    gate = gate.abs()
    h = gated_activation(gate, up, "relu", backend=backend)
    expected = (gate.float() * up.float()).to(torch.bfloat16)
    assert torch.equal(h.isnan(), expected.isnan())
    assert torch.equal(h[~h.isnan()], expected[~h.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_spreads_and_never_fires(backend, dtype, activation):
    values = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 0.0, -0.0]).to(dtype)
    gate = values.repeat(5, 9)
    counts = torch.zeros(1, 72, dtype=torch.int64)
    h = gated_activation(gate, None, activation, torch.zeros(5, dtype=torch.int32), counts, backend=backend)
    assert counts.view(9, 8).tolist() == [[0, 0, 5, 0, 5, 0, 0, 0]] * 9
    assert h[:, :2].isnan().all() and h.view(5, 9, 8)[:, :, :2].isnan().all()
    assert not h.view(5, 9, 8)[:, :, 4:].isnan().any()
    up = torch.full_like(gate, float("nan"))
    assert gated_activation(gate, up, activation, backend=backend).isnan().all()


@needs_extension
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates_saturate(activation):
    gate = torch.tensor([88.0, 89.0, 200.0, 1e20, 3e38, float("inf")]).repeat(3, 7)
    assert torch.equal(gated_activation(gate, None, activation, backend="cpp"), gate)
    gate = torch.tensor([-88.0, -89.0, -200.0, -1e20, -3e38]).repeat(3, 7)
    assert gated_activation(gate, None, activation, backend="cpp").abs().max() < 1e-35


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
def test_layouts_give_the_same_numbers(backend, gated):
    tokens, neurons = 63, 77
    fused = random(tokens, 2 * neurons)
    halves = fused[:, :neurons], fused[:, neurons:]
    transposed = tuple(half.t().contiguous().t() for half in halves)
    expanded = fused[:1, :neurons].expand(tokens, neurons), fused[1:2, neurons:].expand(tokens, neurons)
    every_other_id = torch.arange(2 * tokens, dtype=torch.int32)[::2] // 50
    for gate, up in (halves, transposed, expanded):
        up = up if gated else None
        counts = torch.zeros(3, neurons, dtype=torch.int64)
        h = gated_activation(gate, up, "silu", every_other_id, counts, backend=backend)
        torch.testing.assert_close(h, eager(gate, up, "silu"))
        assert torch.equal(counts, counted(gate, every_other_id, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_kept(backend):
    gate, up = random(2, 3, 5, 7, 31)
    language_ids = torch.arange(3 * 5 * 7, dtype=torch.int32).view(3, 5, 7) % 4
    counts = torch.zeros(4, 31, dtype=torch.int64)
    h = gated_activation(gate, up, "gelu", language_ids, counts, backend=backend)
    torch.testing.assert_close(h, eager(gate, up, "gelu"))
    assert torch.equal(counts, counted(gate.view(-1, 31), language_ids.view(-1), 4))
    token = gated_activation(gate[0, 0, 0], up[0, 0, 0], "gelu", backend=backend)
    torch.testing.assert_close(token, h[0, 0, 0])


@needs_extension
def test_rows_beyond_two_to_the_31_elements(tmp_path):
    gate = rows_far_apart(tmp_path / "gate", stride=2**31 + 64, width=64)
    gate.copy_(random(2, 64))
    counts = torch.zeros(1, 64, dtype=torch.int64)
    h = gated_activation(gate, gate, "silu", torch.zeros(2, dtype=torch.int32), counts, backend="cpp")
    assert torch.equal(h, gated_activation(gate.contiguous(), gate.contiguous(), "silu", backend="cpp"))
    assert torch.equal(counts[0], (gate > 0).sum(0))


def rows_far_apart(path: Path, stride: int, width: int) -> Tensor:
    """[2, width] bf16 rows in a sparse file: the addresses are far apart, the memory in between is never touched."""
    size = stride + width
    with path.open("wb") as file:
        file.truncate(2 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).as_strided((2, width), (stride, 1))


def test_autograd_equals_eager():
    for gated in (True, False):
        for activation in ACTIVATIONS:
            gate, up = random(2, 17, 23).double().requires_grad_()
            inputs = (gate, up) if gated else (gate,)
            h = gated_activation(gate, up if gated else None, activation)
            ours = torch.autograd.grad(h.square().sum(), inputs)
            theirs = torch.autograd.grad(eager(gate, up if gated else None, activation).square().sum(), inputs)
            for left, right in zip(ours, theirs, strict=True):
                torch.testing.assert_close(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    gate, up = (values.double().requires_grad_() for values in random(2, 5, 7))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, activation, backend=backend), (gate, up))
    assert torch.autograd.gradcheck(lambda g: gated_activation(g, None, activation, backend=backend), gate)


def test_a_broadcast_gradient_is_accepted():
    gate = random(6, 9).requires_grad_()
    gated_activation(gate, None, "relu").sum().backward()
    assert torch.equal(gate.grad, (gate > 0).float())


def test_second_derivatives_are_refused():
    gate = random(4, 5).requires_grad_()
    loss = gated_activation(gate, None, "silu").square().sum()
    (slope,) = torch.autograd.grad(loss, gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("counting", [True, False])
def test_opcheck(gated, counting):
    gate, up = random(2, 9, 13)
    language_ids = torch.arange(9, dtype=torch.int32) % 3 - 1 if counting else None
    counts = torch.zeros(2, 13, dtype=torch.int64) if counting else None
    for needs_grad in (False, True):
        arguments = (gate.clone().requires_grad_(needs_grad), up if gated else None, 0, language_ids, counts)
        torch.library.opcheck(torch.ops.lape_fast.gated_activation.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_counts(compiler):
    def forward(gate: Tensor, up: Tensor, language_ids: Tensor, counts: Tensor) -> Tensor:
        return gated_activation(gate * 2, up, "silu", language_ids, counts) + 1

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend=compiler)
    counts = torch.zeros(3, 33, dtype=torch.int64)
    expected = torch.zeros_like(counts)
    for tokens in (5, 8):
        gate, up = random(2, tokens, 33, seed=tokens)
        language_ids = torch.arange(tokens, dtype=torch.int32) % 4 - 1
        h = compiled(gate, up, language_ids, counts)
        torch.testing.assert_close(h, eager(gate * 2, up, "silu") + 1)
        expected += counted(gate, language_ids, 3)
    assert torch.equal(counts, expected)


def test_inference_mode_counts():
    gate = random(8, 5)
    counts = torch.zeros(1, 5, dtype=torch.int64)
    with torch.inference_mode():
        gated_activation(gate, None, "silu", torch.zeros(8, dtype=torch.int32), counts)
    assert torch.equal(counts[0], (gate > 0).sum(0))


GATE = torch.zeros(4, 6)
IDS = torch.zeros(4, dtype=torch.int32)
COUNTS = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GATE, GATE, "swish"), "'swish' is unknown; choose one of silu, gelu, gelu_tanh, relu"),
        ((GATE.int(), None, "silu"), "floating-point tensor"),
        ((torch.tensor(1.0), None, "silu"), "floating-point tensor"),
        ((GATE, GATE[:, :5], "silu"), r"up must match gate \(\[4, 6\]"),
        ((GATE, GATE.double(), "silu"), "up must match gate"),
        ((GATE, None, "silu", IDS), "belong together"),
        ((GATE, None, "silu", None, COUNTS), "belong together"),
        ((GATE, None, "silu", IDS, COUNTS.int()), r"counts must be int64 \[languages, 6\]"),
        ((GATE, None, "silu", IDS, COUNTS[:, :5]), r"counts must be int64 \[languages, 6\]"),
        ((GATE, None, "silu", IDS, COUNTS.t().contiguous().t()), "counts contiguous"),
        ((GATE, None, "silu", IDS.long(), COUNTS), r"language_ids must be int32 \[4\]"),
        ((GATE, None, "silu", IDS[:3], COUNTS), r"language_ids must be int32 \[4\]"),
        ((GATE, None, "silu", IDS + 2, COUNTS), "run from 2 to 2, but counts has 2 languages"),
        ((GATE, None, "silu", IDS - 2, COUNTS), "run from -2 to -2"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ShapeError, match=message):
        gated_activation(*arguments)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GATE[0], None, 0, None, None), r"gate must be \[T, F\]"),
        ((GATE.t(), None, 0, None, None), "unit stride"),
        ((GATE.int(), None, 0, None, None), "float32, bfloat16, float16 and float64"),
        ((GATE, GATE[:3], 0, None, None), "up must be"),
        ((GATE, None, 4, None, None), "activation number 4"),
        ((GATE, None, 0, IDS, None), "belong together"),
        ((GATE, None, 0, IDS.long(), COUNTS), "language_ids must be int32"),
        ((GATE, None, 0, IDS[:3], COUNTS), "language_ids must be int32"),
        ((GATE, None, 0, IDS, COUNTS[:, :5]), "counts must be contiguous int64"),
        ((GATE, None, 0, IDS, COUNTS[0]), "counts must be contiguous int64"),
        ((GATE, None, 0, IDS, COUNTS.int()), "counts must be contiguous int64"),
    ],
)
def test_the_native_op_itself_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lape_fast.gated_activation(*arguments)


@needs_extension
def test_the_native_op_leaves_foreign_languages_uncounted():
    gate = torch.ones(6, 5)
    language_ids = torch.tensor([0, 1, 2, -1, -7, 2**31 - 1], dtype=torch.int32)
    counts = torch.zeros(2, 5, dtype=torch.int64)
    torch.ops.lape_fast.gated_activation(gate, None, 0, language_ids, counts)
    assert counts.tolist() == [[1] * 5, [1] * 5]
