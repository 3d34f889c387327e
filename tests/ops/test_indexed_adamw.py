"""The AdamW op on the CPU: torch's AdamW on the masters, the rounded masters in the weights, and nothing else moves."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lape_fast.errors import ShapeError
from lape_fast.ops import indexed_adamw_
from tests.ops.oracles import BACKENDS, DTYPES, assert_within_budget, needs_extension, random
from tests.ops.test_gated_activation import rows_far_apart

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
# [F, D] and K
SIZES = [(1, 1, 1), (63, 77, 0), (63, 77, 1), (63, 77, 63), (431, 257, 150), (257, 1, 63), (77, 431, 63)]
LAYOUTS = {
    "rows": lambda F, D, dtype, seed: random(F, D, dtype=dtype, seed=seed),
    "columns": lambda F, D, dtype, seed: random(D, F, dtype=dtype, seed=seed).T,
    "rows of a wider buffer": lambda F, D, dtype, seed: random(F + 2, D + 5, dtype=dtype, seed=seed)[1:-1, 3 : 3 + D],
    "every third entry": lambda F, D, dtype, seed: random(F, 3 * D, dtype=dtype, seed=seed)[:, ::3],
    "none": lambda F, D, dtype, seed: torch.empty(0),
}
OPERANDS = ("weights", "neurons", "grads", "masters", "exp_avgs", "exp_avg_sqs")


@dataclass
class Parts:
    """The six lists that the op takes."""

    weights: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)

    def add(self, layout: str, size: tuple[int, int, int], dtype: torch.dtype) -> Parts:
        """Adds a part whose moments are zero."""
        (height, width, selected), seed = size, len(self.weights)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        chosen = torch.randperm(height, generator=torch.Generator().manual_seed(seed))[:selected].sort().values
        self.weights.append(LAYOUTS[layout](height, width, dtype, seed))
        self.neurons.append(chosen)
        self.grads.append(random(selected, width, seed=seed + 1).to(wide))
        self.masters.append(random(selected, width, seed=seed + 2).to(wide))
        self.exp_avgs.append(torch.zeros_like(self.masters[-1]))
        self.exp_avg_sqs.append(torch.zeros_like(self.masters[-1]))
        return self

    def lists(self) -> list[list[Tensor]]:
        return [getattr(self, name) for name in OPERANDS]

    def step(self, backend: str | None = None, **options) -> Parts:
        indexed_adamw_(*self.lists(), **{**OPTIONS, **options}, backend=backend)
        return self


def mixed_parts() -> Parts:
    """Parts of every size, layout and dtype, in no order."""
    parts = Parts()
    for number, size in enumerate([*SIZES, (16, 300, 16), (900, 300, 200)]):
        for layout in list(LAYOUTS)[number % 2 :: 2]:
            parts.add(layout, size, DTYPES[(number + len(layout)) % len(DTYPES)])
    return parts


def torch_states(parts: Parts, steps: int, dtype: torch.dtype, clip: float = 1.0) -> list[dict[str, Tensor]]:
    """Masters and moments after some steps of torch.optim.AdamW with the same gradients, in the dtype."""
    parameters = [torch.nn.Parameter(master.to(dtype, copy=True)) for master in parts.masters]
    options = {name: OPTIONS[name] for name in ("lr", "eps", "weight_decay")}
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    optimizer = torch.optim.AdamW(parameters, **options, betas=betas, foreach=False)
    for parameter, grad in zip(parameters, parts.grads, strict=True):
        parameter.grad = grad.to(dtype) * clip
    for _ in range(steps):
        optimizer.step()
    return [{"master": parameter.detach(), **optimizer.state[parameter]} for parameter in parameters]


def states(parts: Parts) -> list[dict[str, Tensor]]:
    names = ("master", "exp_avg", "exp_avg_sq")
    triples = zip(parts.masters, parts.exp_avgs, parts.exp_avg_sqs, strict=True)
    return [dict(zip(names, triple, strict=True)) for triple in triples]


def bits(values: Tensor) -> Tensor:
    """The values as integers, in which NaN equals NaN."""
    whole = values.contiguous() if values._base is None else values._base
    return whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_equals_torch(backend):
    parts = Parts()
    for layout in LAYOUTS:
        parts.add(layout, (77, 63, 19), torch.float64)
    parts.weights[-1] = torch.empty(0, dtype=torch.float64)
    expected = torch_states(parts, 7, torch.float64, clip=0.3)
    for step in range(1, 8):
        parts.step(backend, step=step, clip=torch.tensor(0.3, dtype=torch.float64))
    # A few roundings per step, of values of about one.
    for ours, theirs in zip(states(parts), expected, strict=True):
        for name, values in ours.items():
            torch.testing.assert_close(values, theirs[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_within_budget(backend, dtype, layout):
    parts = Parts().add(layout, (150, 431, 77), dtype)
    torchs, truths = (torch_states(parts, 10, wide)[0] for wide in (torch.float32, torch.float64))
    for step in range(1, 11):
        parts.step(backend, step=step)
    for name, values in states(parts)[0].items():
        assert_within_budget(values, torchs[name], truths[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "none"])
def test_weights_are_the_rounded_masters_and_nothing_else_moves(backend, dtype, layout):
    for size in SIZES:
        parts = Parts().add(layout, size, dtype)
        (weight,), (chosen,) = parts.weights, parts.neurons
        # What is not selected is NaN: reading any of it would show in the masters.
        whole = weight if weight._base is None else weight._base
        whole.fill_(float("nan"))
        expected, grads = whole.clone(), copy.deepcopy(parts.grads)
        parts.step(backend, step=1)
        view = expected.as_strided(weight.shape, weight.stride(), weight.storage_offset())
        view[chosen] = parts.masters[0].to(dtype)
        assert torch.equal(bits(whole), bits(expected)), size
        assert parts.masters[0].isfinite().all() and torch.equal(parts.grads[0], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_parts_at_once_are_as_each_alone(backend):
    together, alone = mixed_parts(), mixed_parts()
    for step in (1, 2, 3):
        together.step(backend, step=step)
        for part in zip(*alone.lists(), strict=True):
            indexed_adamw_(*([tensor] for tensor in part), **OPTIONS, step=step, backend=backend)
    for left, right in zip(together.lists(), alone.lists(), strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_scales_the_gradients(backend):
    clipped, scaled = (Parts().add("rows", (63, 257, 19), torch.float32) for _ in range(2))
    scaled.grads = [grad * 0.37 for grad in scaled.grads]
    clipped.step(backend, step=1, clip=torch.tensor(0.37))
    scaled.step(backend, step=1)
    # The factor and the gradient may be multiplied inside a fused operation, which rounds once less.
    torch.testing.assert_close(states(clipped), states(scaled), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.9)])
def test_means_of_no_memory_are_the_gradient(backend, beta1, beta2):
    parts = Parts().add("columns", (63, 77, 19), torch.bfloat16)
    # Averages beside which the gradient is small: subtracting them and adding them again would lose it.
    parts.exp_avgs[0].fill_(1e6)
    parts.exp_avg_sqs[0].fill_(1e6)
    parts.step(backend, step=3, beta1=beta1, beta2=beta2)
    grad = parts.grads[0]
    torch.testing.assert_close(parts.exp_avgs[0], grad + beta1 * (1e6 - grad), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.exp_avg_sqs[0], beta2 * 1e6 + (1 - beta2) * grad**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_nan_stays_where_it_is_and_large_values_round_to_infinity(backend, dtype, layout):
    parts = Parts().add(layout, (63, 77, 19), dtype)
    parts.grads[0][2, 3] = float("nan")
    if dtype != torch.float64:
        # A NaN that rounding by a carry would turn into zero.
        parts.masters[0].view(torch.int32)[4, 5] = 0x7FFFFFFF
    parts.masters[0][6, 7] = largest = torch.finfo(parts.masters[0].dtype).max
    parts.step(backend, step=1, weight_decay=0.0)
    written = parts.weights[0][parts.neurons[0]]
    expected = [[2, 3], [4, 5]] if dtype != torch.float64 else [[2, 3]]
    assert parts.masters[0].isnan().nonzero().tolist() == written.isnan().nonzero().tolist() == expected
    assert written[6, 7] == torch.tensor(largest, dtype=parts.masters[0].dtype).to(dtype)


@needs_extension
def test_results_do_not_depend_on_the_number_of_threads(set_threads):
    results = []
    for threads in (1, 2, 3, 8):
        set_threads(threads)
        results.append(mixed_parts().step("cpp", step=1).step("cpp", step=2))
    for result in results[1:]:
        for left, right in zip(result.lists(), results[0].lists(), strict=True):
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_side_by_side_in_one_buffer(backend):
    """Halves of a fused projection, by rows and by columns."""
    for fused, halves in (
        (torch.zeros(2 * 20, 31), lambda fused: (fused[:20], fused[20:])),
        (torch.zeros(31, 2 * 20), lambda fused: (fused[:, :20].T, fused[:, 20:].T)),
    ):
        parts = Parts().add("rows", (20, 31, 5), torch.float32).add("rows", (20, 31, 7), torch.float32)
        parts.weights = list(halves(fused))
        parts.step(backend, step=1)
        for weight, chosen, master in zip(parts.weights, parts.neurons, parts.masters, strict=True):
            assert torch.equal(weight[chosen], master)
            assert weight.count_nonzero() == master.count_nonzero()


@needs_extension
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_beyond_two_to_the_31_elements(tmp_path, transposed):
    weight = rows_far_apart(tmp_path / "weight", stride=2**31 + 64, width=64)
    size = (64, 2, 9) if transposed else (2, 64, 1)
    parts = Parts().add("rows", size, torch.bfloat16)
    parts.weights = [weight.T if transposed else weight]
    parts.step("cpp", step=1)
    assert torch.equal(parts.weights[0][parts.neurons[0]], parts.masters[0].bfloat16())


def test_nothing_to_do():
    indexed_adamw_([], [], [], [], [], [], lr=0.1, step=1)
    empty = Parts().add("rows", (0, 5, 0), torch.float32).add("columns", (5, 0, 2), torch.float32)
    empty.step(step=1)
    assert [tuple(master.shape) for master in empty.masters] == [(0, 5), (2, 0)]


@pytest.mark.parametrize("clip", [None, torch.tensor(0.5)])
def test_opcheck(clip):
    parts = Parts().add("rows", (9, 13, 3), torch.float32).add("columns", (9, 13, 2), torch.bfloat16)
    parts.add("none", (9, 13, 2), torch.float32)
    arguments = (*parts.lists(), clip, *OPTIONS.values(), 3)
    torch.library.opcheck(torch.ops.lape_fast.indexed_adamw_.default, arguments)


def test_compiles_without_a_graph_break():
    def step(parts: list[list[Tensor]]) -> Tensor:
        indexed_adamw_(*parts, **OPTIONS, step=2)
        return parts[3][0] + 1

    compiled, eager = (
        Parts().add("rows", (9, 13, 3), torch.float32).add("columns", (9, 13, 2), torch.bfloat16) for _ in range(2)
    )
    result = torch.compile(step, fullgraph=True)(compiled.lists())
    assert torch.equal(result, step(eager.lists()))
    for left, right in zip(compiled.lists(), eager.lists(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def one_part(**changes: Tensor) -> list[list[Tensor]]:
    """A part of 2 of 6 neurons of 4 entries, with some of its tensors replaced."""
    part = {
        "weights": torch.zeros(6, 4),
        "neurons": torch.tensor([1, 4]),
        **{name: torch.zeros(2, 4) for name in OPERANDS[2:]},
    }
    return [[{**part, **changes}[name]] for name in OPERANDS]


VALUES = torch.zeros(2, 4)
WRONG = {
    "dtype of a weight": ({"weights": torch.zeros(6, 4, dtype=torch.int32)}, "A weight must be floating"),
    "width": ({"weights": torch.zeros(6, 5)}, r"master must be contiguous torch.float32 \[2, 5\]"),
    "dimensions": ({"weights": torch.zeros(6, 4, 1)}, "A weight must be"),
    "fp32 master of fp64": ({"weights": torch.zeros(6, 4).double()}, "must be contiguous torch.float64"),
    "fp64 master of fp32": ({"masters": VALUES.double()}, "master must be contiguous torch.float32"),
    "half master": ({"weights": torch.zeros(0), "masters": VALUES.half()}, "master must be contiguous"),
    "number of neurons": ({"neurons": torch.tensor([1])}, r"\[1, 4\] on cpu for its 1 neurons"),
    "dtype of neurons": ({"neurons": torch.tensor([1, 4], dtype=torch.int32)}, "neurons must be int64"),
    "neurons in two dimensions": ({"neurons": torch.tensor([[1, 4]])}, "neurons must be int64"),
    "neuron too high": ({"neurons": torch.tensor([1, 6])}, "within the 6 rows .* from 1 to 6"),
    "neuron too low": ({"neurons": torch.tensor([-1, 4])}, "from -1 to 4"),
    "neuron twice": ({"neurons": torch.tensor([4, 4])}, "increase strictly"),
    "neurons unsorted": ({"neurons": torch.tensor([4, 1])}, "increase strictly"),
    "shape of a gradient": ({"grads": torch.zeros(2, 5)}, "grad must be contiguous and match"),
    "dtype of a gradient": ({"grads": VALUES.bfloat16()}, "grad must be contiguous and match"),
    "strides of a gradient": ({"grads": torch.zeros(4, 2).T}, r"strides \[1, 2\]"),
    "strides of a master": ({"masters": torch.zeros(4, 2).T}, r"strides \[1, 2\]"),
    "shape of a mean": ({"exp_avgs": torch.zeros(1, 4)}, "exp_avg must be contiguous"),
    "shape of a square": ({"exp_avg_sqs": torch.zeros(2, 4, 1)}, "exp_avg_sq must be contiguous"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ShapeError, match=message):
        indexed_adamw_(*one_part(**changes), lr=0.1, step=1)


@needs_extension
@pytest.mark.parametrize("changes", [changes for changes, _ in WRONG.values()], ids=WRONG.keys())
def test_the_native_op_itself_refuses_them_too(changes):
    with pytest.raises(RuntimeError, match="must|CPU kernels take"):
        torch.ops.lape_fast.indexed_adamw_(*one_part(**changes), None, *OPTIONS.values(), 1)


def test_wrong_lists_steps_and_factors_are_named():
    lists = one_part()
    with pytest.raises(ShapeError, match=r"\[0, 1, 1, 1, 1, 1\] tensors"):
        indexed_adamw_([], *lists[1:], lr=0.1, step=1)
    with pytest.raises(ShapeError, match="step is 0"):
        indexed_adamw_(*lists, lr=0.1, step=0)
    with pytest.raises(ShapeError, match="clip must be an fp32"):
        indexed_adamw_(*lists, lr=0.1, step=1, clip=torch.ones(1))
    with pytest.raises(ShapeError, match="clip must be an fp32"):
        indexed_adamw_(*lists, lr=0.1, step=1, clip=torch.tensor(1))


BUFFER = torch.zeros(60)
OVERLAPS = {
    "a master that is the gradient": {"grads": VALUES, "masters": VALUES},
    "a master inside the weight": {"weights": BUFFER[:24].view(6, 4), "masters": BUFFER[20:28].view(2, 4)},
    "moments": {"exp_avgs": BUFFER[:8].view(2, 4), "exp_avg_sqs": BUFFER[7:15].view(2, 4)},
    "rows of a weight": {"weights": torch.zeros(4).expand(6, 4)},
    "entries of a weight": {"weights": torch.zeros(6, 1).expand(6, 4)},
    "rows that reach into each other": {"weights": BUFFER.as_strided((6, 4), (3, 1))},
    "columns that reach into each other": {"weights": BUFFER.as_strided((6, 4), (1, 5))},
}


@needs_extension
@pytest.mark.parametrize("changes", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_the_native_op_refuses_what_threads_would_race_for(changes):
    with pytest.raises(RuntimeError, match="overlap in memory|share memory"):
        indexed_adamw_(*one_part(**changes), lr=0.1, step=1, backend="cpp")


@needs_extension
def test_the_native_op_refuses_a_weight_in_two_parts():
    first, second = one_part(), one_part()
    lists = [left + right for left, right in zip(first, second, strict=True)]
    for other in (lists[0][0], lists[0][0].as_strided((6, 4), (4, 1), 0), lists[0][0][1:]):
        lists[0][1] = other
        with pytest.raises(RuntimeError, match="A weight and A weight overlap"):
            indexed_adamw_(*lists[:1], [torch.tensor([1, 4]), torch.tensor([0, 2])], *lists[2:], lr=0.1, step=1)


@needs_extension
def test_the_native_op_refuses_lists_of_other_lengths_and_steps_before_the_first():
    lists = one_part()
    with pytest.raises(RuntimeError, match="one of each for every part"):
        torch.ops.lape_fast.indexed_adamw_([], *lists[1:], None, *OPTIONS.values(), 1)
    with pytest.raises(RuntimeError, match="step is 0"):
        torch.ops.lape_fast.indexed_adamw_(*lists, None, *OPTIONS.values(), 0)
    with pytest.raises(RuntimeError, match="clip must be"):
        torch.ops.lape_fast.indexed_adamw_(*lists, torch.ones(1), *OPTIONS.values(), 1)
