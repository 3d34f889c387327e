"""Text: corpora by language, language codes, and packing documents into rows of tokens."""

from __future__ import annotations

from lape_fast.text.corpus import Corpus, open_corpus
from lape_fast.text.languages import canonical, convert, is_language, language_name, nearest
from lape_fast.text.packing import Packed, pack, pack_for_model, tokenize

__all__ = [
    "Corpus",
    "Packed",
    "canonical",
    "convert",
    "is_language",
    "language_name",
    "nearest",
    "open_corpus",
    "pack",
    "pack_for_model",
    "tokenize",
]
