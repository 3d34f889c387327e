"""How a data set addresses its languages: by configuration, by the paths of its files, or by a column of one table.

Each class finds the languages of a data set, and opens one of them as a stream of records. They work on the hub and on
a folder of the same layout alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lape_fast.errors import CorpusError
from lape_fast.text.languages import canonical, is_language

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import IterableDataset

# The builder of the `datasets` library for a file: naming it keeps the library from running into a loading script.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json"}


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub at one commit, or in a folder.

    Attributes:
        name: its hub id or folder.
        revision: the commit; None for a folder.
        files: the paths of its files, sorted.
        root: what a path begins with, to be read by ``datasets``.
    """

    name: str
    revision: str | None
    files: tuple[str, ...]
    root: str


@dataclass(frozen=True)
class Configurations:
    """One configuration a language, as FineWeb-2 and Wikipedia have it."""

    def languages(self, dataset: HubDataset, split: str) -> dict[str, str]:
        import datasets

        names = datasets.get_dataset_config_names(dataset.name, revision=dataset.revision)
        # Several snapshots of a language (20220301.mt, 20231101.mt): the last in order is the newest, and stays.
        found = {canonical(name): name for name in sorted(names) if is_language(name)}
        if not found:
            raise CorpusError(
                f"The data set {dataset.name!r} has no configuration named by a language code, only: "
                f"{', '.join(names[:10])}; download it into a folder with one file a language."
            )
        return found

    def open(self, dataset: HubDataset, split: str, configuration: str) -> IterableDataset:
        import datasets

        splits = datasets.load_dataset(dataset.name, configuration, revision=dataset.revision, streaming=True)
        return _split(splits, split)

    def __str__(self) -> str:
        return "configuration"


@dataclass(frozen=True)
class Files:
    """One set of files a language.

    Attributes:
        pattern: their paths: ``{code}`` stands for the language's code, ``*`` for anything within a folder's name.
    """

    pattern: str

    def languages(self, dataset: HubDataset, split: str) -> dict[str, tuple[str, ...]]:
        parts = re.split(r"(\{code\}|\*)", self.pattern)
        codes = iter(["(?P<code>[^/]+)"])
        fields = {"{code}": lambda: next(codes, "(?P=code)"), "*": lambda: "[^/]*"}
        expression = re.compile("".join(fields[part]() if part in fields else re.escape(part) for part in parts))
        found: dict[str, tuple[str, ...]] = {}
        for file in dataset.files:
            match = expression.fullmatch(file)
            if match and is_language(match["code"]):
                language = canonical(match["code"])
                found[language] = (*found.get(language, ()), file)
        if not found:
            raise CorpusError(
                f"The data set {dataset.name!r} has no file like {self.pattern} with a language code in its path; "
                f"its {len(dataset.files)} files begin with: {', '.join(dataset.files[:5])}."
            )
        return found

    def open(self, dataset: HubDataset, split: str, files: Iterable[str]) -> IterableDataset:
        import datasets

        paths = [f"{dataset.root}/{file}" for file in files]
        suffix = next(suffix for suffix in BUILDERS if self.pattern.endswith(suffix))
        return datasets.load_dataset(BUILDERS[suffix], data_files={split: paths}, split=split, streaming=True)

    def __str__(self) -> str:
        return f"files {self.pattern}"


@dataclass(frozen=True)
class Rows:
    """One small table for all languages; it is downloaded whole.

    Attributes:
        column: holds the code of each row's language.
    """

    column: str

    def languages(self, dataset: HubDataset, split: str) -> dict[str, str]:
        table = self._table(dataset, split)
        codes = table.unique(self.column) if self.column in table.column_names else []
        found = {canonical(code): code for code in sorted(filter(None, codes)) if is_language(code)}
        if not found:
            raise CorpusError(
                f"The data set {dataset.name!r} has no column {self.column!r} of language codes; its columns are "
                f"{', '.join(table.column_names)}."
            )
        return found

    def open(self, dataset: HubDataset, split: str, code: str) -> IterableDataset:
        table = self._table(dataset, split)
        rows = [row for row, each in enumerate(table[self.column]) if each == code]
        return table.select(rows).to_iterable_dataset()

    def _table(self, dataset: HubDataset, split: str):
        import datasets

        return _split(datasets.load_dataset(dataset.name, revision=dataset.revision), split)

    def __str__(self) -> str:
        return f"rows by their {self.column}"


Addressing = Configurations | Files | Rows


def _split(splits, wanted: str):
    return splits[wanted] if wanted in splits else next(iter(splits.values()))
