"""The weights of FFN projections straight from a model's safetensors, some rows at a time and without the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError
from lape_fast.files import open_safetensors, read_json
from lape_fast.models.layouts import LAYOUTS, WEIGHT_DTYPES, DenseLayout
from lape_fast.models.loading import load_config

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
PROJECTIONS = ("gate", "up", "down")

# Rows of a stored matrix that are read at once where columns of it are wanted.
ROWS_AT_ONCE = 256


class Checkpoint:
    """A dense model's FFN weights on disk; every read opens a file, and at most one matrix is in memory.

    Args:
        name_or_path: a model's folder, or the hub id of one in the local cache; nothing is downloaded.

    Attributes:
        folder: where it is.
        layout: the table's row for it.

    Raises:
        ConfigError: there is no such model here, or it has no safetensors.
        ArchitectureError: the table of FFN layouts lacks it, or it is a mixture of experts.

    Example:
        >>> Checkpoint("meta-llama/Llama-3.1-8B").read(0, "gate", [3, 7]).shape  # [K, D]
    """

    def __init__(self, name_or_path: str | os.PathLike):
        self.folder = _find_folder(os.fspath(name_or_path))
        config = load_config(self.folder)
        layout = LAYOUTS[config.model_type]
        if not isinstance(layout, DenseLayout):
            raise ArchitectureError(
                f"{self.folder} is a {config.model_type}, a mixture of experts, whose neurons are not tuned; name the "
                "dense model that the adapter was made for."
            )
        self.layout = layout
        self._files = _files_of_tensors(self.folder)

    def read(self, layer: int, projection: str, neurons: Sequence[int] | Tensor | None = None) -> Tensor:
        """The weights of neurons as rows, ``[K, D]`` in the dtype they are stored in; of all F without ``neurons``.

        Args:
            layer: from 0.
            projection: "gate", "up" or "down", of which a neuron's column is its row here.
            neurons: indices.

        Raises:
            ArchitectureError: the checkpoint has no such weight or neuron, or stores it quantised.
        """
        if neurons is None:
            return as_rows(self.layout, projection, self.read_whole(layer, projection))
        name = self._name(layer, projection)
        with open_safetensors(self._files[name]) as file:
            stored = file.get_slice(name)
            shape = stored.get_shape()
            axis = neuron_axis(self.layout, projection)
            width = shape[axis] // _parts(self.layout, projection)
            chosen = torch.as_tensor(neurons, dtype=torch.int64)
            if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < width:
                raise ArchitectureError(
                    f"{name} of {self.folder} has {width} neurons, but {int(chosen.max())} was asked for; name the "
                    "model that the adapter was made for."
                )
            if projection == "up" and self.layout.fused:
                chosen = chosen + width
            values = _rows(stored, chosen) if axis == 0 else _columns(stored, chosen, shape[0])
        return self._plain(name, values)

    def read_whole(self, layer: int, projection: str) -> Tensor:
        """The stored weight that a projection is in; GPT-2's is ``[inputs, outputs]``, a fused one both gate and up."""
        return self.read_tensor(self._name(layer, projection))

    def read_tensor(self, name: str) -> Tensor:
        """A weight as it is stored, by the name that it has in the model.

        Raises:
            ArchitectureError: the checkpoint has no such weight, or stores it quantised.
        """
        # A model may hold its decoder under one more name than its files do, or one less.
        found = [each for each in self._files if name == each or f".{name}".endswith(f".{each}")] or [
            each for each in self._files if each.endswith(f".{name}")
        ]
        if len(found) != 1:
            raise ArchitectureError(
                f"{self.folder} has {len(found)} weights named {name} where one is needed; name the model that the "
                "adapter was made for."
            )
        with open_safetensors(self._files[found[0]]) as file:
            return self._plain(name, file.get_tensor(found[0]))

    def _plain(self, name: str, values: Tensor) -> Tensor:
        if values.dtype not in WEIGHT_DTYPES:
            raise ArchitectureError(
                f"{name} of {self.folder} is stored as {values.dtype}, so it is quantised; name the model in 16 or 32 "
                "bits."
            )
        return values

    def _name(self, layer: int, projection: str) -> str:
        """A weight's name in the files, where what stands in front of the layers is not always the module's path."""
        path = getattr(self.layout, projection)
        suffix = f"{self.layout.layers}.{layer}.{path}.weight"
        found = [name for name in self._files if path and (name == suffix or name.endswith(f".{suffix}"))]
        if len(found) != 1:
            raise ArchitectureError(
                f"{self.folder} has {len(found)} weights named {suffix} where one is needed; name the model that the "
                "adapter was made for."
            )
        return found[0]


def neuron_axis(layout: DenseLayout, projection: str) -> int:
    """Along which dimension of its stored weight the neurons of a projection lie."""
    return int((projection == "down") != layout.transposed)


def as_rows(layout: DenseLayout, projection: str, weight: Tensor) -> Tensor:
    """A projection's weight as it is stored, with its neurons as rows: ``[F, D]``, a view."""
    rows = weight.T if neuron_axis(layout, projection) else weight
    width = len(rows) // _parts(layout, projection)
    return rows[width:] if projection == "up" and layout.fused else rows[:width]


def _parts(layout: DenseLayout, projection: str) -> int:
    """How many projections share the weight of one."""
    return 2 if layout.fused and projection != "down" else 1


def _rows(stored, chosen: Tensor) -> Tensor:
    # safetensors reads a list of rows one by one, and no empty one.
    return stored[chosen.tolist()] if len(chosen) else stored[:0]


def _columns(stored, chosen: Tensor, height: int) -> Tensor:
    blocks = [stored[start : start + ROWS_AT_ONCE][:, chosen] for start in range(0, height, ROWS_AT_ONCE)]
    return torch.cat(blocks).T.contiguous()


def _find_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base {name!r} is neither a folder nor a model in the local cache of the hub; give its folder, or "
            "download it first."
        ) from error


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of a checkpoint in one file or in several."""
    if (folder / INDEX_NAME).is_file():
        index = read_json(folder / INDEX_NAME)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise FileFormatError(f"{folder / INDEX_NAME} has no weight_map; copy the checkpoint again.")
        return {name: folder / file for name, file in index["weight_map"].items()}
    if not (folder / SINGLE_NAME).is_file():
        raise ConfigError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; save the model with save_pretrained, which "
            "writes safetensors."
        )
    with open_safetensors(folder / SINGLE_NAME) as file:
        return dict.fromkeys(file.keys(), folder / SINGLE_NAME)
