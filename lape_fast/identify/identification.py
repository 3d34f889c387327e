"""Identification from start to end: count every language of a corpus, select its neurons, write both files."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lape_fast.errors import FileExistsAlreadyError
from lape_fast.identify.counting import count_activations, differences, fit_context, run_identity
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.rules import Lape
from lape_fast.identify.selection import select_neurons
from lape_fast.text import Corpus

COUNTS_NAME, NEURONS_NAME = "counts.safetensors", "neurons.safetensors"


def identify_neurons(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    output: str | os.PathLike,
    *,
    context_length: int = 4096,
    batch_tokens: int = 16384,
    tokens_per_language: int | None = None,
    **thresholds: float,
) -> tuple[ActivationCounts, NeuronSet]:
    """Writes ``counts.safetensors`` and ``neurons.safetensors`` into a folder.

    The same call with the same output resumes what was interrupted, and does nothing twice.

    Args:
        model, tokenizer, corpus, context_length, batch_tokens, tokens_per_language: see ``count_activations``.
        output: the folder.
        thresholds: of LAPE, see ``Lape``.

    Raises:
        FileExistsAlreadyError: the folder holds the results of another run.

    Example:
        >>> counts, neurons = identify_neurons(model, tokenizer, open_corpus("texts/"), "out", top_rate=0.01)
        >>> neurons.count("mlt_Latn")
    """
    folder = Path(output)
    counts = count_to_file(
        model,
        tokenizer,
        corpus,
        folder / COUNTS_NAME,
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
    )
    neurons = select_neurons(counts, Lape(**thresholds))
    path = folder / NEURONS_NAME
    if not path.exists():
        neurons.save(path)
    elif NeuronSet.load(path).summary() != neurons.summary():
        raise FileExistsAlreadyError(
            f"{path} was selected with other thresholds; write this selection elsewhere with `lape-fast select "
            f"{folder / COUNTS_NAME} --output FILE`."
        )
    return counts, neurons


def count_to_file(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    path: str | os.PathLike,
    *,
    context_length: int = 4096,
    batch_tokens: int = 16384,
    tokens_per_language: int | None = None,
) -> ActivationCounts:
    """``count_activations`` into a file, through ``PATH.partial``, from which an interrupted run resumes.

    Raises:
        FileExistsAlreadyError: the file holds the counts of another run.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    if path.exists():
        counts = ActivationCounts.load(path)
        run = run_identity(
            model, tokenizer, corpus, fit_context(model, context_length), batch_tokens, tokens_per_language
        )
        changed = differences(run, counts.metadata)
        if changed:
            raise FileExistsAlreadyError(
                f"{path} holds the counts of another run ({changed}); choose another output or remove the file."
            )
    else:
        counts = count_activations(
            model,
            tokenizer,
            corpus,
            context_length=context_length,
            batch_tokens=batch_tokens,
            tokens_per_language=tokens_per_language,
            checkpoint=partial,
        )
        counts.save(path)
    partial.unlink(missing_ok=True)
    return counts
