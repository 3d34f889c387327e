"""The dense feed-forward network of one layer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from lape_fast.errors import ArchitectureError
from lape_fast.models.layouts import WEIGHT_DTYPES, DenseLayout
from lape_fast.models.quantised import KINDS, dequantise, keep_as_stored, quantisation_of

_LOAD_OTHERWISE = (
    f"load the model in float16, bfloat16 or float32, or quantised as {', '.join(kind.name for kind in KINDS)}"
)


class Absorbed(nn.Identity):
    """Stands where a norm was that a replaced FFN computes itself."""

    def __call__(self, *arguments, **options):
        refuse_new_forward(self, "A norm that a replaced FFN computes itself")
        return super().__call__(*arguments, **options)


def refuse_new_forward(module: nn.Module, what: str) -> None:
    """For the ``__call__`` of a module that must not be made to compute something else.

    Raises:
        ArchitectureError: it was; the hooks of accelerate, which only go around it, are welcome.
    """
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise ArchitectureError(
            f"{what} was given another forward, as Liger's use_liger_kernel does, which goes around it; apply such "
            "kernels to the model before its FFNs are replaced, or switch them off for FFN and norms "
            "(liger_kernel_config={'swiglu': False, 'rms_norm': False})."
        )


class FFN:
    """The feed-forward network of one layer: its projections, its weights in one orientation, and its place.

    The weights and biases are views of the live parameters, made anew at every access: write through them under
    ``torch.no_grad()`` and the model changes. They stay valid while the FFN is replaced.

    A quantised projection has no such weight: what is read is dequantised at every access, a fresh tensor in the
    dtype of the layer's activations. Writing to it changes nothing; ask ``quantised`` before you write.

    Attributes:
        layer: the layer's number, from 0.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether there is an up projection.
        experts: 1, as in a mixture of experts it is more.
        neurons: F.
        hidden_size: D.
        norm: the norm whose output is the block's input and nothing else's, where the table names it; else None.
        decoder_layer: the layer of the decoder that the block is in.
        quantised: how the projections are quantised, such as "bitsandbytes LLM.int8"; None if none of them is.
        projections: the original projection modules by name: "gate", "up" and "down"; "gate_up" and "down" where
            they are fused; "gate" and "down" without a gate. A module that replaces the FFN owns them by
            ``self.projections = nn.ModuleDict(ffn.projections)``, so that ``parameters()`` and ``to()`` find them.
    """

    experts = 1

    def __init__(self, number: int, layer: nn.Module, layout: DenseLayout, activation: str) -> None:
        self.layer = number
        self.activation = activation
        self.gated = layout.up is not None
        self._layout = layout
        self.decoder_layer = layer
        self._gate = self._projection(layout.gate)
        self._up = self._projection(layout.up) if self.gated else None
        self._down = self._projection(layout.down)
        modules = [module for module in (self._gate, self._up, self._down) if module is not None]
        kinds = [kind.name for kind in map(quantisation_of, modules) if kind is not None]
        self.quantised = kinds[0] if kinds else None
        keep_as_stored(modules)
        # Norms and biases are never quantised; a quantised weight need not say what it computes in.
        self._dtype = next(parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
        self.hidden_size, self.neurons = self._shape(self._down)  # [D, F]
        if layout.fused:
            self.projections = {"gate_up": self._gate, "down": self._down}
        else:
            named = {"gate": self._gate, "up": self._up, "down": self._down}
            self.projections = {name: module for name, module in named.items() if module is not None}
        self.norm = layer.get_submodule(layout.ffn_norm) if layout.ffn_norm else None
        self._originals = {path: layer.get_submodule(path) for path in (layout.replaced, *layout.identities)}
        self._installed: dict[str, nn.Module] | None = None

    @property
    def original(self) -> nn.Module:
        """The module that ``replace`` exchanges."""
        return self._originals[self._layout.replaced]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, or of what quantised weights compute in."""
        return self._dtype if self.quantised else self._gate.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._gate.weight.device

    @property
    def writable(self) -> bool:
        """Whether single rows can be written: not of quantised weights, nor where each process holds a share."""
        return not self.quantised and not isinstance(self._gate.weight, DTensor)

    @property
    def gate_weight(self) -> torch.Tensor:
        """[F, D]"""
        return self._part(self._weight(self._gate), 0)

    @property
    def up_weight(self) -> torch.Tensor | None:
        """[F, D], or None in an ungated FFN."""
        return self._part(self._weight(self._up), 1) if self.gated else None

    @property
    def down_weight(self) -> torch.Tensor:
        """[D, F]"""
        return self._weight(self._down)

    @property
    def gate_bias(self) -> torch.Tensor | None:
        """[F], or None."""
        return self._part(self._gate.bias, 0)

    @property
    def up_bias(self) -> torch.Tensor | None:
        """[F], or None."""
        return self._part(self._up.bias, 1) if self.gated else None

    @property
    def down_bias(self) -> torch.Tensor | None:
        """[D], or None."""
        return self._down.bias

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Applies the original input projections.

        Args:
            x: [..., D]

        Returns:
            gate before its activation and up (None in an ungated FFN), both [..., F]; not contiguous where fused.
        """
        if not self._layout.fused:
            return self._gate(x), self._up(x) if self.gated else None
        both = self._gate(x)  # [..., 2F]
        return both[..., : self.neurons], both[..., self.neurons :]

    def project_gate(self, x: torch.Tensor) -> torch.Tensor:
        """The gate of ``project`` alone, without the work for up where that is possible: [..., D] -> [..., F]."""
        if not self._layout.fused:
            return self._gate(x)
        if self.quantised:
            return self.project(x)[0]
        return F.linear(x, self.gate_weight, self.gate_bias)

    def project_down(self, h: torch.Tensor) -> torch.Tensor:
        """Applies the original output projection: [..., F] -> [..., D]."""
        return self._down(h)

    def input_gradient(
        self, part: Literal["gate", "up", "down"], grad: torch.Tensor, total: torch.Tensor | None = None
    ) -> torch.Tensor:
        """total + grad @ the weight of a part, in place where there is a total; by the product of fp8 where it is fp8.

        Args:
            part: which projection.
            grad: dL/d its output, [..., F], or [..., D] for down.
            total: what it is added to, [..., D], or [..., F] for down.
        """
        projection = {"gate": self._gate, "up": self._up, "down": self._down}[part]
        kind = quantisation_of(projection)
        if kind is not None and kind.input_gradient is not None:
            first = self.neurons if self._layout.fused and part == "up" else 0
            product = kind.input_gradient(projection, grad, slice(first, first + grad.shape[-1]))
            return product if total is None else total.add_(product)
        weight = getattr(self, f"{part}_weight").to(grad.dtype)
        if total is None:
            return grad @ weight
        total.view(-1, total.shape[-1]).addmm_(grad.reshape(-1, grad.shape[-1]), weight)
        return total

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The whole FFN by the model's own modules, whatever stands in their place: [..., D] -> [..., D]."""
        # The table names the identities in the order in which the model computes them.
        for module in self._originals.values():
            x = module(x)
        return x

    def outgoing(self, neurons: torch.Tensor) -> torch.Tensor:
        """A copy of the weights by which ``neurons`` reach the rest of the model, [K, D]: their columns of down.

        Raises:
            ArchitectureError: the down projection is quantised, so that ``set_outgoing`` could not put them back.
        """
        return self._writable_down()[neurons]

    def set_outgoing(self, neurons: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what ``outgoing`` reads."""
        self._writable_down()[neurons] = values

    def replace(self, module: nn.Module, *, with_norm: bool = False) -> None:
        """Puts ``module`` where this FFN is computed, until ``restore``.

        Args:
            module: maps the FFN's input [..., D] to its output [..., D]; OPT flattens the leading dimensions to one.
            with_norm: also take the norm out, so that the module is given what the norm would be given.

        Raises:
            ArchitectureError: the FFN is replaced already, by this object or by something else.
        """
        originals = dict(self._originals)
        if with_norm and self.norm is not None:
            originals[self._layout.ffn_norm] = self.norm
        for path, original in originals.items():
            if self.decoder_layer.get_submodule(path) is not original:
                raise ArchitectureError(
                    f"The FFN of layer {self.layer} is already replaced: {path} now holds "
                    f"{type(self.decoder_layer.get_submodule(path)).__name__}; restore it first."
                )
        installed = {path: nn.Identity() for path in self._layout.identities} | {self._layout.replaced: module}
        if self._layout.ffn_norm in originals:
            installed[self._layout.ffn_norm] = Absorbed()
        self._put(installed)
        self._installed = installed

    def restore(self) -> None:
        """Puts the original modules back; does nothing if they are in place.

        Raises:
            ArchitectureError: something else has replaced the module that ``replace`` installed.
        """
        if self._installed is None:
            return
        for path, module in self._installed.items():
            found = self.decoder_layer.get_submodule(path)
            if found is not module:
                raise ArchitectureError(
                    f"The FFN of layer {self.layer} cannot be restored: {path} now holds {type(found).__name__}, put "
                    "there by something else; undo that first."
                )
        norm = {self._layout.ffn_norm: self.norm} if self._layout.ffn_norm in self._installed else {}
        self._put(self._originals | norm)
        self._installed = None

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self.decoder_layer.get_submodule(parent), name, module)

    def _writable_down(self) -> torch.Tensor:  # [F, D]
        kind = quantisation_of(self._down)
        if kind is not None:
            raise ArchitectureError(
                f"The down projection of layer {self.layer} is quantised ({kind.name}), so the weights of single "
                "neurons cannot be changed in place; load the model in float16, bfloat16 or float32."
            )
        return self.down_weight.data.t()

    def _weight(self, projection: nn.Module) -> torch.Tensor:
        if quantisation_of(projection) is not None:
            # [outputs, inputs] even where it took the place of a Conv1D.
            return dequantise(projection, self._dtype)
        return projection.weight.t() if self._layout.transposed else projection.weight

    def _shape(self, projection: nn.Module) -> tuple[int, int]:
        if quantisation_of(projection) is not None:
            return projection.out_features, projection.in_features
        return tuple(self._weight(projection).shape)

    def _part(self, tensor: torch.Tensor | None, part: int) -> torch.Tensor | None:
        # Slices rather than chunk: autograd refuses in-place writes to the views that chunk returns.
        if tensor is None or not self._layout.fused:
            return tensor
        return tensor[part * self.neurons : (part + 1) * self.neurons]

    def _projection(self, path: str) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        try:
            projection = self.decoder_layer.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"Layer {self.layer} has no {path}, so its FFN has been replaced or its code differs from the one the "
                "table describes; restore the original FFN, or correct the row in lape_fast/models/layouts.py."
            ) from error
        if quantisation_of(projection) is not None:
            return projection
        if not isinstance(projection, Conv1D if self._layout.transposed else nn.Linear):
            raise ArchitectureError(
                f"{path} of layer {self.layer} is a {type(projection).__name__} where a plain projection is needed; "
                f"restore the original FFN, merge and unload the adapter that wraps it, or {_LOAD_OTHERWISE}."
            )
        weight = projection.weight
        # A quantised tensor may claim the dtype that it dequantises to.
        if weight.dtype not in WEIGHT_DTYPES or type(weight).dequantize is not torch.Tensor.dequantize:
            raise ArchitectureError(
                f"{path} of layer {self.layer} stores its weight as {type(weight).__name__} of {weight.dtype}, a kind "
                f"of quantisation that is not supported; {_LOAD_OTHERWISE}."
            )
        return projection
