"""The norms of a decoder layer while it trains: less kept for backward, and torch's fused kernel on CUDA.

transformers computes its norms step by step in fp32 and so keeps an fp32 copy of their input for backward. A frozen
norm needs no such copy: it is computed a second time from its input, which the residual stream keeps anyway. Only
forward passes that record a graph are affected; all others run the model's own code.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_fast.ops.backend import device_type

# The norms that transformers writes out step by step -> whether it is weight * x / rms(x), which torch has a fused
# kernel for. (Gemma's multiplies by 1 + weight in fp32, which a 16-bit weight cannot hold.)
NORMS = {
    "LlamaRMSNorm": True,
    "MistralRMSNorm": True,
    "Qwen2RMSNorm": True,
    "Qwen3RMSNorm": True,
    "Phi3RMSNorm": True,
    "Olmo2RMSNorm": True,
    "Gemma2RMSNorm": False,
    "Gemma3RMSNorm": False,
    "CohereLayerNorm": False,
    "Cohere2LayerNorm": False,
}


def slim_norms(layer: nn.Module) -> None:
    """Lets the norms of a decoder layer keep only their input for backward; of these instances, never of a class."""
    for norm in _norms(layer):
        norm.forward = types.MethodType(_forward, norm)


def restore_norms(layer: nn.Module) -> None:
    """Undoes ``slim_norms``."""
    for norm in _norms(layer):
        norm.__dict__.pop("forward", None)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), by torch's fused kernel where there is one: ``[..., D] -> [..., D]``.

    The fused kernel rounds once where the model's own code in 16 bits rounds twice.
    """
    if device_type(x) == "cuda" and NORMS.get(type(norm).__name__) and x.dtype == norm.weight.dtype:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, x)


def _norms(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if type(module).__name__ in NORMS]


def _forward(norm: nn.Module, x: Tensor) -> Tensor:
    frozen = not any(parameter.requires_grad for parameter in norm.parameters())
    records = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    # An input in 32 bits is its own fp32 copy.
    if not (records and frozen and x.dtype in (torch.bfloat16, torch.float16)):
        return type(norm).forward(norm, x)
    # The fused kernel keeps no more than x itself and a number per row.
    return normalise(norm, x) if device_type(x) == "cuda" and NORMS[type(norm).__name__] else _Recomputed.apply(x, norm)


class _Recomputed(torch.autograd.Function):
    """A norm that is computed a second time in backward, by the model's own code."""

    @staticmethod
    def forward(ctx, x, norm):
        ctx.norm = norm
        ctx.save_for_backward(x)
        return type(norm).forward(norm, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            normed = type(ctx.norm).forward(ctx.norm, leaf)
        # Nested in a backward pass; torch's FLOP counter cannot follow autograd.grad there.
        normed.backward(grad)
        return leaf.grad, None
