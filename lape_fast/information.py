"""What `lape-fast info` tells: what a file holds, and what this installation can do."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from lape_fast import __version__
from lape_fast.errors import FileFormatError
from lape_fast.files import read_metadata
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.tune import read_adapter_config

PACKAGES = ("torch", "triton", "transformers", "datasets", "peft", "accelerate", "safetensors")


def describe_file(path: str | os.PathLike) -> dict[str, Any]:
    """What a counts file, a neuron file or an adapter folder holds, as JSON values.

    Raises:
        FileFormatError: it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        return read_adapter_config(path)
    readers = {"counts": ActivationCounts, "neurons": NeuronSet}
    kind = read_metadata(path).get("kind")
    if kind not in readers:
        raise FileFormatError(
            f"{path} holds {kind!r}; info reads counts files, neuron files and adapter folders. A published .pth mask "
            "is read by `lape-fast convert`."
        )
    return {"kind": kind, **readers[kind].load(path).summary()}


def describe_installation() -> dict[str, Any]:
    """Versions, devices and backends, as JSON values."""
    import torch

    from lape_fast.ops.backend import EXTENSION_LOADED

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "lape_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": devices,
        "cpu_threads": torch.get_num_threads(),
        "cpu_backend": "cpp" if EXTENSION_LOADED else "reference: build the extension for speed",
        "gpu_backend": "triton" if devices else "none: no CUDA device",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {package}"
