"""Files that are whole or absent: atomic writes, and safetensors whose metadata is JSON.

Every file is written beside its final name, synced and renamed, so an interrupt or a full disk leaves the old file
as it was. What a killed process leaves of such a file is removed by the next one that writes it.

Nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:
    fcntl = None

from safetensors import SafetensorError, safe_open

from lape_fast.errors import FileExistsAlreadyError, FileFormatError, LapeFastError

# The command line imports this module, and `--help` should not wait for torch.
if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1

# What errors say of a full disk: the system's words, and those of torch's writer.
NO_ROOM = (
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    "PytorchStreamWriter failed writing",
    "unexpected pos",
    "basic_ios::clear: iostream error",
)

# How the hidden names end of what is not whole yet.
UNFINISHED = ".partial"

# What JSON spells characters beyond 16 bits with, two at a time.
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")

# Bytes of a JSON file, and of the header of a safetensors file. Parsed, hostile JSON takes twenty times as much.
LONGEST_JSON = 1 << 26


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


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps the folder of an unfinished run to this process and those that it starts, for the ``with`` block.

    Raises:
        FileExistsAlreadyError: another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as file:
        try:
            if fcntl:
                # Not flock, whose locks the workers of a killed process would keep.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsAlreadyError(
                f"{folder} belongs to a run that is still going on; wait for its end, or choose another output."
            ) from error
        # A file system without locks.
        except OSError:
            pass
        yield


def _sync(path: Path) -> None:
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def lacks_room(error: BaseException) -> bool:
    """Whether an error says that a file could not grow; torch, safetensors and Python each have one of their own."""
    return any(sign in str(error) for sign in NO_ROOM)


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
        FileFormatError: the file is missing, too long, or not JSON in which every name stands once.
    """
    return parse_json(read_text(path, LONGEST_JSON), str(path))


def read_text(path: str | os.PathLike, longest: int) -> str:
    """Reads a small file of UTF-8.

    Raises:
        FileFormatError: it cannot be read, is not UTF-8, or has more than ``longest`` bytes.
    """
    try:
        if not Path(path).is_file():
            raise FileFormatError(f"{path} does not exist or is not a file; check the path.")
        with Path(path).open("rb") as file:
            content = file.read(longest + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} cannot be read ({error}); check the path and its permissions.") from error
    if len(content) > longest:
        raise FileFormatError(f"{path} is longer than {longest:,} bytes, the most that is read; check which it is.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 ({error}); write it again.") from error


def parse_json(text: str, what: str, error_type: type[LapeFastError] = FileFormatError) -> Any:
    """Parses JSON that a stranger wrote.

    Args:
        text: the JSON.
        what: where it stands, for the message.
        error_type: what is raised.

    Raises:
        LapeFastError: of ``error_type``: it is not JSON, or a name stands twice in an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if _HALF_CHARACTER.search(text):
            # None of them may stand alone: such text can be written nowhere.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    # Beside JSONDecodeError: numbers of too many digits, and names that stand twice. Brackets may nest too deep.
    except (ValueError, RecursionError) as error:
        raise error_type(f"{what} is not valid JSON ({error}); write it again.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for position, name in enumerate(names) if name in names[:position])
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return values


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape.

    Args:
        value: the value.
        shape: a type, which must be the value's own; None; a tuple of shapes, one of which is enough; a list of one
            shape, that of every element; a dict, each of whose names the value must have in its shape, or with ``str``
            for all names; or a function that decides.

    Example:
        >>> fits({"mlt_Latn": [1, 2.5]}, {str: [is_number]})
        True
    """
    if isinstance(shape, tuple):
        return any(fits(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(fits(each, shape[str]) for each in value.values())
        return all(name in value and fits(value[name], each) for name, each in shape.items())
    if shape is None or isinstance(shape, type):
        return type(value) is (type(None) if shape is None else shape)
    return bool(shape(value))


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
    from safetensors.torch import save

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
    metadata = {name: parse_json(value, f"The metadata {name!r} of {path}") for name, value in raw.items()}
    version = metadata.get("schema_version")
    if type(version) is not int:
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
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is not a complete safetensors file ({error}); write it again.") from error


def _check_header(path: str | os.PathLike) -> None:
    """Makes sure that a file says the same to every reader, and that its header is no longer than any of ours."""
    try:
        if not Path(path).is_file():
            raise FileFormatError(f"{path} does not exist or is not a file; check the path.")
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_JSON:
                raise FileFormatError(
                    f"{path} is not a complete safetensors file (its header would have {length:,} bytes, and at most "
                    f"{LONGEST_JSON:,} are read); write it again."
                )
            header = file.read(length)
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read ({error}); check the path and its permissions.") from error
    # The names of tensors and metadata; safetensors itself would take the last of two.
    try:
        parse_json(header.decode(), "the header")
    except (UnicodeDecodeError, FileFormatError) as error:
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
