"""FP8: projections that multiply in 8 bits, in the forward pass and for the gradient of their input.

    y  = (q_x q_W^T) s_x s_W        q_x s_x = x         rounded row by row
    dx = (q_g q_W) s_g              q_g s_g = dy * s_W  rounded row by row

All q are float8_e4m3fn. Each output has its own s_W, which is multiplied into the gradient before that is rounded, so
that one rounding of the weight serves both products: dx is the gradient of the y that was computed. Tensor cores take
both operands of an fp8 product with what is summed lying side by side in memory, hence the second product reads a
transposed copy of the same bytes; it is made when it is first needed, so that a model which is only run has one byte
per weight and one that is trained has two, as in bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType

from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.models.hidden_states import decoder
from lape_fast.models.layouts import layout_of
from lape_fast.ops import quantise_rows
from lape_fast.ops.backend import device_type

# As it stands in a config, where transformers asks for a method's name.
FP8_METHOD = "lape-fast-fp8"

# Tensor cores take sizes in steps of 16; twice that, so that either half of a fused gate and up can be taken alone.
STEP = 32

# The least compute capability with float8_e4m3fn: Ada, Hopper and later.
CAPABILITY = (8, 9)

# Sums of a product's terms keep fewer bits where speed counts most. Not in gradients, whose errors add up over layers.
FAST_FORWARD, FAST_BACKWARD = True, False


class Fp8Linear(nn.Module):
    """A frozen projection in fp8, in place of an ``nn.Linear`` or a ``Conv1D``.

    Its product keeps nothing for backward. On a GPU it comes in bfloat16, whatever the model's dtype, to which it is
    then converted; on the CPU it is summed in float32.

    Args:
        projection: the module that is replaced; its bias is kept as it is.
        device: where the weight is rounded, and stays.

    Attributes:
        weight: float8_e4m3fn ``[outputs, inputs]`` as uint8, so that no ``.to(dtype)`` and no optimizer touches it.
        scale: float32 ``[outputs]``, whatever ``.to(dtype)`` asks for.
        transposed: the same bytes ``[inputs, outputs]``, or None as long as no gradient was asked for.
        source_cls: the class of the projection that was replaced.

    Example:
        >>> layer = Fp8Linear(nn.Linear(64, 128, bias=False))
        >>> y = layer(torch.randn(3, 64))
    """

    def __init__(self, projection: nn.Module, device: torch.device | None = None):
        super().__init__()
        self.source_cls = type(projection)
        weight = projection.weight.detach().to(device or projection.weight.device)
        if not isinstance(projection, nn.Linear):
            # GPT-2's, which stores [inputs, outputs].
            weight = weight.T
        self.out_features, self.in_features = weight.shape
        q, scale = quantise_rows(weight)
        self.weight = nn.Parameter(q.view(torch.uint8), requires_grad=False)
        self.bias = projection.bias
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("transposed", None, persistent=False)
        self.train(projection.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return _Product.apply(x, self.bias, self)

    def multiply(self, x: Tensor) -> Tensor:
        """y, not differentiable: ``[..., inputs]`` -> ``[..., outputs]``."""
        q, scale = quantise_rows(x)
        y = _product(q, scale, self.weight, self.scale, _dtype_of_products(x), fast=FAST_FORWARD)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def input_gradient(self, grad: Tensor, outputs: slice = slice(None)) -> Tensor:
        """grad @ weight[outputs]: ``[..., outputs]`` -> ``[..., inputs]``.

        Args:
            grad: dL/dy, of all outputs or of some.
            outputs: which; their number is a multiple of 16.
        """
        q, scale = quantise_rows(grad, self.scale[outputs].contiguous())
        if self.transposed is None:
            self.transposed = self.weight.T.contiguous()
        ones = scale.new_ones(self.in_features)
        grad_x = _product(q, scale, self.transposed[:, outputs], ones, grad.dtype, fast=FAST_BACKWARD)
        return grad_x.view(*grad.shape[:-1], self.in_features)

    def dense(self) -> Tensor:
        """The weight that it multiplies by, float32 ``[outputs, inputs]``; exact."""
        return self.weight.view(torch.float8_e4m3fn).float() * self.scale[:, None]

    def _apply(self, fn, recurse: bool = True) -> Fp8Linear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


class _Product(torch.autograd.Function):
    """x -> y, without a gradient of the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: Fp8Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wants_x, wants_bias, _ = ctx.needs_input_grad
        grad_x = ctx.layer.input_gradient(grad).to(ctx.dtype) if wants_x else None
        return grad_x, grad.flatten(0, -2).sum(0) if wants_bias else None, None


def _product(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """(q weight^T) scale weight_scale for q ``[T, M]``, weight ``[N, M]`` in bytes, and the scales of their rows."""
    given = dtype if device_type(q) == "cpu" else torch.bfloat16
    rows = ScalingType.RowWise
    weight = weight.view(torch.float8_e4m3fn).T
    scales = scale, rows, weight_scale[None], rows
    return F.scaled_mm(q, weight, *scales, output_dtype=given, use_fast_accum=fast).to(dtype)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    device = device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_fp8(device: torch.device) -> None:
    """Makes sure that a device has products in fp8; the CPU computes them from operands that are rounded just so.

    Raises:
        ConfigError: it has none.
    """
    advice = "load the model without quantise, or use a GPU of the Ada or Hopper generation or later"
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            raise ConfigError(
                f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, but products in "
                f"fp8 need {CAPABILITY[0]}.{CAPABILITY[1]}; {advice}."
            )
    elif device.type not in ("cpu", "meta"):
        raise ConfigError(f"torch has no product in float8_e4m3fn for the device {str(device)!r}; {advice}.")


def quantise_layers(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Replaces the projections of a model's decoder layers by ``Fp8Linear``, in place; attention's and the FFNs'.

    Embeddings, norms and the head stay, and so does a projection whose inputs or outputs are no multiple of 32. Call it
    before FFNs are found or replaced.

    Args:
        model: a causal language model of a known architecture, in 16 or 32 bits.
        device: where the weights are rounded, one after the other, and stay; None leaves each where it is.

    Returns:
        The same model.

    Raises:
        ArchitectureError: the architecture is unknown, or all projections stay as they are.
        ConfigError: the device has no product in fp8.
    """
    from transformers.pytorch_utils import Conv1D

    check_fp8(device or model.device)
    layers = decoder(model).get_submodule(layout_of(model).layers)
    replaced = 0
    for path, module in list(layers.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and not any(size % STEP for size in module.weight.shape):
            layers.set_submodule(path, Fp8Linear(module, device))
            replaced += 1
    if not replaced:
        raise ArchitectureError(
            f"No projection of this {model.config.model_type} model has inputs and outputs in multiples of {STEP}, "
            "which products in fp8 need; load it without quantise."
        )
    return model


def is_fp8(model: nn.Module) -> bool:
    """Whether some of a model's projections multiply in fp8."""
    return any(isinstance(module, Fp8Linear) for module in model.modules())


@functools.cache
def fp8_config() -> type:
    """What ``from_pretrained`` takes as its ``quantization_config`` to quantise a model so, once it has read it.

    Takes the device to quantise on. It is not written to a checkpoint: transformers refuses to save such a model.
    """
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Fp8Config(QuantizationConfigMixin):
        quant_method = FP8_METHOD

        def __init__(self, device: torch.device):
            self.quant_method, self.device = FP8_METHOD, str(device)

    @register_quantizer(FP8_METHOD)
    class Fp8Quantizer(HfQuantizer):
        is_trainable = True

        def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            return quantise_layers(model, torch.device(self.quantization_config.device))

        def is_serializable(self) -> bool:
            raise ConfigError(
                "A model in fp8 cannot be saved, for fp8 is a way to compute: load the checkpoint with quantise='fp8' "
                "wherever it is to run, or call dequantise_model and save that."
            )

    return Fp8Config
