"""Corpora on the Hugging Face hub, streamed: one configuration a language, as FineWeb-2 and Wikipedia have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lape_fast.errors import CorpusError
from lape_fast.text.languages import canonical, is_language
from lape_fast.text.records import LineRange, texts_of_records

if TYPE_CHECKING:
    from datasets import IterableDataset


def hub_configurations(name: str) -> dict[str, str]:
    """The configurations of a data set that are named by a language: canonical code -> configuration.

    Args:
        name: a hub id such as ``HuggingFaceFW/fineweb-2``, or the folder of a data set.

    Raises:
        CorpusError: the data set cannot be reached, or none of its configurations is named by a language.
    """
    import datasets

    try:
        configurations = datasets.get_dataset_config_names(name)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{name!r} is no file or folder, and no data set of that name can be reached on the Hugging Face hub "
            f"({error}); check the spelling, the network and, for a gated data set, your access."
        ) from error
    # Several snapshots of a language (20220301.mt, 20231101.mt): the last in order is the newest, and stays.
    languages = {canonical(each): each for each in sorted(configurations) if is_language(each)}
    if not languages:
        raise CorpusError(
            f"The data set {name!r} has no configuration named by a language code, only: "
            f"{', '.join(configurations[:10])}; download it into a folder with one file a language."
        )
    return languages


def hub_revision(name: str, configuration: str) -> list[str]:
    """The files behind a configuration; their addresses hold the commit, so that a changed data set is noticed."""
    import datasets

    files = datasets.load_dataset_builder(name, configuration).config.data_files or {}
    return [f"{split}: {file}" for split in sorted(files) for file in files[split]]


def open_stream(name: str, configuration: str) -> IterableDataset:
    """Opens one configuration for streaming: its split ``train``, or its first where there is none."""
    import datasets

    try:
        splits = datasets.load_dataset(name, configuration, streaming=True)
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"The configuration {configuration!r} of {name!r} cannot be opened ({error}); try again."
        ) from error
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def streamed_documents(
    dataset: IterableDataset, lines: LineRange, text_column: str | None, source: str
) -> Iterator[str]:
    """The texts of a streaming data set, without the blank ones.

    Args:
        dataset: what ``open_stream`` returns.
        lines: which records to read.
        text_column: the column of the text; None means ``text``, else ``content``.
        source: what to call the data set in error messages.

    Raises:
        CorpusError: no such column.
    """
    return texts_of_records(lines.of(dataset), text_column, source)
