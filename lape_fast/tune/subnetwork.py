"""The subnetwork of a whole model: its FFNs from the lowest trained layer up, the rest of the model frozen."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lape_fast.errors import AdapterError, TrainingError
from lape_fast.models import check_neurons, dense_ffns, model_identity
from lape_fast.tune.norms import restore_norms, slim_norms
from lape_fast.tune.optimizer import IndexedAdamW, Part
from lape_fast.tune.policies import decide_at_first_step, policy_of_layer, set_policies
from lape_fast.tune.subnetwork_ffn import ATTACHED, Policy, Storage, SubnetworkFFN

DEFAULT_NAME = "default"


class Subnetwork:
    """One language's subnetwork in a model, attached by ``attach_subnetwork``.

    Attributes:
        model: the model.
        layers: the FFNs, from the lowest trained layer up.
        paths: the path of each in the model.
        name: under which the FFNs know it.
        base: the identity of the model it is attached to.

    Args:
        model: a model with subnetwork FFNs.
        name: one of the languages that they know.
    """

    def __init__(self, model: nn.Module, name: str):
        self.model = model
        self.layers = installed_layers(model)
        paths = {id(module): path for path, module in model.named_modules()}
        self.paths = [paths[id(layer)] for layer in self.layers]
        self.name = name
        self.base = model_identity(model)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: fp32 masters of ``[K, D]`` per layer and part."""
        return [parameter for layer in self.layers for parameter in layer.masters(self.name).values()]

    def trainable(self) -> int:
        """How many weights are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def neurons(self) -> dict[int, Tensor]:
        """The neurons per layer, on the CPU, where there are any."""
        chosen = {layer.ffn.layer: layer.neurons(self.name).cpu() for layer in self.layers}
        return {layer: neurons for layer, neurons in chosen.items() if len(neurons)}

    def synchronize(self) -> None:
        """Makes the base weights hold the trained values after writes to ``.data`` of masters, which leave no trace."""
        for layer in self.layers:
            layer.synchronize()

    def detach(self, *, keep: bool) -> None:
        """Gives the model its own modules back, with the trained values in its weights or the original ones.

        Raises:
            AdapterError: the values shall be kept, but the base cannot be written.
        """
        for layer in self.layers if keep else ():
            layer.make_resident()
        for layer in self.layers:
            uninstall(layer, self.name if keep else None)
        # PEFT would take the next adapter for one beside this.
        self.model.__dict__.pop("peft_config", None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the model computes with its original weights, bit for bit."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.holding(None))
            yield

    def optimizer(self, **options: Any) -> IndexedAdamW:
        """AdamW for this subnetwork: updates masters and base weights in one pass over all layers.

        Args:
            options: of ``IndexedAdamW``: lr, betas, eps, weight_decay, max_grad_norm.

        Example:
            >>> optimizer = attach_subnetwork(model, neurons["mlt_Latn"]).optimizer(lr=1e-4)
        """
        parts = [
            Part(
                master,
                functools.partial(_written_weight, layer, self.name, part),
                layer.neurons(self.name),
                functools.partial(layer.note_update, self.name),
            )
            for layer in self.layers
            for part, master in layer.masters(self.name).items()
        ]
        return IndexedAdamW(parts, **options)

    def set_policy(self, policy: Policy) -> None:
        """Changes what is kept for backward, in all layers; ``auto`` decides at the next training step."""
        set_policies(self.layers, policy)
        if policy == "auto":
            decide_at_first_step(self.model)

    def fingerprint(self) -> str:
        """SHA-256 over the original values that the subnetwork replaces, to know the base again."""
        return fingerprint(self.layers, self.name)


def attach_subnetwork(
    model: nn.Module, neurons: Sequence[Tensor], policy: Policy = "save", *, storage: Storage = "auto"
) -> Subnetwork:
    """Freezes the model and replaces its FFNs, from the lowest trained layer up, by subnetwork FFNs.

    Layers below the lowest trained one are left as they are: nothing in them needs a gradient, so autograd never
    enters them. Layers above it that have no neurons are replaced too, since they then save less for backward.

    Args:
        model: a causal language model of a known architecture.
        neurons: one sorted index tensor per layer.
        policy: what is kept for backward: ``save``, ``recompute``, ``checkpoint`` or ``auto``, the fastest that fits
            into the memory that is free at the first training step.
        storage: ``resident`` writes the trained values into the base, ``overlay`` never writes it; ``auto`` is overlay
            where the base is quantised or sharded. Choose overlay for a model that is to be sharded later.

    Raises:
        ArchitectureError: the number of layers or a neuron index does not fit the model, or it is a mixture of experts.
        ConfigError: the policy is unknown.
        TrainingError: no layer has a neuron.

    Example:
        >>> subnetwork = attach_subnetwork(model, neurons["mlt_Latn"])
        >>> optimizer = torch.optim.AdamW(subnetwork.parameters(), lr=1e-4)
    """
    layers = install(model, neurons, DEFAULT_NAME, policy, storage, SubnetworkFFN)
    # After the masters were made: they are frozen first, and then alone set free.
    model.requires_grad_(False)
    for layer in layers:
        layer.hold(DEFAULT_NAME)
        for parameter in layer.masters().values():
            parameter.requires_grad_(True)
    return Subnetwork(model, DEFAULT_NAME)


def install(
    model: nn.Module,
    neurons: Sequence[Tensor],
    name: str,
    policy: Policy,
    storage: Storage,
    kind: type[SubnetworkFFN],
) -> list[SubnetworkFFN]:
    """Makes the FFNs from the lowest trained layer up modules of ``kind`` that know ``neurons`` under ``name``.

    The modules of languages that were installed before serve for this one too, above or below its lowest layer.

    Returns:
        All modules of ``kind`` in the model, from the lowest layer up; none of them holds ``name`` yet.

    Raises:
        ArchitectureError, TrainingError: as for ``attach_subnetwork``.
        AdapterError: there is a language of this name already.
    """
    ffns = dense_ffns(model)
    check_neurons(ffns, neurons)
    trained = [layer for layer, chosen in enumerate(neurons) if len(chosen)]
    if not trained:
        raise TrainingError(
            "No layer has a neuron to train: the selection gave this language none; select with a higher top_rate, or "
            "by the rule budget, which gives every language as many."
        )
    installed = {layer.ffn.layer: layer for layer in installed_layers(model)}
    check_name(list(installed.values()), name)
    earlier = list(next(iter(installed.values())).selections) if installed else []
    for ffn in ffns[trained[0] :]:
        if ffn.layer not in installed:
            layer = installed[ffn.layer] = kind(ffn, policy_of_layer(policy, ffn.layer == trained[0]), storage)
            ffn.replace(layer, with_norm=True)
            slim_norms(ffn.decoder_layer)
            for other in earlier:
                layer.add(other, torch.empty(0, dtype=torch.int64))
    for number, layer in installed.items():
        layer.add(name, neurons[number])
    if policy == "auto":
        decide_at_first_step(model)
    return installed_layers(model)


def check_name(layers: Sequence[SubnetworkFFN], name: str) -> None:
    """Makes sure that subnetwork FFNs can know a new language by this name.

    Raises:
        AdapterError: one of them has it already, or torch cannot have it as the name of a module.
    """
    if any(name in layer.selections for layer in layers):
        raise AdapterError(f"The model has an adapter named {name!r} already; choose another name or delete it first.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise AdapterError(
            f"An adapter cannot be named {name!r}, which means something else to torch; choose another name, such as "
            "the language's."
        )


def installed_layers(model: nn.Module) -> list[SubnetworkFFN]:
    """The subnetwork FFNs of a model, from the lowest layer up."""
    return sorted(
        (module for module in model.modules() if isinstance(module, SubnetworkFFN)), key=lambda layer: layer.ffn.layer
    )


@torch.no_grad()
def combine(layers: Sequence[SubnetworkFFN], weights: Mapping[str, float], name: str) -> dict[str, int]:
    """Adds a language ``name`` whose values are the base's plus the weighted sum of what others changed.

    Args:
        layers: all subnetwork FFNs of a model.
        weights: how much of each language.
        name: a new one.

    Returns:
        "neurons", how many the new language has, and "shared", how many of these are in more than one of the others.
    """
    total = shared = 0
    for layer in layers:
        chosen = {other: layer.neurons(other) for other in weights}
        union, members = torch.cat(list(chosen.values())).unique(return_counts=True)
        total, shared = total + len(union), shared + int((members > 1).sum())
        layer.add(name, union)
        for other, weight in weights.items():
            rows = torch.searchsorted(union, chosen[other])
            for part, original in layer.originals(other).items():
                change = layer.masters(other)[part] - original
                layer.masters(name)[part].index_add_(0, rows, change, alpha=weight)
    return {"neurons": total, "shared": shared}


def uninstall(layer: SubnetworkFFN, keep: str | None) -> None:
    """Gives a layer its own modules back, with the values of a language or its original ones."""
    layer.hold(keep)
    # Masters may have been written in ways that leave no trace.
    layer.synchronize()
    # Forgotten without a switch, which would take the values out again.
    layer.held = None
    layer.set_policy("save")
    layer.ffn.restore()
    restore_norms(layer.ffn.decoder_layer)


def fingerprint(layers: Sequence[SubnetworkFFN], name: str) -> str:
    """SHA-256 over the values that the base has at the neurons of a language."""
    digest = hashlib.sha256()
    for layer in layers:
        for part, values in layer.originals(name).items():
            digest.update(f"{layer.ffn.layer}.{part}{list(values.shape)}{values.dtype}".encode())
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _written_weight(layer: SubnetworkFFN, name: str, part: str) -> Tensor | None:
    """The ``[F, D]`` weight that an optimizer writes a part into; none while it holds no values of this language."""
    return None if layer.overlay or layer.held != name else layer.base_weight(part)


def _write_after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Brings what an optimizer did to masters into the base weights. Fused optimizers leave no other trace of it."""
    if isinstance(optimizer, IndexedAdamW):
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(ATTACHED):
        layer.follow(stepped)


register_optimizer_step_post_hook(_write_after_step)
