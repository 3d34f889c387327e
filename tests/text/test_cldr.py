"""The built-in corpus: enough languages, really in those languages, and the same in every process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import unicodedata

import pytest

from lape_fast.errors import CorpusError
from lape_fast.text import open_corpus
from lape_fast.text.cldr import DOCUMENTS, cldr_documents, cldr_languages
from lape_fast.text.cldr_words import load_words
from lape_fast.text.languages import cldr_locales

TARGETS = [
    *("mlt_Latn", "afr_Latn", "isl_Latn", "cym_Latn", "mkd_Cyrl", "lvs_Latn"),
    *("lit_Latn", "slv_Latn", "slk_Latn", "est_Latn", "kat_Geor", "npi_Deva"),
]

HASHES = """
import hashlib, json, sys
from lape_fast.text.cldr import cldr_documents
hashes = {code: hashlib.sha256("\\n".join(cldr_documents(code, 1, 300)).encode()).hexdigest() for code in sys.argv[1:]}
sys.stdout.write(json.dumps(hashes))
"""


def names_of(language):
    words = load_words(cldr_locales()[language], language.split("_")[1])
    tables = (words.territories, words.languages, words.scripts, words.currencies)
    return {name for table in tables for name in table.values()} | {zone for zone, _ in words.zones}


def test_corpus_has_more_than_120_languages_and_the_targets():
    languages = open_corpus("cldr").languages
    assert len(languages) >= 120
    assert set(TARGETS) <= set(languages)


def test_every_language_is_really_in_that_language():
    english = names_of("eng_Latn")
    for language in cldr_languages():
        if language != "eng_Latn":
            own = names_of(language)
            translated = own - english
            assert len(translated) >= 100, language
            assert len(translated) >= 0.5 * len(own), language


@pytest.mark.parametrize(
    ("language", "script"),
    [("kat_Geor", "GEORGIAN"), ("mkd_Cyrl", "CYRILLIC"), ("npi_Deva", "DEVANAGARI"), ("ell_Grek", "GREEK")],
)
def test_letters_are_those_of_the_script(language, script):
    letters = [letter for document in cldr_documents(language, 1, 300) for letter in document if letter.isalpha()]
    assert sum(unicodedata.name(letter).startswith(script) for letter in letters) > 0.97 * len(letters)


def test_no_language_is_the_text_of_another():
    firsts = {}
    for language in cldr_languages():
        for document in cldr_documents(language, 1, 3):
            assert firsts.setdefault(document, language) == language


@pytest.mark.parametrize("language", [*TARGETS, "rif_Latn", "wol_Latn"])
def test_a_language_has_enough_and_varied_text_quickly(language):
    start = time.process_time()
    documents = list(cldr_documents(language))
    assert time.process_time() - start < 1
    assert len(documents) == DOCUMENTS
    assert len(set(documents)) > 0.99 * DOCUMENTS
    assert sum(len(document.encode()) for document in documents) > 60_000
    assert len({word for document in documents for word in document.split()}) > 2000
    assert all(document and "\n" not in document and "{" not in document for document in documents)


def test_text_is_the_same_in_every_process_and_order():
    # Norwegian and Nynorsk share data, and Azerbaijani is where a shared one is known to be overwritten.
    order = ["azj_Latn", "nob_Latn", "nno_Latn", "isl_Latn", "mlt_Latn"]
    found = []
    for seed, codes in (("0", order), ("4711", order[::-1])):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", HASHES, *codes], env=environment, capture_output=True, check=True)
        found.append(json.loads(run.stdout))
    assert found[0] == found[1]


def test_lines_give_the_same_documents_as_the_whole():
    whole = list(cldr_documents("mlt_Latn"))
    train, test = (open_corpus("cldr", lines=lines, languages=["mt"]) for lines in ("1-1597", "1798-"))
    assert list(train.documents("mlt_Latn")) == whole[:1597]
    assert list(test.documents("mlt_Latn")) == whole[1797:]
    with pytest.raises(CorpusError, match="mlt_Latn .* has no documents in lines 5000-"):
        list(open_corpus("cldr", lines="5000-").documents("mlt_Latn"))


def test_unknown_language_is_refused():
    with pytest.raises(CorpusError, match="The corpus cldr has no language 'xyz_Latn'"):
        open_corpus("cldr", languages=["xyz_Latn"])


def test_description_names_the_data():
    description = open_corpus("cldr", languages=["mt"]).describe()
    assert description == open_corpus("cldr", languages=["mlt_Latn"]).describe()
    assert description["spec"] == "cldr"
    assert description["fingerprint"] != open_corpus("cldr", languages=["cym_Latn"]).describe()["fingerprint"]


def test_plurals_and_dates_are_the_locales():
    english = "\n".join(cldr_documents("eng_Latn"))
    assert "1 day ago" in english
    assert "in 2 days" in english
    assert not re.search(r"\b1 (days|years|miles|euros)\b", english)
    icelandic = "\n".join(cldr_documents("isl_Latn"))
    assert "október" in icelandic
    assert "oktyabr" not in icelandic
