"""JSON files of what a study measured: each says what kind it is, and nothing else is read in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lape_fast.errors import FileFormatError
from lape_fast.files import SCHEMA_VERSION, fits, read_json, write_json


def write_result(path: str | os.PathLike, kind: str, values: dict[str, Any]) -> None:
    """Writes a result with its kind and schema version, atomically."""
    write_json(path, {"kind": kind, "schema_version": SCHEMA_VERSION, **values})


def read_result(path: str | os.PathLike, kind: str, command: str, needed: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what ``write_result`` wrote.

    Args:
        path: the file.
        kind: what it must hold.
        command: the command that writes such files.
        needed: names that must be in it, each with the shape of its value as ``fits`` takes it.

    Raises:
        FileFormatError: of another kind, of a newer schema, or incomplete.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != kind:
        raise FileFormatError(f"{path} holds no {kind}; name the JSON file that `lape-fast {command}` wrote.")
    version = values.get("schema_version")
    if type(version) is not int or version > SCHEMA_VERSION:
        raise FileFormatError(
            f"{path} has schema version {version!r:.60}, but this lape_fast reads up to {SCHEMA_VERSION}; upgrade "
            "lape_fast."
        )
    if missing := [name for name, shape in needed.items() if not fits(values.get(name), shape)]:
        raise FileFormatError(f"{path} lacks {', '.join(missing)}; run `lape-fast {command}` again.")
    return {name: value for name, value in values.items() if name not in ("kind", "schema_version")}
