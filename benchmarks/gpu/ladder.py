"""What each part of ours brings to a training step: one more of them on each rung, from the published scripts' way.

    clone-scatter     clones of the weights in every forward pass, full weight gradients
    + compact         our FFN in plain torch operators: weight gradients as products of [T, K] operands, nothing cloned
    + activation      its kernels
    + norms           norms that keep their input alone, by torch's fused kernel
    + loss            the loss without logits
    + lowest layer    no gradient of the lowest trained layer's input; below, every rung forms that of the embeddings
    + optimizer       masters and weights updated in one pass, instead of torch's fused AdamW and a write

The norm in front of an FFN is part of ours from the second rung on.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from unittest import mock

from torch import Tensor, nn

from benchmarks.peers import LEARNING_RATE, Method, Peer, ffn_weights, gradients_of, prepare_clone_scatter
from lape_fast.models import without_logits
from lape_fast.tune.norms import restore_norms
from lape_fast.tune.subnetwork import attach_subnetwork

RUNGS = ("clone-scatter", "+ compact", "+ activation", "+ norms", "+ loss", "+ lowest layer", "+ optimizer")


def prepare_rung(model: nn.Module, neurons: Sequence[Tensor], rung: str) -> Peer:
    """Makes a model into the peer of a rung."""
    height = RUNGS.index(rung)
    if height < RUNGS.index("+ lowest layer"):
        model.enable_input_require_grads()
    if height < RUNGS.index("+ compact"):
        return prepare_clone_scatter(model, neurons)
    subnetwork = attach_subnetwork(model, neurons)
    if height < RUNGS.index("+ norms"):
        for layer in subnetwork.layers:
            restore_norms(layer.ffn.decoder_layer)
    if height >= RUNGS.index("+ loss"):
        without_logits(model)
    parameters, optimizer = subnetwork.parameters(), None
    if height >= RUNGS.index("+ optimizer"):
        optimizer = subnetwork.optimizer(lr=LEARNING_RATE, weight_decay=0.0)
    peer = Peer(model, subnetwork.trainable(), parameters, functools.partial(gradients_of, parameters), optimizer)
    if height < RUNGS.index("+ activation"):
        peer.surroundings = functools.partial(mock.patch.dict, os.environ, LAPE_FAST_BACKEND="reference")
    peer.undo.callback(subnetwork.detach, keep=False)
    return peer


def ladder() -> dict[str, Method]:
    """The rungs as methods, the lowest first."""
    return {
        rung: Method(functools.partial(prepare_rung, rung=rung), ffn_weights if number else lambda model: ())
        for number, rung in enumerate(RUNGS)
    }
