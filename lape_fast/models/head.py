"""The head of a causal language model: its loss without its logits, for one instance of a model."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lape_fast.errors import ArchitectureError
from lape_fast.models.hidden_states import decoder
from lape_fast.models.layouts import WEIGHT_DTYPES, ExpertLayout, layout_of
from lape_fast.ops import linear_cross_entropy
from lape_fast.ops.linear_cross_entropy import IGNORED


def without_logits(model: nn.Module) -> contextlib.ExitStack:
    """Makes this model compute ``loss`` from ``labels`` by ``linear_cross_entropy``, and return no logits beside it.

    The loss is transformers' ``ForCausalLMLoss``, with its ``num_items_in_batch`` and ``shift_labels``; every other
    argument goes to the model without its head. The model's own forward, whose signature stays, computes all other
    calls: those without labels, and those with ``logits_to_keep``, ``output_router_logits`` or an ``ignore_index``.
    Whoever reads the logits of a call with labels, such as a Trainer's ``compute_metrics``, finds None.

    The head must be frozen before the loss is asked for with gradients enabled; the adapter of a wrapped head must be
    merged.

    Args:
        model: a causal language model of a known architecture; other models of its class are left alone.

    Returns:
        What undoes it: leaving its ``with`` block, or its ``close()``. Nothing has to, as the model stays usable.

    Raises:
        ArchitectureError: an unknown architecture, a model that has no plain linear head or a loss of its own, or a
            forward that something else replaced by what is no method.

    Example:
        >>> with without_logits(model):
        ...     model(input_ids=input_ids, labels=input_ids).loss.backward()
    """
    _check(model)
    stock = model.forward.__func__
    earlier = vars(model).get("forward")
    names = list(inspect.signature(model.forward).parameters)
    installed = True

    # A method, so that a deep copy of the model runs itself; it can become a part of what others install on top.
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if installed and _asks_only_for_loss(arguments):
            return _loss_without_logits(self, **arguments)
        return stock(self, *args, **kwargs)

    def undo() -> None:
        nonlocal installed
        installed = False
        if getattr(vars(model).get("forward"), "__func__", None) is not forward:
            return
        if earlier is None:
            del model.forward
        else:
            model.forward = earlier

    model.forward = types.MethodType(forward, model)
    undoing = contextlib.ExitStack()
    undoing.callback(undo)
    return undoing


def _asks_only_for_loss(arguments: dict[str, Any]) -> bool:
    kept = arguments.get("logits_to_keep", 0)
    return (
        arguments.get("labels") is not None
        and isinstance(kept, int)
        and kept == 0
        and not arguments.get("output_router_logits")
        and arguments.get("ignore_index", IGNORED) == IGNORED
    )


def _loss_without_logits(
    model: nn.Module,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    logits_to_keep: int = 0,
    ignore_index: int = IGNORED,
    return_dict: bool | None = None,
    **arguments,
):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    # The whole of what the head stands on: around the decoder, Gemma 3 makes masks and sees images.
    outputs = model.base_model(**arguments, return_dict=True)
    hidden = outputs.last_hidden_state  # [R, S, D]
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    layout, config, head = layout_of(model), decoder(model).config, model.get_output_embeddings()
    loss = linear_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        shift_labels.flatten().to(hidden.device),
        bias=head.bias,
        scale=1.0 if layout.logit_scale_field is None else getattr(config, layout.logit_scale_field),
        softcap=None if layout.logit_softcap_field is None else getattr(config, layout.logit_softcap_field),
        num_items=num_items_in_batch,
    )
    output = CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    as_dict = model.config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _check(model: nn.Module) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    layout, head = layout_of(model), model.get_output_embeddings()
    kind = type(model).__name__
    if not isinstance(head, nn.Linear) or head.weight.dtype not in WEIGHT_DTYPES:
        found = f"{head.weight.dtype} weights" if isinstance(head, nn.Linear) else f"a {type(head).__name__}"
        raise ArchitectureError(
            f"The head of this {kind} is no plain linear layer but {found}; give a causal language model whose head is "
            "neither quantised nor wrapped by an adapter."
        )
    if model.loss_function is not ForCausalLMLoss:
        raise ArchitectureError(
            f"This {kind} has a loss of its own, {model.loss_function!r}, which cannot be computed without logits; "
            "use it as it is."
        )
    if isinstance(layout, ExpertLayout) and model.config.output_router_logits:
        raise ArchitectureError(
            f"This {kind} adds a loss of its routers (output_router_logits is on in its config), which is not computed "
            "without logits; switch it off or use the model as it is."
        )
    if not inspect.ismethod(model.forward):
        raise ArchitectureError(
            f"Something else has replaced the forward of this {kind} by a {type(model.forward).__name__} that is no "
            "method; load the model onto one device, and call without_logits before others change the model."
        )
