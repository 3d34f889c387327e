"""Adapters: the trained values of one language's neurons, in a folder of two files that PEFT reads too.

``adapter_model.safetensors`` holds the trained values (not differences), ``adapter_config.json`` the neurons they
belong to and the base they were trained on. A fingerprint of the values they replace makes sure that they are only
ever put into that base. Nothing here needs PEFT.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lape_fast.errors import ArchitectureError, FileFormatError
from lape_fast.files import read_json, read_safetensors, write_json, write_tensors
from lape_fast.models import dequantise_model, model_identity
from lape_fast.tune.subnetwork import Subnetwork, attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy, Storage, whole

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"

# What PEFT puts in front of a module's path.
PREFIX = "base_model.model."

REQUIRED = {"peft_type", "language", "base", "neurons", "replaced_values_sha256"}
VALUE_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
# Of the base, what is compared and what is named where it differs.
BASE_FACTS = {"config_hash", "model", "model_type", "layers", "neurons_per_layer"}


def write_adapter(subnetwork: Subnetwork, folder: Path, config: Mapping[str, Any]) -> None:
    """Writes the two files of an adapter into a folder that exists, with the values in the base's dtype.

    All processes of a sharded model must call it together; the first one writes.

    Args:
        subnetwork: the attached subnetwork.
        folder: where; use ``atomic_folder`` for an adapter that others shall read.
        config: a ``SubnetworkConfig`` as ``to_dict`` gives it; the base and its fingerprint are filled in.
    """
    tensors = {
        f"{PREFIX}{path}.{part}": whole(master.detach()).to(layer.ffn.dtype)
        for path, layer in zip(subnetwork.paths, subnetwork.layers, strict=True)
        for part, master in layer.masters(subnetwork.name).items()
    }
    facts = {"base": subnetwork.base, "replaced_values_sha256": subnetwork.fingerprint(), "inference_mode": True}
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    write_tensors(folder / TENSORS_NAME, "adapter", tensors, {"language": config["language"]})
    write_json(folder / CONFIG_NAME, {**config, **facts})


def load_subnetwork(
    model: nn.Module, folder: str | os.PathLike, policy: Policy = "save", *, storage: Storage = "auto"
) -> Subnetwork:
    """Attaches the subnetwork of an adapter and puts its trained values into the model, without PEFT.

    Args:
        model: the base that the adapter was trained on.
        folder: an adapter folder, written by ``tune`` or by PEFT.
        policy, storage: see ``attach_subnetwork``.

    Raises:
        FileFormatError: the folder is not a complete adapter.
        ArchitectureError: the adapter was made for another base.

    Example:
        >>> subnetwork = load_subnetwork(model, "adapters/mlt_Latn")
        >>> with subnetwork.disabled():  # the base, bit for bit
        ...     before = model(input_ids)
    """
    config = read_adapter_config(folder)
    tensors = read_safetensors(Path(folder) / TENSORS_NAME)
    check_base(config["base"], model_identity(model), f"The adapter {folder}")
    try:
        subnetwork = attach_subnetwork(model, decode_neurons(config["neurons"]), policy, storage=storage)
    except (FileFormatError, ArchitectureError) as error:
        raise type(error)(f"The adapter {folder} does not fit the model: {error}") from error
    try:
        check_fingerprint(config, subnetwork.fingerprint(), f"The adapter {folder}")
        _put_values(subnetwork, tensors, folder)
    except Exception:
        subnetwork.detach(keep=False)
        raise
    return subnetwork


def merge_subnetwork(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """The base with the values of a subnetwork's adapter in its weights, see ``merge_adapter``."""
    subnetwork = load_subnetwork(model, folder)
    if all(layer.ffn.writable for layer in subnetwork.layers):
        subnetwork.detach(keep=True)
        return model
    values = [parameter.detach() for parameter in subnetwork.parameters()]
    neurons = decode_neurons(read_adapter_config(folder)["neurons"])
    subnetwork.detach(keep=False)
    plain = attach_subnetwork(dequantise_model(model), neurons)
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), values, strict=True):
            parameter.copy_(value)
    plain.detach(keep=True)
    return model


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        FileFormatError: the folder is not an adapter of lape_fast.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileFormatError(
            f"{folder} is not an adapter folder: it has no {CONFIG_NAME}; name the folder tune wrote."
        )
    config = read_json(path)
    kinds = {"language": str, "neurons": list, "replaced_values_sha256": str}
    if (
        not isinstance(config, dict)
        or not config.keys() >= REQUIRED
        or not all(isinstance(config[name], kind) for name, kind in kinds.items())
    ):
        raise FileFormatError(f"{path} is not the configuration of a lape_fast adapter; name the folder tune wrote.")
    return config


def encode_neurons(neurons: Sequence[Tensor]) -> list[str]:
    """Neurons per layer as a configuration holds them: one line of numbers per layer."""
    return [" ".join(map(str, chosen.tolist())) for chosen in neurons]


def decode_neurons(lines: Sequence[str]) -> list[Tensor]:
    """Undoes ``encode_neurons``: int64 ``[K]`` per layer, sorted.

    Raises:
        FileFormatError: a line is not made of increasing numbers.
    """
    neurons = []
    for layer, line in enumerate(lines):
        words = line.split() if isinstance(line, str) else [str(line)]
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise FileFormatError(
                f"The neurons of layer {layer} are {line!r:.60} and not numbers; copy the file again."
            )
        chosen = torch.tensor([int(word) for word in words], dtype=torch.int64)
        if (chosen.diff() <= 0).any():
            raise FileFormatError(f"The neurons of layer {layer} are not in increasing order; copy the file again.")
        neurons.append(chosen)
    return neurons


def check_base(made_for: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    """Makes sure that a model has the configuration that an adapter was made for.

    Raises:
        ArchitectureError: it has another.
        FileFormatError: the adapter does not say which.
    """
    if not isinstance(made_for, Mapping) or not made_for.keys() >= BASE_FACTS:
        raise FileFormatError(f"{what} does not describe its base but says {made_for!r:.60}; copy the adapter again.")
    if made_for["config_hash"] != identity["config_hash"]:
        raise ArchitectureError(
            f"{what} was made for {made_for['model']} ({made_for['model_type']}, {made_for['layers']} layers of "
            f"{made_for['neurons_per_layer']} neurons), but the model is {identity['model']} "
            f"({identity['model_type']}, {identity['layers']} of {identity['neurons_per_layer']}); load it on its own "
            "base."
        )


def check_fingerprint(config: Mapping[str, Any], found: str, what: str) -> None:
    """Makes sure that a model holds the values that an adapter replaces.

    Raises:
        ArchitectureError: it holds others.
    """
    if config["replaced_values_sha256"] != found:
        raise ArchitectureError(
            f"{what} was made for another base: the weights it replaces are not those it was trained from "
            f"({config['base']['model']}); load the checkpoint it names, in the dtype and "
            "quantisation it was trained in."
        )


@torch.no_grad()
def _put_values(subnetwork: Subnetwork, tensors: dict[str, Tensor], folder: str | os.PathLike) -> None:
    for path, layer in zip(subnetwork.paths, subnetwork.layers, strict=True):
        for part, master in layer.masters(subnetwork.name).items():
            values = tensors.get(f"{PREFIX}{path}.{part}")
            if values is None or values.shape != master.shape:
                found = "absent" if values is None else list(values.shape)
                raise FileFormatError(
                    f"{folder} is damaged: {part} of layer {layer.ffn.layer} is {found} where {list(master.shape)} is "
                    "needed; copy the adapter again."
                )
            if values.dtype not in VALUE_DTYPES or not values.isfinite().all():
                raise FileFormatError(
                    f"{folder} is damaged: {part} of layer {layer.ffn.layer} holds {values.dtype} values that are not "
                    "all finite numbers; copy the adapter again, or train it again from its last good checkpoint."
                )
            master.copy_(values)
    subnetwork.synchronize()
