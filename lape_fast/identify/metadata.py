"""What the metadata of counts and neurons look like: what others are going to rely on is checked when it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import fits, is_number
from lape_fast.identify.chunks import QUEUES
from lape_fast.text.records import LineRange


def _is_part(value: Any) -> bool:
    """Whether it is a part's number and the number of parts."""
    return fits(value, [int]) and len(value) == 2 and 1 <= value[0] <= value[1] <= QUEUES


def _is_interval(value: Any) -> bool:
    return fits(value, [is_number]) and len(value) == 2


def _is_corpus(value: Any) -> bool:
    """Whether it is what ``Corpus.describe`` gives, or as flat."""
    flat = fits(value, {str: (None, bool, str, is_number, [(str, is_number)])})
    return flat and fits(value.get("spec"), (None, str))


def _is_lines(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(LineRange.parse(value))
    except ConfigError:
        return False


# By name, where it is there; other metadata are only shown.
SHAPES = {
    "model": str,
    "model_type": str,
    "config_hash": str,
    "weights_hash": str,
    "tokenizer_hash": str,
    "counts_hash": str,
    "dtype": str,
    "name": (None, str),
    "context_length": int,
    "corpus": (None, _is_corpus),
    "stability": (None, {str: {"jaccard": (None, is_number), "interval": (None, _is_interval)}}),
    "shards": {str: [{"parts": [str], "lines": _is_lines, "shard": [int], "shards": int}]},
    "merged_parts": [_is_part],
    "part": lambda value: type(value) is int and 1 <= value <= QUEUES,
    "parts": lambda value: type(value) is int and 1 <= value <= QUEUES,
    "skipped_files": [str],
}


def check_metadata(path: str | os.PathLike, metadata: Mapping[str, Any]) -> None:
    """Makes sure that metadata can be relied on.

    Raises:
        FileFormatError: a value is not what is written under its name.
    """
    for name, shape in SHAPES.items():
        if name in metadata and not fits(metadata[name], shape):
            raise FileFormatError(
                f"{path} says {name!r} is {metadata[name]!r:.80}, which is never written there; get the file again."
            )
