"""Streams of documents: the text of one language in a fixed order, dealt to shards, shuffled, stopped and resumed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lape_fast.errors import ConfigError, DamagedFileError

# Documents that are shuffled together, and so held in memory together.
BLOCK = 4096


class DocumentStream:
    """The documents of one shard of a language, none of them blank, each given out once.

    Iterating goes on from where the stream stands, so that ``itertools.islice(stream, 100)`` twice gives 200 documents.
    Nothing is opened before the first one is asked for: a stream made in one process may be read in its fork.

    Shards: of text on this machine, shard i of n holds the documents number i, i + n, i + 2n, ... of the language, and
    every shard reads every file. A data set on the hub is dealt by ``datasets.distributed.split_dataset_by_node``:
    whole files where they divide evenly, else every n-th record.

    Shuffling: the shard is cut into blocks of ``BLOCK`` documents, and each is permuted by a generator seeded with the
    seed, the language and the number of the block. A far wider shuffle would be less than exact to resume: the
    buffer of ``datasets`` is lost on resuming.

    Attributes:
        language: the canonical code.
    """

    def __init__(
        self,
        language: str,
        parts: Sequence[Part],
        *,
        shard: int = 0,
        shards: int = 1,
        seed: int | None = None,
        skip_bad_files: bool = False,
    ) -> None:
        """
        Args:
            parts: what the text consists of, in order.

        The other arguments are those of ``Corpus.stream``.
        """
        if not 0 <= shard < shards:
            raise ConfigError(f"There is no shard {shard} among {shards}; count them from 0 to {shards - 1}.")
        self.language = language
        self._parts = parts
        self._shard = shard
        self._shards = shards
        self._seed = seed
        self._skip_bad_files = skip_bad_files
        self.restore({"part": 0, "before": 0, "within": None, "block": 0, "offset": 0, "bad_files": {}})

    def __iter__(self) -> DocumentStream:
        return self

    def __next__(self) -> str:
        return next(self._documents)

    @property
    def bad_files(self) -> list[str]:
        """A sentence for each damaged file met so far, with the reason; what lay before the damage was given out."""
        return list(self._bad_files.values())

    def state(self) -> dict[str, Any]:
        """JSON that says where the stream stands: right behind the last document given out."""
        start = self._position() if self._seed is None else self._block_start
        return {**start, "block": self._block, "offset": self._offset, "bad_files": dict(self._bad_files)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position that a stream of the same text with the same arguments has returned as its ``state``.

        Files finished before it are not opened again; in the file or block where it lies, documents are read over.

        Raises:
            ConfigError: it is nothing that a stream returned.
        """
        if not _is_state(state):
            raise ConfigError(f"{state!r:.200} is no position in the text of {self.language}; start again without it.")
        self._part, self._before, self._within = state["part"], state["before"], state["within"]
        self._block, self._offset = state["block"], state["offset"]
        self._bad_files = dict(state["bad_files"])
        self._reading: Reading | None = None
        self._block_start = self._position()
        self._documents = self._in_order() if self._seed is None else self._shuffled()

    def _position(self) -> dict[str, Any]:
        within = self._within if self._reading is None else self._reading.state()
        return {"part": self._part, "before": self._before, "within": within}

    def _in_order(self) -> Iterator[str]:
        while self._part < len(self._parts):
            # Documents are numbered through the whole language, so that small files do not all fall to the first shard.
            shard = (self._shard - self._before) % self._shards
            self._reading = self._parts[self._part].open(shard, self._shards, self._within)
            try:
                yield from self._reading
            except DamagedFileError as error:
                if not self._skip_bad_files:
                    hint = "`identify` and `count` go on behind it with --skip-bad-files."
                    raise DamagedFileError(f"{error} {hint}") from error
                # By part, since a block that is read again after a restore meets the same damage again.
                self._bad_files[str(self._part)] = str(error)
            self._before += self._reading.numbered
            self._part, self._within, self._reading = self._part + 1, None, None

    def _shuffled(self) -> Iterator[str]:
        documents = self._in_order()
        while block := list(itertools.islice(documents, BLOCK)):
            random.Random(f"{self._seed} {self.language} {self._block}").shuffle(block)
            for number in range(self._offset, len(block)):
                self._offset = number + 1
                if number + 1 == len(block):
                    # Behind its last document a block need not be read again: the stream stands before the next one.
                    self._block_start, self._block, self._offset = self._position(), self._block + 1, 0
                yield block[number]


def _is_state(state: Any) -> bool:
    # `within` is the part's own.
    numbers = ("part", "before", "block", "offset")
    return (
        isinstance(state, dict)
        and state.keys() == {*numbers, "within", "bad_files"}
        and all(type(state[name]) is int and state[name] >= 0 for name in numbers)
        and isinstance(state["bad_files"], dict)
    )


class Part(Protocol):
    """A run of documents of one language, such as a file or a configuration on the hub."""

    def open(self, shard: int, shards: int, state: Any) -> Reading:
        """Starts reading a shard, from the first document or from where another reading's ``state`` says."""


class Reading(Protocol):
    """A part while it is read; ``numbered`` is how many documents of all shards this reading has gone through."""

    numbered: int

    def __iter__(self) -> Iterator[str]: ...

    def state(self) -> Any:
        """JSON for the position right behind the last document given out."""


@dataclass(frozen=True)
class LocalPart:
    """Documents on this machine; ``read`` starts with the document of a number counted from 0."""

    read: Callable[[int], Iterator[str]]

    def open(self, shard: int, shards: int, state: int | None) -> _LocalReading:
        if state is not None and (type(state) is not int or state < 0):
            raise ConfigError(f"{state!r:.200} is no position in a file; start again without it.")
        return _LocalReading(self.read, shard, shards, state or 0)


class _LocalReading:
    def __init__(self, read: Callable[[int], Iterator[str]], shard: int, shards: int, start: int) -> None:
        self.numbered = start
        self._read = read
        self._shard = shard
        self._shards = shards

    def __iter__(self) -> Iterator[str]:
        for document in self._read(self.numbered):
            mine = self.numbered % self._shards == self._shard
            self.numbered += 1
            if mine:
                yield document

    def state(self) -> int:
        return self.numbered


@dataclass(frozen=True)
class Source:
    """Where the text of a corpus comes from; opening one reads no text.

    Attributes:
        name: what it was opened as.
        languages: canonical codes.
        parts: what a language's text consists of, in order; nothing for a language whose files are all empty.
        content: JSON for each part of a language, in order, that changes when its text changes.
        ignored: the files that were left out, each with the reason.
    """

    name: str
    languages: Sequence[str]
    parts: Callable[[str], Sequence[Part]]
    content: Callable[[str], list[Any]]
    ignored: Sequence[str] = ()
