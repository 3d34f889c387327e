"""Corpora from files: what is read, in which order, and which damage is named."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from lape_fast.errors import ConfigError, CorpusError
from lape_fast.text import open_corpus, overlap

SENTENCES = ["L-ewwel sentenza.", "It-tieni waħda.", "It-tielet.", "Ir-raba’ u l-aħħar."]


def write_txt(path, sentences=SENTENCES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{sentence}\n" for sentence in sentences).encode())
    return path


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def compress_gzip(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def compress_zstd(path):
    target = path.with_name(path.name + ".zst")
    target.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    path.unlink()
    return target


def documents(folder, language="mlt_Latn", **options):
    return list(open_corpus(folder, **options).documents(language))


@pytest.mark.parametrize("compress", [lambda path: path, compress_gzip, compress_zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_every_format_yields_the_same_documents(tmp_path, suffix, compress):
    path = tmp_path / f"mlt_Latn{suffix}"
    if suffix == ".txt":
        write_txt(path)
    else:
        write_jsonl(path, [{"id": 1, "text": sentence} for sentence in SENTENCES])
    compress(path)
    assert documents(tmp_path) == SENTENCES
    assert documents(tmp_path, lines="2-3") == SENTENCES[1:3]


def test_parquet_yields_its_text_column(tmp_path):
    table = pyarrow.table({"id": range(4), "content": SENTENCES})
    parquet.write_table(table, tmp_path / "mlt-Latn.parquet", row_group_size=2)
    assert documents(tmp_path) == SENTENCES
    assert documents(tmp_path, lines="2-3") == SENTENCES[1:3]
    assert documents(tmp_path, lines="4-") == SENTENCES[3:]


def test_long_files_are_read_across_blocks(tmp_path):
    sentences = [f"Sentenza {'ħ' * (number % 977)} numru {number}" for number in range(3000)]
    path = write_txt(tmp_path / "mlt_Latn.txt", sentences)
    assert documents(tmp_path) == sentences
    # Several frames in one file, as parallel compressors write them, with a skippable one between.
    data = path.read_bytes()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:100_001], data[100_001:])]
    path.unlink()
    (tmp_path / "mlt_Latn.txt.zst").write_bytes(frames[0] + b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + frames[1])
    assert documents(tmp_path) == sentences


def test_blank_lines_are_dropped_but_numbered(tmp_path):
    (tmp_path / "mt.txt").write_bytes("\ufeffwieħed\r\n\r\n  \t\r\nerbgħa\r\nħamsa".encode())
    assert documents(tmp_path) == ["wieħed", "erbgħa", "ħamsa"]
    assert documents(tmp_path, lines="2-4") == ["erbgħa"]
    assert documents(tmp_path, lines="5") == ["ħamsa"]


def test_only_line_feeds_end_a_line(tmp_path):
    (tmp_path / "mt.txt").write_text("one\u2028still one\x0cand\x85still\ntwo\n", encoding="utf-8", newline="")
    assert len(documents(tmp_path)) == 2


def test_jsonl_text_may_span_lines_and_be_missing(tmp_path):
    write_jsonl(tmp_path / "mt.jsonl", [{"text": "wieħed\ntnejn"}, {"text": None}, {"text": " "}, {"text": "tlieta"}])
    assert documents(tmp_path) == ["wieħed\ntnejn", "tlieta"]


def test_files_of_one_language_join_in_path_order_with_lines_of_each(tmp_path):
    write_txt(tmp_path / "b" / "mlt_Latn.txt", ["b1", "b2", "b3"])
    write_txt(tmp_path / "a" / "deep" / "mt.txt", ["deep1", "deep2", "deep3"])
    write_txt(tmp_path / "mlt-Latn.txt", ["top1", "top2", "top3"])
    write_txt(tmp_path / "a" / "20231101.mt.txt", ["a1", "a2", "a3"])
    write_txt(tmp_path / "a" / "cym_Latn.txt", ["cymraeg"])
    corpus = open_corpus(tmp_path, lines="1-2")
    assert corpus.languages == ["cym_Latn", "mlt_Latn"]
    assert list(corpus.documents("mt")) == ["a1", "a2", "deep1", "deep2", "b1", "b2", "top1", "top2"]
    assert list(corpus.documents("mt")) == list(corpus.documents("mlt_Latn"))


def test_files_without_a_language_are_named_and_left_out(tmp_path):
    write_txt(tmp_path / "mlt_Latn.txt")
    write_txt(tmp_path / "README.txt")
    write_txt(tmp_path / "sub" / "MANIFEST.tsv")
    write_txt(tmp_path / ".cache" / "cym_Latn.txt")
    corpus = open_corpus(tmp_path)
    assert corpus.languages == ["mlt_Latn"]
    assert len(corpus.ignored) == 2
    assert "README.txt ('README' is no language code)" in corpus.ignored
    assert any(each.startswith("sub/MANIFEST.tsv") for each in corpus.ignored)


def test_a_single_file_is_a_corpus_of_one_language(tmp_path):
    path = write_txt(tmp_path / "mlt_Latn.txt")
    write_txt(tmp_path / "cym_Latn.txt")
    corpus = open_corpus(path)
    assert corpus.languages == ["mlt_Latn"]
    assert list(corpus.documents("mlt_Latn")) == SENTENCES
    with pytest.raises(CorpusError, match="'notes' is no language code"):
        open_corpus(write_txt(tmp_path / "notes.txt"))


def test_languages_are_chosen_in_any_style(tmp_path):
    for code in ("mlt_Latn", "cym_Latn", "isl_Latn"):
        write_txt(tmp_path / f"{code}.txt")
    assert open_corpus(tmp_path, languages=["mt", "isl-Latn", "mlt_Latn"]).languages == ["isl_Latn", "mlt_Latn"]


def test_absent_language_is_refused_with_near_ones(tmp_path):
    write_txt(tmp_path / "srp_Cyrl.txt")
    write_txt(tmp_path / "mlt_Latn.txt")
    for wanted, offer in (
        ("srp_Latn", "near ones are srp_Cyrl"),
        ("maltese", "near ones are mlt_Latn"),
        # Nothing is near, and nothing is said to be.
        ("nonsense", "it has mlt_Latn, srp_Cyrl"),
    ):
        with pytest.raises(CorpusError, match=rf"no language '{wanted}' among its 2; {offer}"):
            open_corpus(tmp_path, languages=[wanted])
    with pytest.raises(CorpusError, match="no language 'srp_Latn'"):
        list(open_corpus(tmp_path).documents("srp_Latn"))
    with pytest.raises(CorpusError, match="name one"):
        open_corpus(tmp_path, languages=[])


def test_missing_and_empty_corpora_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpus(str(tmp_path / "absent"))
    with pytest.raises(CorpusError, match="holds no text in any language"):
        open_corpus(tmp_path)
    write_txt(tmp_path / "README.txt")
    with pytest.raises(CorpusError, match="'README' is no language code"):
        open_corpus(tmp_path)


def test_language_without_documents_is_refused(tmp_path):
    write_txt(tmp_path / "mlt_Latn.txt")
    write_txt(tmp_path / "cym_Latn.txt", [" ", ""])
    with pytest.raises(CorpusError, match=r"cym_Latn \(Welsh\) has no documents"):
        documents(tmp_path, "cym_Latn")
    with pytest.raises(CorpusError, match=r"mlt_Latn \(Maltese\) has no documents in lines 5-9"):
        documents(tmp_path, lines="5-9")
    (tmp_path / "isl_Latn.txt").touch()
    with pytest.raises(CorpusError, match=r"isl_Latn \(Icelandic\) has no documents: every file of it .* is empty"):
        open_corpus(tmp_path)
    assert open_corpus(tmp_path, languages=["mt"]).languages == ["mlt_Latn"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("compress", [lambda path: path, compress_gzip, compress_zstd], ids=["plain", "gz", "zst"])
def test_undecodable_bytes_are_named_with_their_offset(tmp_path, suffix, compress):
    before = "ħobż tajjeb\n" * 40_000
    line = b'{"text": "caf\xe9"}\n' if suffix == ".jsonl" else b"caf\xe9\n"
    if suffix == ".jsonl":
        before = '{"text": "ħobż"}\n' * 30_000
    path = tmp_path / f"mlt_Latn{suffix}"
    path.write_bytes(before.encode() + line)
    offset = len(before.encode()) + line.index(b"\xe9")
    path = compress(path)
    with pytest.raises(CorpusError, match=rf"{path.name} is not UTF-8: the byte 0xe9 at byte offset {offset}"):
        documents(tmp_path)
    # What lies outside the lines asked for does no harm.
    assert len(documents(tmp_path, lines="1-100")) == 100


def test_utf16_is_refused_at_its_first_byte(tmp_path):
    (tmp_path / "mt.txt").write_bytes("ħobż\n".encode("utf-16"))
    with pytest.raises(CorpusError, match="0xff at byte offset 0 "):
        documents(tmp_path)


@pytest.mark.parametrize("compress", [compress_gzip, compress_zstd], ids=["gz", "zst"])
def test_damaged_compressed_file_is_refused(tmp_path, compress):
    path = compress(write_txt(tmp_path / "mlt_Latn.txt", [f"sentenza {os.urandom(9).hex()}" for _ in range(5000)]))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=f"{path.name} cannot be read to its end"):
        documents(tmp_path)
    path.write_bytes(b"not compressed at all\n")
    with pytest.raises(CorpusError, match=f"{path.name} cannot be read to its end"):
        documents(tmp_path)


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "mlt_Latn.parquet"
    parquet.write_table(pyarrow.table({"text": SENTENCES}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match="mlt_Latn.parquet is no complete parquet file"):
        documents(tmp_path)


def test_undecodable_parquet_text_is_refused(tmp_path):
    text = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "mlt_Latn.parquet")
    with pytest.raises(CorpusError, match="mlt_Latn.parquet holds a text that is not UTF-8: byte 3 of it is 0xe9"):
        documents(tmp_path)


def test_missing_text_column_lists_the_actual_ones(tmp_path):
    write_jsonl(tmp_path / "mlt_Latn.jsonl", [{"id": 1, "body": "test"}])
    parquet.write_table(pyarrow.table({"id": [1], "body": ["test"]}), tmp_path / "cym_Latn.parquet")
    for language in ("mlt_Latn", "cym_Latn"):
        with pytest.raises(CorpusError, match="has no column 'text' or 'content'; .* its columns: id, body"):
            documents(tmp_path, language)
        with pytest.raises(CorpusError, match="has no column 'texts'; .* its columns: id, body"):
            documents(tmp_path, language, text_column="texts")
        with pytest.raises(CorpusError, match="'id' of .* holds int"):
            documents(tmp_path, language, text_column="id")
        assert documents(tmp_path, language, text_column="body") == ["test"]


def test_text_column_beats_content(tmp_path):
    write_jsonl(tmp_path / "mt.jsonl", [{"content": "content", "text": "text"}])
    assert documents(tmp_path) == ["text"]
    assert documents(tmp_path, text_column="content") == ["content"]


@pytest.mark.parametrize(("line", "told"), [("{'text': 1}", "is not JSON"), ('["text"]', "is a list")])
def test_broken_jsonl_line_is_named(tmp_path, line, told):
    (tmp_path / "mt.jsonl").write_text('{"text": "tajjeb"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=f"Line 2 of .*mt.jsonl {told}"):
        documents(tmp_path)


@pytest.mark.parametrize("lines", ["0-5", "7-3", "a-b", "-5", "", "1-2-3", "1:5"])
def test_senseless_ranges_of_lines_are_refused(tmp_path, lines):
    write_txt(tmp_path / "mlt_Latn.txt")
    with pytest.raises(ConfigError, match="no range of lines"):
        open_corpus(tmp_path, lines=lines)


def test_broken_link_is_refused(tmp_path):
    (tmp_path / "mlt_Latn.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(CorpusError, match="mlt_Latn.txt cannot be read"):
        open_corpus(tmp_path)


def test_fingerprint_follows_the_text_and_not_the_place(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_txt(first / "sub" / "mlt_Latn.txt")
    write_txt(first / "cym_Latn.txt")
    shutil.copytree(first, second)
    description = open_corpus(first).describe()
    assert json.loads(json.dumps(description)) == description
    assert description["languages"] == ["cym_Latn", "mlt_Latn"]

    def fingerprint(folder=second, **options):
        return open_corpus(folder, **options).describe()["fingerprint"]

    assert fingerprint(first) == fingerprint(second)
    different = {fingerprint(), fingerprint(lines="1-2"), fingerprint(languages=["mt"]), fingerprint(text_column="x")}
    assert len(different) == 4
    write_txt(second / "mlt_Latn.txt", ["more"])
    assert fingerprint() not in different


def test_several_corpora_follow_each_other(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_txt(first / "mlt_Latn.txt", ["first 1", "first 2", "first 3"])
    write_txt(first / "cym_Latn.txt", ["cymraeg"])
    write_txt(first / "isl_Latn.txt", [])
    write_txt(second / "mt.txt", ["second 1", "second 2", "second 3"])
    write_txt(second / "isl_Latn.txt", ["íslenska"])
    write_txt(second / "README.txt")
    corpus = open_corpus([first, second], lines="1-2")
    assert corpus.languages == ["cym_Latn", "isl_Latn", "mlt_Latn"]
    assert list(corpus.documents("mlt_Latn")) == ["first 1", "first 2", "second 1", "second 2"]
    assert list(corpus.documents("isl_Latn")) == ["íslenska"]
    assert len(corpus.ignored) == 1
    assert open_corpus([second, first], languages=["cy"]).languages == ["cym_Latn"]
    assert len(open_corpus([str(first), "cldr"], languages=["is"]).describe()["languages"]) == 1
    with pytest.raises(CorpusError, match=f"{first} \\+ {second} has no language 'fra_Latn' among its 3"):
        open_corpus([first, second], languages=["fra_Latn"])
    with pytest.raises(CorpusError, match="No corpus was named"):
        open_corpus([])


def test_fingerprint_covers_every_corpus_and_their_order(tmp_path):
    first, second = write_txt(tmp_path / "a" / "mt.txt", ["one"]), write_txt(tmp_path / "b" / "mt.txt", ["other"])
    specs = ([first], [second], [first, second], [second, first], [first, "cldr"])
    descriptions = [open_corpus(spec, languages=["mt"]).describe() for spec in specs]
    assert len({description["fingerprint"] for description in descriptions}) == 5
    assert descriptions[2]["spec"] == f"{first} + {second}"
    assert {frozenset(description) for description in descriptions} == {
        frozenset({"spec", "lines", "languages", "text_column", "fingerprint"})
    }
    assert open_corpus(first).describe() == open_corpus([first]).describe()


def test_overlapping_shards_are_known_by_their_ids(tmp_path):
    first = write_txt(tmp_path / "first" / "mlt_Latn.txt")
    write_txt(tmp_path / "first" / "cym_Latn.txt")
    second = write_txt(tmp_path / "second" / "mlt_Latn.txt", ["Oħra."])

    def shard(spec=first.parent, number=0, shards=2, **options):
        identity = open_corpus(spec, **options).shard_id("mt", number, shards)
        return json.loads(json.dumps(identity))

    whole = shard(shards=1)
    assert overlap(whole, whole)
    assert overlap(whole, shard(languages=["mt"], shards=1))
    assert overlap(whole, shard(number=1))
    assert not overlap(shard(number=0), shard(number=1))
    # A deal among three has nothing to do with one among two.
    assert overlap(shard(number=0), shard(number=1, shards=3))
    assert not overlap(whole, shard(second.parent, shards=1))
    assert overlap(whole, shard([first.parent, second.parent], shards=1))
    assert overlap(shard(number=0), shard([second.parent, first.parent], number=1))
    assert not overlap(shard(lines="1-2"), shard(lines="3-"))
    assert overlap(shard(lines="1-2"), shard(lines="2-"))
    assert overlap(shard(lines="2"), shard(lines="1-3", number=1))
    assert overlap(shard("cldr"), shard("cldr", lines="1-10", number=1))
    assert not overlap(whole, shard("cldr"))


def test_documents_are_streamed(tmp_path):
    path = write_txt(tmp_path / "mlt_Latn.txt", ["sentenza"] * 200_000)
    # A bad byte at the far end is not reached by a reader that takes only the first document.
    with path.open("ab") as file:
        file.write(b"\xff\n")
    assert next(open_corpus(tmp_path).documents("mlt_Latn")) == "sentenza"


def test_shared_corpus_is_read_whole(shared_corpus):
    corpus = open_corpus(shared_corpus, lines="1-1597")
    assert len(corpus.languages) == 188
    assert {each.split(" ")[0] for each in corpus.ignored} >= {"README.md", "LICENSES.md", "line_docs.tsv"}
    top = open_corpus(shared_corpus / "mlt_Latn.txt", lines="1-1597")
    assert len(list(top.documents("mlt_Latn"))) == 1597
