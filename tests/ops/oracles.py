"""What the tests of the ops compare with: eager PyTorch, written without the package's references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lape_fast.ops.backend import EXTENSION_LOADED

needs_extension = pytest.mark.skipif(not EXTENSION_LOADED, reason="the native extension is not built")

BACKENDS = ["reference", pytest.param("cpp", marks=needs_extension)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
}


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def eager(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """h in the dtype of ``gate``, one op after the other."""
    activated = EAGER[activation](gate)
    return activated if up is None else activated * up


def eager_gradients(gate: Tensor, up: Tensor | None, activation: str, grad_h: Tensor) -> tuple[Tensor, Tensor | None]:
    """dL/dgate and dL/dup by autograd, in the dtype of ``gate``."""
    gate = gate.detach().clone().requires_grad_()
    up = None if up is None else up.detach().clone().requires_grad_()
    eager(gate, up, activation).backward(grad_h)
    return gate.grad, None if up is None else up.grad


def counted(gate: Tensor, language_ids: Tensor, languages: int) -> Tensor:
    """[languages, F] int64: in how many tokens of each language a neuron's gate is positive."""
    return torch.stack([(gate[language_ids == language] > 0).sum(0) for language in range(languages)])


def assert_within_budget(computed: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """The largest error against fp64 is at most twice that of eager PyTorch in the same dtype.

    For fp64 the truth is eager PyTorch itself, with rounding errors of its own: there the budget is 32 ulp of the
    largest value (a few roundings of each side, and of the products that cancel in the slope of GELU).
    """
    assert computed.dtype == torchs.dtype
    error, torchs_error = ((values.double() - truth).abs().max() for values in (computed, torchs))
    budget = 2 * torchs_error
    if computed.dtype == torch.float64:
        budget = 32 * torch.finfo(torch.float64).eps * truth.abs().max()
    assert error <= budget, f"largest error {error:.3g}, but at most {budget:.3g} is allowed"


class LargestTensor(TorchDispatchMode):
    """Within the context, the most elements of any tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        values = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.elements = max([self.elements, *(value.numel() for value in values)])
        return result
