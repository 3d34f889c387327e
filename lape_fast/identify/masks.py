"""The published neuron files, ``list[language][layer] -> LongTensor`` in a ``.pth``: read without running anything."""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lape_fast.errors import FileFormatError, ShapeError
from lape_fast.files import file_hash, write_bytes
from lape_fast.identify.counts import check_languages
from lape_fast.identify.neurons import NeuronSet

# What a pickle of lists of tensors names. torch's own safe reader calls more, such as bytearray with any length.
NAMED = re.compile(
    r"collections OrderedDict|torch\.serialization _get_layout"
    r"|torch (Size|(?!Untyped|Typed)\w+Storage|u?int\d+|b?float\d+)"
    r"|torch\._utils _rebuild_(tensor_v2|parameter|sparse_tensor|meta_tensor_no_storage)"
)

# Pickles at the start of a file of the old format: a magic number, the protocol, the system, the lists, the storages.
OLD_PICKLES = 5


def import_masks(path: str | os.PathLike, languages: Sequence[str], neurons_per_layer: int) -> NeuronSet:
    """Reads a published neuron file.

    Args:
        path: a file that ``torch.save`` wrote from lists of lists of index tensors.
        languages: the codes of the file's languages in its order; the file holds no names.
        neurons_per_layer: F of the model, which the file does not say either.

    Raises:
        FileFormatError: a file that holds anything but lists and index tensors (nothing in it is run), another number
            of languages, or indices that are repeated or out of range.
        LanguageError: two codes of the same language.

    Example:
        >>> neurons = import_masks("mask.pth", ["mlt_Latn", "afr_Latn"], neurons_per_layer=14336)
    """
    languages = check_languages(languages)
    nested = _read_lists(path)
    size, held = os.path.getsize(path), 0
    if len(nested) != len(languages):
        raise FileFormatError(
            f"{path} holds {len(nested)} languages, but {len(languages)} codes were given; "
            "name every language of the file, in its order."
        )
    for language, layers in zip(languages, nested, strict=True):
        for layer, indices in enumerate(layers):
            if indices.layout is not torch.strided or indices.device.type != "cpu":
                raise FileFormatError(
                    f"{path}: language {language!r} has a tensor without plain values in layer {layer} "
                    f"({indices.layout}, {indices.device}); store ordinary CPU tensors of indices."
                )
            # A stored view can claim any size, so it is measured before anything copies it.
            if indices.numel() > neurons_per_layer:
                raise FileFormatError(
                    f"{path}: language {language!r} has {indices.numel()} indices in layer {layer}, but a layer has "
                    f"only {neurons_per_layer} neurons; check the number of neurons per layer."
                )
            # A file of a few bytes can name one tensor a million times.
            held += indices.numel()
            if held > size:
                raise FileFormatError(
                    f"{path} names more than {size} indices in as many bytes, so its tensors are not stored each for "
                    "itself; write it again from copies of them."
                )
    metadata = {"rule": "imported", "source": Path(path).name, "source_hash": file_hash(path)}
    try:
        return NeuronSet.from_lists(dict(zip(languages, nested, strict=True)), neurons_per_layer, metadata)
    except ShapeError as error:
        raise FileFormatError(f"{path} does not fit what was said about it: {error}") from error


def export_masks(neurons: NeuronSet, path: str | os.PathLike) -> None:
    """Writes the published form, atomically: lists of int64 tensors, in the order of ``neurons.languages``.

    Example:
        >>> export_masks(NeuronSet.load("neurons.safetensors"), "mask.pth")
    """
    # In memory first, because torch.save stores a file's own name in it, and the temporary name is random.
    buffer = io.BytesIO()
    torch.save([neurons[language] for language in neurons.languages], buffer)
    write_bytes(path, buffer.getvalue())


def _read_lists(path: str | os.PathLike) -> list[list[torch.Tensor]]:
    if not Path(path).is_file():
        raise FileFormatError(f"{path} does not exist or is not a file; check the path.")
    try:
        _check_pickles(path)
        nested = torch.load(path, map_location="cpu", weights_only=True)
    # A hostile or broken file makes torch raise nearly anything, and its own advice is to load it unsafely.
    except Exception as error:
        raise FileFormatError(
            f"{path} cannot be read as tensors and lists alone ({type(error).__name__}), and nothing in it was run; "
            "get the file again, or write it with torch.save from lists of tensors."
        ) from error
    _check_all(path, "the file", [nested], list)
    _check_all(path, "a language", nested, list)
    for layers in nested:
        _check_all(path, "a layer", layers, torch.Tensor)
    return nested


def _check_pickles(path: str | os.PathLike) -> None:
    """Refuses what would take more memory than the file has bytes, before torch reads it.

    Raises:
        ValueError, zipfile.BadZipFile, OSError: it is no such file, or a bomb.
    """
    for pickled in _pickles(path):
        for opcode, argument, _ in pickletools.genops(pickled):
            named = opcode.name in ("GLOBAL", "INST") and NAMED.fullmatch(argument)
            if not named and opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"it names {argument!r}")


def _pickles(path: str | os.PathLike) -> Iterator[io.BufferedIOBase]:
    with Path(path).open("rb") as file:
        # Told apart as torch does.
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not zipped:
            for _ in range(OLD_PICKLES):
                yield file
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            stored = all(each.compress_type == zipfile.ZIP_STORED for each in members)
            if not stored or sum(each.file_size for each in members) > os.path.getsize(path):
                raise ValueError("it is compressed, and torch.save never compresses")
            if len({each.filename for each in members}) < len(members):
                raise ValueError("a name stands twice in it")
            for each in members:
                if each.filename.endswith(".pkl"):
                    yield archive.open(each)


def _check_all(path: str | os.PathLike, place: str, values: list[Any], kind: type) -> None:
    for value in values:
        if type(value) is not kind:
            raise FileFormatError(
                f"{path} holds a {type(value).__name__} for {place} where a plain {kind.__name__} is needed; "
                "a mask is a list of languages, each a list with one index tensor per layer."
            )
