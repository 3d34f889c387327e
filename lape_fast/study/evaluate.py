"""How well a model predicts each language: perplexity and bits per byte on the same text, before and after."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import CorpusError
from lape_fast.models import layout_of, tokenizer_hash
from lape_fast.progress import Advance, progress_bar
from lape_fast.text import Corpus, Packed, pack_for_model, tokenize

# Logits that are held in fp32 at once, 256 MiB: of all positions of a batch they would be 4 GiB at 8,192 tokens and a
# vocabulary of 128k, and the loss takes as much again.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class LanguageScore:
    """What a model makes of one language's text.

    Attributes:
        nats: summed negative log-likelihood of the predicted tokens.
        tokens: how many tokens were predicted: all but the first of a document, which is its prefix (the
            tokenizer's beginning or end of sequence) wherever the tokenizer has one.
        bytes: UTF-8 bytes of the text.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token; depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Negative log2-likelihood per byte of text; comparable between tokenizers and, with care, languages."""
        return self.nats / math.log(2) / self.bytes


@dataclass(frozen=True)
class EvaluationText:
    """Text that was tokenised and packed once, to be scored many times.

    Attributes:
        languages: canonical codes.
        bytes: UTF-8 bytes of each language.
        tokens: how many tokens of each language are predicted.
        packed: the rows.
        rows_per_batch: rows per forward pass.
        source: JSON values that say what text this is (corpus, tokenizer, row length, hash of the rows).
    """

    languages: tuple[str, ...]
    bytes: tuple[int, ...]
    tokens: tuple[int, ...]
    packed: Packed
    rows_per_batch: int
    source: dict[str, Any]


def prepare_text(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    *,
    languages: Sequence[str] | None = None,
    context_length: int = 512,
    batch_tokens: int = 8192,
) -> EvaluationText:
    """Tokenises and packs the text of some languages for ``score``.

    Args:
        model: decides whether documents may share a row.
        tokenizer: its tokenizer.
        corpus: what ``open_corpus`` returned.
        languages: canonical codes; all of the corpus by default.
        context_length: tokens per row.
        batch_tokens: tokens per forward pass; their logits are in memory at once, in the model's dtype.

    Raises:
        CorpusError: a language has no text, or none that can be predicted.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("texts/", lines="1798-1997"))
        >>> before = score(model, text)
    """
    languages = tuple(languages or corpus.languages)
    documents, document_languages, sizes = [], [], []
    for number, language in enumerate(languages):
        texts = list(corpus.documents(language))
        documents += texts
        document_languages += [number] * len(texts)
        sizes.append(sum(len(text.encode()) for text in texts))
    if 0 in sizes:
        raise CorpusError(f"{corpus.name} has no text to evaluate in {languages[sizes.index(0)]}; leave it out.")
    packed = pack_for_model(model, tokenizer, tokenize(tokenizer, documents), document_languages, context_length)
    predicted = torch.bincount(packed.language_ids[_predicted(packed)], minlength=len(languages)).tolist()
    if 0 in predicted:
        raise CorpusError(
            f"Not one token of {languages[predicted.index(0)]} can be predicted in {corpus.name}: its documents are "
            "single tokens, and the tokenizer puts none before them; give it longer text or leave it out."
        )
    source = {
        "corpus": corpus.describe(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "context_length": context_length,
        "batch_tokens": batch_tokens,
        "text_hash": hashlib.sha256(torch.stack((packed.input_ids, packed.language_ids)).numpy()).hexdigest(),
    }
    rows_per_batch = max(1, batch_tokens // context_length)
    return EvaluationText(languages, tuple(sizes), tuple(predicted), packed, rows_per_batch, source)


def score(model: nn.Module, text: EvaluationText, description: str = "evaluating") -> dict[str, LanguageScore]:
    """Scores a model on prepared text.

    Returns:
        A score per language.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("texts/", lines="1798-1997"))
        >>> score(model, text)["mlt_Latn"].bits_per_byte
    """
    with progress_bar(description, len(text.packed.input_ids)) as advance:
        return _scores(text, score_nats(model, text, advance))


def bits_per_byte(model: nn.Module, text: EvaluationText) -> dict[str, float]:
    """The bits per byte of each language, without a bar of progress of its own: for the ``measure`` of a training run.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("texts/", lines="1598-1797"))
        >>> measure = functools.partial(bits_per_byte, text=text)
        >>> tune_language(model, tokenizer, corpus, config, "adapters/mlt_Latn", measure=measure)
    """
    scores = _scores(text, score_nats(model, text, lambda *_: None))
    return {language: each.bits_per_byte for language, each in scores.items()}


def _scores(text: EvaluationText, nats: torch.Tensor) -> dict[str, LanguageScore]:
    totals = zip(text.languages, nats.tolist(), text.tokens, text.bytes, strict=True)
    return {language: LanguageScore(nat, token, size) for language, nat, token, size in totals}


@torch.inference_mode()
def score_nats(model: nn.Module, text: EvaluationText, advance: Advance) -> torch.Tensor:
    """The summed negative log-likelihood of each language's text, float64 ``[languages]``.

    Args:
        advance: told the rows and tokens of every forward pass.
    """
    training = model.training
    model.eval()
    # Summed in fp64: the order of rows must not show in the last digits that are printed.
    nats = torch.zeros(len(text.languages), dtype=torch.float64)
    rows = len(text.packed.input_ids)
    try:
        for start in range(0, rows, text.rows_per_batch):
            losses, languages = _token_losses(model, text.packed, slice(start, start + text.rows_per_batch))
            nats.index_add_(0, languages, losses)
            advance(min(text.rows_per_batch, rows - start), len(losses))
    finally:
        model.train(training)
    return nats


def evaluate_languages(model: nn.Module, tokenizer, corpus: Corpus, **options) -> dict[str, LanguageScore]:
    """``prepare_text`` and ``score`` in one call; ``options`` are those of ``prepare_text``.

    Example:
        >>> evaluate_languages(model, tokenizer, open_corpus("texts/"), languages=["mlt_Latn"])["mlt_Latn"].perplexity
    """
    return score(model, prepare_text(model, tokenizer, corpus, **options))


def _predicted(packed: Packed, rows: slice = slice(None)) -> torch.Tensor:
    """Which tokens of packed rows are predicted from the one before, bool ``[R, S]``."""
    # The first of a piece has nothing before it, or was predicted at the end of the piece before.
    return (packed.position_ids[rows] > 0) & (packed.language_ids[rows] >= 0)


def _token_losses(model: nn.Module, packed: Packed, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every predicted token of some rows, fp64 ``[N]``, and its language, ``[N]``."""
    device = next(model.parameters()).device
    arguments = {"input_ids": packed.input_ids[rows].to(device)}
    if layout_of(model).position_ids:
        arguments["position_ids"] = packed.position_ids[rows].to(device)
    logits = model(**arguments, use_cache=False).logits  # [R, S, V]
    row, column = _predicted(packed, rows).nonzero(as_tuple=True)
    targets, languages = packed.input_ids[rows][row, column], packed.language_ids[rows][row, column]
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    parts = zip(*(each.to(device).split(at_once) for each in (row, column - 1, targets)), strict=True)
    losses = [F.cross_entropy(logits[row, before].float(), target, reduction="none") for row, before, target in parts]
    return torch.cat(losses).double().cpu(), languages.long()
