"""What `lape-fast info` tells: what a file holds, and what this installation can do."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lape_fast import __version__
from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import read_metadata
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.identify.release import read_ablation
from lape_fast.tune import describe_adapter

PACKAGES = ("torch", "triton", "transformers", "datasets", "peft", "accelerate", "safetensors")

# What only some commands need, and the extra that brings it.
OPTIONAL = {
    "bitsandbytes": "quantise",
    "torchao": "quantise",
    "lm_eval": "evaluate",
    "trl": "trl",
    "liger-kernel": "liger",
}

# The kinds of files that are read.
READ = ("counts", "neurons")

BUILD = "pip install --no-build-isolation -e . builds the native code"


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """What a counts file, a neuron file or an adapter folder holds, as JSON values.

    Of neurons whose ablation lies beside them, ``selectivity`` too.

    Raises:
        FileFormatError: it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        try:
            return describe_adapter(path)
        except FileFormatError:
            inside = sorted(each for each in path.glob("*.safetensors") if read_metadata(each).get("kind") in READ)
            if not inside:
                raise
            raise FileFormatError(
                f"{path} is a folder of files; info reads one of them, such as {inside[0]}, or an adapter folder."
            ) from None
    kind = read_metadata(path).get("kind")
    if kind == "counts":
        return {"kind": kind, **ActivationCounts.load(path).summary()}
    if kind == "neurons":
        neurons = NeuronSet.load(path)
        measured = match_ablations({"neurons": neurons}, beside=ablation_beside(path))
        facts = {"kind": kind, **neurons.summary()}
        return facts | {"selectivity": measured["neurons"]["selectivity"]} if measured else facts
    raise FileFormatError(
        f"{path} holds {kind!r}; info reads counts files, neuron files and adapter folders. A published .pth mask "
        "is read by `lape-fast convert`."
    )


def ablation_beside(path: str | os.PathLike) -> list[Path]:
    """The ablation that lies beside a neuron file, ``NAME.ablation.json`` beside ``NAME.safetensors``, if there."""
    beside = Path(path).with_suffix(".ablation.json")
    return [beside] if beside.is_file() else []


def match_ablations(
    selections: Mapping[str, NeuronSet], named: Sequence[Path] = (), beside: Sequence[Path] = ()
) -> dict[str, dict[str, Any]]:
    """Which ablation was measured on which selection, told by the fingerprint of the neurons.

    Args:
        selections: name -> neuron set.
        named: JSON files of ``ablate`` that a user named.
        beside: such files that happen to lie beside the neurons, and may be of others.

    Returns:
        name -> what the file holds, for the selections that have one.

    Raises:
        FileFormatError: a file that is no ablation.
        ConfigError: a named file that belongs to none of the selections.
    """
    names = {neurons.fingerprint(): name for name, neurons in selections.items()}
    matched = {}
    for path in [*beside, *named]:
        ablation = read_ablation(path)
        name = names.get(ablation["neurons_fingerprint"])
        if name is not None:
            matched[name] = ablation
        elif path in named:
            raise ConfigError(
                f"{path} was measured on other neurons than were selected; name the ablation of this selection, or "
                "leave it out."
            )
    return matched


def describe_installation() -> dict[str, Any]:
    """Versions, devices and backends, as JSON values."""
    import torch

    from lape_fast.ops.backend import EXTENSION_LOADED

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "lape_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name, name) for name in PACKAGES},
        "optional": {name: _version(name, f"'lape-fast[{extra}]'") for name, extra in OPTIONAL.items()},
        "gpus": devices,
        "cpu_threads": torch.get_num_threads(),
        "cpu_backend": "cpp" if EXTENSION_LOADED else f"reference, which is slow: {BUILD}",
        "gpu_backend": "triton" if devices else "none: torch sees no CUDA device",
    }


def _version(package: str, source: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {source}"
