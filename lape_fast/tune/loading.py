"""Adapters of every method, told apart by what their folder holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import read_json
from lape_fast.models import dense_ffns, dequantise_model
from lape_fast.tune import adapter, dense
from lape_fast.tune.adapter import load_subnetwork, merge_subnetwork, read_adapter_config
from lape_fast.tune.dense import DenseWeights, load_dense
from lape_fast.tune.subnetwork import Subnetwork
from lape_fast.tune.subnetwork_ffn import Policy, Storage

if TYPE_CHECKING:
    from lape_fast.tune.peft_adapter import PeftAdapter


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, policy: Policy = "save", *, storage: Storage = "auto"
) -> Subnetwork | DenseWeights | PeftAdapter:
    """Puts the trained values of an adapter of any method into its base.

    Args:
        model: the base that the adapter was trained on.
        folder: an adapter folder, written by ``tune`` or by PEFT.
        policy, storage: of a subnetwork, see ``attach_subnetwork``.

    Returns:
        What gives the base back: ``disabled()`` is a context within which the model computes as the base, bit for bit;
        ``detach(keep=False)`` makes it the base again, so that the next adapter can be loaded, and
        ``detach(keep=True)`` leaves the values in its weights. ``trainable()`` says how many weights were trained.

    Raises:
        FileFormatError: the folder is not a complete adapter.
        ArchitectureError: the adapter was made for another base.

    Example:
        >>> for folder in ("adapters/mlt_Latn", "adapters/mlt_Latn-lora"):
        ...     adapter = load_adapter(model, folder)
        ...     print(score(model, text)["mlt_Latn"].bits_per_byte)
        ...     adapter.detach(keep=False)
    """
    kind = adapter_kind(folder)
    if kind == "subnetwork":
        return load_subnetwork(model, folder, policy, storage=storage)
    if kind == "dense":
        return load_dense(model, folder)
    from lape_fast.tune.peft_adapter import load_peft

    return load_peft(model, folder)


def merge_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """The base with an adapter of any method in its weights; a quantised base is dequantised first.

    Args:
        model: the base that the adapter was trained on; it is changed.
        folder: an adapter folder.

    Raises:
        FileFormatError, ArchitectureError: as for ``load_adapter``.

    Example:
        >>> merge_adapter(model, "adapters/mlt_Latn").save_pretrained("llama-mlt")
    """
    if adapter_kind(folder) == "subnetwork":
        return merge_subnetwork(model, folder)
    loaded = load_adapter(model, folder)
    if adapter_kind(folder) == "peft":
        from lape_fast.tune.peft_adapter import put_peft

        # It was made for this base, but fits it in 16 bits too.
        loaded.detach(keep=False)
        model = model if dense_ffns(model)[0].writable else dequantise_model(model)
        loaded = put_peft(model, folder)
    loaded.detach(keep=True)
    return model


def describe_adapter(folder: str | os.PathLike) -> dict[str, Any]:
    """What an adapter folder says of itself, as JSON values.

    Raises:
        FileFormatError: it holds no adapter.
    """
    kind = adapter_kind(folder)
    if kind == "subnetwork":
        return read_adapter_config(folder)
    config = read_json(Path(folder) / (dense.CONFIG_NAME if kind == "dense" else adapter.CONFIG_NAME))
    if not isinstance(config, dict):
        raise FileFormatError(f"{folder} does not describe its adapter; copy the adapter again.")
    return config


def name_adapters(folders: Sequence[str | os.PathLike]) -> dict[str, str | os.PathLike]:
    """Adapter folders by what to call them: the folder's name, or its path where two have one name.

    Raises:
        ConfigError: a folder is named twice.
        FileFormatError: a folder is not there, or holds no adapter.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not any((path / name).is_file() for name in (adapter.CONFIG_NAME, dense.CONFIG_NAME)):
            raise FileFormatError(
                f"{path} is not an adapter folder: it has no {adapter.CONFIG_NAME}; name the folder tune wrote."
            )
    short = [path.resolve().name for path in paths]
    names = short if len(set(short)) == len(paths) else list(map(str, paths))
    if len(set(names)) < len(names):
        raise ConfigError(f"The adapters {', '.join(names)} are not all different; name each folder once.")
    return dict(zip(names, folders, strict=True))


def adapter_kind(folder: str | os.PathLike) -> Literal["subnetwork", "dense", "peft"]:
    """What kind of adapter a folder holds.

    Raises:
        FileFormatError: none.
    """
    if (Path(folder) / dense.CONFIG_NAME).is_file():
        return "dense"
    path = Path(folder) / adapter.CONFIG_NAME
    # The subnetwork's own reader says what is wrong with a folder that has none.
    config: Any = read_json(path) if path.is_file() else {}
    known = isinstance(config, dict) and config.get("peft_type", "SUBNETWORK") != "SUBNETWORK"
    return "peft" if known else "subnetwork"
