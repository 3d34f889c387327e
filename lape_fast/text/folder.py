"""Corpora from files whose names begin with a language code."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from lape_fast.errors import CorpusError
from lape_fast.text.languages import canonical, is_language
from lape_fast.text.records import LineRange, read_documents, split_name
from lape_fast.text.streams import LocalPart, Source


def folder_source(path: Path, lines: LineRange, text_column: str | None) -> Source:
    """The text of a folder, read recursively, or of one file; the files of a language follow each other in path order.

    Args:
        path: a folder or file that exists.
        lines: which lines or records of each file to read.
        text_column: as for ``read_documents``.

    Raises:
        CorpusError: no file there is named by a language code.
    """
    files, ignored = _language_files(path)
    if not files:
        left_out = f" It holds only: {'; '.join(ignored[:5])}." if ignored else ""
        raise CorpusError(
            f"{path} holds no text in any language; put one .txt, .jsonl or .parquet file a language there, "
            f"named by its code, such as mlt_Latn.txt.{left_out}"
        )
    root = path if path.is_dir() else path.parent

    def parts(language: str) -> list[LocalPart]:
        read = functools.partial(_documents_from, lines=lines, text_column=text_column)
        return [LocalPart(functools.partial(read, file)) for file in files[language] if _size(file)]

    def content(language: str) -> list:
        return [[file.relative_to(root).as_posix(), _size(file)] for file in files[language] if _size(file)]

    return Source(str(path), sorted(files), parts, content, ignored)


def _documents_from(path: Path, start: int, *, lines: LineRange, text_column: str | None) -> Iterator[str]:
    return itertools.islice(read_documents(path, lines, text_column), start, None)


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
