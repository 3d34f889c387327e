"""Language codes: one table, in which ``mt``, ``mlt``, ``mlt-Latn`` and ``20231101.mt`` all name ``mlt_Latn``.

The canonical code is the one of FLORES-200: an ISO 639-3 language and an ISO 15924 script. ``languages.tsv`` holds one
row a language. Its column ``cldr`` names the locale of the built-in corpus: those in Babel's data with at least 500
texts of their own and at least half of their names different from the English ones.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lape_fast.errors import LanguageError

TABLE = Path(__file__).with_name("languages.tsv")

# ISO 15924, without the codes for "unwritten", "undetermined" and the like: what the script of a code must be.
SCRIPTS = frozenset(
    """
    Adlm Aghb Ahom Arab Aran Armi Armn Avst Bali Bamu Bass Batk Beng Bhks Bopo Brah Brai Bugi Buhd Cakm Cans Cari Cham
    Cher Chrs Copt Cpmn Cprt Cyrl Cyrs Deva Diak Dogr Dsrt Dupl Egyp Elba Elym Ethi Gara Geok Geor Glag Gong Gonm Goth
    Gran Grek Gujr Gukh Guru Hanb Hang Hani Hano Hans Hant Hatr Hebr Hira Hluw Hmng Hmnp Hrkt Hung Ital Java Jpan Kali
    Kana Kawi Khar Khmr Khoj Kits Knda Kore Krai Kthi Lana Laoo Latf Latg Latn Lepc Limb Lina Linb Lisu Lyci Lydi Mahj
    Maka Mand Mani Marc Medf Mend Merc Mero Mlym Modi Mong Mroo Mtei Mult Mymr Nagm Nand Narb Nbat Newa Nkoo Nshu Ogam
    Olck Onao Orkh Orya Osge Osma Ougr Palm Pauc Perm Phag Phli Phlp Phnx Plrd Prti Rjng Rohg Runr Samr Sarb Saur Sgnw
    Shaw Shrd Sidd Sind Sinh Sogd Sogo Sora Soyo Sund Sunu Sylo Syrc Tagb Takr Tale Talu Taml Tang Tavt Telu Tfng Tglg
    Thaa Thai Tibt Tirh Tnsa Todr Toto Tutg Ugar Vaii Vith Wara Wcho Xpeo Xsux Yezi Yiii Zanb
    """.split()  # noqa: SIM905
)

# Wikipedia's dumps name a language as 20231101.mt.
_DUMP = re.compile(r"\d{8}\.(?P<wikipedia>[a-z-]+)")
_WELL_FORMED = re.compile(r"(?P<language>[a-z]{3})[_-](?P<script>[A-Z][a-z]{3})")


def canonical(code: str) -> str:
    """The canonical code of a language, such as ``mlt_Latn``.

    Args:
        code: in any known style: ``mlt_Latn``, ``mlt-Latn``, ``mlt``, ``mt``, ``20231101.mt``. A well-formed code that
            is not in the table (``xyz_Latn``) is accepted as it is, since large corpora hold thousands of them.

    Raises:
        LanguageError: no such code; the message lists near ones.

    Example:
        >>> canonical("20231101.mt")
        'mlt_Latn'
    """
    found = _resolve(code)
    if found is None:
        near = _or_list(nearest(code, _rows()))
        raise LanguageError(
            f"{code!r} is no known language code; write it like 'mlt_Latn', 'mlt-Latn', 'mt' or '20231101.mt'"
            + (f" (did you mean {near}?)." if near else ".")
        )
    return found


def is_language(text: str) -> bool:
    """Whether ``text`` is a language code in any known style."""
    return _resolve(text) is not None


def language_name(code: str) -> str:
    """The English name of a language, or the canonical code itself where the table has none.

    Raises:
        LanguageError: no such code.

    Example:
        >>> language_name("mlt_Latn")
        'Maltese'
    """
    code = canonical(code)
    row = _rows().get(code)
    return row.name if row else code


def convert(code: str, style: str) -> str:
    """A language code in another style.

    Args:
        code: in any known style.
        style: ``flores`` (``mlt_Latn``), ``hyphen`` (``mlt-Latn``), ``bcp47`` (``mt``) or ``wikipedia`` (``mt``).

    Raises:
        LanguageError: no such code, no such style, or the language has no code in that style.
    """
    code = canonical(code)
    row = _rows().get(code, Language(code, code, bcp47=code.replace("_", "-"), wikipedia="", aliases=(), cldr=""))
    styles = {"flores": code, "hyphen": code.replace("_", "-"), "bcp47": row.bcp47, "wikipedia": row.wikipedia}
    if style not in styles:
        raise LanguageError(f"{style!r} is no style of language codes; choose one of {', '.join(styles)}.")
    if not styles[style]:
        raise LanguageError(f"{code} ({row.name}) has no {style} code; name its files or configurations explicitly.")
    return styles[style]


def nearest(code: str, candidates: Iterable[str]) -> list[str]:
    """Up to three of the canonical codes ``candidates`` that ``code`` may have meant, best first.

    Args:
        code: what was written: a code, perhaps of the same language in another script, or a language's English name.
        candidates: canonical codes.
    """
    candidates = list(candidates)
    language = (_resolve(code) or code).replace("-", "_").split("_")[0].lower()
    same = [candidate for candidate in candidates if candidate.split("_")[0] == language]
    names = {language_name(candidate).lower(): candidate for candidate in candidates}
    by_name = [names[name] for name in difflib.get_close_matches(code.lower(), names, n=3, cutoff=0.75)]
    by_code = difflib.get_close_matches(code, candidates, n=3, cutoff=0.6)
    return list(dict.fromkeys(same + by_name + by_code))[:3]


def cldr_locales() -> dict[str, str]:
    """The locale in Babel's CLDR data of every language of the built-in corpus: canonical code -> locale, sorted."""
    return {code: row.cldr for code, row in sorted(_rows().items()) if row.cldr}


@dataclass(frozen=True)
class Language:
    """One row of the table."""

    code: str
    name: str
    bcp47: str
    wikipedia: str
    aliases: tuple[str, ...]
    cldr: str

    def spellings(self) -> set[str]:
        """Every normalised code that means this language, apart from Wikipedia's own."""
        language, script = self.code.split("_")
        subtag = self.bcp47.split("-")[0]
        spellings = {self.code, self.bcp47, f"{subtag}_{script}", *self.aliases}
        if subtag == self.bcp47:
            # BCP 47 leaves the usual script out, so the bare ISO 639-3 code means this row too.
            spellings.add(language)
        return {_normalised(spelling) for spelling in spellings}


def _resolve(code: str) -> str | None:
    dump = _DUMP.fullmatch(code)
    if dump:
        return _wikipedias().get(dump["wikipedia"])
    known = _spellings().get(_normalised(code))
    if known:
        return known
    parts = _WELL_FORMED.fullmatch(code)
    return f"{parts['language']}_{parts['script']}" if parts and parts["script"] in SCRIPTS else None


def _normalised(spelling: str) -> str:
    return spelling.lower().replace("-", "_")


def _or_list(codes: list[str]) -> str:
    return " or ".join(f"{code} ({language_name(code)})" for code in codes)


@functools.cache
def _rows() -> dict[str, Language]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        records = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {
            record["code"]: Language(**{**record, "aliases": tuple(record["aliases"].split())}) for record in records
        }


@functools.cache
def _wikipedias() -> dict[str, str]:
    return {row.wikipedia: code for code, row in _rows().items() if row.wikipedia}


@functools.cache
def _spellings() -> dict[str, str]:
    # A bare Wikipedia code counts only where nothing else has that spelling: `als` is Albanian in ISO 639-3,
    # but Alemannic as a Wikipedia.
    spellings = {_normalised(wikipedia): code for wikipedia, code in _wikipedias().items()}
    spellings.update((spelling, code) for code, row in _rows().items() for spelling in row.spellings())
    return spellings
