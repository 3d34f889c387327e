"""The loss of a frozen head without logits: dense autograd in fp64, torch's error budget, and what it never does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lape_fast.errors import ShapeError, TrainingError
from lape_fast.ops import linear_cross_entropy
from lape_fast.ops.linear_cross_entropy import CHUNK_ROWS, reference
from tests.ops.oracles import DTYPES, LargestTensor, assert_within_budget, random

# More rows than one chunk and an odd rest; sizes that are multiples of nothing.
T, D, V = CHUNK_ROWS + 77, 23, 51

VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "scale and softcap": {"scale": 3.0, "softcap": 2.0},
    "sum": {"num_items": 1},
    "given number": {"num_items": 7},
    "given number in a tensor": {"num_items": torch.tensor(7)},
}


def inputs(dtype: torch.dtype = torch.float64, rows: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels, a third of them ignored."""
    hidden, weight = random(rows, D, dtype=dtype), random(V, D, dtype=dtype, scale=D**-0.5, seed=1)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(V, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 1 / 3] = -100
    return hidden, weight, labels


def eager(hidden, weight, labels, bias=None, scale=1.0, softcap=None, num_items=None) -> Tensor:
    """All logits in the dtype of ``hidden``, as transformers computes them; their loss in fp32, or fp64."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


def loss_and_gradient(function, hidden: Tensor, *rest, upstream: float = 1.0, **named) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    loss = function(hidden, *rest, **named)
    (loss * upstream).backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_within_torchs_error(dtype, variant, biased, poisoned_memory):
    hidden, weight, labels = inputs(dtype)
    bias = random(V, dtype=dtype, seed=3) if biased else None
    named = VARIANTS[variant]
    wide = None if bias is None else bias.double()
    truth = loss_and_gradient(eager, hidden.double(), weight.double(), labels, bias=wide, **named)
    torchs = loss_and_gradient(eager, hidden, weight, labels, bias=bias, **named)
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, bias=bias, **named)
    assert_within_budget(ours[1], torchs[1], truth[1])
    assert ours[0].dtype == torchs[0].dtype
    # One number, where torch's own may be right by luck: one resolution each for logits, log, sum and division.
    assert ours[0].double().item() == pytest.approx(truth[0].item(), rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_formula(variant):
    arguments = inputs()
    ours = loss_and_gradient(reference, *arguments, **VARIANTS[variant])
    torchs = loss_and_gradient(eager, *arguments, **VARIANTS[variant])
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    hidden, weight, labels = inputs(rows=5)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, labels, softcap=softcap), hidden)


def test_confident_predictions_keep_their_small_gradients():
    # Here p of the label is 1 up to rounding: what is left of the gradient must not drown in bf16 roundings of 1.
    weight = torch.eye(8, dtype=torch.bfloat16) * 8
    hidden, labels = torch.eye(8, dtype=torch.bfloat16), torch.arange(8)
    truth = loss_and_gradient(eager, hidden.double(), weight.double(), labels)
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    # Few roundings, each by at most half of bf16's resolution, relative to every entry and not only to the largest.
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=2**-7, atol=0)


def test_leading_dimensions_are_tokens():
    hidden, weight, labels = inputs(rows=24)
    loss, gradient = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    folded = loss_and_gradient(linear_cross_entropy, hidden.view(2, 3, 4, D), weight, labels.view(2, 3, 4))
    assert folded[0].equal(loss) and folded[1].view(24, D).equal(gradient)


def test_strided_inputs():
    hidden, weight, labels = inputs(rows=24)
    right = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    strided = hidden.t().contiguous().t(), weight.t().contiguous().t(), labels.repeat_interleave(2)[::2]
    torch.testing.assert_close(loss_and_gradient(linear_cross_entropy, *strided), right)


def test_the_upstream_gradient_scales_every_backward():
    hidden, weight, labels = inputs()
    _, once = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels) * 3
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, 3 * once)
    loss.backward()
    torch.testing.assert_close(hidden.grad, 6 * once)


def test_fp16_gradients_survive_until_the_loss_is_scaled():
    # Divided by this many tokens before it is scaled, fp16 would round the gradient to nothing.
    hidden, weight, labels = inputs(torch.float16, rows=9)
    named = {"num_items": 10_000_000}
    _, ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, upstream=1e7, **named)
    truth = loss_and_gradient(eager, hidden.double(), weight.double(), labels, upstream=1e7, **named)[1]
    torchs = loss_and_gradient(eager, hidden, weight, labels, upstream=1e7, **named)[1]
    assert_within_budget(ours, torchs, truth)


@pytest.mark.parametrize("variant", ["plain", "softcap", "sum", "given number"])
def test_chunks_of_padding(variant):
    hidden, weight, labels = inputs(rows=2 * CHUNK_ROWS)
    labels[:CHUNK_ROWS] = -100
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, **VARIANTS[variant])
    torch.testing.assert_close(ours, loss_and_gradient(eager, hidden, weight, labels, **VARIANTS[variant]))
    assert not ours[1][:CHUNK_ROWS].any()


@pytest.mark.parametrize("num_items", [None, 0, 1])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_but_padding(rows, num_items):
    hidden, weight, labels = inputs(rows=rows)
    labels.fill_(-100)
    items = None if num_items is None else torch.tensor(num_items)
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, num_items=items)
    torchs = loss_and_gradient(eager, hidden, weight, labels, num_items=items)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert ours[0].isnan() == (num_items != 1)


def test_padding_is_ignored_whatever_its_hidden_state_is():
    hidden, weight, labels = inputs(rows=9)
    right = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    hidden[labels == -100] = torch.nan
    ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("named", [{}, {"softcap": 1.5}, {"scale": 0.3}], ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype, named):
    rows, words = 3 * CHUNK_ROWS, 200
    hidden = random(rows, D, dtype=dtype).requires_grad_()
    weight, labels = random(words, D, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels, **named).backward()
    assert seen.elements == CHUNK_ROWS * words


def test_it_never_waits_for_the_device():
    # A meta tensor has no values: whatever reads one raises.
    hidden = torch.empty(T, D, device="meta", requires_grad=True)
    weight, labels = torch.empty(V, D, device="meta"), torch.empty(T, dtype=torch.int64, device="meta")
    num_items = torch.empty((), device="meta")
    linear_cross_entropy(hidden, weight, labels).backward()
    linear_cross_entropy(hidden, weight, labels, num_items=num_items, softcap=2.0).backward()
    assert hidden.grad.shape == (T, D)


def count_flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_two_products_and_one_without_gradients():
    hidden, weight, labels = inputs(torch.float32)
    assert count_flops(lambda: linear_cross_entropy(hidden, weight, labels)) == 2 * T * D * V
    hidden.requires_grad_()
    assert count_flops(lambda: linear_cross_entropy(hidden, weight, labels).backward()) == 4 * T * D * V
    with torch.no_grad():
        assert count_flops(lambda: linear_cross_entropy(hidden, weight, labels)) == 2 * T * D * V
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, labels = inputs()
    loss, _ = loss_and_gradient(linear_cross_entropy, hidden, weight, labels, softcap=2.0)
    with torch.no_grad():
        assert linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, softcap=2.0).equal(loss)


def test_autocast_computes_the_products_in_its_dtype():
    hidden, weight, labels = inputs(torch.float32)
    truth = loss_and_gradient(eager, hidden.double(), weight.double(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradient(linear_cross_entropy, hidden, weight, labels)
        torchs = loss_and_gradient(eager, hidden, weight, labels)
        mixed = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.float32
    assert_within_budget(ours[1], torchs[1], truth[1])
    assert mixed.equal(ours[0])
    with torch.autocast("cpu", torch.bfloat16):
        double = loss_and_gradient(linear_cross_entropy, hidden.double(), weight.double(), labels)
    torch.testing.assert_close(double, truth)


def test_torch_compile():
    hidden, weight, labels = inputs(torch.float32)
    weight_of_body = random(D, D, seed=5)

    def step(hidden):
        return linear_cross_entropy(F.silu(hidden @ weight_of_body), weight, labels, softcap=2.0) * 2

    compiled = torch.compile(step, backend="aot_eager")
    # Two programs with the same operators, differently grouped.
    torch.testing.assert_close(loss_and_gradient(compiled, hidden), loss_and_gradient(step, hidden))
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), step(hidden))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5, D, dtype=torch.int64)}, "hidden must be a floating-point tensor"),
        ({"weight": torch.zeros(V, D + 1)}, r"head's weight must be \[V, D\]"),
        ({"weight": torch.zeros(V)}, r"head's weight must be \[V, D\]"),
        ({"weight": torch.zeros(V, D, dtype=torch.bfloat16)}, "convert one of them"),
        ({"bias": torch.zeros(V + 1)}, r"head's bias must be \[V\]"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "one per row"),
        ({"labels": torch.zeros(5, dtype=torch.int32)}, "one per row"),
        ({"labels": torch.full((5,), V)}, f"from {V} to {V}, but the head has {V} words"),
        ({"labels": torch.tensor([0, -100, -1, 2, 3])}, "from -1 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"hidden": torch.zeros(5, D), "weight": torch.zeros(V, D), "labels": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(ShapeError, match=message) as refused:
        linear_cross_entropy(**{**arguments, **change})
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_that_is_trained_is_refused(name):
    hidden, weight, labels = inputs(rows=5)
    head = {"weight": weight, "bias": torch.zeros(V, dtype=torch.float64)}
    head[name].requires_grad_()
    with pytest.raises(TrainingError, match=f"The head's {name} needs a gradient"):
        linear_cross_entropy(hidden, labels=labels, **head)
