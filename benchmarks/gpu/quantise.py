"""Quantises a model with random weights where it stands, as `load_model` would while it reads a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from lape_fast.models import decoder, fp8
from lape_fast.models.quantised import keep_as_stored


def quantise_layers(model: nn.Module, kind: str) -> nn.Module:
    """Exchanges the linear projections of the decoder's layers for "fp8", or bitsandbytes' "nf4" or "int8".

    Raises:
        ImportError: bitsandbytes is needed and not installed.
        ConfigError: the device has no product in fp8.
    """
    if kind == "fp8":
        return fp8.quantise_layers(model)
    # Before anything is changed.
    import bitsandbytes  # noqa: F401

    layers = decoder(model).layers
    for path, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            layers.set_submodule(path, _MAKERS[kind](module))
    keep_as_stored(layers.modules())
    return model


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, size = linear.weight.detach(), (linear.in_features, linear.out_features)
    dtype = weight.dtype
    made = Linear4bit(*size, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    options = {"quant_type": "nf4", "compress_statistics": False, "module": made}
    made.weight = Params4bit(weight, requires_grad=False, **options).to(weight.device)
    return made


def _int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    weight, size = linear.weight.detach(), (linear.in_features, linear.out_features)
    made = Linear8bitLt(*size, bias=False, has_fp16_weights=False, device=torch.device("meta"))
    # It is quantised on its way from the CPU.
    made.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    return made


_MAKERS = {"nf4": _nf4, "int8": _int8}
