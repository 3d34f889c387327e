"""The feed-forward networks of a model: found by the table of layouts, and computed by other modules for a while."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lape_fast.errors import ArchitectureError
from lape_fast.models.dense import FFN
from lape_fast.models.experts import ExpertFFN
from lape_fast.models.hidden_states import decoder
from lape_fast.models.layouts import ACTIVATION_NAMES, DenseLayout, ExpertLayout, Layout, layout_of

# The class that reads each kind of row.
_KINDS = {DenseLayout: FFN, ExpertLayout: ExpertFFN}


def find_ffns(model: nn.Module) -> list[FFN] | list[ExpertFFN]:
    """The FFN of every layer, in order: all dense or all mixtures of experts.

    An FFN that a module with an attribute ``ffn`` computes is found through that attribute.

    Raises:
        ArchitectureError: unknown architecture or activation, projections that are wrapped, replaced by something
            else, split by tensor parallelism or quantised in a way that is not supported, a config whose code goes
            around the projections, or dense layers in a mixture of experts.

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
    if _is_tensor_parallel(model, base):
        raise ArchitectureError(
            f"This {model.config.model_type} model is split among devices by tensor parallelism, which is not "
            "supported; load it without tp_plan, on one device or with load_sharded_model."
        )
    kind, activation = _KINDS[type(layout)], _activation(layout, base.config)
    layers = enumerate(base.get_submodule(layout.layers))
    return [_installed(layer, layout) or kind(number, layer, layout, activation) for number, layer in layers]


def dense_ffns(model: nn.Module) -> list[FFN]:
    """``find_ffns`` for what works on the projections of a dense FFN, as tuning does.

    Raises:
        ArchitectureError: as ``find_ffns`` and ``check_unshared``, or the model is a mixture of experts.
    """
    if isinstance(layout_of(model), ExpertLayout):
        raise ArchitectureError(
            f"This {model.config.model_type} model is a mixture of experts, whose neurons can be counted, selected and "
            "switched off but not tuned; tune a dense model."
        )
    ffns = find_ffns(model)
    check_unshared(model, ffns)
    return ffns


def check_unshared(model: nn.Module, ffns: Sequence[FFN]) -> None:
    """Makes sure that no weight of an FFN projection is used in a second place, which tuning would change with it.

    Raises:
        ArchitectureError: two layers share a projection, or two modules a weight; the message names both.
    """
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for ffn in ffns:
        for projection in ffn.projections.values():
            shared = names[id(projection.weight)]
            if len(shared) > 1:
                raise ArchitectureError(
                    f"{' and '.join(shared)} are one weight, so that tuning a neuron in one place would change it in "
                    "the other; give each layer projections of its own."
                )


def check_neurons(ffns: Sequence[FFN] | Sequence[ExpertFFN], neurons: Sequence[torch.Tensor]) -> None:
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


def check_size(made_for: tuple[int, int], model: tuple[int, int]) -> None:
    """Makes sure that neurons were found in a model of this one's size: layers and neurons per layer.

    Raises:
        ArchitectureError: they were not.
    """
    if made_for != model:
        raise ArchitectureError(
            f"The neurons are of a model with {made_for[0]} layers x {made_for[1]} neurons, but this model has "
            f"{model[0]} x {model[1]}; use the model they were found in, or identify again."
        )


@contextlib.contextmanager
def replaced(ffns: Sequence[FFN] | Sequence[ExpertFFN], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Computes ``ffns`` by ``modules`` inside the ``with`` block, and restores them on the way out, whatever happens.

    Args:
        ffns: FFNs that are not replaced yet.
        modules: one per FFN, called as the FFN's ``replace`` says.

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


def _installed(layer: nn.Module, layout: Layout) -> FFN | None:
    """The FFN of a layer whose replacement knows it."""
    if not isinstance(layout, DenseLayout):
        return None
    return getattr(layer.get_submodule(layout.replaced), "ffn", None)


def _is_tensor_parallel(model: nn.Module, base: nn.Module) -> bool:
    if (model.tp_size or 1) > 1:
        return True
    # FSDP's weights are of this class too, but it makes them whole before each layer is computed.
    split = any(isinstance(parameter, DTensor) for parameter in base.parameters())
    return split and not any(isinstance(module, FSDPModule) for module in base.modules())


def _activation(layout: Layout, config) -> str:
    name = layout.activation_name or getattr(config, layout.activation_field)
    if name not in ACTIVATION_NAMES:
        raise ArchitectureError(
            f"The FFN's activation {name!r} is not supported; the supported ones are {', '.join(ACTIVATION_NAMES)}."
        )
    return ACTIVATION_NAMES[name]
