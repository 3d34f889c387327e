"""Files that are whole or absent: atomic writes, and safetensors whose metadata is JSON.

Every file is written beside its final name, synced and renamed, so an interrupt or a full disk leaves the old file
as it was. What a killed process leaves of such a file is removed by the next one that writes it.

Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    fcntl = None

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lape_fast.errors import FileExistsAlreadyError, FileFormatError

SCHEMA_VERSION = 1

# How the hidden names end of what is not whole yet.
UNFINISHED = ".partial"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it replaces ``path`` in one step, on failure it vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _unfinished(path, tempfile.mkstemp)
    try:
        yield temporary
        # mkstemp creates 0600; a finished file has the permissions that open() would have given it.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def remove_unfinished(path: str | os.PathLike) -> None:
    """Removes what killed processes have left of ``path``; what a living one is writing stays."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}") if fcntl else ():
        # Where there are no locks nobody knows who lives.
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(lock)


def _unfinished(path: Path, make: Callable[..., Any]) -> tuple[Path, int]:
    """A new hidden file or folder beside ``path``, and the descriptor of the lock that its living writer has on it."""
    remove_unfinished(path)
    while True:
        made = make(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        if isinstance(made, tuple):
            os.close(made[0])
            made = made[1]
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have taken it for left, between its birth and its lock.
        if os.path.exists(made):
            return Path(made), lock
        os.close(lock)


def _sync(path: Path) -> None:
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def refuse_existing(path: str | os.PathLike) -> None:
    """Makes sure that an output is not there yet.

    Raises:
        FileExistsAlreadyError: it is.
    """
    if Path(path).exists():
        raise FileExistsAlreadyError(f"{path} exists already; choose another output or remove it first.")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``path`` on success and vanishes on failure.

    Raises:
        FileExistsAlreadyError: ``path`` is there already and is not an empty folder.
    """
    path = Path(path)
    if not path.is_dir() or any(path.iterdir()):
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parent, lock = _unfinished(path, tempfile.mkdtemp)
    try:
        # A folder inside the private one gets ordinary permissions.
        temporary = parent / path.name
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            if written.is_file():
                _sync(written)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        os.close(lock)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes ``content`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads JSON.

    Raises:
        FileFormatError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not valid JSON ({error}); write it again.") from error


def write_tensors(
    path: str | os.PathLike, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Writes a safetensors file whose metadata values are JSON, atomically.

    Args:
        path: where to write.
        kind: what the file holds ("counts", "neurons", "adapter"); checked when it is read.
        tensors: name -> tensor, on any device.
        metadata: JSON-serialisable values; ``kind`` and ``schema_version`` are added.
    """
    header = {"kind": kind, "schema_version": SCHEMA_VERSION, **metadata}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    encoded = {name: json.dumps(value, ensure_ascii=False) for name, value in header.items()}
    # "format": "pt" is what other readers of safetensors expect to find, unquoted.
    write_bytes(path, save(contiguous, metadata={"format": "pt", **encoded}))


def read_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a file that ``write_tensors`` wrote.

    Returns:
        The tensors by name, and the metadata with its JSON values decoded.

    Raises:
        FileFormatError: not a safetensors file, of another kind, or of a newer schema.
    """
    metadata = read_metadata(path)
    if metadata.get("kind") != kind:
        raise FileFormatError(
            f"{path} holds {metadata.get('kind')!r} where a file of {kind!r} is needed; check which file was named."
        )
    return read_safetensors(path), metadata


def read_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads the tensors of any safetensors file, whoever wrote it.

    Raises:
        FileFormatError: missing, or not a complete safetensors file.
    """
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """Reads only the metadata of a file that ``write_tensors`` wrote.

    Raises:
        FileFormatError: missing, not a safetensors file, not written by lape_fast, or of a newer schema.
    """
    with open_safetensors(path) as file:
        raw = file.metadata() or {}
    raw.pop("format", None)
    try:
        metadata = {name: json.loads(value) for name, value in raw.items()}
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path} was not written by lape_fast: its metadata is not JSON ({error}).") from error
    version = metadata.get("schema_version")
    if not isinstance(version, int):
        raise FileFormatError(f"{path} was not written by lape_fast: it has no schema_version in its metadata.")
    if version > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} has schema version {version}, but this lape_fast reads up to {SCHEMA_VERSION}; upgrade lape_fast."
        )
    return metadata


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[safe_open]:
    """A safetensors file to read from piece by piece.

    Raises:
        FileFormatError: missing, or not a complete safetensors file.
    """
    if not Path(path).is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is not a complete safetensors file ({error}); write it again.") from error


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form (sorted keys, no blanks), as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
