"""The memory of a training step without the step: a model of meta tensors runs it, and the bytes alive are followed.

Meta tensors have shapes and dtypes but no values, so a step of an 8-billion-parameter model takes a second and no
memory. Autograd keeps for them what it keeps for real ones, by the model's own code, whatever the architecture. Three
things depend on the device, and follow the one that is planned for:

    attention   the CPU's and CUDA's flash kernels keep queries, keys, values, output and a number per row; CUDA's takes
                no mask, so that a mask leads to its memory-efficient kernel, which wants keys and values of every head
    norms       CUDA has a fused RMS norm, which keeps its input and a number per row (lape_fast/tune/norms.py)
    products    CUDA multiplies 16-bit operands into fp32, which the CPU copies first

What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lape_fast.models import decoder, layout_of, without_logits
from lape_fast.models.layouts import check_known
from lape_fast.ops.backend import planned_for

# Implementations of attention that are computed as they are; the others keep what a flash kernel without a mask keeps.
TRACED_ATTENTION = ("sdpa", "eager")

# Up to which head size CUDA's flash kernel goes.
FLASH_HEAD_SIZE = 256


class LiveBytes(TorchDispatchMode):
    """Within the context, follows the bytes of tensors that operators create and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Inputs met before any operator returned them were there already.
        self._follow((args, kwargs), created=False)
        result = func(*args, **(kwargs or {}))
        self._follow(result, created=True)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, value: Any, created: bool) -> None:
        if isinstance(value, (tuple, list)):
            for each in value:
                self._follow(each, created)
        elif isinstance(value, dict):
            self._follow(list(value.values()), created)
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage._cdata not in self._sizes:
                size = storage.nbytes() if created else 0
                self._sizes[storage._cdata] = size
                self.live += size
                weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, identity: int) -> None:
        self.live -= self._sizes.pop(identity)


@dataclass(frozen=True)
class Trace:
    """Bytes that a training step adds to what is resident.

    Attributes:
        kept: held when the decoder is done, for backward and for the loss.
        forward: the most at any time of the decoder's forward pass.
        loss: the most at any time of the loss.
        backward: the most at any time of the backward pass, with the gradients of trained weights that are there by
            then.
    """

    kept: int
    forward: int
    loss: int
    backward: int


def build_on_meta(config, dtype: torch.dtype) -> nn.Module:
    """A causal language model of meta tensors, in training mode.

    Raises:
        ArchitectureError: the table of FFN layouts lacks the architecture.
    """
    from transformers import AutoModelForCausalLM

    check_known(config.model_type)
    chosen = getattr(config, "_attn_implementation", None)
    implementation = chosen if chosen is None or chosen in TRACED_ATTENTION else "sdpa"
    with torch.device("meta"):
        # A copy, because transformers writes dtype and attention into it.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=implementation)
    return model.train()


def trace_step(model: nn.Module, rows: int, context_length: int, *, packed: bool, device: str) -> Trace:
    """Runs a step without its optimizer and follows the bytes alive.

    Args:
        model: of meta tensors, with its subnetwork attached.
        rows: R.
        context_length: S.
        packed: whether a row holds several documents, which attention must keep apart by a mask.
        device: "cpu" or "cuda", whose kernels are accounted for.
    """
    ids = torch.empty(rows, context_length, dtype=torch.int64, device="meta")
    positions = {"position_ids": ids} if layout_of(model).position_ids else {}
    with planned_for(device), _kernels_of(device), without_logits(model):
        trace = trace_calls(model, {"input_ids": ids, "labels": ids, **positions}, _Answers(not packed))
    for parameter in model.parameters():
        parameter.grad = None
    return trace


def trace_calls(model: nn.Module, inputs: Mapping[str, Tensor], answers: contextlib.AbstractContextManager) -> Trace:
    """Follows the bytes alive in forward and backward of a model that computes its loss, of meta or of real tensors.

    Args:
        model: in training mode.
        inputs: with labels.
        answers: entered for the forward pass.
    """
    figures = []

    def note() -> None:
        figures.append(live.peak)
        live.peak = live.live

    def note_kept(*_) -> None:
        figures.append(live.live)
        note()

    handle = decoder(model).register_forward_hook(note_kept)
    try:
        with LiveBytes() as live:
            with answers:
                loss = model(**inputs, use_cache=False).loss
            note()
            loss.backward()
            note()
    finally:
        handle.remove()
    return Trace(*figures)


class _Answers(TorchFunctionMode):
    """Within the context, meta tensors answer what transformers asks of its inputs.

    Whether every row is one document, to go without a mask; and whether there is padding, to warn of a missing one.
    """

    def __init__(self, one_document: bool):
        super().__init__()
        self._answers = {Tensor.__bool__: one_document, Tensor.__contains__: False}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self._answers and args[0].is_meta:
            return self._answers[func]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Within the context, torch's attention and fused norm keep for meta tensors what they keep on a device.

    Replaced by name, because modes of torch are off within a backward pass, where checkpointed layers are computed.
    """
    own_attention, own_norm = F.scaled_dot_product_attention, F.rms_norm

    def attention(query, *args, **options):
        return _attention(device, query, *args, **options) if query.is_meta else own_attention(query, *args, **options)

    def norm(x, *args, **options):
        return _FusedNorm.apply(x) if x.is_meta and device == "cuda" else own_norm(x, *args, **options)

    F.scaled_dot_product_attention, F.rms_norm = attention, norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = own_attention, own_norm


def _attention(
    device: str,
    query: Tensor,  # [R, heads, S, head size]
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's scaled_dot_product_attention would call on a device."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    aten = torch.ops.aten
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if attn_mask is None and query.element_size() == 2 and query.shape[-1] <= FLASH_HEAD_SIZE:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if query.shape[1] == key.shape[1]:
        bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    # No fused kernel is left: the one that writes every weight out is what torch calls for meta tensors by itself.
    return aten.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _FusedNorm(torch.autograd.Function):
    """CUDA's fused RMS norm, of meta tensors, for which torch would write it out."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad)
