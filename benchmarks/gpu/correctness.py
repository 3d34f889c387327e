"""Whether the device computes what it should: kernels against fp64 and int64, gradients and training against autograd.

Each check is a plain function that raises AssertionError with a sentence. What it checks is a parameter, so that a test
can see each of them fail. Errors are judged by a budget: at most twice torch's own in the same dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.shapes import SIZES, Shape, build_model, choose_neurons
from benchmarks.gpu.stage import NotMeasured, Stage
from lape_fast.models import find_ffns
from lape_fast.ops import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_backward,
    indexed_adamw_,
    linear_cross_entropy,
    slot_map,
)
from lape_fast.tune import attach_subnetwork

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# [T, F]: whole tiles of the kernels, and sizes that no tile divides.
SIZES_OF_TENSORS = ((512, 1024), (431, 257), (77, 2000), (1, 63))

EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

# Languages of neighbouring tokens by token number, as packs of one, several and many languages have them.
LANGUAGES = 16
PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda token: torch.full_like(token, 3),
    "runs": lambda token: token // 37 % LANGUAGES,
    "gaps": lambda token: torch.where(token % 13 == 0, -1, token // 13 % LANGUAGES),
    "shuffled": lambda token: token * 7919 % (LANGUAGES + 1) - 1,
    "none": lambda token: torch.full_like(token, -1),
}

# More elements than 32 bits count, of an 8B model's width; on the CPU so many would take minutes.
LARGE_ELEMENTS = {"cuda": 2**31 + 2**20, "cpu": 2**18}
LARGE_NEURONS = 14336

POLICIES = ("save", "recompute", "checkpoint")
LEARNING_RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def run(stage: Stage, options: argparse.Namespace) -> None:
    """A row per check: passed, or what was wrong."""
    for name, check in CHECKS.items():
        stage.measure(name, functools.partial(passed, check, stage.device))


def passed(check: Callable[[torch.device], None], device: torch.device) -> dict[str, Any]:
    """Runs a check; there is nothing to say of one that raises nothing."""
    check(device)
    return {"shown": "passed"}


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def largest_error(values: Tensor, truth: Tensor) -> float:
    """The largest difference from the truth."""
    return (values.double() - truth).abs().max().item() if values.numel() else 0.0


def require_budget(found: Tensor, truth: Tensor, allowed: float, what: str) -> None:
    """Raises unless the largest error against the truth is at most twice torch's own, ``allowed``."""
    error = largest_error(found, truth)
    # Not `error > 2 * allowed`, which is false for NaN.
    assert error <= 2 * allowed, f"{what}: the largest error is {error:.3g}, but torch's own is {allowed:.3g}."


def require_equal(found: Tensor, right: Tensor, what: str) -> None:
    """Raises unless all values are equal."""
    wrong = int((found != right).sum()) if found.shape == right.shape else found.numel()
    assert wrong == 0 and found.shape == right.shape, f"{what}: {wrong} of {found.numel()} values differ."


def eager(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """h in the dtype of ``gate``, one torch operation after the other."""
    activated = EAGER[activation](gate)
    return activated if up is None else activated * up


def eager_gradients(gate: Tensor, up: Tensor | None, activation: str, grad_h: Tensor) -> list[Tensor]:
    """dL/dgate and dL/dup by autograd, in the dtype of ``gate``."""
    inputs = [values.detach().clone().requires_grad_() for values in (gate, up) if values is not None]
    eager(*inputs, *([None] if up is None else []), activation).backward(grad_h)
    return [values.grad for values in inputs]


def count_positive(gate: Tensor, language_ids: Tensor, languages: int) -> Tensor:
    """int64 ``[G, F]``: on how many tokens of each language a neuron's gate is positive."""
    return torch.stack([(gate[language_ids == language] > 0).sum(0) for language in range(languages)])


def check_forward(device: torch.device, op: Callable[..., Tensor] = gated_activation) -> None:
    """h within the budget, in every dtype, activation and size, gated and not."""
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for tokens, neurons in SIZES_OF_TENSORS:
                gate = draw(tokens, neurons, dtype=dtype, device=device, scale=3)
                for up in (draw(tokens, neurons, dtype=dtype, device=device, seed=1), None):
                    h = op(gate, up, activation)
                    right = eager(gate.double(), None if up is None else up.double(), activation)
                    what = f"gated_activation, {activation}, {dtype}, [{tokens}, {neurons}]"
                    require_budget(h, right, largest_error(eager(gate, up, activation), right), what)


def check_counts(device: torch.device, op: Callable[..., Tensor] = gated_activation) -> None:
    """Counts equal to int64 sums, for packs of one, several and many languages; h is the same as without counting."""
    for dtype in DTYPES:
        for tokens, neurons in SIZES_OF_TENSORS:
            gate, up = draw(2, tokens, neurons, dtype=dtype, device=device)
            for pattern, language_of in PATTERNS.items():
                language_ids = language_of(torch.arange(tokens)).to(device, torch.int32)
                counts = torch.full((LANGUAGES, neurons), 2**40, dtype=torch.int64, device=device)
                h = op(gate, up, "silu", language_ids, counts)
                what = f"counts of {pattern} languages, {dtype}, [{tokens}, {neurons}]"
                require_equal(counts - 2**40, count_positive(gate, language_ids, LANGUAGES), what)
                require_equal(h, gated_activation(gate, up, "silu"), f"h beside {what}")


def check_large(
    device: torch.device,
    elements: int | None = None,
    forward: Callable[..., Tensor] = gated_activation,
    backward: Callable[..., tuple[Tensor, Tensor]] = gated_activation_backward,
) -> None:
    """The same beyond 2^31 elements, and the backward there: every count, and the first and last rows of the rest."""
    tokens = -(-(elements or LARGE_ELEMENTS[device.type]) // LARGE_NEURONS)
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (
        torch.empty(tokens, LARGE_NEURONS, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        for _ in range(2)
    )
    language_ids = (torch.arange(tokens, device=device) // 1000 % 3).int()
    counts = torch.zeros(3, LARGE_NEURONS, dtype=torch.int64, device=device)
    h = forward(gate, up, "silu", language_ids, counts)
    parts = zip(gate.split(4096), language_ids.split(4096), strict=True)
    what = f"of {tokens} x {LARGE_NEURONS} elements"
    require_equal(counts, sum(count_positive(rows, ids, 3) for rows, ids in parts), f"counts {what}")

    ends = [slice(0, 8), slice(tokens - 8, tokens)]
    before = [(gate[rows].clone(), up[rows].clone()) for rows in ends]
    neurons = torch.tensor([0, 5, LARGE_NEURONS - 1], device=device)
    # h is what backward needs no more, so it serves as a gradient.
    hidden, grads = backward(h, gate, up, "silu", slot_map(neurons, LARGE_NEURONS), 3)
    for rows, (old_gate, old_up) in zip(ends, before, strict=True):
        wide = old_gate.double(), old_up.double()
        right = eager(*wide, "silu")
        allowed = largest_error(eager(old_gate, old_up, "silu"), right)
        require_budget(h[rows], right, allowed, f"h {what}")
        require_budget(hidden[rows], right[:, neurons], allowed, f"compact h {what}")
        owns = eager_gradients(old_gate, old_up, "silu", h[rows])
        rights = eager_gradients(*wide, "silu", h[rows].double())
        for found, own, right in zip((gate, up), owns, rights, strict=True):
            require_budget(found[rows], right, largest_error(own, right), f"gradients {what}")
        compact = torch.cat([gate[rows][:, neurons], up[rows][:, neurons]], 1)
        require_equal(grads[rows], compact, f"compact gradients {what}")


def check_backward(device: torch.device, op: Callable[..., tuple[Tensor, Tensor]] = gated_activation_backward) -> None:
    """Gradients and the compact h within the budget; the compact gradients are columns of the gradients, to the bit."""
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for number, (tokens, width) in enumerate(SIZES_OF_TENSORS):
                gate, grad_h = draw(2, tokens, width, dtype=dtype, device=device, scale=2)
                up = None if number % 2 else draw(tokens, width, dtype=dtype, device=device, seed=1)
                _check_backward_of(gate, up, grad_h, activation, op)


def _check_backward_of(
    gate: Tensor, up: Tensor | None, grad_h: Tensor, activation: str, op: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    width, given = gate.shape[1], [values for values in (gate, up) if values is not None]
    wide = gate.double(), None if up is None else up.double()
    rights, owns = eager_gradients(*wide, activation, grad_h.double()), eager_gradients(gate, up, activation, grad_h)
    right_h = eager(*wide, activation)
    allowed_h = largest_error(eager(gate, up, activation), right_h)
    # None, a few, and all of the neurons.
    for selected in (0, width // 7, width):
        what = f"gated_activation_backward, {activation}, {gate.dtype}, {list(gate.shape)}, {selected} selected"
        order = torch.randperm(width, generator=torch.Generator().manual_seed(selected))
        neurons = order[:selected].sort().values.to(gate.device)
        slots = slot_map(neurons, width) if selected else None
        found = [values.clone() for values in given]
        ups = None if up is None else found[1]
        hidden, grads = op(grad_h, found[0], ups, activation, slots, selected)
        for each, own, right in zip(found, owns, rights, strict=True):
            require_budget(each, right, largest_error(own, right), what)
        require_equal(grads, torch.cat([each[:, neurons] for each in found], 1), f"compact gradients, {what}")
        require_budget(hidden, right_h[:, neurons], allowed_h, f"compact h, {what}")


def torch_adamw(master: Tensor, grad: Tensor, steps: int) -> Tensor:
    """The values after some steps of torch's AdamW with one gradient, in the dtype of both."""
    parameter = nn.Parameter(master.clone())
    parameter.grad = grad
    optimizer = torch.optim.AdamW(
        [parameter], lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, foreach=False
    )
    for _ in range(steps):
        optimizer.step()
    return parameter.detach()


def check_adamw(device: torch.device, op: Callable[..., None] = indexed_adamw_, steps: int = 5) -> None:
    """Masters within the budget, weights equal to the rounded masters, and frozen entries with all their bits."""
    for dtype in DTYPES:
        rows = draw(300, 431, dtype=dtype, device=device)
        columns = draw(431, 300, dtype=dtype, device=device).T
        weights, neurons = [rows, columns], [torch.arange(start, 300, 7, device=device) for start in (5, 0)]
        before = [weight.clone() for weight in weights]
        masters = [weight[chosen].float() for weight, chosen in zip(weights, neurons, strict=True)]
        first = [master.clone() for master in masters]
        grads = [draw(*master.shape, dtype=torch.float32, device=device, seed=2) for master in masters]
        moments = [[torch.zeros_like(master) for master in masters] for _ in range(2)]
        options = {"lr": LEARNING_RATE, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON, "weight_decay": DECAY}
        clip = torch.tensor(0.5, device=device)
        for step in range(1, steps + 1):
            op(weights, neurons, grads, masters, *moments, **options, step=step, clip=clip)
        for number, layout in enumerate(("rows", "columns")):
            what = f"indexed_adamw_, {layout}, {dtype}"
            start, grad = first[number], 0.5 * grads[number]
            right = torch_adamw(start.double(), grad.double(), steps)
            require_budget(masters[number], right, largest_error(torch_adamw(start, grad, steps), right), what)
            expected = before[number].clone()
            expected[neurons[number]] = masters[number].to(dtype)
            require_equal(weights[number], expected, f"weights, {what}")


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of all logits, in the dtype of the hidden states."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def check_loss(device: torch.device, op: Callable[..., Tensor] = linear_cross_entropy) -> None:
    """The loss without logits, and its gradient, within the budget."""
    for dtype in (torch.bfloat16, torch.float32):
        hidden = draw(1500, 64, dtype=dtype, device=device)
        weight = draw(3000, 64, dtype=dtype, device=device, seed=1, scale=0.2)
        labels = torch.arange(1500, device=device) * 7 % 3000
        labels[::11] = -100
        results = []
        for loss, wide in ((op, dtype), (plain_loss, dtype), (plain_loss, torch.float64)):
            states = hidden.detach().to(wide).clone().requires_grad_()
            value = loss(states, weight.to(wide), labels)
            value.backward()
            results.append((value.detach(), states.grad))
        (found, found_grad), (own, own_grad), (right, right_grad) = results
        # torch's single number may be right by chance, so a rounding of the dtype is allowed beside its error.
        error, allowed = largest_error(found, right), 2 * largest_error(own, right)
        allowed += torch.finfo(dtype).eps * right.item()
        assert error <= allowed, f"linear_cross_entropy, {dtype}: {error:.3g} off, where {allowed:.3g} is allowed."
        require_budget(
            found_grad, right_grad, largest_error(own_grad, right_grad), f"linear_cross_entropy's gradient, {dtype}"
        )


def toy_model(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Shape, Tensor]:
    """A small Llama with token ids of two rows."""
    shape = SIZES["toy"][0]
    model = build_model(shape, device, dtype)
    generator = torch.Generator().manual_seed(0)
    return model, shape, torch.randint(shape.vocabulary, (2, 48), generator=generator).to(device)


def toy_neurons(device: torch.device) -> list[Tensor]:
    """The neurons of one language in the small model."""
    options = argparse.Namespace(masks=[])
    return [chosen.to(device) for chosen in choose_neurons(options, SIZES["toy"][0], "cym_Latn")[0]]


def autograd_gradients(model: nn.Module, input_ids: Tensor, neurons: Sequence[Tensor]) -> list[Tensor]:
    """Of the selected rows and columns, out of the dense gradients of all FFN weights; the model stays as it was."""
    own = copy.deepcopy(model).train()
    ffns = find_ffns(own)
    for ffn in ffns:
        for projection in ffn.projections.values():
            projection.weight.requires_grad_(True)
    own(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    selected = []
    for ffn, chosen in zip(ffns, neurons, strict=True):
        if len(chosen):
            gate, up, down = (ffn.projections[name].weight.grad for name in ("gate", "up", "down"))
            selected += [gate[chosen], up[chosen], down[:, chosen].T]
    return selected


def subnetwork_gradients(model: nn.Module, input_ids: Tensor, neurons: Sequence[Tensor], policy: str) -> list[Tensor]:
    """The same by our autograd function; the model stays as it was."""
    own = copy.deepcopy(model).train()
    subnetwork = attach_subnetwork(own, neurons, policy)
    own(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    return [parameter.grad for parameter in subnetwork.parameters()]


def check_gradients(device: torch.device, gradients: Callable[..., list[Tensor]] = subnetwork_gradients) -> None:
    """The subnetwork's gradients under every policy, by their norms: a small matrix has few large errors."""
    neurons = toy_neurons(device)
    for dtype in (torch.float32, torch.bfloat16):
        base, _, input_ids = toy_model(device, dtype)
        torchs = autograd_gradients(base, input_ids, neurons)
        rights = autograd_gradients(copy.deepcopy(base).double(), input_ids, neurons)
        for policy in POLICIES:
            founds = gradients(base, input_ids, neurons, policy)
            for found, own, right in zip(founds, torchs, rights, strict=True):
                error, allowed = ((values.double() - right).norm().item() for values in (found, own))
                what = f"Gradients under {policy}, {dtype}"
                assert error <= 2 * allowed, f"{what}: an error of {error:.3g}, but dense autograd's is {allowed:.3g}."


def check_frozen(device: torch.device, trained: Sequence[Tensor] | None = None, steps: int = 3) -> None:
    """A few steps move every trained row and column, and not a bit of any other weight.

    Args:
        device: where to train.
        trained: the neurons that are said to be trained; by default those that are.
        steps: how many.
    """
    neurons = toy_neurons(device)
    model, _, input_ids = toy_model(device, torch.bfloat16)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    subnetwork = attach_subnetwork(model.train(), neurons)
    optimizer = subnetwork.optimizer(lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
    subnetwork.detach(keep=True)
    after = model.state_dict()
    for number, chosen in enumerate(neurons if trained is None else trained):
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            path = f"model.layers.{number}.mlp.{name}.weight"
            moved = (before[path] != after[path]).any(1 - dim)
            expected = torch.zeros_like(moved)
            expected[chosen] = True
            require_equal(moved, expected, f"moved neurons of {path} after {steps} steps")
            del before[path]
    for name, values in before.items():
        require_equal(after[name], values, f"{name}, which is frozen")


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles within the context."""
    from triton import knobs

    compiled: list[str] = []

    def note(*, fn: Any, **_: Any) -> bool:
        compiled.append(fn.name)
        return False

    earlier, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield compiled
    finally:
        knobs.runtime.jit_cache_hook = earlier


def check_compilations(device: torch.device) -> None:
    """Another number of tokens compiles nothing."""
    if device.type != "cuda":
        raise NotMeasured("Triton compiles for GPUs alone; without one the tests compare its keys")

    def launch(tokens: int) -> None:
        # fp64 is what nothing else here runs, so that the first launch must compile.
        gate, up, grad_h = draw(3, tokens, 1009, dtype=torch.float64, device=device)
        counts = torch.zeros(2, 1009, dtype=torch.int64, device=device)
        gated_activation(gate, up, "silu", torch.zeros(tokens, dtype=torch.int32, device=device), counts)
        slots = slot_map(torch.tensor([3, 700], device=device), 1009)
        gated_activation_backward(grad_h, gate, up, "silu", slots, 2)

    with counted_compilations() as first:
        launch(4096)
    assert first, "The first launches compiled nothing, so this check sees no compilation at all."
    with counted_compilations() as again:
        for tokens in (4097, 4100, 4112, 4031):
            launch(tokens)
    assert not again, f"Other numbers of tokens compiled {', '.join(again)} again."


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "gated_activation": check_forward,
    "counts": check_counts,
    "beyond 2^31 elements": check_large,
    "gated_activation_backward": check_backward,
    "indexed_adamw_": check_adamw,
    "linear_cross_entropy": check_loss,
    "subnetwork gradients": check_gradients,
    "frozen weights": check_frozen,
    "compilations": check_compilations,
}
