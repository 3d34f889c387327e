"""Text: corpora by language, language codes, and packing documents into rows of tokens."""

from __future__ import annotations

from lape_fast.text.corpus import Corpus, open_corpus, overlap
from lape_fast.text.languages import canonical, convert, is_language, language_name, nearest
from lape_fast.text.packing import Packed, pack, pack_for_model, tokenize
from lape_fast.text.streams import DocumentStream

__all__ = [
    "Corpus",
    "DocumentStream",
    "Packed",
    "canonical",
    "convert",
    "is_language",
    "language_name",
    "nearest",
    "open_corpus",
    "overlap",
    "pack",
    "pack_for_model",
    "tokenize",
]
