"""Language codes: every style means one language, and what is no code is refused."""

from __future__ import annotations

import csv

import pytest

from lape_fast.errors import LanguageError
from lape_fast.text.languages import TABLE, canonical, cldr_locales, convert, is_language, language_name, nearest

# Codes in which large corpora and evaluation sets name their languages: style by style, with the canonical code.
SPELLINGS = {
    "mlt_Latn": ("mlt_Latn", "mlt-Latn", "mlt", "mt", "20231101.mt", "MT"),
    "nob_Latn": ("no", "nb", "nor", "nob-Latn", "20231101.no"),
    "est_Latn": ("et", "est", "ekk", "ekk_Latn", "ekk-Latn"),
    "lvs_Latn": ("lv", "lav", "lvs"),
    "npi_Deva": ("ne", "nep", "npi"),
    "zho_Hans": ("zh", "zho", "cmn", "cmn_Hani", "zh-CN", "zh-Hans"),
    "zho_Hant": ("zh-Hant", "zh_TW", "cmn_Hant"),
    "tgl_Latn": ("fil", "tl", "fil_Latn", "20231101.tl"),
    "swh_Latn": ("sw", "swa", "swh"),
    "arb_Arab": ("ar", "ara", "arb"),
    "arz_Arab": ("arz", "arz-Arab", "20231101.arz"),
    "srp_Cyrl": ("sr", "srp", "sr-Cyrl"),
    "srp_Latn": ("sr-Latn",),
    "pes_Arab": ("fa", "fas", "fas_Arab"),
    "als_Latn": ("sq", "sqi", "als"),
    "gsw_Latn": ("gsw", "20231101.als"),
    "yue_Hant": ("yue", "zh-yue", "20231101.zh-yue"),
    "deu_Latn": ("de", "deu", "ger"),
}

# Of FLORES-200, those in scripts or with codes that are easily lost.
FLORES = """ace_Arab acm_Arab acq_Arab ajp_Arab arb_Latn bjn_Arab kas_Deva knc_Arab min_Arab mni_Beng sat_Olck taq_Tfng
tzm_Tfng ydd_Hebr zho_Hant quy_Latn ayr_Latn gaz_Latn pbt_Arab prs_Arab plt_Latn khk_Cyrl ory_Orya azb_Arab"""


@pytest.mark.parametrize(("code", "spelling"), [(code, each) for code, all_ in SPELLINGS.items() for each in all_])
def test_every_style_means_the_same_language(code, spelling):
    assert canonical(spelling) == code
    assert is_language(spelling)


def test_flores_codes_are_canonical_and_named():
    for code in FLORES.split():
        assert canonical(code) == code
        assert language_name(code) != code


def test_every_code_of_the_shared_corpus_is_in_the_table(shared_corpus):
    with (shared_corpus / "MANIFEST.tsv").open(encoding="utf-8") as manifest:
        codes = {row["code"] for row in csv.DictReader(manifest, delimiter="\t")}
    assert len(codes) == 188
    for code in codes:
        assert canonical(code) == code
        assert language_name(code) != code


def test_no_spelling_of_the_table_is_claimed_twice():
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["code"] for row in rows] == sorted({row["code"] for row in rows})
    for row in rows:
        for spelling in (row["code"], row["bcp47"], *row["aliases"].split()):
            assert canonical(spelling) == row["code"], spelling
        if row["wikipedia"]:
            assert canonical(f"20231101.{row['wikipedia']}") == row["code"]


@pytest.mark.parametrize("style", ["flores", "hyphen", "bcp47", "wikipedia"])
def test_conversion_survives_a_round_trip(style):
    for code in cldr_locales():
        try:
            converted = convert(code, style)
        except LanguageError:
            assert style == "wikipedia"
            continue
        assert canonical(f"20231101.{converted}" if style == "wikipedia" else converted) == code


def test_conversion_writes_the_style_asked_for():
    assert convert("mt", "flores") == "mlt_Latn"
    assert convert("mt", "hyphen") == "mlt-Latn"
    assert convert("mlt_Latn", "bcp47") == "mt"
    assert convert("srp_Latn", "bcp47") == "sr-Latn"
    assert convert("yue_Hant", "wikipedia") == "zh-yue"
    with pytest.raises(LanguageError, match="srp_Latn .* has no wikipedia code"):
        convert("srp_Latn", "wikipedia")
    with pytest.raises(LanguageError, match="'iso' is no style"):
        convert("mt", "iso")


def test_well_formed_code_outside_the_table_is_accepted_as_it_is():
    assert canonical("xyz_Latn") == "xyz_Latn"
    assert canonical("xyz-Cyrl") == "xyz_Cyrl"
    assert language_name("xyz_Latn") == "xyz_Latn"
    assert convert("xyz_Latn", "bcp47") == "xyz-Latn"


@pytest.mark.parametrize(
    "text", ["README", "LICENSES", "MANIFEST", "line_docs", "line_ids", "train", "dev", "test", "src", "xyz_Abcd", ""]
)
def test_other_file_stems_are_no_language_codes(text):
    assert not is_language(text)
    with pytest.raises(LanguageError):
        canonical(text)


def test_error_offers_near_codes():
    for written in ("mlt_latin", "Maltese", "mltLatn"):
        with pytest.raises(LanguageError, match=r"mlt_Latn \(Maltese\)"):
            canonical(written)


def test_nearest_prefers_the_same_language_in_another_script():
    assert nearest("srp_Latn", ["slv_Latn", "srp_Cyrl", "mlt_Latn"])[0] == "srp_Cyrl"
    assert nearest("sr", ["slv_Latn", "srp_Cyrl"])[0] == "srp_Cyrl"
    assert nearest("qqqq", ["slv_Latn", "srp_Cyrl"]) == []
