"""Reading the documents of one file as a stream: text and jsonl, plain or compressed with gzip or zstd, and parquet."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape_fast.errors import ConfigError, CorpusError, DamagedFileError

BLOCK_BYTES = 1 << 18

# Bytes of a line, after decompression.
LONGEST_LINE = 1 << 26

# How many times its size a file may hold when it is decompressed; text is compressed to a fifth, at best a twentieth.
# The first 64 MiB are free, for tests repeat themselves.
MOST_EXPANSION, FREE_BYTES = 250, 1 << 26

DEFAULT_COLUMNS = ("text", "content")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split_name(name: str) -> tuple[str, str, str] | None:
    """The stem, format suffix and compression suffix of a file name that can be read, or None.

    ``mlt_Latn.txt.gz`` gives ``("mlt_Latn", ".txt", ".gz")``.
    """
    stem, compression = _split_suffix(name, DECOMPRESSORS)
    stem, file_format = _split_suffix(stem, READERS)
    if not stem or not file_format or (file_format == ".parquet" and compression):
        return None
    return stem, file_format, compression


def read_documents(path: Path, lines: LineRange, text_column: str | None) -> Iterator[str]:
    """The documents of one file, in order, without the blank ones.

    Args:
        path: a file whose name ``split_name`` understands.
        lines: which of the file's lines (text) or records (jsonl, parquet) to read; blank ones are counted too.
        text_column: the field of a record that holds the text; None means ``text``, else ``content``.

    Raises:
        DamagedFileError: the file is cut off, not UTF-8 or not in its format.
        CorpusError: its name is no such file's, or it has no such column.
    """
    parsed = split_name(path.name)
    if parsed is None:
        raise CorpusError(f"{path} is no .txt, .jsonl or .parquet file; convert it to one of them.")
    _, file_format, compression = parsed
    return READERS[file_format](path, DECOMPRESSORS[compression], lines, text_column)


def texts_of_records(records: Iterable[Mapping], text_column: str | None, source: str) -> Iterator[str]:
    """The texts of records, without the blank ones.

    Args:
        records: one mapping a record.
        text_column: as for ``read_documents``; chosen by the first record.
        source: where the records come from, for error messages.
    """
    column = None
    for record in records:
        if column is None or column not in record:
            column = choose_column(list(record), text_column if column is None else column, source)
        text = record[column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"The column {column!r} of {source} holds {type(text).__name__} where text is needed; "
                f"choose another text_column among: {', '.join(record)}."
            )
        if text and not text.isspace():
            _check_encodable(text, source)
            yield text


def _check_encodable(text: str, source: str) -> None:
    # JSON can spell half of a character ("\\ud800"), which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DamagedFileError(
            f"{source} holds a text with {ascii(text[error.start])}, half of a character, behind "
            f"{text[: error.start][-20:]!r}; write the file again from clean text."
        ) from error


def choose_column(columns: Sequence[str], wanted: str | None, source: str) -> str:
    """The column that holds the text: ``wanted``, or the first of the default ones that is there.

    Raises:
        CorpusError: no such column; the message lists the actual ones.
    """
    for column in (wanted,) if wanted else DEFAULT_COLUMNS:
        if column in columns:
            return column
    missing = repr(wanted) if wanted else " or ".join(map(repr, DEFAULT_COLUMNS))
    actual = ", ".join(columns) or "(none)"
    raise CorpusError(f"{source} has no column {missing}; set text_column to one of its columns: {actual}.")


@dataclass(frozen=True)
class LineRange:
    """A range of lines or records, counted from 1, both ends included; ``last`` None means to the end."""

    first: int = 1
    last: int | None = None

    @classmethod
    def parse(cls, text: str | None) -> LineRange:
        """Reads ``1-1597``, ``1598-`` (to the end) or ``7`` (one line); None means every line.

        Raises:
            ConfigError: not a range.
        """
        if text is None:
            return cls()
        first, dash, last = (part.strip() for part in str(text).partition("-"))
        # More digits than any file has lines; of thousands Python makes no number.
        short = max(len(first), len(last)) < 19
        if short and first.isdecimal() and (last.isdecimal() or not last):
            end = int(last) if last else None if dash else int(first)
            if int(first) >= 1 and (end is None or end >= int(first)):
                return cls(int(first), end)
        raise ConfigError(
            f"{text!r:.60} is no range of lines; write it like '1-1597', '1598-' or '7', counting from 1."
        )

    def __str__(self) -> str:
        return f"{self.first}-{'' if self.last is None else self.last}"

    def meets(self, other: LineRange) -> bool:
        """Whether a line lies in both ranges."""
        return all(a.last is None or b.first <= a.last for a, b in ((self, other), (other, self)))

    def of(self, items: Iterable) -> Iterator:
        """The items of an iterable that lie in the range."""
        return itertools.islice(items, self.first - 1, self.last)


def _split_suffix(name: str, suffixes: Iterable[str]) -> tuple[str, str]:
    suffix = next((suffix for suffix in suffixes if suffix and name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)], suffix


def _read_txt(path: Path, blocks: Callable, lines: LineRange, text_column: str | None) -> Iterator[str]:
    for offset, _, line in lines.of(_lines(path, blocks)):
        text = _decode(path, offset, line).strip()
        if text:
            yield text


def _read_jsonl(path: Path, blocks: Callable, lines: LineRange, text_column: str | None) -> Iterator[str]:
    records = (_record(path, offset, number, line) for offset, number, line in lines.of(_lines(path, blocks)))
    yield from texts_of_records((record for record in records if record is not None), text_column, str(path))


def _record(path: Path, offset: int, number: int, line: bytes) -> dict | None:
    text = _decode(path, offset, line).strip()
    if not text:
        return None
    try:
        record = json.loads(text)
    # Beside JSONDecodeError: a number of too many digits, and brackets that nest too deep.
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"Line {number} of {path} is not JSON ({error}); write one JSON object a line."
        ) from error
    if not isinstance(record, dict):
        raise DamagedFileError(f"Line {number} of {path} is a {type(record).__name__}; write one JSON object a line.")
    return record


def _read_parquet(path: Path, blocks: Callable, lines: LineRange, text_column: str | None) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    # One value at a time: a page of a few bytes can name one text a million times.
    def values(file: parquet.ParquetFile, column: str) -> Iterator:
        for batch in file.iter_batches(columns=[column], batch_size=1024):
            yield from (value.as_py() for value in batch.column(0))

    def size(value: Any) -> int:
        return 1 + (len(value) if isinstance(value, str) else 0)

    try:
        with parquet.ParquetFile(path) as file:
            column = choose_column(file.schema_arrow.names, text_column, str(path))
        # Texts that stand in a page once stay so.
        with parquet.ParquetFile(path, read_dictionary=[column]) as file:
            records = ({column: value} for value in _expanding(path, values(file, column), size))
            yield from texts_of_records(lines.of(records), column, str(path))
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{path} holds a text that is not UTF-8: byte {error.start} of it is 0x{error.object[error.start]:02x}; "
            "write the file again from clean text."
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path} is no complete parquet file ({error}); copy or write it again.") from error


def _lines(path: Path, blocks: Callable) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file: byte offset (after decompression), number from 1, bytes without the line feed."""
    offset, pieces, length = 0, [], 0
    lines = itertools.count(1)
    for block in _readable(path, blocks):
        *whole, rest = block.split(b"\n")
        if whole:
            # Joined once, or a long line would be copied for each block of it.
            whole[0] = b"".join([*pieces, whole[0]])
            pieces, length = [], 0
        for line in whole:
            number = next(lines)
            yield from _without_mark(offset, number, line)
            offset += len(line) + 1
        pieces.append(rest)
        length += len(rest)
        if length > LONGEST_LINE:
            raise DamagedFileError(
                f"Line {next(lines)} of {path} has more than {LONGEST_LINE:,} bytes; write one document a line."
            )
    if length:
        yield from _without_mark(offset, next(lines), b"".join(pieces))


def _without_mark(offset: int, number: int, line: bytes) -> Iterator[tuple[int, int, bytes]]:
    mark = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
    yield offset + mark, number, line[mark:]


def _decode(path: Path, offset: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte offset {offset + error.start}"
        if path.suffix.lower() in DECOMPRESSORS:
            where += " of its decompressed text"
        raise DamagedFileError(
            f"{path} is not UTF-8: the byte 0x{line[error.start]:02x} at {where} cannot be decoded ({error.reason}); "
            "convert the file to UTF-8."
        ) from error


def _readable(path: Path, blocks: Callable) -> Iterator[bytes]:
    """The blocks of a file, with every way of being damaged turned into one error."""
    try:
        yield from _expanding(path, blocks(path), len)
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{path} cannot be read to its end ({error}); copy or compress it again.") from error


def _expanding(path: Path, items: Iterable, size: Callable[[Any], int]) -> Iterator:
    """The items of a file, as long as all together have a size that its own can explain."""
    most = max(FREE_BYTES, MOST_EXPANSION * path.stat().st_size)
    for item in items:
        most -= size(item)
        if most < 0:
            raise DamagedFileError(
                f"{path} holds more than {MOST_EXPANSION} times its own size, as no text does; if it is what it should "
                "be, write it again without compression."
            )
        yield item


def _plain_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _gzip_blocks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _zstd_blocks(path: Path) -> Iterator[bytes]:
    import pyarrow

    # Unlike zstandard's readers it gives out no more than a block at a time, and notices a truncated frame.
    with pyarrow.OSFile(str(path)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


# File format and compression by suffix: everything that can be read.
READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
DECOMPRESSORS = {"": _plain_blocks, ".gz": _gzip_blocks, ".zst": _zstd_blocks}
