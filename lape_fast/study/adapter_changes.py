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
from lape_fast.files import open_safetensors, read_json, read_safetensors
from lape_fast.models.checkpoint import PROJECTIONS, Checkpoint
from lape_fast.tune.adapter import (
    CONFIG_NAME,
    PREFIX,
    TENSORS_NAME,
    check_fingerprint,
    decode_neurons,
    read_adapter_config,
)
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
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileFormatError(f"{folder} is not an adapter folder: it has no {CONFIG_NAME}; name one that tune wrote.")
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise FileFormatError(
            f"{folder} is an adapter of the kind {kind!r}, whose changes cannot be read; the kinds are "
            f"{', '.join(KINDS)}."
        )
    name_of_base, open_kind = KINDS[kind]
    name = base or name_of_base(config)
    if not name:
        raise ConfigError(f"{folder} does not name the model it was trained on; give it as --model.")
    changes = open_kind(Path(folder), config, Checkpoint(name))
    if not changes.places:
        raise FileFormatError(f"{folder} changes no projection of an FFN, so there is nothing to measure.")
    return changes


def _open_subnetwork(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """Trained values of chosen rows. All of them are read at once: they are a small share of the model."""
    config = read_adapter_config(folder)
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
                f"{folder} is damaged: {projection} of layer {layer} is {list(new.shape)} where {list(old.shape)} is "
                "needed; copy the adapter again."
            )
        # As tune.subnetwork.fingerprint.
        digest.update(f"{layer}.{PARTS[PROJECTIONS.index(projection)]}{list(old.shape)}{old.dtype}".encode())
        digest.update(old.contiguous().view(torch.uint8).numpy())
        changes[layer, projection] = Change(neurons[layer], old, new.double() - old.double())
    check_fingerprint(config, digest.hexdigest(), f"The adapter {folder}")
    return AdapterChanges(places, changes.__getitem__)


def _open_lora(folder: Path, config: dict[str, Any], base: Checkpoint) -> AdapterChanges:
    """Two low-rank factors for every neuron: the change is B A times alpha / r, or alpha / sqrt(r) (rsLoRA)."""
    unknown = [name for name in ("use_dora", "alpha_pattern", "lora_bias") if config.get(name)]
    if unknown:
        raise FileFormatError(f"{folder} is a LoRA with {', '.join(unknown)}, which cannot be read; give a plain LoRA.")
    modules = {}
    with open_safetensors(folder / TENSORS_NAME) as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                modules.update(dict.fromkeys(_places_of(base, module), module))

    def read(place: Place) -> Change:
        layer, projection = place
        with open_safetensors(folder / TENSORS_NAME) as file:
            down, up = (file.get_tensor(f"{modules[place]}.lora_{part}.weight").double() for part in "AB")
        rank = len(down)
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        delta = scale * up @ down  # [outputs, inputs]
        if projection == "down":
            delta = delta.T
        if base.layout.fused and projection != "down":
            delta = delta.chunk(2)[projection == "up"]
        old = base.read(layer, projection)
        if delta.shape != old.shape:
            raise ArchitectureError(
                f"{folder} changes {projection} of layer {layer} as {list(delta.shape)}, but {base.folder} has "
                f"{list(old.shape)}; name the base it was trained on."
            )
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


# peft_type -> the name of the base in a configuration, and what opens an adapter.
KINDS: dict[str, tuple[Callable[[dict], str | None], Callable[[Path, dict, Checkpoint], AdapterChanges]]] = {
    "SUBNETWORK": (lambda config: (config.get("base") or {}).get("model"), _open_subnetwork),
    "LORA": (lambda config: config.get("base_model_name_or_path"), _open_lora),
}
