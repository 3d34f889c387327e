"""Corpora as they come: each kind of odd text is counted or skipped by the rule that docs/reliability.md states."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc

import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lape_fast.errors import ConfigError, CorpusError, DamagedFileError
from lape_fast.identify import CountingSettings, count_activations
from lape_fast.text import open_corpus, tokenize
from lape_fast.text.records import FREE_BYTES, LONGEST_LINE
from tests.tiny_models import tiny_model, tiny_tokenizer

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documents(path, **options):
    return list(open_corpus(path, **options).stream("mlt_Latn"))


def count(folder, **options):
    given_settings = CountingSettings(context_length=32, batch_tokens=64, **options)
    return count_activations(tiny_model("llama"), tiny_tokenizer(), open_corpus(folder), given_settings, workers=0)


# Bytes


@many
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@example(b"\xef\xbb\xbfone\r\ntwo\rthree\x0cfour\xe2\x80\xa8five\xc2\x85six\n\n \n")
def test_any_bytes_are_lines_of_utf_8_or_refused(tmp_path, content):
    """The rule in three lines: a line feed ends a document, blanks around it are no text, and all of it is UTF-8."""
    for suffix, written in ((".txt", content), (".txt.gz", gzip.compress(content))):
        path = tmp_path / f"mlt_Latn{suffix}"
        path.write_bytes(written)
        try:
            lines = content.removeprefix(b"\xef\xbb\xbf").decode().split("\n")
        except UnicodeDecodeError:
            with pytest.raises(DamagedFileError, match="is not UTF-8"):
                documents(path)
            continue
        expected = [line.strip() for line in lines if line.strip()]
        if content:
            assert documents(path) == expected
        else:
            path.write_bytes(gzip.compress(b"") if suffix.endswith("gz") else b"\n")
            assert documents(path) == []


def test_invalid_utf_8_stops_a_run_or_is_skipped_and_reported(tmp_path):
    (tmp_path / "mlt_Latn.a.txt").write_bytes(b"before\nbad \xff byte\nbehind\n")
    (tmp_path / "mlt_Latn.b.txt").write_text("the next file\n")
    with pytest.raises(DamagedFileError, match=r"the byte 0xff at byte offset 11 .*--skip-bad-files"):
        count(tmp_path)
    counts = count(tmp_path, skip_bad_files=True)
    assert counts.tokens.tolist() == [sum(map(len, tokenize(tiny_tokenizer(), ["before", "the next file"]))) - 2]
    (skipped,) = counts.metadata["skipped_files"]
    assert "mlt_Latn.a.txt is not UTF-8" in skipped and skipped.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "nul \0 byte",
        "שלום עולם",
        "e\u0301 u\u0308 \u202eright-to-left override\u202c",
        "👩\u200d👩\u200d👧",
        "a\rb",
        "a\u2028b\u2029c",
        "a\x85b\x0cc\x0bd\x1ce",
    ],
)
def test_odd_characters_within_a_line_are_text_of_one_document(tmp_path, text):
    (tmp_path / "mlt_Latn.txt").write_text(f"{text}\r\nnext\n", encoding="utf-8", newline="")
    assert documents(tmp_path) == [text, "next"]
    (tmp_path / "mlt_Latn.txt").unlink()
    (tmp_path / "mlt_Latn.jsonl").write_text(json.dumps({"text": text}) + "\r\n", encoding="utf-8", newline="")
    assert documents(tmp_path) == [text]


def test_empty_documents_are_passed_over(tmp_path):
    (tmp_path / "mlt_Latn.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("", "a", None, " \u2003\x85", "b")) + "\n\n"
    )
    assert documents(tmp_path) == ["a", "b"]


def test_half_a_character_in_json_is_damage(tmp_path):
    (tmp_path / "mlt_Latn.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DamagedFileError, match=r"mlt_Latn\.jsonl holds a text with '\\ud83d', half of a character"):
        documents(tmp_path)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": '])
def test_json_that_readers_trip_over_is_damage(tmp_path, line):
    (tmp_path / "mlt_Latn.jsonl").write_text(line + "\n")
    with pytest.raises(DamagedFileError, match=r"Line 1 of .*mlt_Latn\.jsonl is not JSON"):
        documents(tmp_path)


# Tokens


def test_text_that_spells_special_tokens_is_counted_as_text(tmp_path):
    """The tokenizer's own tokens are never counted, and no text can write one."""
    (tmp_path / "mlt_Latn.txt").write_text("<bos><eos><pad>\n<bos>\n")
    pieces = tokenize(tiny_tokenizer(), ["<bos><eos><pad>", "<bos>"])
    assert not {0, 1, 2} & {token for tokens in pieces for token in tokens[1:]}
    assert count(tmp_path).tokens.tolist() == [sum(map(len, pieces)) - 2]


def test_how_documents_are_tokenised_together_changes_nothing(tmp_path, monkeypatch):
    lines = [f"line {number} " + "x" * (number % 7) for number in range(40)]
    (tmp_path / "mlt_Latn.txt").write_text("\n".join(lines))
    whole = count(tmp_path)
    monkeypatch.setattr("lape_fast.identify.chunks.CHARACTERS_PER_CALL", 20)
    assert torch.equal(count(tmp_path).positive, whole.positive)


# Sizes


def test_a_line_of_50_mb_is_one_document(tmp_path):
    line = "għandu " * 6_250_000
    assert len(line.encode()) == 50_000_000
    (tmp_path / "mlt_Latn.txt").write_text(f"first\n{line}\nlast\n", encoding="utf-8")
    assert [len(text) for text in documents(tmp_path)] == [5, len(line) - 1, 4]


def test_a_longer_line_is_damage(tmp_path):
    with (tmp_path / "mlt_Latn.txt").open("wb") as file:
        file.write(b"first\n")
        file.truncate(LONGEST_LINE + (1 << 20))
    stream = open_corpus(tmp_path).stream("mlt_Latn", skip_bad_files=True)
    assert list(stream) == ["first"]
    assert "Line 2 of" in stream.bad_files[0] and "more than 67,108,864 bytes" in stream.bad_files[0]


def test_a_million_documents_take_no_more_memory_than_a_thousand(tmp_path):
    """Traced behind the middle: whatever grew with the documents would have grown by 100,000 objects there."""
    (tmp_path / "mlt_Latn.txt").write_text("a\nb\n" * 500_000)
    stream = open_corpus(tmp_path).stream("mlt_Latn", seed=0)
    for _ in range(500_000):
        next(stream)
    tracemalloc.start()
    for _ in range(100_000):
        next(stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(1 for _ in stream) == 400_000
    # A block of documents that is shuffled together, and a block of the file with its lines: 130,000 objects.
    assert peak < 16 << 20


# Bombs: a megabyte or two that unfold into 1.6 gigabytes (gzip) or 16 (zstd), and kilobytes of parquet into 50.


def gz_bomb(path, unit):
    path.write_bytes(gzip.compress(unit * (1 << 14)) * 100)


def zst_bomb(path, unit):
    path.write_bytes(pyarrow.compress(unit * (1 << 14), "zstd", asbytes=True) * 1000)


def parquet_bomb(path, unit):
    text = pyarrow.array([(unit * (1 << 19)).decode()])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), text)
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")


READ = """
import resource, sys
from pathlib import Path
from lape_fast.errors import DamagedFileError
from lape_fast.text import open_corpus
import pyarrow.parquet, gzip

mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (512 << 20),) * 2)
try:
    for text in open_corpus(sys.argv[1]).stream("mlt_Latn"):
        pass
    print("read")
except DamagedFileError as error:
    print(error)
"""


@pytest.mark.parametrize("unit", [b"x" * 1024, b"x" * 1023 + b"\n"], ids=["one line", "lines"])
@pytest.mark.parametrize(("suffix", "write"), [(".txt.gz", gz_bomb), (".txt.zst", zst_bomb)])
def test_a_compressed_bomb_is_damage_within_512_mb(tmp_path, suffix, write, unit):
    path = tmp_path / f"mlt_Latn{suffix}"
    write(path, unit)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=300)
    assert "mlt_Latn" in done.stdout and ("times its own size" in done.stdout or "Line 1" in done.stdout), done


@pytest.mark.parametrize("unit", [b"x", b" "])
def test_a_parquet_bomb_is_damage_within_512_mb(tmp_path, unit):
    path = tmp_path / "mlt_Latn.parquet"
    parquet_bomb(path, unit)
    assert path.stat().st_size < 1 << 16
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=300)
    assert "holds more than 250 times its own size" in done.stdout, done


def test_text_that_repeats_itself_is_no_bomb(tmp_path):
    """What is free is more than any test or small corpus has."""
    line = "the same line\n"
    (tmp_path / "mlt_Latn.txt.gz").write_bytes(gzip.compress(line.encode() * 100_000))
    assert 100_000 * len(line) < FREE_BYTES
    assert len(documents(tmp_path)) == 100_000


# Languages


def test_a_language_in_two_files_is_the_text_of_both(tmp_path):
    (tmp_path / "mlt_Latn.txt").write_text("one\n")
    (tmp_path / "mt.txt").write_text("two\n")
    corpus = open_corpus(tmp_path, languages=["mt", "mlt_Latn"])
    assert corpus.languages == ["mlt_Latn"] and list(corpus.stream("mt")) == ["one", "two"]
    assert count(tmp_path).languages == ["mlt_Latn"]


def test_the_same_corpus_named_twice_is_refused(tmp_path):
    (tmp_path / "mlt_Latn.txt").write_text("one\n")
    with pytest.raises(CorpusError, match="holds the same text of mlt_Latn twice"):
        open_corpus([tmp_path, tmp_path])


@pytest.mark.parametrize("state", [None, {}, {"part": 0}, {"part": -1, "before": 0}, "start", 3])
def test_a_position_that_no_stream_returned_is_refused(tmp_path, state):
    (tmp_path / "mlt_Latn.txt").write_text("one\n")
    stream = open_corpus(tmp_path).stream("mlt_Latn")
    with pytest.raises(ConfigError, match="is no position in the text of mlt_Latn"):
        stream.restore(state)
    assert list(stream) == ["one"]
