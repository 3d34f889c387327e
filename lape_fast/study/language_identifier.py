"""A language identifier that needs no download: naive Bayes over character n-grams, trained on a corpus in seconds.

    log p(language | text)  =  sum over the text's n-grams of log p(n-gram | language)  +  constant

with every language as likely as the others. It knows the languages of its corpus and no other: text in a language that
it never saw is taken for the nearest it did.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from lape_fast.text import Corpus

# Characters that an n-gram has at most; three code points of 21 bits fit an int64.
LONGEST = 3
BITS = 21

# How many n-grams are kept, the most frequent ones, and what is added to each count.
NGRAMS = 100_000
SMOOTHING = 0.1

# What a text without any known n-gram is in (ISO 639-2: undetermined).
UNDETERMINED = "und"


class LanguageIdentifier:
    """Calling it with a text gives the code of its language, or "und" where the text has no letter that it knows.

    Args:
        languages: G codes.
        ngrams: int64 ``[V]``, sorted, as ``ngrams_of`` gives them.
        log_shares: ``[V, G]``, the logarithm of each n-gram's share of a language's text.

    Example:
        >>> identify = train_identifier(open_corpus("cldr"))
        >>> identify("Il-qattus qagħad fuq it-tapit.")
        'mlt_Latn'
    """

    def __init__(self, languages: Sequence[str], ngrams: Tensor, log_shares: Tensor):
        self.languages = tuple(languages)
        self.ngrams = ngrams
        self.log_shares = log_shares

    def __call__(self, text: str) -> str:
        found = ngrams_of(text)
        places = torch.searchsorted(self.ngrams, found).clamp(max=len(self.ngrams) - 1)
        known = places[self.ngrams[places] == found]
        if not len(known):
            return UNDETERMINED
        return self.languages[int(self.log_shares[known].sum(0).argmax())]


def train_identifier(
    corpus: Corpus, languages: Iterable[str] | None = None, *, characters: int = 100_000
) -> LanguageIdentifier:
    """Learns to tell the languages of a corpus apart.

    Args:
        corpus: text in every language.
        languages: canonical codes; all of the corpus by default.
        characters: of each language's text, from the first document on, that are read.

    Raises:
        CorpusError: the corpus lacks a language, or has no text in it.

    Example:
        >>> identify = train_identifier(open_corpus("texts/", lines="1-1597"), ["mlt_Latn", "eng_Latn"])
    """
    languages = tuple(languages or corpus.languages)
    counted = [ngrams_of(_beginning(corpus, language, characters)).unique(return_counts=True) for language in languages]
    every, positions = torch.cat([ngrams for ngrams, _ in counted]).unique(return_inverse=True)
    totals = torch.zeros(len(every), dtype=torch.int64).index_add_(0, positions, torch.cat([n for _, n in counted]))
    kept = every[totals.topk(min(NGRAMS, len(every))).indices].sort().values
    counts = torch.full((len(languages), len(kept)), SMOOTHING)
    for row, (ngrams, numbers) in zip(counts, counted, strict=True):
        places = torch.searchsorted(kept, ngrams).clamp(max=len(kept) - 1)
        known = kept[places] == ngrams
        row[places[known]] += numbers[known]
    return LanguageIdentifier(languages, kept, (counts / counts.sum(1, keepdim=True)).log().T.contiguous())


def ngrams_of(text: str) -> Tensor:
    """All n-grams of a text's words, from single characters to ``LONGEST``, as numbers in any order.

    Words begin and end with a space; case, digits and punctuation do not count.
    """
    words = unicodedata.normalize("NFC", text.casefold()).translate(_LETTERS).split()
    line = f" {' '.join(words)} " if words else ""
    codes = torch.from_numpy(np.frombuffer(line.encode("utf-32-le"), dtype="<u4").astype(np.int64))
    found = []
    for length in range(1, LONGEST + 1):
        count = max(0, len(codes) - length + 1)
        ngrams = torch.zeros(count, dtype=torch.int64)
        for place in range(length):
            ngrams = (ngrams << BITS) | codes[place : place + count]
        found.append(ngrams)
    # A space by itself is in every text.
    return torch.cat([found[0][found[0] != ord(" ")], *found[1:]])


class _Letters(dict):
    """For ``str.translate``: letters and the marks that go with them stay, anything else is a space."""

    def __missing__(self, code: int) -> int:
        self[code] = code if unicodedata.category(chr(code))[0] in "LM" else ord(" ")
        return self[code]


_LETTERS = _Letters()


def _beginning(corpus: Corpus, language: str, characters: int) -> str:
    found, length = [], 0
    for document in corpus.documents(language):
        found.append(document)
        length += len(document)
        if length >= characters:
            break
    return "\n".join(found)[:characters]
