"""Quantised projections: how each kind is told, without importing its library, and read as a dense weight.

A kind is one row of ``KINDS``. Quantisation is a way to load a model, so nothing here ever writes to one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.models.fp8 import Fp8Linear, check_fp8, fp8_config
from lape_fast.models.layouts import LAYOUTS, ExpertLayout

# How load_model can quantise: the first two are bitsandbytes'; fp8 needs no library.
Quantise = Literal["nf4", "int8", "torchao-int8", "fp8"]


@dataclass(frozen=True)
class Quantisation:
    """One kind of quantised projection.

    Attributes:
        name: for messages.
        matches: whether a module is of this kind.
        dense: reads a module's weight as [outputs, inputs], a fresh tensor in whatever dtype the kind computes it.
        input_gradient: the kind's own product of dL/dy and the weight of a slice of outputs; None where the product
            with ``dense`` is all there is.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    dense: Callable[[Any], torch.Tensor]
    input_gradient: Callable[[Any, torch.Tensor, slice], torch.Tensor] | None = None


def _is_a(thing: Any, library: str, name: str) -> bool:
    # By name, since a library that was never imported has made no module.
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == library for kind in type(thing).__mro__)


def _is_4bit(module: nn.Module) -> bool:
    return _is_a(module, "bitsandbytes", "Linear4bit") and getattr(module.weight, "quant_state", None) is not None


def _dense_4bit(module: Any) -> torch.Tensor:
    import bitsandbytes

    weight, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # In this order only the product can read it, and a product with 1 and 0 is exact.
        identity = torch.eye(module.in_features, dtype=state.dtype)
        return bitsandbytes.matmul_4bit(identity, weight, state).t()
    return bitsandbytes.functional.dequantize_4bit(weight, state)


def _is_int8(module: nn.Module) -> bool:
    return _is_a(module, "bitsandbytes", "Linear8bitLt") and module.weight.dtype == torch.int8


def _dense_int8(module: Any) -> torch.Tensor:
    # The scales move from the weight to the state in the first forward pass.
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return module.weight.data.float().mul_(scales.mul(1.0 / 127.0)[:, None])


def _is_torchao_int8(module: nn.Module) -> bool:
    # With act_quant_kwargs the activations are quantised too.
    weight = getattr(module, "weight", None)
    return _is_a(weight, "torchao", "Int8Tensor") and getattr(weight, "act_quant_kwargs", None) is None


def _dense_torchao(module: Any) -> torch.Tensor:
    return module.weight.dequantize()


KINDS = (
    Quantisation("bitsandbytes NF4 or FP4", _is_4bit, _dense_4bit),
    Quantisation("bitsandbytes LLM.int8", _is_int8, _dense_int8),
    Quantisation("torchao int8 weight-only", _is_torchao_int8, _dense_torchao),
    Quantisation("FP8", lambda module: isinstance(module, Fp8Linear), Fp8Linear.dense, Fp8Linear.input_gradient),
)


def quantisation_of(module: nn.Module) -> Quantisation | None:
    """The kind of a quantised projection; None where its weight is what the table of kinds does not know."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


@torch.no_grad()
def dequantise(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a quantised projection computes with, [outputs, inputs]: a fresh tensor at every call.

    Args:
        module: a projection that ``quantisation_of`` knows.
        dtype: of the result.

    Example:
        >>> grad_x = grad_y @ dequantise(module, grad_y.dtype)
    """
    return quantisation_of(module).dense(module).to(dtype)


def keep_as_stored(modules: Iterable[nn.Module]) -> None:
    """Stops bitsandbytes from rewriting 4-bit weights on the first forward pass on some CPUs.

    In eval mode on a CPU with AVX512-BF16 it reorders them for its kernel and rounds their scales to bfloat16, and
    nothing brings the scales back.
    """
    for module in modules:
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False


def loading_options(
    name: str, config: Any, quantise: str | None, dtype: torch.dtype | str, device: torch.device
) -> dict[str, Any]:
    """What ``from_pretrained`` must be told to load a model quantised; nothing where neither asked for nor stored so.

    Args:
        name: of the model, for messages.
        config: the model's.
        quantise: one of ``Quantise``, or None.
        dtype: to compute in; "auto" is the checkpoint's.
        device: where the weights are quantised, one by one as they are read.

    Raises:
        ConfigError: quantise is unknown, the library is not installed, or the checkpoint or the dtype forbids it.
        ArchitectureError: the FFNs are of a kind that stays as it is.
    """
    stored = getattr(config, "quantization_config", None)
    if quantise is None:
        return {} if stored is None else {"device_map": {"": device}}
    if quantise not in get_args(Quantise):
        raise ConfigError(f"The quantisation {quantise!r} is unknown; use one of {', '.join(get_args(Quantise))}.")
    if stored is not None:
        raise ConfigError(f"{name} was saved quantised already; load it without quantise={quantise!r}.")
    layout = LAYOUTS[config.model_type]
    # torchao quantises nn.Linear only, and nothing here quantises experts.
    if isinstance(layout, ExpertLayout) or (layout.transposed and quantise == "torchao-int8"):
        raise ArchitectureError(
            f"{quantise} would leave the FFNs of this {config.model_type} model as they are; load it without quantise."
        )
    compute = config.dtype or torch.float32 if dtype == "auto" else dtype
    if compute == torch.float64:
        raise ConfigError(f"A model cannot be quantised as {quantise} and compute in float64; choose a smaller dtype.")
    if quantise == "fp8":
        # Read on the CPU, so that the device never holds a weight and its rounded copy for more than one projection.
        check_fp8(device)
        return {"quantization_config": fp8_config()(device)}
    library = "torchao" if quantise == "torchao-int8" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"Loading a model as {quantise} needs {library}, which is not installed; pip install 'lape-fast[quantise]'."
        )
    return {"device_map": {"": device}, "quantization_config": _SCHEMES[quantise](compute)}


def _nf4(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _int8(compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    # It would say at every product that it works in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8(compute: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Quantising a model is no reason to change how everything else is compiled and multiplied.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


_SCHEMES = {"nf4": _nf4, "int8": _int8, "torchao-int8": _torchao_int8}


def dequantise_model(model: nn.Module) -> nn.Module:
    """Turns every quantised projection of a model, in place, into a plain one in the model's dtype.

    The model is then like one that was loaded without quantisation, with the weights that the quantised one computed
    with, and ``save_pretrained`` writes it so. FFNs found before are stale; find them again.

    Returns:
        The same model.

    Example:
        >>> model, tokenizer = load_model("base/", quantise="nf4")
        >>> dequantise_model(model).save_pretrained("plain/")
    """
    dtype = model.dtype
    for path, module in list(model.named_modules()):
        if quantisation_of(module) is not None:
            model.set_submodule(path, _plain(module, dtype))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for leftover in ("is_loaded_in_4bit", "is_loaded_in_8bit", "_weight_conversions"):
        vars(model).pop(leftover, None)
    return model


def _plain(module: Any, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight, bias = dequantise(module, dtype), module.bias
    with torch.device("meta"):
        # What transformers replaced by a quantised projection may have been GPT-2's, which stores [inputs, outputs].
        if getattr(module, "source_cls", None) is Conv1D:
            plain, weight = Conv1D(*weight.shape), weight.t().contiguous()
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)
