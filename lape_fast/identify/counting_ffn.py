"""FFNs that count: what a model computes its feed-forward networks by while its text is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lape_fast.errors import ArchitectureError
from lape_fast.models import FFN, ExpertFFN, decoder, find_ffns, forward_hidden, replaced, without_final_norm
from lape_fast.ops import gated_activation
from lape_fast.text import Packed


class CountingFFN(nn.Module):
    """Computes an FFN through the counting op.

    Args:
        ffn: the block, in its model.
        counts: int64 ``[E, G, F]`` of this layer, added to in place; E is 1.
        last: nothing reads the output of the model's last FFN, so its up and down projections are left out.
    """

    def __init__(self, ffn: FFN | ExpertFFN, counts: Tensor, last: bool = False):
        super().__init__()
        self.ffn = ffn
        self.counts = counts
        self.last = last
        # Taken by each forward pass, so that one that went around this module is noticed.
        self.language_ids: Tensor | None = None
        # Where a search for values that are not finite is told which tokens have them, bool [T].
        self.searched: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        if self.last:
            gate, up = self.ffn.project_gate(x), None
        else:
            gate, up = self.ffn.project(x)
        # OPT flattens the leading dimensions; the ids follow.
        language_ids = self.take_language_ids().view(gate.shape[:-1])
        h = gated_activation(gate, up, self.ffn.activation, language_ids, self.counts[0])
        if self.last or self.searched is not None:
            x = self.check(x, gate)
        # Nothing reads the output of the last FFN but the check behind it.
        return x if self.last else self.ffn.project_down(h)

    def check(self, x: Tensor, gate: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The input ``x``, but NaN for tokens of which a gate is not finite; a search that goes on is told which.

        Args:
            x: ``[..., D]``.
            gate: ``[..., F]``; with ``tokens``, ``[S, F]`` of those int64 ``[S]``.
        """
        # A sum is not finite if a term is not: one pass over the gates, and no copy of them.
        traces = gate.sum(-1, dtype=torch.promote_types(gate.dtype, torch.float32)) * 0
        if tokens is not None:
            traces = traces.new_zeros(len(x)).index_add_(0, tokens, traces)
        if self.searched is not None:
            self.searched.append(traces.isnan().flatten())
        return x + traces.unsqueeze(-1).to(x.dtype)

    def take_language_ids(self) -> Tensor:
        """The ids that were set for this forward pass, which only one may use."""
        language_ids, self.language_ids = self.language_ids, None
        return language_ids


class CountingExperts(CountingFFN):
    """Computes a mixture of experts and counts: to the bit as transformers' grouped implementation does, and as its
    eager one but for the order in which a token's experts are added up.

    A neuron fires only on tokens that are routed to its expert, and its activation probability is over all tokens of a
    language: it says how much the language uses the neuron, router included. Of the last layer only the down
    projections are left out, since gate and up are one product.
    """

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:  # [T, D], [T, K], [T, K] -> [T, D]
        routes = self.ffn.route(chosen)
        gate_up = self.ffn.project(x, routes)  # [S, 2F]
        _, languages, neurons = self.counts.shape
        language_ids = self.take_language_ids().flatten()[routes.tokens]
        # Expert and language together number the rows of [E * G, F].
        row_ids = torch.where(language_ids < 0, -1, routes.experts * languages + language_ids).int()
        # Only for its counts: h is the model's own, whose activation may be one that the op does not know.
        gate = self.ffn.gate(gate_up)
        gated_activation(gate, None, "relu", row_ids, self.counts.view(-1, neurons))
        if self.last or self.searched is not None:
            x = self.check(x, gate, routes.tokens)
        return x if self.last else self.ffn.project_down(self.ffn.activate(gate_up), routes, weights)


_COUNTING = {FFN: CountingFFN, ExpertFFN: CountingExperts}


@contextlib.contextmanager
def counting_ffns(model: nn.Module, counts: Tensor, *, skip_last: bool = True) -> Iterator[list[CountingFFN]]:
    """Within the context the model's FFNs count; set ``language_ids`` of the yielded modules before each forward.

    Args:
        model: a causal language model of a known architecture.
        counts: int64 ``[L, E, G, F]`` as ``zero_counts`` makes them, added to in place.
        skip_last: leave out what only the model's output needs: the last layer's up and down projections and the
            decoder's final norm. The hidden states are then meaningless.
    """
    ffns = find_ffns(model)
    modules = [
        _COUNTING[type(ffn)](ffn, layer_counts, last=skip_last and ffn is ffns[-1])
        for ffn, layer_counts in zip(ffns, counts, strict=True)
    ]
    with replaced(ffns, modules), without_final_norm(model) if skip_last else contextlib.nullcontext():
        yield modules


@torch.inference_mode()
def count_batch(model: nn.Module, modules: Sequence[CountingFFN], packed: Packed) -> Tensor | None:
    """Runs the model without its head over one batch of rows, under ``counting_ffns``.

    What is not finite in a layer is not finite behind the last one, so that one look there serves for all layers; only
    if something is found, the batch is computed once more to see where it begins.

    Returns:
        Languages and layers, int64 ``[2, N]``: one for each counted token of which a gate is NaN or infinite, with the
        first such layer; -1 for a sharded model, whose other processes take no part in a search. None if there is none.

    Raises:
        ArchitectureError: the forward pass went around a counting FFN.
    """
    device = modules[0].counts.device
    language_ids = packed.language_ids.to(device)
    hidden = _run(model, modules, packed, language_ids)
    missed = [module.ffn.layer for module in modules if module.language_ids is not None]
    if missed:
        raise ArchitectureError(
            f"The model computed the FFN of layer {missed[0]} by other code than its own, so nothing was counted "
            "there; load it without the library or the kernels that replace its forward."
        )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # In what is not counted, such as padding, attention may divide zero by zero.
    bad = ~hidden.sum(-1, dtype=wide).isfinite() & (language_ids >= 0)
    if not bad.any():
        return None
    if isinstance(next(decoder(model).parameters()), DTensor):
        languages = language_ids[bad].long().cpu()
        return torch.stack([languages, torch.full_like(languages, -1)])
    return _search(model, modules, packed, language_ids)


def _run(model: nn.Module, modules: Sequence[CountingFFN], packed: Packed, language_ids: Tensor) -> Tensor:
    for module in modules:
        module.language_ids = language_ids
    device = language_ids.device
    return forward_hidden(model, packed.input_ids.to(device), packed.position_ids.to(device))


def _search(model: nn.Module, modules: Sequence[CountingFFN], packed: Packed, language_ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    for module in modules:
        module.searched = found
    try:
        # Nothing is counted twice.
        _run(model, modules, packed, torch.full_like(language_ids, -1))
    finally:
        for module in modules:
            module.searched = None
    bad = torch.stack(found) & (language_ids.flatten() >= 0)  # [L, T]
    tokens = bad.any(0)
    return torch.stack([language_ids.flatten()[tokens].long(), bad[:, tokens].int().argmax(0)]).cpu()


def zero_counts(model: nn.Module, languages: int) -> Tensor:
    """A buffer to count into: int64 ``[L, E, G, F]`` on the model's device, with E = 1 expert in a dense FFN."""
    ffns = find_ffns(model)
    experts = ffns[0].experts
    # The decoder's, since parts that count nothing, such as a vision tower, need not be loaded.
    shape = (len(ffns), experts, languages, ffns[0].neurons // experts)
    return torch.zeros(shape, dtype=torch.int64, device=next(decoder(model).parameters()).device)


def by_language(counts: Tensor) -> Tensor:
    """A counting buffer as files hold it: int64 ``[G, L, E * F]`` on the CPU, a copy."""
    layers, experts, languages, neurons = counts.shape
    values = torch.empty(languages, layers, experts, neurons, dtype=counts.dtype)
    return values.copy_(counts.cpu().permute(2, 0, 1, 3)).view(languages, layers, experts * neurons)


def set_by_language(counts: Tensor, values: Tensor) -> None:
    """The inverse of ``by_language``: writes int64 ``[G, L, E * F]`` into a counting buffer."""
    layers, experts, languages, neurons = counts.shape
    counts.copy_(values.view(languages, layers, experts, neurons).permute(1, 2, 0, 3))
