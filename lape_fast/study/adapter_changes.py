"""What an adapter changed in each FFN projection, from its folder and the base's files, one matrix at a time.

A kind of adapter is one row of ``KINDS``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError
from lape_fast.files import open_safetensors, read_safetensors
from lape_fast.models.checkpoint import PROJECTIONS, Checkpoint, as_rows
from lape_fast.tune import dense
from lape_fast.tune.adapter import PREFIX, TENSORS_NAME, check_fingerprint, decode_neurons
from lape_fast.tune.loading import adapter_kind, describe_adapter
from lape_fast.tune.subnetwork_ffn import PARTS

# A layer's number and one of PROJECTIONS.
Place = tuple[int, str]


@dataclass(frozen=True)
class Change:
    """The weights of some neurons of a projection, and what was added to them; a column of down is a row here.

    Attributes:
        neurons: int64 ``[K]``, sorted.
        old: ``[K, D]``.
        delta: ``[K, D]``, without the rounding that adding it to ``old`` may bring.
    """

    neurons: Tensor
    old: Tensor
    delta: Tensor


@dataclass(frozen=True)
class AdapterChanges:
    """The changes of one adapter.

    Attributes:
        places: where it has any, in order.
        read: reads those of one place.
    """

    places: tuple[Place, ...]
    read: Callable[[Place], Change]


def open_changes(folder: str | os.PathLike, base: str | os.PathLike | None = None) -> AdapterChanges:
    """Opens an adapter to read what it changed in the FFNs.

    Args:
        folder: an adapter folder of a kind in ``KINDS``.
        base: the model it was trained on, a folder or a hub id in the local cache; by default what the adapter names.

    Raises:
        FileFormatError: not an adapter, of another kind, or without a change of an FFN.
        ConfigError: the base is not on this machine.
        ArchitectureError: the base is not the one that the adapter was made for.

    Example:
        >>> changes = open_changes("adapters/mlt_Latn")
        >>> {place: changes.read(place).delta.norm() for place in changes.places}
    """
    config = describe_adapter(folder)
    kind = adapter_kind(folder)
    kind = str(config["peft_type"]).lower() if kind == "peft" else kind
    if kind not in KINDS:
        raise FileFormatError(
            f"{folder} is an adapter of the kind {kind!r}, whose changes cannot be read; the kinds are "
            f"{', '.join(KINDS)}."
        )
    name = base or (config.get("base") or {}).get("model") or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder} does not name the model it was trained on; give it as --model.")
    changes = KINDS[kind](Path(folder), config, Checkpoint(name))
    if not changes.places:
        raise FileFormatError(f"{folder} changes no projection of an FFN, so there is nothing to measure.")
    return changes


def _open_subnetwork(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """Trained values of chosen rows. All of them are read at once: they are a small share of the model."""
    neurons = decode_neurons(config["neurons"])
    trained = {}
    for name, values in read_safetensors(folder / TENSORS_NAME).items():
        path, _, part = name.removeprefix(PREFIX).rpartition(".")
        number = path.removesuffix(f".{base.layout.replaced}").rpartition(".")[2]
        if part not in PARTS or not number.isdecimal() or int(number) >= len(neurons):
            raise FileFormatError(f"{folder} holds {name}, which is no trained value; copy the adapter again.")
        trained[int(number), PROJECTIONS[PARTS.index(part)]] = values
    places = _ordered(trained)
    digest = hashlib.sha256()
    changes = {}
    for layer, projection in places:
        new = trained[layer, projection]
        # In the dtype that the base was loaded in, which need not be that of its file.
        old = base.read(layer, projection, neurons[layer]).to(new.dtype)
        if new.shape != old.shape:
            raise FileFormatError(
                f"{folder} does not fit {base.folder}: {projection} of layer {layer} is {list(new.shape)} where "
                f"{list(old.shape)} is needed; name the base it was trained on, or copy a damaged adapter again."
            )
        # As tune.subnetwork.fingerprint.
        digest.update(f"{layer}.{PARTS[PROJECTIONS.index(projection)]}{list(old.shape)}{old.dtype}".encode())
        digest.update(old.contiguous().view(torch.uint8).numpy())
        changes[layer, projection] = Change(neurons[layer], old, new.double() - old.double())
    check_fingerprint(config, digest.hexdigest(), f"The adapter {folder}")
    return AdapterChanges(places, changes.__getitem__)


def _open_dense(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """Whole trained weights by name: of all neurons. The base is read once to make sure that it is the right one."""
    if "replaced_values_sha256" not in config:
        raise FileFormatError(f"{folder / dense.CONFIG_NAME} does not say what was replaced; copy the adapter again.")
    path = folder / dense.TENSORS_NAME
    digest = hashlib.sha256()
    weights = {}
    with open_safetensors(path) as file:
        for name in sorted(file.keys()):
            # As tune.dense.fingerprint.
            old = base.read_tensor(name).to(file.get_tensor(name).dtype)
            digest.update(f"{name}{list(old.shape)}{old.dtype}".encode())
            digest.update(old.flatten().view(torch.uint8).numpy())
            if name.endswith(".weight"):
                weights.update(dict.fromkeys(_places_of(base, name.removesuffix(".weight")), name))
    check_fingerprint(config, digest.hexdigest(), f"The adapter {folder}")

    def read(place: Place) -> Change:
        layer, projection = place
        with open_safetensors(path) as file:
            new = as_rows(base.layout, projection, file.get_tensor(weights[place]))
        old = base.read(layer, projection).to(new.dtype)
        return Change(torch.arange(len(old)), old, new.double() - old.double())

    return AdapterChanges(_ordered(weights), read)


def _open_lora(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """Two low-rank factors for every neuron: the change is B A times alpha / r, or alpha / sqrt(r) (rsLoRA)."""
    unknown = [name for name in ("use_dora", "alpha_pattern", "lora_bias") if config.get(name)]
    if unknown:
        raise FileFormatError(f"{folder} is a LoRA with {', '.join(unknown)}, which cannot be read; give a plain LoRA.")

    def change(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        rank = len(down)
        return (config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)) * up @ down

    return _open_factors(folder, base, (".lora_A.weight", ".lora_B.weight"), change)


def _open_ia3(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """A factor for each output of a projection, or each input: the change is the weight times the factor less one."""
    return _open_factors(folder, base, (".ia3_l",), lambda weight, factor: weight * (factor - 1))


def _open_factors(
    folder: Path, base: Checkpoint, names: tuple[str, ...], change: Callable[..., Tensor]
) -> AdapterChanges:
    """An adapter of PEFT, of which a few small tensors decide how a weight changes.

    Args:
        names: what the tensors of a module are called behind its path.
        change: makes of the weight and of them the weight's change, both ``[outputs, inputs]``.
    """
    modules = {}
    with open_safetensors(folder / TENSORS_NAME) as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(names[0]):
                module = name.removesuffix(names[0])
                modules.update(dict.fromkeys(_places_of(base, module), module))

    def read(place: Place) -> Change:
        layer, projection = place
        with open_safetensors(folder / TENSORS_NAME) as file:
            factors = [file.get_tensor(f"{modules[place]}{name}").double() for name in names]
        stored = base.read_whole(layer, projection).double()
        weight = stored.T if base.layout.transposed else stored  # [outputs, inputs]
        try:
            delta = change(weight, *factors)
            fits = delta.shape == weight.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ArchitectureError(
                f"{folder} changes {projection} of layer {layer} by {[list(each.shape) for each in factors]}, which do "
                f"not fit the {list(weight.shape)} in {base.folder}; name the base it was trained on."
            )
        delta = delta.T if base.layout.transposed else delta
        old, delta = (as_rows(base.layout, projection, each) for each in (stored, delta))
        return Change(torch.arange(len(old)), old, delta)

    return AdapterChanges(_ordered(modules), read)


def _places_of(base: Checkpoint, module: str) -> list[Place]:
    """The projections that a module computes, none if it is no part of an FFN."""
    found = []
    for projection in PROJECTIONS:
        path = getattr(base.layout, projection)
        match = path and re.search(rf"\b{re.escape(base.layout.layers)}\.(\d+)\.{re.escape(path)}$", module)
        if match:
            found.append((int(match[1]), projection))
    return found


def _ordered(places: dict[Place, Any]) -> tuple[Place, ...]:
    return tuple(sorted(places, key=lambda place: (place[0], PROJECTIONS.index(place[1]))))


# The kinds of adapters: our own, and PEFT's by the name that it has in their configuration.
KINDS: dict[str, Callable[[Path, dict[str, Any], Checkpoint], AdapterChanges]] = {
    "subnetwork": _open_subnetwork,
    "dense": _open_dense,
    "lora": _open_lora,
    "ia3": _open_ia3,
}
