"""The counting loop: one streaming pass over the text of many languages, counting how often each neuron fires.

The text is cut into groups: runs of documents in the corpus's own order, packed into rows by themselves. A group's
counts depend on nothing outside it, so a run that was interrupted between two groups resumes to the same counts.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.errors import ConfigError, CorpusError
from lape_fast.files import read_tensors, write_tensors
from lape_fast.identify.counting_ffn import by_language, count_batch, counting_ffns, set_by_language, zero_counts
from lape_fast.identify.counts import ActivationCounts
from lape_fast.models import model_identity, tokenizer_hash
from lape_fast.progress import progress_bar
from lape_fast.text import Corpus, pack_for_model, tokenize

# Documents are tokenised this many at a time.
DOCUMENTS_PER_CALL = 256


@dataclass
class Position:
    """Where a counting run stands: languages before ``language`` are done, and ``documents`` of that one."""

    language: int = 0
    documents: int = 0


def count_activations(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    *,
    context_length: int = 4096,
    batch_tokens: int = 16384,
    tokens_per_language: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60.0,
) -> ActivationCounts:
    """Counts, for every language of a corpus, the tokens on which each FFN neuron of a model fires.

    Args:
        model: a causal language model of a known architecture, in eval mode.
        tokenizer: its tokenizer.
        corpus: what ``open_corpus`` returned; all its languages are counted.
        context_length: tokens per row.
        batch_tokens: about how many tokens the model sees at a time.
        tokens_per_language: stop a language after the document that reaches this many tokens.
        checkpoint: a file that the run is saved to now and then, and resumed from when it exists.
        checkpoint_seconds: how often.

    Returns:
        The counts, with the identities of model, tokenizer and corpus in their metadata.

    Raises:
        CorpusError: a language has no tokens.
        ConfigError: the checkpoint belongs to another run.

    Example:
        >>> model, tokenizer = load_model("meta-llama/Llama-3.1-8B")
        >>> counts = count_activations(model, tokenizer, open_corpus("texts/"))
        >>> counts.save("counts.safetensors")
    """
    context_length = fit_context(model, context_length)
    run = run_identity(model, tokenizer, corpus, context_length, batch_tokens, tokens_per_language)
    languages = corpus.languages
    counts, tokens, position = _start(model, languages, checkpoint, run)
    saved = time.monotonic()
    with counting_ffns(model, counts) as modules, progress_bar("counting", len(languages)) as advance:
        advance(position.language)
        for group in _groups(tokenizer, corpus, position, batch_tokens, tokens_per_language, tokens):
            languages_of = [group.language] * len(group.documents)
            packed = pack_for_model(model, tokenizer, group.documents, languages_of, context_length)
            if len(packed.input_ids):
                count_batch(model, modules, packed)
            counted = int((packed.language_ids >= 0).sum())
            tokens[group.language] += counted
            advance(group.after.language - position.language, counted)
            position = group.after
            if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                _save_checkpoint(checkpoint, counts, tokens, position, run)
                saved = time.monotonic()
    empty = [language for language, total in zip(languages, tokens.tolist(), strict=True) if total == 0]
    if empty:
        raise CorpusError(f"There is not one token to count in {', '.join(empty)}; add text or leave them out.")
    return ActivationCounts(by_language(counts), tokens, languages, run)


def run_identity(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    context_length: int,
    batch_tokens: int,
    tokens_per_language: int | None,
) -> dict[str, Any]:
    """Everything that decides the counts, as JSON values: two runs with the same identity count the same."""
    return {
        **model_identity(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "corpus": corpus.describe(),
        "context_length": context_length,
        "batch_tokens": batch_tokens,
        "tokens_per_language": tokens_per_language,
    }


def differences(run: dict[str, Any], earlier: dict[str, Any]) -> str:
    """What differs between a run's identity and an earlier one's, in words; empty if nothing does."""
    return "; ".join(
        f"{name} was {_in_words(earlier.get(name))} and is {_in_words(value)}"
        for name, value in run.items()
        if _compared(earlier.get(name)) != _compared(value)
    )


def _compared(value: Any) -> Any:
    # A corpus is the same under another path: its fingerprint covers files, sizes, lines and languages.
    return value.get("fingerprint") if isinstance(value, dict) else value


def _in_words(value: Any) -> str:
    described = f"{value.get('spec')} ({str(value.get('fingerprint'))[:12]})" if isinstance(value, dict) else str(value)
    return described if len(described) <= 100 else described[:97] + "..."


def fit_context(model: nn.Module, context_length: int) -> int:
    """The row length to use: no longer than the model's positions reach."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(context_length, positions or context_length)


@dataclass
class _Group:
    language: int
    documents: list[list[int]]
    after: Position


def _groups(
    tokenizer, corpus: Corpus, start: Position, batch_tokens: int, tokens_per_language: int | None, tokens: Tensor
) -> Iterator[_Group]:
    """Cuts the corpus into runs of documents of one language, of about ``batch_tokens`` tokens each.

    ``tokens`` are those counted so far per language; the caller adds a group's before it asks for the next.
    """
    for language in range(start.language, len(corpus.languages)):
        done = start.documents if language == start.language else 0
        texts = itertools.islice(corpus.documents(corpus.languages[language]), done, None)
        documents, size = [], 0
        for ids in _tokenized(tokenizer, texts):
            documents.append(ids)
            size += len(ids)
            budget = None if tokens_per_language is None else tokens_per_language - int(tokens[language])
            if budget is not None and size >= budget:
                break
            if size >= batch_tokens:
                done += len(documents)
                yield _Group(language, documents, Position(language, done))
                documents, size = [], 0
        yield _Group(language, documents, Position(language + 1, 0))


def _tokenized(tokenizer, texts: Iterator[str]) -> Iterator[list[int]]:
    while batch := list(itertools.islice(texts, DOCUMENTS_PER_CALL)):
        yield from tokenize(tokenizer, batch)


def _start(model: nn.Module, languages: Sequence[str], checkpoint, run: dict[str, Any]):
    counts = zero_counts(model, len(languages))
    if checkpoint is not None and Path(checkpoint).exists():
        tensors, metadata = read_tensors(checkpoint, "checkpoint")
        changed = differences(run, metadata["run"])
        if changed:
            raise ConfigError(
                f"{checkpoint} holds an interrupted run of another kind ({changed}); resume it with its own settings, "
                "or choose another output."
            )
        set_by_language(counts, tensors["counts"])
        tokens = tensors["tokens"]
        position = Position(**metadata["position"])
    else:
        tokens = torch.zeros(len(languages), dtype=torch.int64)
        position = Position()
    return counts, tokens, position


def _save_checkpoint(path, counts: Tensor, tokens: Tensor, position: Position, run: dict[str, Any]) -> None:
    state = {"run": run, "position": vars(position)}
    write_tensors(path, "checkpoint", {"counts": by_language(counts), "tokens": tokens}, state)
