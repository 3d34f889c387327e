"""Corpora of the `datasets` library, on a data set that the test writes: no network."""

from __future__ import annotations

import json

import datasets
import pytest

from lape_fast.errors import CorpusError
from lape_fast.text import open_corpus
from lape_fast.text.corpus import Corpus
from lape_fast.text.hub import hub_source, open_stream
from lape_fast.text.records import LineRange

CARD = """---
configs:
- config_name: 20231101.mt
  data_files:
  - {split: train, path: data/mt.jsonl}
  - {split: test, path: data/other.jsonl}
- config_name: swh-Latn
  data_files:
  - {split: test, path: data/sw.jsonl}
- config_name: default
  data_files: data/*.jsonl
---
"""


@pytest.fixture
def data_set(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    texts = {"mt": ["wieħed", "", "tnejn", "tlieta"], "other": ["ieħor"], "sw": ["moja", "mbili"]}
    for name, lines in texts.items():
        column = "content" if name == "sw" else "text"
        records = [json.dumps({"id": number, column: line}) for number, line in enumerate(lines)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    return str(tmp_path)


def hub_corpus(folder, lines=None, languages=None, text_column=None):
    line_range = LineRange.parse(lines)
    source = hub_source(str(folder), line_range, text_column)
    return Corpus([source], lines=line_range, languages=languages, text_column=text_column)


def test_configurations_named_by_language_become_languages(data_set):
    corpus = hub_corpus(data_set)
    assert corpus.languages == ["mlt_Latn", "swh_Latn"]
    assert list(corpus.documents("mlt_Latn")) == ["wieħed", "tnejn", "tlieta"]
    assert list(corpus.documents("mlt_Latn")) == ["wieħed", "tnejn", "tlieta"]
    assert list(corpus.documents("sw")) == ["moja", "mbili"]


def test_lines_count_the_records(data_set):
    corpus = hub_corpus(data_set, lines="2-3", languages=["mt"])
    assert corpus.languages == ["mlt_Latn"]
    assert list(corpus.documents("mt")) == ["tnejn"]
    assert corpus.describe()["lines"] == "2-3"


def test_stream_is_read_lazily_and_its_columns_are_checked(data_set):
    assert isinstance(open_stream(data_set, "20231101.mt"), datasets.IterableDataset)
    with pytest.raises(CorpusError, match=r"\(20231101.mt\) has no column 'body'; .* its columns: id, text"):
        next(hub_corpus(data_set, text_column="body").stream("mt"))


def test_data_set_without_languages_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(CorpusError, match="no configuration named by a language code, only: default"):
        hub_corpus(tmp_path)


def test_hub_id_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="'owner/name' is no file or folder, and no data set of that name can be"):
        open_corpus("owner/name")
