"""Corpora on the Hugging Face hub, streamed: one configuration a language, as FineWeb-2 and Wikipedia have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lape_fast.errors import CorpusError
from lape_fast.text.languages import canonical, is_language
from lape_fast.text.records import LineRange, texts_of_records
from lape_fast.text.streams import Source

if TYPE_CHECKING:
    from datasets import IterableDataset


def hub_source(name: str, lines: LineRange, text_column: str | None) -> Source:
    """The text of a data set on the hub that has one configuration a language.

    Args:
        name: a hub id such as ``HuggingFaceFW/fineweb-2``, or the folder of a data set.
        lines: which records of each language to read.
        text_column: the column of the text; None means ``text``, else ``content``.

    Raises:
        CorpusError: the data set cannot be reached, or none of its configurations is named by a language.
    """
    configurations = hub_configurations(name)

    def parts(language: str) -> list[HubPart]:
        return [HubPart(name, configurations[language], lines, text_column)]

    def content(languages: list[str]) -> list[str]:
        return hub_revision(name, configurations[languages[0]]) if languages else []

    return Source(name, sorted(configurations), parts, content)


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


@dataclass(frozen=True)
class HubPart:
    """One configuration of a data set; arguments as for ``hub_source``."""

    name: str
    configuration: str
    lines: LineRange
    text_column: str | None

    def open(self, shard: int, shards: int, state: dict[str, Any] | None) -> _HubReading:
        from datasets.distributed import split_dataset_by_node

        dataset = open_stream(self.name, self.configuration)
        strategy = "auto"
        if self.lines != LineRange():
            dataset = dataset.skip(self.lines.first - 1)
            if self.lines.last is not None:
                dataset = dataset.take(self.lines.last - self.lines.first + 1)
            # Dealing whole files would take a share of the lines from each of them.
            strategy = "examples"
        dataset = split_dataset_by_node(dataset, shard, shards, strategy=strategy)
        if state is not None:
            dataset.load_state_dict(state)
        return _HubReading(dataset, self.text_column, f"{self.name} ({self.configuration})")


class _HubReading:
    # The library deals the records itself.
    numbered = 0

    def __init__(self, dataset: IterableDataset, text_column: str | None, source: str) -> None:
        self._dataset = dataset
        self._text_column = text_column
        self._source = source

    def __iter__(self) -> Iterator[str]:
        try:
            yield from texts_of_records(self._dataset, self._text_column, self._source)
        except CorpusError:
            raise
        except (OSError, ValueError) as error:
            raise CorpusError(f"{self._source} cannot be read to its end ({error}); resume or try again.") from error

    def state(self) -> dict[str, Any]:
        return self._dataset.state_dict()
