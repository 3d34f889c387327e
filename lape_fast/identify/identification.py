"""Identification from start to end: count every language of a corpus, select its neurons, write both files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from lape_fast.errors import FileExistsAlreadyError, SelectionError
from lape_fast.files import remove_unfinished
from lape_fast.identify.checkpoints import differences
from lape_fast.identify.chunks import CountingSettings
from lape_fast.identify.counting import count_activations, fit_settings, run_identity
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.distributed import World
from lape_fast.identify.neurons import NeuronSet
from lape_fast.identify.selection import select_neurons
from lape_fast.text import Corpus

COUNTS_NAME, NEURONS_NAME = "counts.safetensors", "neurons.safetensors"


def identify_neurons(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    output: str | os.PathLike,
    settings: CountingSettings | None = None,
    *,
    min_tokens: int = 0,
    checkpoint_seconds: float = 300.0,
    workers: int | None = None,
    world: World | None = None,
) -> tuple[ActivationCounts, NeuronSet]:
    """Writes ``counts.safetensors`` and ``neurons.safetensors`` into a folder.

    The same call with the same output resumes what was interrupted, and does nothing twice.

    Args:
        model, tokenizer, corpus, settings, checkpoint_seconds, workers, world: see ``count_activations``.
        output: the folder.
        min_tokens: languages with fewer are counted, but left out of the selection.

    Raises:
        FileExistsAlreadyError: the folder holds the results of another run.
        SelectionError: a language has no tokens; the counts are written.

    Example:
        >>> counts, neurons = identify_neurons(model, tokenizer, open_corpus("texts/"), "out")
        >>> neurons.count("mlt_Latn")
    """
    folder, settings = Path(output), settings or CountingSettings()
    counts = count_to_file(
        model,
        tokenizer,
        corpus,
        folder / COUNTS_NAME,
        settings,
        checkpoint_seconds=checkpoint_seconds,
        workers=workers,
        world=world,
    )
    try:
        neurons = select_neurons(counts.with_tokens(min_tokens)[0], settings.selection_rule())
    except SelectionError as error:
        raise SelectionError(
            f"{error} The counts are in {folder / COUNTS_NAME}: `lape-fast select` them with --min-tokens, --languages "
            "or another rule."
        ) from error
    if world is not None and not world.is_main:
        return counts, neurons
    path = folder / NEURONS_NAME
    if not path.exists():
        neurons.save(path)
    elif NeuronSet.load(path).summary() != neurons.summary():
        raise FileExistsAlreadyError(
            f"{path} was selected by another rule; write this selection elsewhere with `lape-fast select "
            f"{folder / COUNTS_NAME} --output FILE`."
        )
    return counts, neurons


def count_to_file(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    path: str | os.PathLike,
    settings: CountingSettings | None = None,
    *,
    checkpoint_seconds: float = 300.0,
    workers: int | None = None,
    world: World | None = None,
) -> ActivationCounts:
    """``count_activations`` into a file, through the folder ``PATH.partial``, from which an interrupted run resumes.

    Raises:
        FileExistsAlreadyError: the file holds the counts of another run.
    """
    path = Path(path)
    world = world or World()
    partial = path.with_name(f"{path.name}.partial")
    if path.exists():
        counts = ActivationCounts.load(path)
        run = run_identity(model, tokenizer, corpus, fit_settings(model, settings or CountingSettings()))
        changed = differences(run, counts.metadata)
        if changed:
            raise FileExistsAlreadyError(
                f"{path} holds the counts of another run ({changed}); choose another output or remove the file."
            )
        # A run that was killed between its last two steps leaves it behind.
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            remove_unfinished(path)
        return counts
    counts = count_activations(
        model,
        tokenizer,
        corpus,
        settings,
        checkpoint=partial,
        checkpoint_seconds=checkpoint_seconds,
        workers=workers,
        world=world,
    )
    if world.is_main:
        counts.save(path)
        shutil.rmtree(partial, ignore_errors=True)
    # Nobody goes on to read the file before it is there.
    world.wait()
    return counts
