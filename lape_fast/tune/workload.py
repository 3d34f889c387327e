"""The training of a subnetwork on a model of meta tensors: what stays between its steps, and what a step adds.

No weight is loaded. What stays is counted, and a step is traced (lape_fast/tune/tracing.py). Written down as formulas
are quantised weights and what dequantises them; assumed is the CUDA context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.models import Fp8Linear, decoder, dense_ffns, layout_of, quantise_layers, supports_packing
from lape_fast.ops.linear_cross_entropy import CHUNK_ROWS
from lape_fast.tune.policies import set_policies
from lape_fast.tune.subnetwork import attach_subnetwork
from lape_fast.tune.tracing import TRACED_ATTENTION, Trace, build_on_meta, trace_step

# Assumed: the CUDA context with the kernels' code and cuBLAS' workspace.
CONTEXT_BYTES = 3 * 2**30 // 4

# Of AdamW, whose two moments are in the masters' dtype.
MOMENTS = 2

# Quantisation -> the bytes of a weight [N, M]: bitsandbytes' NF4 has an fp32 scale per 64 weights and its int8 one per
# row, torchao's int8 also a zero point per row. FP8 is built of meta tensors and counted.
QUANTISED: dict[str, Callable[[int, int], int]] = {
    "nf4": lambda rows, columns: -(-rows * columns // 2) + 4 * -(-rows * columns // 64),
    "int8": lambda rows, columns: rows * columns + 4 * rows,
    "torchao-int8": lambda rows, columns: rows * columns + 5 * rows,
}

# Tokens of a batch so large that all that counts grows in proportion from there.
MANY_TOKENS = 2**15

# More rows than anybody computes at once.
MOST_ROWS = 2**16


class Workload:
    """A model of meta tensors with its subnetwork: what is resident, and what its steps take.

    Args:
        config: of the model.
        dtype: of the model.
        indices: gives an index tensor per layer for a number of layers and of neurons per layer.
        rows: that are computed at once.
        context_length: tokens per row.
        packed: whether rows hold several documents; None where the model can.
        device: "cuda" or "cpu", whose kernels are accounted for.
        accumulates: whether gradients of earlier rows are there already.
        quantise: how the weights are quantised, or None.
        overlay: whether the base is never written.

    Attributes:
        sizes: how many neurons each layer trains.
        trained_weights: of these neurons.
        gradients: their bytes.
        packed: whether attention needs a mask.
        transposed: bytes of the copies that fp8 weights get in the first backward pass, and keep.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        indices: Callable[[int, int], list[Tensor]],
        rows: int,
        context_length: int,
        *,
        packed: bool | None,
        device: str,
        accumulates: bool,
        quantise: str | None,
        overlay: bool,
    ):
        self.model = build_on_meta(config, dtype)
        if quantise == "fp8":
            quantise_layers(self.model)
        self.dtype, self.rows, self.context_length, self.device = dtype, rows, context_length, device
        self.accumulates, self.quantise = accumulates, quantise
        ffns = dense_ffns(self.model)
        self._base = _base_bytes(self.model, quantise)
        self._widest = max(module.weight.numel() for ffn in ffns for module in ffn.projections.values())
        # Other implementations of attention tell documents apart by their lengths.
        by_mask = getattr(config, "_attn_implementation", None) in (None, *TRACED_ATTENTION)
        self.packed = by_mask and (supports_packing(self.model) if packed is None else packed)
        neurons = indices(len(ffns), ffns[0].neurons)
        self.sizes = [len(chosen) for chosen in neurons]
        subnetwork = attach_subnetwork(self.model, neurons, storage="overlay" if overlay else "resident")
        self.layers = subnetwork.layers
        self.trained_weights = subnetwork.trainable()
        self.gradients = _bytes(subnetwork.parameters())
        self.trace = functools.cache(self._trace)
        # The layers that gradients go through get them.
        if quantise == "fp8":
            self._trace("recompute", 1)
        copies = [module.transposed for module in self.model.modules() if isinstance(module, Fp8Linear)]
        self.transposed = _bytes([copy for copy in copies if copy is not None])

    def resident(self) -> dict[str, int]:
        """What stays between steps, by name."""
        buffers = [dict(selection.named_buffers()) for layer in self.layers for selection in layer.selections.values()]
        originals = [value for named in buffers for name, value in named.items() if name.startswith("original_")]
        indices = [value for named in buffers for name, value in named.items() if name in ("neurons", "slots")]
        context = {"CUDA context": CONTEXT_BYTES} if self.device == "cuda" else {}
        return {
            "weights": self._base + self.transposed,
            "masters": self.gradients,
            "originals": _bytes(originals),
            "indices": _bytes(indices),
            "moments": MOMENTS * self.gradients,
            **context,
        }

    def phases(self, policy: str, rows: int) -> dict[str, int]:
        """The most that each part of a step adds to what is resident."""
        trace = self._between(policy, rows)
        # Two of a quantised FFN's weights are there at once in backward, through a copy in fp32 for int8.
        dense = self._widest * (2 * self.dtype.itemsize + 4 * (self.quantise == "int8"))
        dense *= self.quantise in QUANTISED
        before = self.gradients if self.accumulates else 0
        return {
            "forward": trace.forward + dense + before,
            "loss": trace.loss + before,
            "backward": trace.backward + dense + before,
            "optimizer": self.gradients,
        }

    def largest_rows(self, policy: str, room: float) -> int:
        """The most rows whose step adds no more than ``room`` bytes."""
        low, high = 0, MOST_ROWS
        while low < high:
            middle = (low + high + 1) // 2
            fits = max(self.phases(policy, middle).values()) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _trace(self, policy: str, rows: int) -> Trace:
        set_policies(self.layers, policy)
        return trace_step(self.model, rows, self.context_length, packed=self.packed, device=self.device)

    def _between(self, policy: str, rows: int) -> Trace:
        """The trace of some rows, between or beyond the few that are run.

        Each figure is the largest of several that grow in proportion, so a chord lies above it; only the loss stops
        growing so at the rows of its chunk. Behind the last of the few, where what does not grow no longer counts, it
        is a line.
        """
        length = self.context_length
        few = {1, self.rows, max(1, CHUNK_ROWS // length), -(-CHUNK_ROWS // length)}
        run = sorted(few | {max(2 * max(few), -(-MANY_TOKENS // length))})
        if rows in run:
            return self.trace(policy, rows)
        last = next((position for position, size in enumerate(run) if size > rows), len(run) - 1)
        first, last = run[last - 1], run[last]
        share = (rows - first) / (last - first)
        ends = zip(vars(self.trace(policy, first)).values(), vars(self.trace(policy, last)).values(), strict=True)
        return Trace(*(round(low + share * (high - low)) for low, high in ends))


def _base_bytes(model: nn.Module, quantise: str | None) -> int:
    """Of the base's weights and buffers, which are those of a freshly built model; each once."""
    from transformers.pytorch_utils import Conv1D

    total = _bytes([*model.parameters(), *model.buffers()])
    # The decoder's layers alone are quantised, never the embeddings or the head.
    layers = decoder(model).get_submodule(layout_of(model).layers)
    for module in layers.modules() if quantise in QUANTISED else ():
        if isinstance(module, (nn.Linear, Conv1D)):
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            total += QUANTISED[quantise](rows, columns) - module.weight.nbytes
    return total


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
