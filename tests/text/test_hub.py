"""Corpora of the `datasets` library, on a data set that the test writes: no network."""

from __future__ import annotations

import http.server
import json
import threading
import time

import pytest

from lape_fast.errors import CorpusError
from lape_fast.text import open_corpus
from lape_fast.text.addressing import Files
from lape_fast.text.corpus import Corpus
from lape_fast.text.hub import hub_source
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


def test_columns_are_checked(data_set):
    with pytest.raises(CorpusError, match=r"\(mlt_Latn\) has no column 'body'; .* its columns: id, text"):
        next(hub_corpus(data_set, text_column="body").stream("mt"))


def test_data_set_without_languages_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(CorpusError, match="no configuration named by a language code, only: default"):
        hub_corpus(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A server that answers as the hub does: a data set, a gated one, and nothing else."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            # The library asks on its own account too.
            asked.extend([self.path] if self.path.startswith("/api/datasets") else [])
            gated = "gated" in self.path
            status = 403 if self.path.endswith("/auth-check") else 200 if gated or "free" in self.path else 404
            body = {"id": "owner/x", "sha": "c0ffee", "gated": "auto" if gated else False}
            files = ["v1.0/swh-Latn/swh-Latn_0.parquet", "v1.0/mlt-Latn/mlt-Latn_1.parquet", "README.md"]
            data = json.dumps({**body, "siblings": [{"rfilename": file} for file in files]}).encode()
            self.send_response(status)
            if status == 403:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()


def test_languages_are_found_among_the_files_of_one_commit(hub):
    source = hub_source("owner/free", LineRange(), None, Files("v1.0/{code}/*.parquet"))
    assert source.languages == ["mlt_Latn", "swh_Latn"]
    # The commit is what decides the text, and what every process reads.
    assert source.content("mlt_Latn") == [[["c0ffee"], ("v1.0/mlt-Latn/mlt-Latn_1.parquet",), "train"]]
    (part,) = source.parts("mlt_Latn")
    assert part.dataset.root == "hf://datasets/owner/free@c0ffee"
    assert len(hub) == 1


def test_gated_data_set_says_what_to_do(hub):
    with pytest.raises(
        CorpusError, match="'owner/gated' is gated: accept its terms on .*/datasets/owner/gated, and log"
    ):
        hub_source("owner/gated", LineRange(), None)


def test_hub_id_that_cannot_be_reached_is_refused_at_once(hub, monkeypatch):
    told = "'owner/name' is no file or folder, and no data set of that name can be"
    with pytest.raises(CorpusError, match=told):
        open_corpus("owner/name")
    assert len(hub) == 1
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(CorpusError, match=told):
        open_corpus("owner/name")
    assert time.monotonic() - start < 10
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=told):
        open_corpus("owner/name")
