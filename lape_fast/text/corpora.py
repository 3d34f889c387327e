"""Corpora on the Hugging Face hub that can be named by a short name, with what one needs to know to use them.

The facts are those of the data sets' own cards in 2025. Licences are of the collections; the texts themselves are
their authors'.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lape_fast.text.addressing import Addressing, Configurations, Files, Rows


@dataclass(frozen=True)
class KnownCorpus:
    """One row of the table.

    Attributes:
        name: what ``open_corpus`` and ``--corpus`` take in place of the hub id.
        addressing: how the data set addresses its languages.
        code: Swahili's code, as an example of how the data set writes codes.
        text_column: the column of the text.
        split: the split that is read; a language without it gives its first one.
        licence: of the collection, as an SPDX identifier.
        gated: whether its terms must be accepted on the hub first.
        note: what to know before use.
    """

    name: str
    hub_id: str
    addressing: Addressing
    code: str
    text_column: str
    split: str
    licence: str
    gated: bool
    note: str

    def describe(self) -> dict[str, Any]:
        """The row as JSON."""
        return {**asdict(self), "addressing": str(self.addressing)}


CORPORA = (
    KnownCorpus(
        name="glotcc",
        hub_id="cis-lmu/GlotCC-V1",
        addressing=Files("v1.0/{code}/*.parquet"),
        code="swh-Latn",
        text_column="content",
        split="train",
        licence="CC0-1.0",
        gated=False,
        note="Web text in 1275 languages and scripts; some hold a handful of documents.",
    ),
    KnownCorpus(
        name="fineweb-2",
        hub_id="HuggingFaceFW/fineweb-2",
        addressing=Configurations(),
        code="swh_Latn",
        text_column="text",
        split="train",
        licence="ODC-By-1.0",
        gated=False,
        note="Web text in more than 1800 languages and scripts; English is not among them.",
    ),
    KnownCorpus(
        name="madlad-400",
        hub_id="allenai/MADLAD-400",
        addressing=Files("data/{code}/{code}_clean_*.jsonl.gz"),
        code="sw",
        text_column="text",
        split="train",
        licence="ODC-By-1.0",
        gated=False,
        note="Web text in 419 languages; the clean half of the data set is read.",
    ),
    KnownCorpus(
        name="wikipedia",
        hub_id="wikimedia/wikipedia",
        addressing=Configurations(),
        code="20231101.sw",
        text_column="text",
        split="train",
        licence="CC-BY-SA-3.0 and GFDL",
        gated=False,
        note="About 300 Wikipedias, whole articles; the newest snapshot is read.",
    ),
    KnownCorpus(
        name="flores+",
        hub_id="openlanguagedata/flores_plus",
        addressing=Configurations(),
        code="swh_Latn",
        text_column="text",
        split="dev",
        licence="CC-BY-SA-4.0",
        gated=True,
        note="The same 997 sentences in about 200 languages, for evaluation only; a few languages have devtest only.",
    ),
    KnownCorpus(
        name="sib-200",
        hub_id="Davlan/sib200",
        addressing=Configurations(),
        code="swh_Latn",
        text_column="text",
        split="train",
        licence="CC-BY-SA-4.0",
        gated=False,
        note="701 sentences of FLORES in 205 languages: do not evaluate on FLORES what has read it.",
    ),
    KnownCorpus(
        name="udhr",
        hub_id="cis-lmu/udhr-lid",
        # `iso639-3` would lose Min Nan: its code, nan, is read as a missing value.
        addressing=Rows("id"),
        code="swh_Latn",
        text_column="sentence",
        split="test",
        licence="CC0-1.0",
        gated=False,
        note="About 60 sentences of the Declaration of Human Rights in 430 languages and scripts: for quick trials.",
    ),
)


def known_corpus(spec: str) -> KnownCorpus | None:
    """The row that a short name or a hub id names, in any case; None if there is none."""
    return next((row for row in CORPORA if spec.lower() in (row.name, row.hub_id.lower())), None)
