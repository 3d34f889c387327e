"""Streams of documents: the same ones whole, in shards, shuffled, and resumed at any position."""

from __future__ import annotations

import gzip
import json
import multiprocessing

import pyarrow
import pytest
from pyarrow import parquet

from lape_fast.errors import ConfigError, CorpusError, DamagedFileError
from lape_fast.text import open_corpus, streams
from lape_fast.text.corpus import Corpus
from lape_fast.text.hub import hub_source
from lape_fast.text.records import LineRange

WRITTEN = [f"dokument {number} ħ" if number % 5 else " " for number in range(37)]
TEXTS = [text for text in WRITTEN if not text.isspace()]


def write_txt(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def write_jsonl_gz(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))


def write_parquet(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=4)


def files_corpus(folder):
    write_txt(folder / "a" / "mlt_Latn.txt", WRITTEN[:10])
    write_txt(folder / "b" / "mlt_Latn.txt", [" "])
    write_jsonl_gz(folder / "c" / "mlt_Latn.jsonl.gz", WRITTEN[10:11])
    write_parquet(folder / "d" / "mlt_Latn.parquet", WRITTEN[11:])
    return open_corpus(folder)


def built_in_corpus(folder):
    return open_corpus("cldr", lines="1201-1230", languages=["mt"])


def hub_corpus(folder, files=1, lines=None, suffix="jsonl"):
    """The texts as a data set of so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    card = f"---\nconfigs:\n- config_name: mlt_Latn\n  data_files: data/*.{suffix}\n---\n"
    (folder / "README.md").write_text(card)
    for number in range(files):
        share = WRITTEN[len(WRITTEN) * number // files : len(WRITTEN) * (number + 1) // files]
        path = folder / "data" / f"{number}.{suffix}"
        if suffix == "parquet":
            write_parquet(path, share)
        else:
            write_txt(path, [json.dumps({"text": text}) for text in share])
    line_range = LineRange.parse(lines)
    return Corpus([hub_source(str(folder), line_range, None)], lines=line_range)


def several_corpora(folder):
    write_txt(folder / "first" / "mlt_Latn.txt", WRITTEN[:7])
    write_txt(folder / "second" / "mt.txt", WRITTEN[7:])
    return open_corpus([folder / "first", "cldr", folder / "second"], lines="1-12")


SOURCES = {
    "files": files_corpus,
    "built-in": built_in_corpus,
    "hub": hub_corpus,
    "hub of three files": lambda folder: hub_corpus(folder, files=3, suffix="parquet"),
    "hub lines": lambda folder: hub_corpus(folder, files=3, lines="4-33"),
    "several": several_corpora,
}


@pytest.fixture(params=SOURCES)
def corpus(request, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 8)
    return SOURCES[request.param](tmp_path)


def whole(corpus, **options):
    return list(corpus.stream("mlt_Latn", **options))


def test_stream_holds_the_documents_of_the_corpus(corpus):
    documents = whole(corpus)
    assert documents == list(corpus.documents("mt"))
    assert len(documents) > 15
    assert len(set(documents)) == len(documents)
    assert not any(document.isspace() for document in documents)


def test_files_join_in_path_order_without_blank_documents(tmp_path):
    assert whole(files_corpus(tmp_path / "files")) == TEXTS
    assert whole(hub_corpus(tmp_path / "hub", files=3)) == TEXTS
    assert whole(hub_corpus(tmp_path / "lines", files=3, lines="4-33")) == [
        each for each in WRITTEN[3:33] if each != " "
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 50])
def test_shards_partition_the_documents(corpus, shards):
    dealt = [whole(corpus, shard=shard, shards=shards) for shard in range(shards)]
    assert sorted(document for documents in dealt for document in documents) == sorted(whole(corpus))


@pytest.mark.parametrize("make", [files_corpus, built_in_corpus, several_corpora])
def test_local_documents_are_dealt_in_turn(tmp_path, make):
    corpus = make(tmp_path)
    documents = whole(corpus)
    assert [whole(corpus, shard=shard, shards=4) for shard in range(4)] == [documents[shard::4] for shard in range(4)]


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(("shard", "shards"), [(0, 1), (1, 2), (2, 3)])
def test_resuming_at_every_position_continues_exactly(corpus, shard, shards, seed):
    options = {"shard": shard, "shards": shards, "seed": seed}
    stream = corpus.stream("mlt_Latn", **options)
    given, states = [], [stream.state()]
    for document in stream:
        given.append(document)
        states.append(stream.state())
    states.append(stream.state())
    for position, state in enumerate(states):
        resumed = corpus.stream("mlt_Latn", **options)
        resumed.restore(json.loads(json.dumps(state)))
        assert list(resumed) == given[position:]


@pytest.mark.parametrize("seed", [None, 7])
def test_resuming_after_every_document_gives_each_once(corpus, seed):
    given, state = [], corpus.stream("mlt_Latn", seed=seed).state()
    while True:
        resumed = corpus.stream("mlt_Latn", seed=seed)
        resumed.restore(state)
        document = next(resumed, None)
        if document is None:
            break
        given.append(document)
        state = json.loads(json.dumps(resumed.state()))
    assert given == whole(corpus, seed=seed)


def test_seed_permutes_each_block(corpus):
    documents = whole(corpus)
    shuffled = whole(corpus, seed=1)
    assert shuffled == whole(corpus, seed=1)
    assert shuffled != documents
    assert shuffled != whole(corpus, seed=2)
    for start in range(0, len(documents), 8):
        assert sorted(shuffled[start : start + 8]) == sorted(documents[start : start + 8])


def test_iterating_goes_on_where_the_stream_stands(corpus):
    stream = corpus.stream("mt")
    assert stream.language == "mlt_Latn"
    assert [next(stream), next(stream), *stream] == whole(corpus)
    assert list(stream) == []


def test_stream_is_read_in_a_forked_process(corpus):
    stream = corpus.stream("mlt_Latn")
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=lambda: queue.put(list(stream)))
    child.start()
    assert queue.get() == list(stream)
    child.join()


def test_finished_files_are_not_opened_again(tmp_path):
    corpus = files_corpus(tmp_path)
    stream = corpus.stream("mlt_Latn")
    given = [next(stream) for _ in range(12)]
    state = stream.state()
    (tmp_path / "a" / "mlt_Latn.txt").unlink()
    (tmp_path / "c" / "mlt_Latn.jsonl.gz").unlink()
    resumed = corpus.stream("mlt_Latn")
    resumed.restore(state)
    assert given + list(resumed) == TEXTS


def test_a_shard_without_documents_is_empty(tmp_path):
    write_txt(tmp_path / "mlt_Latn.txt", ["waħda"])
    write_txt(tmp_path / "cym_Latn.txt", [" "])
    corpus = open_corpus(tmp_path)
    assert whole(corpus, shard=0, shards=2) == ["waħda"]
    assert whole(corpus, shard=1, shards=2) == []
    assert list(corpus.stream("cym_Latn", seed=1)) == []
    for shard, shards in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=f"no shard {shard} among {shards}"):
            corpus.stream("mlt_Latn", shard=shard, shards=shards)


def cut_gzip(path):
    path = path.with_suffix(".txt.gz")
    noise = "".join(f"dokument {number * 7919 % 10007}\n" for number in range(40_000))
    data = gzip.compress(noise.encode())
    path.write_bytes(data[: len(data) - 1000])
    return path, "cannot be read to its end"


def spoil_parquet(path):
    path = path.with_suffix(".parquet")
    write_parquet(path, [f"dokument {number}" for number in range(4000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    return path, "is no complete parquet file"


def spoil_utf8(path):
    path = path.with_suffix(".txt")
    path.write_bytes(b"one\ntwo\ncaf\xe9\nthree\n")
    return path, "is not UTF-8"


def spoil_jsonl(path):
    path = path.with_suffix(".jsonl")
    path.write_text('{"text": "one"}\n{"text": "tw\n')
    return path, "Line 2 of .* is not JSON"


def not_compressed(path):
    path = path.with_suffix(".txt.zst")
    path.write_bytes(b"plain text\n")
    return path, "cannot be read to its end"


@pytest.mark.parametrize("spoil", [cut_gzip, spoil_parquet, spoil_utf8, spoil_jsonl, not_compressed])
def test_damaged_file_is_named_and_skipped_only_on_demand(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(streams, "BLOCK", 5)
    write_txt(tmp_path / "a" / "mlt_Latn.txt", ["before 1", "before 2"])
    (tmp_path / "b").mkdir()
    path, reason = spoil(tmp_path / "b" / "mlt_Latn")
    write_txt(tmp_path / "c" / "mlt_Latn.txt", ["behind 1", "behind 2"])
    corpus = open_corpus(tmp_path)
    with pytest.raises(DamagedFileError, match=rf"{reason}.*--skip-bad-files"):
        whole(corpus)
    stream = corpus.stream("mlt_Latn", skip_bad_files=True)
    documents = list(stream)
    assert documents[:2] == ["before 1", "before 2"]
    assert documents[-2:] == ["behind 1", "behind 2"]
    # What lay before the damage stays, and each shard sees the same damage.
    assert (len(documents) > 4) == (spoil is not not_compressed)
    (named,) = stream.bad_files
    assert str(path) in named
    shards = [whole(corpus, shard=shard, shards=3, skip_bad_files=True) for shard in range(3)]
    assert shards == [documents[shard::3] for shard in range(3)]


@pytest.mark.parametrize("seed", [None, 3])
def test_skipped_file_stays_named_after_resuming(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(streams, "BLOCK", 4)
    for name, spoil in (("mlt_Latn.1", spoil_utf8), ("mlt_Latn.2", spoil_jsonl), ("mlt_Latn.4", spoil_utf8)):
        spoil(tmp_path / f"{name}.x")
    write_txt(tmp_path / "mlt_Latn.3.txt", [f"sound {number}" for number in range(6)])
    corpus = open_corpus(tmp_path)
    options = {"seed": seed, "skip_bad_files": True}
    stream = corpus.stream("mlt_Latn", **options)
    states, given = [stream.state()], []
    for document in stream:
        given.append(document)
        states.append(stream.state())
    states.append(stream.state())
    assert len(given) == 11
    assert len(stream.bad_files) == 3
    for position, state in enumerate(states):
        resumed = corpus.stream("mlt_Latn", **options)
        resumed.restore(json.loads(json.dumps(state)))
        assert len(resumed.bad_files) == len(state["bad_files"])
        assert list(resumed) == given[position:]
        assert resumed.bad_files == stream.bad_files


def test_missing_column_is_not_skipped(tmp_path):
    (tmp_path / "mlt_Latn.jsonl").write_text('{"id": 1, "body": "test"}\n')
    with pytest.raises(CorpusError, match="has no column 'text' or 'content'; .* its columns: id, body"):
        whole(open_corpus(tmp_path), skip_bad_files=True)


def test_damaged_data_set_is_refused_in_a_sentence(tmp_path):
    corpus = hub_corpus(tmp_path, files=3, suffix="parquet")
    path = tmp_path / "data" / "1.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorpusError, match=r"\(mlt_Latn\) cannot be read to its end"):
        whole(corpus)
