"""Corpora: named collections of documents by language, read lazily from files, the hub or Babel's CLDR data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import CorpusError, LanguageError
from lape_fast.files import json_hash
from lape_fast.text import cldr, hub
from lape_fast.text.languages import canonical, is_language, language_name, nearest
from lape_fast.text.records import LineRange, read_documents, split_name

BUILT_IN = "cldr"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_corpus(
    spec: str | os.PathLike | Sequence[str],
    *,
    lines: str | None = None,
    languages: Iterable[str] | None = None,
    text_column: str | None = None,
) -> Corpus:
    """Opens a corpus; nothing is read before its documents are asked for.

    Args:
        spec: ``cldr`` for the built-in corpus; a folder, read recursively, whose files are named by language code
            (``mlt_Latn.txt``, ``mt.jsonl.gz``); one such file; or the hub id of a data set with one configuration
            a language.
        lines: a range such as ``1-1597``, counted from 1, of the lines or records of each file (of each language in
            the built-in corpus and on the hub).
        languages: the codes to keep, in any style; None keeps all.
        text_column: the field of the text in jsonl, parquet and hub records; None means ``text``, else ``content``.

    Raises:
        CorpusError: no such corpus, nothing in it, or a language that it lacks.
        ConfigError: ``lines`` is no range.

    Example:
        >>> corpus = open_corpus("texts/", lines="1-1597", languages=["mt", "cy"])
        >>> next(corpus.documents("mlt_Latn"))
    """
    if not isinstance(spec, (str, os.PathLike)):
        (spec,) = spec
    line_range = LineRange.parse(lines)
    path = Path(spec).expanduser()
    if str(spec) == BUILT_IN:
        return _built_in_corpus(line_range, languages)
    if path.exists():
        return _file_corpus(path, line_range, languages, text_column)
    if isinstance(spec, str) and _HUB_ID.fullmatch(spec):
        return hub_corpus(spec, line_range, languages, text_column)
    raise CorpusError(
        f"The corpus {str(spec)!r} does not exist; name a folder, a file, a hub id like 'owner/name', or '{BUILT_IN}' "
        "for the built-in text."
    )


def hub_corpus(name: str, lines: LineRange, languages: Iterable[str] | None, text_column: str | None) -> Corpus:
    """A corpus streamed from the hub, or from the folder of a data set; arguments as for ``open_corpus``."""
    configurations = hub.hub_configurations(name)
    kept = _choose(languages, configurations, name)

    def reader(configuration: str) -> Callable[[], Iterator[str]]:
        source = f"{name} ({configuration})"
        return lambda: hub.streamed_documents(hub.open_stream(name, configuration), lines, text_column, source)

    readers = {language: reader(configurations[language]) for language in kept}
    revision = hub.hub_revision(name, configurations[kept[0]])
    return Corpus(name, readers, lines=lines, text_column=text_column, content=revision)


class Corpus:
    """Documents by language, restartable and in a fixed order.

    Attributes:
        name: what the corpus was opened as.
        languages: sorted canonical codes.
        ignored: the files that were left out, each with the reason.
    """

    def __init__(
        self,
        name: str,
        readers: Mapping[str, Callable[[], Iterator[str]]],
        *,
        lines: LineRange,
        content: Any,
        text_column: str | None = None,
        ignored: Sequence[str] = (),
    ) -> None:
        """
        Args:
            readers: canonical code -> a function that starts reading that language's documents.
            content: JSON that changes when the text changes; only its hash is kept.
        """
        self.name = name
        self.languages = sorted(readers)
        self.ignored = list(ignored)
        self._readers = dict(readers)
        self._lines = lines
        self._text_column = text_column
        self._content = content

    def documents(self, language: str) -> Iterator[str]:
        """The documents of one language, from the first, none of them blank.

        Raises:
            CorpusError: the corpus lacks the language, or holds no document of it in the chosen lines.
        """
        (language,) = _choose([language], self._readers, self.name)
        empty = True
        for document in self._readers[language]():
            empty = False
            yield document
        if empty:
            raise CorpusError(
                f"{language} ({language_name(language)}) has no documents in lines {self._lines} of {self.name}; "
                "give it text, choose other lines, or leave the language out."
            )

    def describe(self) -> dict[str, Any]:
        """JSON for the metadata of files made from this corpus.

        ``fingerprint`` covers everything that decides which documents are read, apart from where they lie: two corpora
        with the same one hold the same text. It compares the sizes of files, not their bytes.
        """
        choice = {"lines": str(self._lines), "languages": self.languages, "text_column": self._text_column}
        return {"spec": self.name, **choice, "fingerprint": json_hash({**choice, "content": self._content})}


def _built_in_corpus(lines: LineRange, languages: Iterable[str] | None) -> Corpus:
    def reader(language: str) -> Callable[[], Iterator[str]]:
        return lambda: cldr.cldr_documents(language, lines.first, lines.last)

    readers = {language: reader(language) for language in _choose(languages, cldr.cldr_languages(), BUILT_IN)}
    return Corpus(BUILT_IN, readers, lines=lines, content=cldr.cldr_version())


def _file_corpus(path: Path, lines: LineRange, languages: Iterable[str] | None, text_column: str | None) -> Corpus:
    files, ignored = _language_files(path)
    if not files:
        left_out = f" It holds only: {'; '.join(ignored[:5])}." if ignored else ""
        raise CorpusError(
            f"{path} holds no text in any language; put one .txt, .jsonl or .parquet file a language there, "
            f"named by its code, such as mlt_Latn.txt.{left_out}"
        )
    kept = _choose(languages, files, str(path))
    for language in kept:
        if not any(_size(file) for file in files[language]):
            names = ", ".join(str(file) for file in files[language])
            raise CorpusError(
                f"{language} ({language_name(language)}) has no documents: {names} is empty; "
                "fill it, remove it, or leave the language out."
            )

    def reader(language: str) -> Callable[[], Iterator[str]]:
        return lambda: (text for file in files[language] for text in read_documents(file, lines, text_column))

    root = path if path.is_dir() else path.parent
    content = [[file.relative_to(root).as_posix(), _size(file)] for language in kept for file in files[language]]
    readers = {language: reader(language) for language in kept}
    return Corpus(str(path), readers, lines=lines, text_column=text_column, content=content, ignored=ignored)


def _language_files(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each language in path order, and the files left out with the reason; hidden ones are skipped."""
    files: dict[str, list[Path]] = {}
    ignored = []
    root = path if path.is_dir() else path.parent
    for file in _walk(path) if path.is_dir() else [path]:
        name = file.relative_to(root).as_posix()
        parsed = split_name(file.name)
        if parsed is None:
            ignored.append(f"{name} (no .txt, .jsonl or .parquet file)")
            continue
        # A stem may go on behind the code: mlt_Latn.part1.txt.
        code = next((stem for stem in (parsed[0], parsed[0].split(".")[0]) if is_language(stem)), None)
        if code is None:
            ignored.append(f"{name} ({parsed[0]!r} is no language code)")
        else:
            files.setdefault(canonical(code), []).append(file)
    return files, ignored


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise CorpusError(f"The folder {error.filename} cannot be read ({error.strerror}); check its permissions.")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CorpusError(f"{file} cannot be read ({error.strerror}); remove the broken link or restore it.") from error


def _choose(wanted: Iterable[str] | None, available: Iterable[str], corpus: str) -> list[str]:
    """The sorted canonical codes of the languages wanted, all of which the corpus must have."""
    available = list(available)
    chosen = set()
    for code in available if wanted is None else wanted:
        try:
            language = canonical(code)
        except LanguageError:
            language = None
        if language not in available:
            near = nearest(code, available) or sorted(available)[:5]
            raise CorpusError(
                f"The corpus {corpus} has no language {code!r} among its {len(available)}; near ones are "
                f"{', '.join(near)}."
            )
        chosen.add(language)
    if not chosen:
        raise CorpusError(
            f"No language of the corpus {corpus} was chosen; name one, or leave languages out to take all."
        )
    return sorted(chosen)
