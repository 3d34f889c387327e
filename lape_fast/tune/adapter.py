"""Adapters: the trained values of one language's neurons, in a folder of two files.

``adapter_model.safetensors`` holds the trained values (not differences) and the neurons they belong to;
``adapter_config.json`` says which base they were trained on. A fingerprint of the values they replace makes sure that
they are only ever put into that base.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.errors import ArchitectureError, FileFormatError
from lape_fast.files import read_json, read_tensors, write_json, write_tensors
from lape_fast.models import model_identity
from lape_fast.tune.subnetwork import Subnetwork, attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"


def write_adapter_files(subnetwork: Subnetwork, folder: Path, *, language: str, **details: Any) -> None:
    """Writes the two files of an adapter into a folder that exists.

    Args:
        subnetwork: the attached subnetwork; its fp32 masters are written.
        folder: where; use ``atomic_folder`` for an adapter that others shall read.
        language: the canonical code of the language that was tuned.
        details: anything else worth keeping in the configuration (JSON values).
    """
    neurons = subnetwork.neurons()
    tensors = {f"layers.{layer}.neurons": indices.to(torch.int32) for layer, indices in neurons.items()}
    for layer in subnetwork.layers:
        tensors |= {f"layers.{layer.ffn.layer}.{part}": values for part, values in layer.masters().items()}
    config = {
        "language": language,
        "base": subnetwork.base,
        "neurons": sum(len(indices) for indices in neurons.values()),
        "trainable": subnetwork.trainable(),
        "replaced_values_sha256": subnetwork.fingerprint(),
        **details,
    }
    write_tensors(folder / TENSORS_NAME, "adapter", tensors, {"language": language})
    write_json(folder / CONFIG_NAME, config)


def load_adapter(model: nn.Module, folder: str | os.PathLike, policy: Policy = "save") -> Subnetwork:
    """Attaches the subnetwork of an adapter and puts its trained values into the model.

    Args:
        model: the base that the adapter was trained on.
        folder: an adapter folder.
        policy: see ``attach_subnetwork``.

    Raises:
        FileFormatError: the folder is not a complete adapter.
        ArchitectureError: the adapter was made for another base.

    Example:
        >>> subnetwork = load_adapter(model, "adapters/mlt_Latn")
        >>> with subnetwork.disabled():  # the base, bit for bit
        ...     before = model(input_ids)
    """
    config = read_adapter_config(folder)
    tensors, _ = read_tensors(Path(folder) / TENSORS_NAME, "adapter")
    identity, made_for = model_identity(model), config["base"]
    if made_for["config_hash"] != identity["config_hash"]:
        raise ArchitectureError(
            f"The adapter {folder} was made for {made_for['model']} ({made_for['model_type']}, {made_for['layers']} "
            f"layers of {made_for['neurons_per_layer']} neurons), but the model is {identity['model']} "
            f"({identity['model_type']}, {identity['layers']} of {identity['neurons_per_layer']}); load it on its own "
            "base."
        )
    neurons = [tensors.get(f"layers.{layer}.neurons", torch.empty(0)).long() for layer in range(identity["layers"])]
    subnetwork = attach_subnetwork(model, neurons, policy)
    try:
        if subnetwork.fingerprint() != config["replaced_values_sha256"]:
            raise ArchitectureError(
                f"The adapter {folder} was made for another base: the weights it replaces in {identity['model']} are "
                f"not those it was trained from ({made_for['model']}); load the checkpoint it names."
            )
        _put_values(subnetwork, tensors, folder)
    except Exception:
        subnetwork.detach(keep=False)
        raise
    return subnetwork


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
    if not isinstance(config, dict) or not {"language", "base", "replaced_values_sha256"} <= config.keys():
        raise FileFormatError(f"{path} is not the configuration of a lape_fast adapter; name the folder tune wrote.")
    return config


@torch.no_grad()
def restore_values(subnetwork: Subnetwork, folder: str | os.PathLike) -> None:
    """Reads the trained values of an adapter of the same neurons into an attached subnetwork.

    Raises:
        FileFormatError: the file is not an adapter, or has other neurons.
    """
    tensors, _ = read_tensors(Path(folder) / TENSORS_NAME, "adapter")
    for layer, indices in subnetwork.neurons().items():
        saved = tensors.get(f"layers.{layer}.neurons")
        if saved is None or not torch.equal(saved.long(), indices):
            raise FileFormatError(f"{folder} holds other neurons in layer {layer} than the subnetwork; start afresh.")
    _put_values(subnetwork, tensors, folder)


@torch.no_grad()
def _put_values(subnetwork: Subnetwork, tensors: dict[str, Tensor], folder: str | os.PathLike) -> None:
    for layer in subnetwork.layers:
        for part, master in layer.masters().items():
            values = tensors.get(f"layers.{layer.ffn.layer}.{part}")
            if values is None or values.shape != master.shape:
                found = "absent" if values is None else list(values.shape)
                raise FileFormatError(
                    f"{folder} is damaged: {part} of layer {layer.ffn.layer} is {found} where {list(master.shape)} is "
                    "needed; copy the adapter again."
                )
            master.copy_(values)
    subnetwork.synchronize()
