"""Corpora on the Hugging Face hub, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape_fast.errors import CorpusError
from lape_fast.text.addressing import Addressing, Configurations, HubDataset
from lape_fast.text.records import LineRange, texts_of_records
from lape_fast.text.streams import Source

if TYPE_CHECKING:
    from datasets import IterableDataset

# Seconds in which the hub must have answered for the first time.
TIMEOUT = 20


def hub_source(
    name: str,
    lines: LineRange,
    text_column: str | None,
    addressing: Addressing = Configurations(),  # noqa: B008 (it is frozen)
    split: str = "train",
) -> Source:
    """The text of a data set on the hub.

    Args:
        name: a hub id such as ``HuggingFaceFW/fineweb-2``, or the folder of a data set.
        lines: which records of each language to read.
        text_column: the column of the text; None means ``text``, else ``content``.
        addressing: how the data set addresses its languages.
        split: the split to read; where it is missing, the first one is read.

    Raises:
        CorpusError: the data set cannot be reached, its terms were not accepted, or it has no language.
    """
    dataset = find_dataset(name)
    try:
        addresses = addressing.languages(dataset, split)
    except CorpusError:
        raise
    except _failures() as error:
        raise _unreachable(name, error) from error

    def parts(language: str) -> list[HubPart]:
        title = f"{name} ({language})"
        return [HubPart(title, dataset, addressing, addresses[language], split, lines, text_column)]

    # The address within the commit; a folder has no commit, and its files' sizes must do.
    version = [dataset.revision] if dataset.revision else _sizes(dataset)
    return Source(name, sorted(addresses), parts, lambda language: [[version, addresses[language], split]])


def find_dataset(name: str) -> HubDataset:
    """Looks a data set up: on the hub, its newest commit; in a folder, its files.

    Raises:
        CorpusError: there is none of that name that this user may read.
    """
    folder = Path(name)
    if folder.is_dir():
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return HubDataset(name, None, tuple(sorted(files)), str(folder))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    # The first request is one that is not retried: `datasets` would take half a minute to say that there is no network.
    api = HfApi()
    try:
        info = api.dataset_info(name, timeout=TIMEOUT)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except GatedRepoError as error:
        raise CorpusError(
            f"The data set {name!r} is gated: accept its terms on {api.endpoint}/datasets/{name}, and log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    # The errors of the network have no class of their own: each release of the library wraps another client.
    except Exception as error:
        raise _unreachable(name, error) from error
    files = tuple(sorted(file.rfilename for file in info.siblings or ()))
    return HubDataset(name, info.sha, files, f"hf://datasets/{name}@{info.sha}")


@dataclass(frozen=True)
class HubPart:
    """One language of a data set; ``address`` is what ``addressing`` found for it, ``title`` is for messages."""

    title: str
    dataset: HubDataset
    addressing: Addressing
    address: Any
    split: str
    lines: LineRange
    text_column: str | None

    def open(self, shard: int, shards: int, state: dict[str, Any] | None) -> _HubReading:
        from datasets.distributed import split_dataset_by_node

        try:
            stream = self.addressing.open(self.dataset, self.split, self.address)
        except _failures() as error:
            raise CorpusError(f"{self.title} cannot be opened ({error}); try again.") from error
        strategy = "auto"
        if self.lines != LineRange():
            stream = stream.skip(self.lines.first - 1)
            if self.lines.last is not None:
                stream = stream.take(self.lines.last - self.lines.first + 1)
            # Dealing whole files would take a share of the lines from each of them.
            strategy = "examples"
        stream = split_dataset_by_node(stream, shard, shards, strategy=strategy)
        if state is not None:
            stream.load_state_dict(state)
        return _HubReading(stream, self.text_column, self.title)


class _HubReading:
    # The library deals the records itself.
    numbered = 0

    def __init__(self, stream: IterableDataset, text_column: str | None, title: str) -> None:
        self._stream = stream
        self._text_column = text_column
        self._title = title

    def __iter__(self) -> Iterator[str]:
        try:
            yield from texts_of_records(self._stream, self._text_column, self._title)
        except CorpusError:
            raise
        except _failures() as error:
            raise CorpusError(f"{self._title} cannot be read to its end ({error}); resume or try again.") from error

    def state(self) -> dict[str, Any]:
        return self._stream.state_dict()


def _failures() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, DatasetsError)


def _unreachable(name: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{name!r} is no file or folder, and no data set of that name can be reached on the Hugging Face hub "
        f"({error}); check the spelling, the network and, for a private data set, your access."
    )


def _sizes(dataset: HubDataset) -> list:
    return [[file, Path(dataset.name, file).stat().st_size] for file in dataset.files]
