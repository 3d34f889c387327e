"""The Triton kernels in Triton's interpreter: exact counts, errors within budget, every output written."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lape_fast.ops import ACTIVATIONS, slot_map
from tests.ops import triton_helpers as helpers

REPOSITORY = Path(__file__).resolve().parents[2]
LANGUAGES = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EAGER = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu}
# Languages of neighbouring tokens, by token number: runs end inside the kernel's steps of rows and inside its tiles.
ID_PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "one-language": lambda token: torch.full_like(token, 3),
    "runs": lambda token: token // 13 % LANGUAGES,
    "long-runs": lambda token: token // 37 % LANGUAGES,
    "runs-after-uncounted-token": lambda token: torch.where(token % 13 == 0, -1, token // 13 % LANGUAGES),
    "shuffled": lambda token: token * 7919 % (LANGUAGES + 1) - 1,
    "alternating": lambda token: token % 2,
    "none": lambda token: torch.full_like(token, -1),
}


@pytest.fixture(scope="module")
def run() -> Iterator[Callable]:
    """Calls a function of triton_helpers where Triton interprets."""
    with helpers.interpreter_process() as process:
        yield functools.partial(helpers.call, process)


def sample(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def language_ids_of(pattern: str, tokens: int) -> Tensor:
    return ID_PATTERNS[pattern](torch.arange(tokens)).to(torch.int32)


def counted(gate: Tensor, language_ids: Tensor, counts: Tensor) -> Tensor:
    """The counts that a loop over the languages gives."""
    fires = gate.float() > 0
    return counts + torch.stack([fires[language_ids == language].sum(0) for language in range(len(counts))])


def eager_forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    activated = EAGER[activation](gate)
    return activated if up is None else activated * up


def eager_backward(
    grad_h: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, dL/dgate and dL/dup from torch's own autograd."""
    gate = gate.detach().clone().requires_grad_()
    up = None if up is None else up.detach().clone().requires_grad_()
    h = eager_forward(gate, up, activation)
    h.backward(grad_h)
    return h.detach(), gate.grad, None if up is None else up.grad


def assert_within_budget(value: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The largest error is at most twice that of eager PyTorch in the same dtype, both against fp64."""
    error, budget = ((result.double() - truth).abs().max().item() for result in (value, eager))
    assert error <= 2 * budget


def test_importing_lape_fast_leaves_triton_alone():
    program = "import sys, lape_fast, lape_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    "pattern, dtype",
    [*((pattern, torch.bfloat16) for pattern in ID_PATTERNS), ("runs", torch.float32), ("runs", torch.float16)],
    ids=str,
)
def test_counts_are_exact_for_every_order_of_languages(run, pattern, dtype):
    gate, up = sample(77, 257, dtype=dtype), sample(77, 257, dtype=dtype, seed=1)
    language_ids = language_ids_of(pattern, 77)
    counts = torch.arange(LANGUAGES * 257).view(LANGUAGES, 257)
    _, result = run(helpers.forward, gate, up, "silu", language_ids, counts)
    assert torch.equal(result, counted(gate, language_ids, counts))


@pytest.mark.parametrize("tokens, neurons", [(1, 1), (1, 431), (63, 77), (77, 431), (431, 63)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_counts_and_h_are_exact_at_odd_sizes(run, tokens, neurons, gated):
    gate = sample(tokens, neurons, dtype=torch.bfloat16)
    up = sample(tokens, neurons, dtype=torch.bfloat16, seed=1) if gated else None
    language_ids = language_ids_of("runs", tokens)
    counts = torch.zeros(LANGUAGES, neurons, dtype=torch.int64)
    h, result = run(helpers.forward, gate, up, "relu", language_ids, counts)
    assert torch.equal(result, counted(gate, language_ids, counts))
    assert torch.equal(h, eager_forward(gate, up, "relu"))


@pytest.mark.parametrize("pattern", ["runs", "long-runs", "shuffled"])
def test_tall_tiles_count_the_same(run, pattern):
    gate, up = sample(300, 77, dtype=torch.bfloat16), sample(300, 77, dtype=torch.bfloat16, seed=1)
    language_ids = language_ids_of(pattern, 300)
    counts = torch.zeros(LANGUAGES, 77, dtype=torch.int64)
    h, result = run(helpers.forward_in_tall_tiles, gate, up, "relu", language_ids, counts)
    assert torch.equal(result, counted(gate, language_ids, counts))
    assert torch.equal(h, eager_forward(gate, up, "relu"))


def test_the_autotuners_trials_leave_no_trace(run):
    grad_h, gate, up = (sample(77, 257, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    counts = torch.arange(LANGUAGES * 257).view(LANGUAGES, 257)
    language_ids = language_ids_of("runs", 77)
    for operands in ((gate, up), (gate, None)):
        arguments = (*operands, "relu", language_ids, counts)
        (h, result), trials = run(helpers.autotuned, "forward", *arguments)
        assert trials > 1
        assert torch.equal(h, eager_forward(*operands, "relu"))
        assert torch.equal(result, counted(gate, language_ids, counts))
        (grad_gate, grad_up, *_), trials = run(helpers.autotuned, "backward", grad_h, *operands, "relu")
        assert trials > 1
        _, *expected = eager_backward(grad_h, *operands, "relu")
        assert torch.equal(grad_gate, expected[0])
        assert grad_up is None or torch.equal(grad_up, expected[1])


def test_language_ids_out_of_range_are_not_counted(run):
    gate = sample(63, 77)
    language_ids = (torch.arange(63) % 9 - 2).to(torch.int32)
    language_ids[:4] = torch.tensor([2**31 - 1, -(2**31), LANGUAGES, -2], dtype=torch.int32)
    counts = torch.zeros(LANGUAGES, 77, dtype=torch.int64)
    _, result = run(helpers.launch_forward, gate, None, "gelu", language_ids, counts)
    assert torch.equal(result, counted(gate, language_ids, counts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_h_is_within_the_error_budget(run, activation, gated, dtype):
    gate, up = 3 * sample(33, 257, dtype=dtype), sample(33, 257, dtype=dtype, seed=1) if gated else None
    h, _ = run(helpers.forward, gate, up, activation)
    truth = eager_forward(gate.double(), up.double() if gated else None, activation)
    assert_within_budget(h, eager_forward(gate, up, activation), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_within_the_error_budget(run, activation, gated, dtype):
    grad_h, gate = sample(33, 257, dtype=dtype, seed=2), 3 * sample(33, 257, dtype=dtype)
    up = sample(33, 257, dtype=dtype, seed=1) if gated else None
    every_neuron = slot_map(torch.arange(257), 257)
    grad_gate, grad_up, hidden, _ = run(helpers.backward, grad_h, gate, up, activation, every_neuron, 257)
    eager = eager_backward(grad_h, gate, up, activation)
    truth = eager_backward(grad_h.double(), gate.double(), up.double() if gated else None, activation)
    assert_within_budget(hidden, eager[0], truth[0])
    assert_within_budget(grad_gate, eager[1], truth[1])
    if gated:
        assert_within_budget(grad_up, eager[2], truth[2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_precision_is_kept(run, activation):
    grad_h, gate, up = (sample(9, 77, seed=seed).double() for seed in range(3))
    h, _ = run(helpers.forward, gate, up, activation)
    grad_gate, grad_up, *_ = run(helpers.backward, grad_h, gate, up, activation)
    for result, truth in zip((h, grad_gate, grad_up), eager_backward(grad_h, gate, up, activation), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_and_extreme_gates_stay_finite(run, activation, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    gate = torch.tensor([[math.nan, 0.0, -0.0, smallest, -smallest, 3e4, -3e4, 100.0, -100.0]], dtype=dtype)
    up, grad_h = torch.ones_like(gate), torch.ones_like(gate)
    counts = torch.zeros(1, gate.shape[1], dtype=torch.int64)
    h, counts = run(helpers.forward, gate, up, activation, torch.zeros(1, dtype=torch.int32), counts)
    grad_gate, grad_up, *_ = run(helpers.backward, grad_h, gate, up, activation)
    assert counts.tolist() == [[0, 0, 0, 1, 0, 1, 0, 1, 0]]
    truths = eager_backward(grad_h.double(), gate.double(), up.double(), activation)
    for result, truth in zip((h, grad_gate, grad_up), truths, strict=True):
        torch.testing.assert_close(result[:, 1:].double(), truth[:, 1:], rtol=0.01, atol=smallest)
    assert h[0, 0].isnan() and grad_up[0, 0].isnan()


def test_rows_of_a_wider_buffer_are_read_in_place(run):
    buffer = sample(63, 2 * 77 + 3, dtype=torch.bfloat16)
    gate, up = buffer[:, :77], buffer[:, 77 : 2 * 77]
    language_ids = language_ids_of("runs", 63)
    counts = torch.zeros(LANGUAGES, 77, dtype=torch.int64)
    h, result = run(helpers.forward, gate, up, "relu", language_ids, counts)
    assert torch.equal(h, eager_forward(gate, up, "relu"))
    assert torch.equal(result, counted(gate, language_ids, counts))


def test_backward_overwrites_only_its_rows_of_a_wider_buffer(run):
    buffer = sample(63, 2 * 77 + 3, dtype=torch.bfloat16)
    grad_h = sample(63, 80, dtype=torch.bfloat16, seed=1)[:, 3:]
    gate, up = buffer[:, :77], buffer[:, 77 : 2 * 77]
    expected, expected_up, *_ = run(helpers.backward, grad_h.contiguous(), gate.contiguous(), up.contiguous(), "silu")
    grad_gate, grad_up, *_ = run(helpers.backward, grad_h, gate, up, "silu")
    assert torch.equal(grad_gate, expected) and torch.equal(grad_up, expected_up)
    result = grad_gate.as_strided(buffer.shape, buffer.stride(), 0)
    assert torch.equal(result[:, 2 * 77 :], buffer[:, 2 * 77 :])


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(
    "neurons",
    [[0], [256], [5, 6, 130, 255], list(range(257)), [200, 3, 90]],
    ids=["first", "last", "several", "all", "unsorted"],
)
def test_selected_columns_are_stored_by_slot(run, neurons, gated):
    grad_h, gate = sample(77, 257, dtype=torch.bfloat16), sample(77, 257, dtype=torch.bfloat16, seed=1)
    up = sample(77, 257, dtype=torch.bfloat16, seed=2) if gated else None
    slots = slot_map(torch.tensor(neurons), 257)
    grad_gate, grad_up, hidden, grads = run(helpers.backward, grad_h, gate, up, "relu", slots, len(neurons))
    parts = [grad_gate, grad_up] if gated else [grad_gate]
    assert torch.equal(grads, torch.cat([part[:, neurons] for part in parts], dim=1))
    assert torch.equal(hidden, eager_forward(gate, up, "relu")[:, neurons])


@pytest.mark.parametrize("with_slots", [True, False], ids=["empty-slots", "no-slots"])
def test_selecting_nothing_still_gives_the_gradients(run, with_slots):
    grad_h, gate, up = (sample(63, 77, seed=seed) for seed in range(3))
    slots = torch.full((77,), -1, dtype=torch.int32) if with_slots else None
    grad_gate, grad_up, hidden, grads = run(helpers.backward, grad_h, gate, up, "relu", slots, 0)
    _, *expected = eager_backward(grad_h, gate, up, "relu")
    assert torch.equal(grad_gate, expected[0]) and torch.equal(grad_up, expected[1])
    assert hidden.shape == (63, 0) and grads.shape == (63, 0)


@pytest.mark.parametrize("shape", [(0, 77), (5, 0), (0, 0)], ids=str)
def test_empty_inputs_give_empty_outputs(run, shape):
    counts = torch.zeros(LANGUAGES, shape[1], dtype=torch.int64)
    h, result = run(helpers.forward, sample(*shape), sample(*shape), "silu", language_ids_of("runs", shape[0]), counts)
    *_, hidden, grads = run(helpers.backward, sample(*shape), sample(*shape), sample(*shape), "silu")
    assert h.shape == shape and not result.any()
    assert hidden.shape == (shape[0], 0) and grads.shape == (shape[0], 0)


def test_leading_dimensions_are_kept(run):
    gate, up = sample(3, 7, 77), sample(3, 7, 77, seed=1)
    language_ids = language_ids_of("runs", 21).view(3, 7)
    counts = torch.zeros(LANGUAGES, 77, dtype=torch.int64)
    h, result = run(helpers.forward, gate, up, "relu", language_ids, counts)
    assert torch.equal(h, eager_forward(gate, up, "relu"))
    assert torch.equal(result, counted(gate.view(21, 77), language_ids.view(21), counts))


UPDATE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def update_lists(sizes: list[tuple[int, int, int]], dtype: torch.dtype) -> list[list[Tensor]]:
    """The six lists of ``indexed_adamw_`` for a row part and a column part of each size (F, D, K)."""
    lists = [[] for _ in range(6)]
    for number, (height, width, selected) in enumerate(sizes * 2):
        columns = number >= len(sizes)
        weight = sample(*((width, height) if columns else (height, width)), dtype=dtype, seed=number)
        chosen = torch.randperm(height, generator=torch.Generator().manual_seed(number))[:selected].sort().values
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad, master = sample(2, selected, width, seed=number + 1).to(wide)
        part = (weight.T if columns else weight, chosen, grad, master, torch.zeros_like(master))
        for tensors, values in zip(lists, (*part, torch.zeros_like(master)), strict=True):
            tensors.append(values)
    return lists


def update_by_torch(lists: list[list[Tensor]], clip: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Masters and moments after two steps of torch's AdamW in the dtype."""
    parameters = [torch.nn.Parameter(master.to(dtype, copy=True)) for master in lists[3]]
    options = {name: UPDATE[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, **options, betas=(UPDATE["beta1"], UPDATE["beta2"]), foreach=False)
    for parameter, grad in zip(parameters, lists[2], strict=True):
        parameter.grad = grad.to(dtype) * clip
    for _ in range(2):
        optimizer.step()
    moments = [optimizer.state[parameter] for parameter in parameters]
    return [(p.detach(), s["exp_avg"], s["exp_avg_sq"]) for p, s in zip(parameters, moments, strict=True)]


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize(
    "sizes",
    [[(1, 1, 1), (63, 77, 19), (5, 1031, 5), (431, 63, 0), (4, 2500, 1)], [(63, 1032, 19), (7, 64, 3)]],
    ids=["odd", "aligned"],
)
def test_the_update_is_torchs_and_the_weights_are_the_rounded_masters(run, sizes, dtype):
    before, lists = update_lists(sizes, dtype), update_lists(sizes, dtype)
    wide = lists[3][0].dtype
    clip = torch.tensor(0.3, dtype=wide)
    for step in (1, 2):
        lists = run(helpers.update, lists, {**UPDATE, "step": step, "clip": clip})
    torchs, truths = (update_by_torch(before, clip.item(), each) for each in (wide, torch.float64))
    for number, (weight, chosen) in enumerate(zip(before[0], lists[1], strict=True)):
        weight[chosen] = lists[3][number].to(dtype)
        assert torch.equal(lists[0][number], weight) and torch.equal(lists[2][number], before[2][number])
        for values, eager, truth in zip(
            (each[number] for each in lists[3:]), torchs[number], truths[number], strict=True
        ):
            if dtype == torch.float64:
                torch.testing.assert_close(values, truth, rtol=1e-13, atol=1e-14)
            elif values.numel():
                # One ulp of the largest value is what a single entry may be off in both.
                assert (values - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-7 * truth.abs().max()


def test_parts_of_several_dtypes_and_without_a_weight(run):
    lists = [[] for _ in range(6)]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        for tensors, more in zip(lists, update_lists([(63, 77, 19)], dtype), strict=True):
            tensors += more
    written = run(helpers.update, lists, {**UPDATE, "step": 1})
    without = [[torch.empty(0, dtype=master.dtype) for master in lists[3]], *lists[1:]]
    unwritten = run(helpers.update, without, {**UPDATE, "step": 1})
    for left, right in zip(written[1:], unwritten[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    for weight, chosen, master in zip(written[0], written[1], written[3], strict=True):
        assert torch.equal(weight[chosen], master.to(weight.dtype))


def test_strided_weights_and_operands_off_the_alignment(run):
    (weights, *others), expected = (
        update_lists([(63, 64, 19)], torch.float32),
        update_lists([(63, 64, 19)], torch.float32),
    )
    # Every third entry of a row, and rows of a wider buffer that begin on no multiple of 16 bytes.
    buffers = torch.zeros(63, 3 * 64), torch.zeros(63, 64 + 5)
    weights = [buffers[0][:, ::3], buffers[1][:, 3:67]]
    # Operands that begin one entry into their storage.
    shifted = [torch.cat([torch.zeros(1), values.flatten()])[1:].view_as(values) for values in others[2]]
    lists = run(helpers.update, [weights, *others[:2], shifted, *others[3:]], {**UPDATE, "step": 1})
    expected = run(helpers.update, expected, {**UPDATE, "step": 1})
    for number, (weight, chosen) in enumerate(zip(lists[0], lists[1], strict=True)):
        assert torch.equal(lists[3][number], expected[3][number])
        assert torch.equal(weight[chosen], expected[3][number])
        whole = weight.as_strided(buffers[number].shape, buffers[number].stride(), 0)
        assert whole.count_nonzero() == expected[3][number].count_nonzero()


def test_neurons_outside_the_weight_are_not_written(run):
    lists = update_lists([(63, 77, 4)], torch.float32)
    lists[1] = [torch.tensor([-1, 0, 62, 63]), torch.tensor([-(2**40), 5, 6, 2**40])]
    before = [weight.clone() for weight in lists[0]]
    weights, neurons, _, masters, *_ = run(helpers.launch_update, lists, 1)
    for weight, expected, chosen, master in zip(weights, before, neurons, masters, strict=True):
        inside = (chosen >= 0) & (chosen < 63)
        expected[chosen[inside]] = master[inside]
        assert torch.equal(weight, expected)
