"""Where each architecture keeps its feed-forward network (FFN), as one table, and the FFN that the table finds.

Every FFN computes ``down(activation(gate(x)) * up(x))``, or ``down(activation(gate(x)))`` where it has no up
projection. An architecture is one row of ``LAYOUTS``; nothing else in lape_fast knows any architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lape_fast.errors import ArchitectureError, ShapeError


@dataclass(frozen=True)
class Layout:
    """One architecture; the defaults are Llama's.

    Attributes:
        decoder: path from the model without its head to the module that maps token ids to hidden states.
        layers: path from the decoder to its list of layers.
        norm: name of the decoder's norm behind its last layer, which a decoder may hold as None.
        replaced: path within a layer to the module that ``FFN.replace`` exchanges.
        gate, up, down: paths within a layer to the projections; up is None in an ungated FFN, and equal to gate
            where one fused projection computes the gate's neurons and then up's.
        identities: paths within a layer to what ``FFN.replace`` turns into ``nn.Identity``, because ``replaced``
            covers the input projection only.
        activation_field: the config's field that names the activation.
        activation_name: the activation itself, where the code fixes it and the config has no such field.
        transposed: whether the projections are GPT-2's Conv1D, which stores [inputs, outputs].
        must_be_off: config fields that make the model's code go around the modules named here.
        packing: whether position_ids that restart keep attention inside documents.
        position_ids: whether the decoder takes position_ids at all.
    """

    decoder: str = ""
    layers: str = "layers"
    norm: str = "norm"
    replaced: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"
    identities: tuple[str, ...] = ()
    activation_field: str = "hidden_act"
    activation_name: str | None = None
    transposed: bool = False
    must_be_off: tuple[str, ...] = ()
    packing: bool = True
    position_ids: bool = True

    @property
    def fused(self) -> bool:
        """Whether one projection computes both gate and up."""
        return self.gate == self.up


LAYOUTS = {
    "llama": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "olmo2": Layout(),
    "cohere": Layout(),
    "cohere2": Layout(),
    "gemma2": Layout(activation_field="hidden_activation"),
    "gemma3_text": Layout(activation_field="hidden_activation"),
    "gemma3": Layout(decoder="language_model", activation_field="hidden_activation"),
    "phi3": Layout(gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
    # The dropout behind c_proj belongs to the residual stream: only what lies before it is replaced.
    "gpt2": Layout(
        layers="h",
        norm="ln_f",
        replaced="mlp.c_fc",
        gate="mlp.c_fc",
        up=None,
        down="mlp.c_proj",
        identities=("mlp.act", "mlp.c_proj"),
        activation_field="activation_function",
        transposed=True,
    ),
    "gpt_neox": Layout(
        norm="final_layer_norm",
        replaced="mlp.dense_h_to_4h",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        identities=("mlp.act", "mlp.dense_4h_to_h"),
    ),
    # OPT's layers have no mlp module, and its attention mask ignores position_ids.
    "opt": Layout(
        decoder="decoder",
        norm="final_layer_norm",
        replaced="fc1",
        gate="fc1",
        up=None,
        down="fc2",
        identities=("activation_fn", "fc2"),
        activation_field="activation_function",
        packing=False,
    ),
    # BLOOM's positions are distances between columns (ALiBi). With slow_but_exact it multiplies by slices of the
    # output projection's weight, around the module and without its bias.
    "bloom": Layout(
        layers="h",
        norm="ln_f",
        replaced="mlp.dense_h_to_4h",
        gate="mlp.dense_h_to_4h",
        up=None,
        down="mlp.dense_4h_to_h",
        identities=("mlp.gelu_impl", "mlp.dense_4h_to_h"),
        activation_name="gelu_tanh",
        must_be_off=("slow_but_exact",),
        packing=False,
        position_ids=False,
    ),
}

# The names that configs use, and the op's activation that computes each.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

# Under these the mask is built from position_ids; flash attention reads them only for batches of a single row.
PACKING_ATTENTION = ("sdpa", "eager", "flex_attention")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def layout_of(model: nn.Module) -> Layout:
    """The table's row for a model.

    Raises:
        ArchitectureError: no model of transformers, or its ``config.model_type`` is not in the table.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ArchitectureError(
            f"A {type(model).__name__} is not a model of transformers; give the model itself, as "
            "peft_model.get_base_model() returns it, or as it was before torch.compile."
        )
    check_known(model.config.model_type)
    return LAYOUTS[model.config.model_type]


def check_known(model_type: str) -> None:
    """Raises ArchitectureError, with the way to add a row, unless the table has ``model_type``."""
    if model_type not in LAYOUTS:
        raise ArchitectureError(
            f"The architecture {model_type!r} has no row in the table of FFN layouts, which knows "
            f"{', '.join(LAYOUTS)}; to add it, write a row under its config.model_type into LAYOUTS in "
            "lape_fast/models/layouts.py and a tiny model of it into tests/tiny_models.py."
        )


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


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of every layer, in order.

    Raises:
        ArchitectureError: unknown architecture or activation, projections that are quantised, wrapped or already
            replaced, or a config whose code goes around the projections.

    Example:
        >>> find_ffns(model)[0].gate_weight.shape  # [F, D]
    """
    layout, base = layout_of(model), decoder(model)
    for field in layout.must_be_off:
        if getattr(base.config, field):
            raise ArchitectureError(
                f"This {model.config.model_type} model has {field} switched on in its config, which makes it compute "
                f"around its projection modules; load it with {field} set to false."
            )
    activation = _activation(layout, base.config)
    return [FFN(number, layer, layout, activation) for number, layer in enumerate(base.get_submodule(layout.layers))]


def check_neurons(ffns: Sequence[FFN], neurons: Sequence[torch.Tensor]) -> None:
    """Makes sure that there is one index tensor per layer and that every index is a neuron of it.

    Raises:
        ArchitectureError: the number of layers or an index does not fit the model.
    """
    if len(neurons) != len(ffns):
        raise ArchitectureError(
            f"The neurons are given for {len(neurons)} layers, but the model has {len(ffns)}; use neurons that were "
            "identified on this model."
        )
    for ffn, chosen in zip(ffns, neurons, strict=True):
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < ffn.neurons:
            raise ArchitectureError(
                f"The neurons {int(chosen.min())} to {int(chosen.max())} of layer {ffn.layer} are not all in the "
                f"model, which has {ffn.neurons} neurons per layer; use neurons that were identified on this model."
            )


@contextlib.contextmanager
def replaced(ffns: Sequence[FFN], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Computes ``ffns`` by ``modules`` inside the ``with`` block, and restores them on the way out, whatever happens.

    Args:
        ffns: FFNs that are not replaced yet.
        modules: one per FFN, each [..., D] -> [..., D].

    Raises:
        ArchitectureError: the numbers differ, or an FFN is replaced already.
    """
    if len(ffns) != len(modules):
        raise ArchitectureError(f"There are {len(ffns)} FFNs but {len(modules)} modules; give one module per FFN.")
    with contextlib.ExitStack() as installed:
        for ffn, module in zip(ffns, modules, strict=True):
            ffn.replace(module)
            installed.callback(ffn.restore)
        yield


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


class FFN:
    """The feed-forward network of one layer: its projections, its weights in one orientation, and its place.

    The weights and biases are views of the live parameters, made anew at every access: write through them under
    ``torch.no_grad()`` and the model changes. They stay valid while the FFN is replaced.

    Attributes:
        layer: the layer's number, from 0.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: whether there is an up projection.
        neurons: F.
        hidden_size: D.
        projections: the original projection modules by name: "gate", "up" and "down"; "gate_up" and "down" where
            they are fused; "gate" and "down" without a gate. A module that replaces the FFN owns them by
            ``self.projections = nn.ModuleDict(ffn.projections)``, so that ``parameters()`` and ``to()`` find them.
    """

    def __init__(self, number: int, layer: nn.Module, layout: Layout, activation: str) -> None:
        self.layer = number
        self.activation = activation
        self.gated = layout.up is not None
        self._layout = layout
        self._parent = layer
        self._gate = self._projection(layout.gate)
        self._up = self._projection(layout.up) if self.gated else None
        self._down = self._projection(layout.down)
        self.hidden_size, self.neurons = self.down_weight.shape  # [D, F]
        if layout.fused:
            self.projections = {"gate_up": self._gate, "down": self._down}
        else:
            named = {"gate": self._gate, "up": self._up, "down": self._down}
            self.projections = {name: module for name, module in named.items() if module is not None}
        self._originals = {path: layer.get_submodule(path) for path in (layout.replaced, *layout.identities)}
        self._installed: dict[str, nn.Module] | None = None

    @property
    def gate_weight(self) -> torch.Tensor:
        """[F, D]"""
        return self._part(self._oriented(self._gate.weight), 0)

    @property
    def up_weight(self) -> torch.Tensor | None:
        """[F, D], or None in an ungated FFN."""
        return self._part(self._oriented(self._up.weight), 1) if self.gated else None

    @property
    def down_weight(self) -> torch.Tensor:
        """[D, F]"""
        return self._oriented(self._down.weight)

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

    def project_down(self, h: torch.Tensor) -> torch.Tensor:
        """Applies the original output projection: [..., F] -> [..., D]."""
        return self._down(h)

    def replace(self, module: nn.Module) -> None:
        """Puts ``module`` where this FFN is computed, until ``restore``.

        Args:
            module: maps the FFN's input [..., D] to its output [..., D]; OPT flattens the leading dimensions to one.

        Raises:
            ArchitectureError: the FFN is replaced already, by this object or by something else.
        """
        for path, original in self._originals.items():
            if self._parent.get_submodule(path) is not original:
                raise ArchitectureError(
                    f"The FFN of layer {self.layer} is already replaced: {path} now holds "
                    f"{type(self._parent.get_submodule(path)).__name__}; restore it first."
                )
        installed = {self._layout.replaced: module} | {path: nn.Identity() for path in self._layout.identities}
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
            if self._parent.get_submodule(path) is not module:
                raise ArchitectureError(
                    f"The FFN of layer {self.layer} cannot be restored: {path} now holds "
                    f"{type(self._parent.get_submodule(path)).__name__}, put there by something else; undo that first."
                )
        self._put(self._originals)
        self._installed = None

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self._parent.get_submodule(parent), name, module)

    def _oriented(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self._layout.transposed else weight

    def _part(self, tensor: torch.Tensor | None, part: int) -> torch.Tensor | None:
        # Slices rather than chunk: autograd refuses in-place writes to the views that chunk returns.
        if tensor is None or not self._layout.fused:
            return tensor
        return tensor[part * self.neurons : (part + 1) * self.neurons]

    def _projection(self, path: str) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        try:
            projection = self._parent.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"Layer {self.layer} has no {path}, so its FFN has been replaced or its code differs from the one the "
                "table describes; restore the original FFN, or correct the row in lape_fast/models/layouts.py."
            ) from error
        if not isinstance(projection, Conv1D if self._layout.transposed else nn.Linear):
            raise ArchitectureError(
                f"{path} of layer {self.layer} is a {type(projection).__name__} where a plain projection is needed; "
                "restore the original FFN, or merge and unload the adapter that wraps it."
            )
        if projection.weight.dtype not in _DTYPES:
            raise ArchitectureError(
                f"{path} of layer {self.layer} stores its weight as {projection.weight.dtype}, so it is quantised; "
                "load the model in float16, bfloat16 or float32."
            )
        return projection


def _activation(layout: Layout, config) -> str:
    name = layout.activation_name or getattr(config, layout.activation_field)
    if name not in ACTIVATION_NAMES:
        raise ArchitectureError(
            f"The FFN's activation {name!r} is not supported; the supported ones are {', '.join(ACTIVATION_NAMES)}."
        )
    return ACTIVATION_NAMES[name]
