"""Which backend runs an op: ``backend=`` beats ``LAPE_FAST_BACKEND`` beats automatic.

The native extension registers its CPU kernels with the dispatcher when it is loaded; the schemas are defined in
Python beside each op, so that the ops exist (and compile, and trace) where the extension was never built.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from lape_fast.errors import BackendError

Backend = Literal["auto", "reference", "cpp", "triton"]

LIBRARY = torch.library.Library("lape_fast", "FRAGMENT")

# The type of the device that meta tensors stand for while memory is planned.
_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="cpu")


def _load_extension() -> bool:
    """Loads the native CPU kernels; False where they were not built."""
    spec = importlib.util.find_spec("lape_fast._C")
    if spec is None or spec.origin is None:
        return False
    torch.ops.load_library(spec.origin)
    return True


EXTENSION_LOADED = _load_extension()


def device_type(tensor: torch.Tensor) -> str:
    """The type of the device whose kernels a tensor is computed by: of a meta tensor, the one it stands for."""
    return _PLANNED.get() if tensor.device.type == "meta" else tensor.device.type


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within the context, meta tensors take the ways that tensors on ``device`` ("cpu" or "cuda") would take."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def resolve_backend(backend: Backend | None, device: torch.device) -> Literal["reference", "cpp", "triton"]:
    """Chooses the backend for a tensor on ``device``.

    Raises:
        BackendError: the name is unknown, or that backend cannot run on this device or in this installation.
    """
    name = backend or os.environ.get("LAPE_FAST_BACKEND") or "auto"
    if name not in get_args(Backend):
        raise BackendError(f"The backend {name!r} is unknown; choose one of {', '.join(get_args(Backend))}.")
    # No kernel runs on a meta tensor: every backend but the reference leads to the op's fake kernel.
    if device.type == "meta" and name != "reference":
        return "triton"
    if name == "auto":
        return _automatic(device)
    if name == "cpp" and (device.type != "cpu" or not EXTENSION_LOADED):
        raise BackendError(
            f"The backend 'cpp' needs CPU tensors and the built extension, but the tensor is on {device} and the "
            f"extension is {'built' if EXTENSION_LOADED else 'not built'}; run `pip install --no-build-isolation "
            "-e .`, or leave the choice to backend='auto'."
        )
    if name == "triton" and device.type != "cuda" and not _interpreting():
        raise BackendError(
            f"The backend 'triton' needs CUDA tensors, but the tensor is on {device}; move it, set TRITON_INTERPRET=1 "
            "before Python starts to run the kernel in Triton's interpreter, or leave the choice to backend='auto'."
        )
    return name


def _automatic(device: torch.device) -> Literal["reference", "cpp", "triton"]:
    if device.type == "cuda":
        return "triton"
    if device.type == "cpu":
        if EXTENSION_LOADED:
            return "cpp"
        if not torch.compiler.is_compiling():
            _warn_reference()
    return "reference"


@functools.cache
def _warn_reference() -> None:
    warnings.warn(
        "lape_fast's native CPU extension is not built, so the CPU runs the plain PyTorch reference: the same numbers, "
        "more slowly. Run `pip install --no-build-isolation -e .` in the source folder to build it.",
        RuntimeWarning,
        stacklevel=2,
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
