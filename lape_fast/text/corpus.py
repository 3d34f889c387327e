"""Corpora: collections of documents by language, read lazily from files, the hub or Babel's CLDR data."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import CorpusError, LanguageError
from lape_fast.files import json_hash
from lape_fast.text import cldr
from lape_fast.text.corpora import CORPORA, known_corpus
from lape_fast.text.folder import folder_source
from lape_fast.text.hub import hub_source
from lape_fast.text.languages import canonical, language_name, nearest
from lape_fast.text.records import LineRange
from lape_fast.text.streams import DocumentStream, LocalPart, Part, Source

BUILT_IN = "cldr"
# How many languages an error lists where none is near.
SHOWN = 5

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def open_corpus(
    spec: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    lines: str | None = None,
    languages: Iterable[str] | None = None,
    text_column: str | None = None,
) -> Corpus:
    """Opens a corpus; nothing is read before its documents are asked for.

    Args:
        spec: ``cldr`` for the built-in corpus; a folder, read recursively, whose files are named by language code
            (``mlt_Latn.txt``, ``mt.jsonl.gz``); one such file; a corpus that ``lape-fast corpora`` lists, such as
            ``glotcc``; or the hub id of a data set with one configuration a language. Of several in a list, a
            language's text is that of each in turn.
        lines: a range such as ``1-1597``, counted from 1, of the lines or records of each file (of each language in
            the built-in corpus and on the hub).
        languages: the codes to keep, in any style; None keeps all. Each must be in one of the corpora at least.
        text_column: the field of the text in jsonl, parquet and hub records; None means that of the listed corpus,
            elsewhere ``text``, else ``content``.

    Raises:
        CorpusError: no such corpus, nothing in it, or a language that it lacks.
        ConfigError: ``lines`` is no range.

    Example:
        >>> corpus = open_corpus("texts/", lines="1-1597", languages=["mt", "cy"])
        >>> next(corpus.documents("mlt_Latn"))
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    if not specs:
        raise CorpusError(f"No corpus was named; name a folder, a file, a hub id, or '{BUILT_IN}'.")
    line_range = LineRange.parse(lines)
    sources = [_find_source(each, line_range, text_column) for each in specs]
    return Corpus(sources, lines=line_range, languages=languages, text_column=text_column)


class Corpus:
    """Documents by language, restartable and in a fixed order.

    Attributes:
        name: what the corpus was opened as.
        languages: sorted canonical codes.
        ignored: the files that were left out, each with the reason.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        lines: LineRange,
        languages: Iterable[str] | None = None,
        text_column: str | None = None,
    ) -> None:
        """
        Args:
            sources: where the text comes from, in order.

        The other arguments are those of ``open_corpus``, which the sources were opened with too.
        """
        self.name = " + ".join(source.name for source in sources)
        available = sorted({language for source in sources for language in source.languages})
        self.languages = _choose(languages, available, self.name)
        self.ignored = [file for source in sources for file in source.ignored]
        self._lines = lines
        self._text_column = text_column
        self._parts = {language: _parts_of(language, sources, self.name) for language in self.languages}
        self._content = {language: _content_of(language, sources, self.name) for language in self.languages}

    def documents(self, language: str) -> Iterator[str]:
        """The documents of one language, from the first, none of them blank.

        Raises:
            CorpusError: the corpus lacks the language, or holds no document of it in the chosen lines.
        """
        stream = self.stream(language)
        empty = True
        for document in stream:
            empty = False
            yield document
        if empty:
            raise CorpusError(
                f"{stream.language} ({language_name(stream.language)}) has no documents in lines {self._lines} of "
                f"{self.name}; give it text, choose other lines, or leave the language out."
            )

    def stream(
        self,
        language: str,
        *,
        shard: int = 0,
        shards: int = 1,
        seed: int | None = None,
        skip_bad_files: bool = False,
    ) -> DocumentStream:
        """The documents of one shard of a language, as a stream that can be stopped and resumed.

        Args:
            shard: which of the ``shards``, counted from 0; together they hold every document once.
            seed: shuffles the shard in blocks; None leaves the order of the corpus.
            skip_bad_files: goes on behind a damaged file of this machine, and names it in ``stream.bad_files``.

        Raises:
            CorpusError: the corpus lacks the language; while reading, a file is damaged or lacks the text column.
            ConfigError: no such shard.

        Example:
            >>> stream = corpus.stream("mlt_Latn", shard=0, shards=8, seed=1)
            >>> first = next(stream)
            >>> resumed = corpus.stream("mlt_Latn", shard=0, shards=8, seed=1)
            >>> resumed.restore(stream.state())
        """
        (language,) = _choose([language], self._parts, self.name)
        parts = self._parts[language]
        return DocumentStream(language, parts, shard=shard, shards=shards, seed=seed, skip_bad_files=skip_bad_files)

    def shard_id(self, language: str, shard: int = 0, shards: int = 1) -> dict[str, Any]:
        """JSON that says which documents a shard of a language holds; ``overlap`` compares two of them.

        Unlike the fingerprint it does not depend on which other languages were chosen, so that two runs over different
        languages are seen to share the text of this one.
        """
        (language,) = _choose([language], self._parts, self.name)
        parts = [json_hash(item)[:16] for item in self._content[language]]
        return {"parts": parts, "lines": str(self._lines), "shard": shard, "shards": shards}

    def describe(self) -> dict[str, Any]:
        """JSON for the metadata of files made from this corpus.

        ``fingerprint`` covers everything that decides which documents are read, apart from where they lie: two corpora
        with the same one hold the same text. It compares the sizes of files, not their bytes.
        """
        choice = {"lines": str(self._lines), "languages": self.languages, "text_column": self._text_column}
        return {"spec": self.name, **choice, "fingerprint": json_hash({**choice, "content": self._content})}


def overlap(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two shards of one language, each described by ``Corpus.shard_id``, can have a document in common.

    They have none if they read different files, different lines of them, or are different shards of the same deal.
    As in the fingerprint, a file is known by its path within the corpus and its size.
    """
    if not set(first["parts"]) & set(second["parts"]):
        return False
    if not LineRange.parse(first["lines"]).meets(LineRange.parse(second["lines"])):
        return False
    same_deal = all(first[key] == second[key] for key in ("parts", "lines", "shards"))
    return not (same_deal and first["shard"] != second["shard"])


def _find_source(spec: str | os.PathLike, lines: LineRange, text_column: str | None) -> Source:
    path = Path(spec).expanduser()
    if str(spec) == BUILT_IN:
        return _built_in_source(lines)
    if path.exists():
        return folder_source(path, lines, text_column)
    known = known_corpus(str(spec))
    if known:
        return hub_source(known.hub_id, lines, text_column or known.text_column, known.addressing, known.split)
    if isinstance(spec, str) and _HUB_ID.fullmatch(spec):
        return hub_source(spec, lines, text_column)
    raise CorpusError(
        f"The corpus {str(spec)!r} does not exist; name a folder, a file, '{BUILT_IN}' for the built-in text, a hub id "
        f"like 'owner/name', or one of {', '.join(row.name for row in CORPORA)}."
    )


def _built_in_source(lines: LineRange) -> Source:
    def parts(language: str) -> list[LocalPart]:
        return [LocalPart(functools.partial(_composed_from, language, lines))]

    version = cldr.cldr_version()
    return Source(BUILT_IN, cldr.cldr_languages(), parts, lambda language: [[version, language]])


def _composed_from(language: str, lines: LineRange, start: int) -> Iterator[str]:
    return cldr.cldr_documents(language, lines.first + start, lines.last)


def _parts_of(language: str, sources: Sequence[Source], corpus: str) -> list[Part]:
    parts = [part for source in sources if language in source.languages for part in source.parts(language)]
    if not parts:
        raise CorpusError(
            f"{language} ({language_name(language)}) has no documents: every file of it in {corpus} is empty; "
            "fill or remove them, or leave the language out."
        )
    return parts


def _content_of(language: str, sources: Sequence[Source], corpus: str) -> list[Any]:
    content = [item for source in sources if language in source.languages for item in source.content(language)]
    if len({json_hash(item) for item in content}) < len(content):
        raise CorpusError(
            f"{corpus} holds the same text of {language} twice (files of one name and size); name each corpus once."
        )
    return content


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
            near = nearest(code, available)
            some = sorted(available)[:SHOWN]
            offer = f"near ones are {', '.join(near)}" if near else f"it has {', '.join(some)}"
            more = ", ..." if not near and len(some) < len(available) else ""
            raise CorpusError(
                f"The corpus {corpus} has no language {code!r} among its {len(available)}; {offer}{more}."
            )
        chosen.add(language)
    if not chosen:
        raise CorpusError(
            f"No language of the corpus {corpus} was chosen; name one, or leave languages out to take all."
        )
    return sorted(chosen)
