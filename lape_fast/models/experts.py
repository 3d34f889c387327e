"""The mixture of experts of one layer: routed tokens, and projections that are one 3-D parameter over all experts.

transformers computes experts through an interface: a table of functions, and a field of the experts' config that names
one of them. Replacing experts means that this field names the function registered here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import ArchitectureError
from lape_fast.models.layouts import WEIGHT_DTYPES, ExpertLayout

# The name of our function in transformers' table, and of the submodule that it calls.
IMPLEMENTATION = "lape_fast"
REPLACEMENT = "replacement"


@dataclass(frozen=True)
class Routes:
    """The S = T x K ways from T tokens to the K experts of each, sorted by expert.

    Attributes:
        experts: int64 [S], ascending.
        tokens: int64 [S].
        order: int64 [S], the places in the flattened [T, K] that the routes were sorted from.
        ends: int32 [E], where each expert's routes end.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    order: torch.Tensor
    ends: torch.Tensor


class ExpertFFN:
    """The experts of one layer: their weights in one orientation, their computation in steps, and their place.

    Unit u of expert e is neuron ``e * F + u`` of its layer. The router is no part of this.

    Attributes:
        layer: the layer's number, from 0.
        activation: "silu", "gelu", "gelu_tanh" or "relu"; an activation of the model's own counts as one of its sign.
        experts: E.
        neurons: E * F.
        hidden_size: D.
    """

    def __init__(self, number: int, layer: nn.Module, layout: ExpertLayout, activation: str) -> None:
        self.layer = number
        self.activation = activation
        self._layout = layout
        self._module = self._experts_module(layer)
        self._config = self._module.config
        self._installed = None
        self.experts, self.hidden_size, width = self.down_weight.shape  # [E, D, F]
        self.neurons = self.experts * width

    @property
    def down_weight(self) -> torch.Tensor:
        """[E, D, F]"""
        return self._oriented(self._module.down_proj)

    def route(self, chosen: torch.Tensor) -> Routes:
        """Sorts the routes of all tokens by expert, and those of one expert by token.

        Args:
            chosen: int64 [T, K], the router's experts of each token.
        """
        experts, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(self.experts, device=chosen.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return Routes(experts, order // chosen.shape[1], order, ends)

    def project(self, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Gate before its activation, and up, of every route: [T, D] -> [S, 2F] as the model orders them."""
        return self._linear(x[routes.tokens], "gate_up_proj", routes)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The gate's part of what ``project`` returns, a view: [S, 2F] -> [S, F]."""
        return gate_up[..., ::2] if self._layout.interleaved else gate_up[..., : gate_up.shape[-1] // 2]

    def activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """h by the model's own code: [S, 2F] -> [S, F]."""
        return self._module._apply_gate(gate_up)

    def project_down(self, h: torch.Tensor, routes: Routes, weights: torch.Tensor) -> torch.Tensor:
        """Applies the output projections and adds up each token's experts by the router's weights.

        Args:
            h: [S, F]
            routes: where each of its rows comes from.
            weights: [T, K], beside the experts that ``route`` was given.

        Returns:
            [T, D]
        """
        out = self._linear(h, "down_proj", routes) * weights.flatten()[routes.order, None]
        by_token = torch.empty_like(out)
        by_token[routes.order] = out
        return by_token.view(*weights.shape, -1).sum(1).to(h.dtype)

    def outgoing(self, neurons: torch.Tensor) -> torch.Tensor:
        """A copy of the weights by which ``neurons`` reach the rest of the model, [K, D]: their columns of down."""
        return self.down_weight.data.transpose(1, 2)[self._units(neurons)]

    def set_outgoing(self, neurons: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what ``outgoing`` reads."""
        self.down_weight.data.transpose(1, 2)[self._units(neurons)] = values

    def replace(self, module: nn.Module) -> None:
        """Lets ``module`` compute the experts, until ``restore``.

        Args:
            module: called with the tokens [T, D], their experts int64 [T, K] and the router's weights of those
                [T, K]; returns [T, D].

        Raises:
            ArchitectureError: the experts are replaced already, by this object or another.
        """
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if self._module.config is not self._config:
            raise ArchitectureError(f"The experts of layer {self.layer} are already replaced; restore them first.")
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _compute_by_replacement)
        # A config of its own: the other layers, and the model's config, stay as they are.
        self._installed = copy.copy(self._config)
        self._installed._experts_implementation = IMPLEMENTATION
        self._module.add_module(REPLACEMENT, module)
        self._module.config = self._installed

    def restore(self) -> None:
        """Gives the experts back to the model's own implementation; does nothing if they are in place.

        Raises:
            ArchitectureError: something else has changed what computes the experts.
        """
        if self._installed is None:
            return
        if self._module.config is not self._installed:
            raise ArchitectureError(
                f"The experts of layer {self.layer} cannot be restored: something else has given them another config; "
                "undo that first."
            )
        self._module.config = self._config
        delattr(self._module, REPLACEMENT)
        self._installed = None

    def _linear(self, rows: torch.Tensor, name: str, routes: Routes) -> torch.Tensor:
        weight = self._oriented(getattr(self._module, name)).transpose(1, 2)  # [E, inputs, outputs]
        # As the model itself would: the grouped product is faster, and knows no float64.
        eager = self._config._experts_implementation == "eager"
        out = (_product_per_expert if eager else F.grouped_mm)(rows, weight, offs=routes.ends)
        return out.add_(getattr(self._module, f"{name}_bias")[routes.experts]) if self._layout.biased else out

    def _oriented(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(1, 2) if self._layout.transposed else weight

    def _units(self, neurons: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = self.neurons // self.experts
        return neurons // width, neurons % width

    def _experts_module(self, layer: nn.Module) -> nn.Module:
        path = self._layout.experts
        try:
            module = layer.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"Layer {self.layer} has no {path}, so it is dense or its code differs from the one the table "
                "describes. A file has one number of neurons for all layers, so models that mix dense layers and "
                "layers of experts (mlp_only_layers, decoder_sparse_step) are not supported."
            ) from error
        if REPLACEMENT in dict(module.named_children()):
            raise ArchitectureError(f"The experts of layer {self.layer} are replaced; restore them first.")
        parameters = dict(module.named_parameters(recurse=False))
        for name in ("gate_up_proj", "down_proj"):
            weight = parameters.get(name)
            if weight is None or weight.dim() != 3 or weight.dtype not in WEIGHT_DTYPES:
                stored = "not as one plain parameter" if weight is None else f"as {weight.dtype} {list(weight.shape)}"
                raise ArchitectureError(
                    f"{path} of layer {self.layer}, a {type(module).__name__}, stores {name} {stored}, so it is "
                    "quantised or wrapped; load the model in float16, bfloat16 or float32 (an MXFP4 checkpoint with "
                    "transformers.Mxfp4Config(dequantize=True)), or merge and unload the adapter."
                )
        return module


def _compute_by_replacement(module: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    return getattr(module, REPLACEMENT)(*arguments)


def _product_per_expert(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """``F.grouped_mm`` for every dtype: [S, inputs], [E, inputs, outputs], int32 [E] -> [S, outputs]."""
    ends = offs.tolist()
    groups = zip([0, *ends], ends, weight, strict=False)
    return torch.cat([rows[start:end] @ expert for start, end, expert in groups])
