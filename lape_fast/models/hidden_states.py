"""The model without its head: what maps packed rows of token ids to hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lape_fast.errors import ShapeError
from lape_fast.models.layouts import layout_of

# Under these the mask is built from position_ids; flash attention reads them only for batches of a single row.
PACKING_ATTENTION = ("sdpa", "eager", "flex_attention")


def decoder(model: nn.Module) -> nn.Module:
    """The part of a model that maps token ids to hidden states, without the head; parameters are shared."""
    path = layout_of(model).decoder
    return model.base_model.get_submodule(path)


def supports_packing(model: nn.Module) -> bool:
    """Whether several documents may share a row, told apart by position_ids that restart at 0.

    Measured for every row of the table by tests/models/test_packing.py; the attention implementation matters too.
    Where it is False, give ``forward_hidden`` one document a row.
    """
    return layout_of(model).packing and decoder(model).config._attn_implementation in PACKING_ATTENTION


def forward_hidden(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Runs the decoder on packed rows and returns the hidden states behind its last norm.

    Padding needs no mask: it stands at the end of a row with position 0, where no document can attend to it.

    Args:
        model: a causal language model of a known architecture.
        input_ids: int64 [R, S].
        position_ids: int64 [R, S], restarting at 0 with every document and 0 at every padding token.

    Returns:
        [R, S, D]

    Raises:
        ShapeError: a row holds two documents and the model does not support packing.
    """
    packs = supports_packing(model)
    if not packs and bool((position_ids[:, 2:] == 1).any()):
        raise ShapeError(
            f"A row holds more than one document, but {model.config.model_type} under "
            f"{decoder(model).config._attn_implementation} attention lets documents of one row see each other; "
            "pack with one document per row."
        )
    arguments = {"position_ids": position_ids} if layout_of(model).position_ids else {}
    return decoder(model)(input_ids=input_ids, use_cache=False, **arguments)[0]


@contextlib.contextmanager
def without_final_norm(model: nn.Module) -> Iterator[None]:
    """Leaves the norm behind the decoder's last layer out inside the ``with`` block; only the head needs it."""
    base, name = decoder(model), layout_of(model).norm
    norm = getattr(base, name)
    if norm is not None:
        setattr(base, name, nn.Identity())
    try:
        yield
    finally:
        setattr(base, name, norm)
