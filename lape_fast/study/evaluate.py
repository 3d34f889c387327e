"""How well a model predicts each language: perplexity and bits per byte on the same text, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import CorpusError
from lape_fast.models import layout_of
from lape_fast.progress import progress_bar
from lape_fast.text import Corpus, Packed, pack_for_model, tokenize


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
    """Text that was tokenised and packed once, to be scored many times."""

    languages: tuple[str, ...]
    bytes: tuple[int, ...]
    packed: Packed
    rows_per_batch: int


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
        batch_tokens: tokens per forward pass; their logits are in memory at once.

    Raises:
        CorpusError: a language has no text.

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
    return EvaluationText(languages, tuple(sizes), packed, max(1, batch_tokens // context_length))


@torch.inference_mode()
def score(model: nn.Module, text: EvaluationText, description: str = "evaluating") -> dict[str, LanguageScore]:
    """Scores a model on prepared text.

    Returns:
        A score per language.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("texts/", lines="1798-1997"))
        >>> score(model, text)["mlt_Latn"].bits_per_byte
    """
    training = model.training
    model.eval()
    # Summed in fp64: the order of rows must not show in the last digits that are printed.
    nats = torch.zeros(len(text.languages), dtype=torch.float64)
    tokens = torch.zeros(len(text.languages), dtype=torch.int64)
    rows = len(text.packed.input_ids)
    with progress_bar(description, rows) as advance:
        for start in range(0, rows, text.rows_per_batch):
            part = slice(start, start + text.rows_per_batch)
            losses, languages = _token_losses(model, text.packed, part)
            nats.index_add_(0, languages, losses)
            tokens += torch.bincount(languages, minlength=len(tokens))
            advance(min(text.rows_per_batch, rows - start), len(losses))
    model.train(training)
    totals = zip(text.languages, nats.tolist(), tokens.tolist(), text.bytes, strict=True)
    return {language: LanguageScore(nat, token, size) for language, nat, token, size in totals}


def evaluate_languages(model: nn.Module, tokenizer, corpus: Corpus, **options) -> dict[str, LanguageScore]:
    """``prepare_text`` and ``score`` in one call; ``options`` are those of ``prepare_text``.

    Example:
        >>> evaluate_languages(model, tokenizer, open_corpus("texts/"), languages=["mlt_Latn"])["mlt_Latn"].perplexity
    """
    return score(model, prepare_text(model, tokenizer, corpus, **options))


def _token_losses(model: nn.Module, packed: Packed, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every predicted token of some rows, fp64 ``[N]``, and its language, ``[N]``."""
    device = next(model.parameters()).device
    arguments = {"input_ids": packed.input_ids[rows].to(device)}
    if layout_of(model).position_ids:
        arguments["position_ids"] = packed.position_ids[rows].to(device)
    logits = model(**arguments, use_cache=False).logits[:, :-1]  # [R, S - 1, V]
    targets, languages = packed.labels[rows, 1:], packed.language_ids[rows, 1:]
    predicted = (targets != -100) & (languages >= 0)
    on_device = predicted.to(device)
    losses = F.cross_entropy(logits[on_device].float(), targets[predicted].to(device), reduction="none")
    return losses.double().cpu(), languages[predicted].long()
