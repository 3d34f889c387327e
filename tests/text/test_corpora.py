"""The table of known corpora: complete, and each row reads an imitation of its data set from a folder."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from lape_fast.errors import CorpusError
from lape_fast.text import canonical, corpora, open_corpus
from lape_fast.text.addressing import Configurations, Files, Rows
from lape_fast.text.corpora import CORPORA, known_corpus
from lape_fast.text.corpus import Corpus
from lape_fast.text.hub import hub_source
from lape_fast.text.records import LineRange

TEXTS = {"swh_Latn": ["moja", "", "mbili", "tatu"], "mlt_Latn": ["wieħed", "tnejn", "tlieta", "erbgħa"]}
BY_NAME = {row.name: row for row in CORPORA}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def code_in_style(row, language):
    """A language's code as the row's data set writes it."""
    return row.code.replace("swh", language[:3]).replace("sw", {"mlt_Latn": "mt", "swh_Latn": "sw"}[language])


def imitate(row, folder):
    """Writes a small data set of the row's layout."""
    makers = {Configurations: write_configurations, Files: write_files, Rows: write_rows}
    makers[type(row.addressing)](row, folder)


def write_configurations(row, folder):
    entries = []
    for language in TEXTS:
        code = code_in_style(row, language)
        write_jsonl(folder / "data" / f"{code}.jsonl", records(row, TEXTS[language]))
        write_jsonl(folder / "data" / f"{code}.other.jsonl", records(row, ["of another split"]))
        splits = [(row.split, f"data/{code}.jsonl"), ("other", f"data/{code}.other.jsonl")]
        files = "".join(f"\n  - {{split: {split}, path: {path}}}" for split, path in splits)
        entries.append(f"- config_name: {code}\n  data_files:{files}\n")
    write_jsonl(folder / "data" / "all.jsonl", records(row, ["all"]))
    card = "---\nconfigs:\n" + "".join(entries) + "- config_name: everything\n  data_files: data/all.jsonl\n---\n"
    (folder / "README.md").write_text(card)


def write_files(row, folder):
    for language, texts in TEXTS.items():
        pattern = row.addressing.pattern.replace("{code}", code_in_style(row, language))
        for number in range(2):
            path = folder / pattern.replace("*", f"{number:04}")
            share = records(row, texts[2 * number : 2 * number + 2])
            if path.suffix == ".parquet":
                path.parent.mkdir(parents=True, exist_ok=True)
                parquet.write_table(pyarrow.Table.from_pylist(share), path)
            else:
                write_jsonl(path, share)
                path.write_bytes(gzip.compress(path.read_bytes()))
    # What a repository holds besides: a loading script, and the noisy half of MADLAD-400.
    (folder / f"{folder.name}.py").write_text("raise SystemExit\n")
    write_jsonl(folder / "data" / "sw" / "sw_noisy_0000.jsonl", records(row, ["noise"]))
    write_jsonl(folder / "data" / "xx_nonsense" / "xx_nonsense_clean_0000.jsonl", records(row, ["noise"]))


def write_rows(row, folder):
    with (folder / f"{row.split}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [row.addressing.column, row.text_column, "iso639-3"])
        writer.writeheader()
        for pair in zip(*TEXTS.values(), strict=True):
            for language, text in zip(TEXTS, pair, strict=True):
                writer.writerow({row.addressing.column: language, row.text_column: text, "iso639-3": language[:3]})
        writer.writerow({row.addressing.column: "zxx_none", row.text_column: "noise", "iso639-3": "zxx"})


def records(row, texts):
    return [{"number": number, row.text_column: text} for number, text in enumerate(texts)]


def write_jsonl(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def imitation(name, folder):
    row = BY_NAME[name]
    imitate(row, folder)
    return Corpus([hub_source(str(folder), LineRange(), row.text_column, row.addressing, row.split)], lines=LineRange())


def test_every_row_is_complete():
    assert list(BY_NAME) == ["glotcc", "fineweb-2", "madlad-400", "wikipedia", "flores+", "sib-200", "udhr"]
    for row in CORPORA:
        assert canonical(row.code) == "swh_Latn", row.name
        description = row.describe()
        assert json.loads(json.dumps(description)) == description
        assert all(value not in ("", None) for value in description.values()), row.name
        assert row.hub_id.count("/") == 1
        assert row.note.endswith(".")
    assert [row.name for row in CORPORA if row.gated] == ["flores+"]


def test_short_names_and_hub_ids_name_a_row():
    assert known_corpus("glotcc") is known_corpus("cis-lmu/GlotCC-V1") is known_corpus("cis-lmu/GlotCC-v1")
    assert known_corpus("owner/other") is None


@pytest.mark.parametrize("name", BY_NAME)
def test_row_reads_an_imitation_of_its_data_set(tmp_path, name):
    corpus = imitation(name, tmp_path)
    assert corpus.languages == ["mlt_Latn", "swh_Latn"]
    assert list(corpus.documents("mlt_Latn")) == TEXTS["mlt_Latn"]
    assert list(corpus.documents("sw")) == ["moja", "mbili", "tatu"]


@pytest.mark.parametrize("name", ["glotcc", "madlad-400", "udhr"])
def test_resumed_and_sharded_like_any_other(tmp_path, name):
    corpus = imitation(name, tmp_path)
    stream = corpus.stream("mlt_Latn")
    given, states = [], [stream.state()]
    for document in stream:
        given.append(document)
        states.append(stream.state())
    for position, state in enumerate(states):
        resumed = corpus.stream("mlt_Latn")
        resumed.restore(json.loads(json.dumps(state)))
        assert list(resumed) == given[position:]
    shards = [list(corpus.stream("mlt_Latn", shard=shard, shards=3)) for shard in range(3)]
    assert sorted(sum(shards, [])) == sorted(given)


def test_short_name_is_opened_by_its_row(tmp_path, monkeypatch):
    # The row itself, with the folder of the imitation in place of the hub id.
    imitate(BY_NAME["glotcc"], tmp_path)
    monkeypatch.setattr(corpora, "CORPORA", (replace(BY_NAME["glotcc"], hub_id=str(tmp_path)),))
    corpus = open_corpus("glotcc", languages=["mt"], lines="2-3")
    assert list(corpus.documents("mlt_Latn")) == ["tnejn", "tlieta"]
    with pytest.raises(CorpusError, match="has no column 'text'; .* its columns: number, content"):
        next(open_corpus("glotcc", text_column="text").stream("mt"))


@pytest.mark.parametrize(
    ("addressing", "told"),
    [
        (Files("v1.0/{code}/*.parquet"), "no file like .* its 1 files begin with: train.jsonl"),
        (Rows("text"), "no column 'text' of language codes; its columns are text"),
        (Rows("id"), "no column 'id' of language codes; its columns are text"),
        (Configurations(), "no configuration named by a language code, only: default"),
    ],
)
def test_data_set_of_another_layout_is_refused(tmp_path, addressing, told):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}])
    with pytest.raises(CorpusError, match=told):
        hub_source(str(tmp_path), LineRange(), None, addressing)
