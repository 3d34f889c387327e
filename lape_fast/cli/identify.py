"""Commands that find neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    ActivationBar,
    BatchTokens,
    Config,
    ContextLength,
    CorpusSpec,
    Device,
    Dtype,
    FilterRate,
    Json,
    Languages,
    Lines,
    Model,
    Output,
    TextColumn,
    TokenBudget,
    TopRate,
    load,
    note_ignored,
    open_text,
    split_codes,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_facts, print_neurons


def identify(
    model: Model,
    output: Output,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    context_length: ContextLength = 4096,
    batch_tokens: BatchTokens = 16384,
    tokens_per_language: TokenBudget = None,
    top_rate: TopRate = 0.05,
    filter_rate: FilterRate = 0.95,
    activation_bar: ActivationBar = 0.95,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Count how often each neuron fires per language, and select each language's neurons.

    Writes counts.safetensors and neurons.safetensors into the output folder. The same command resumes an interrupted
    run.

    Example: lape-fast identify --model meta-llama/Llama-3.1-8B --corpus texts/ --output out
    """
    from lape_fast.identify import identify_neurons

    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    counts, neurons = identify_neurons(
        loaded,
        tokenizer,
        opened,
        output,
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
        top_rate=top_rate,
        filter_rate=filter_rate,
        activation_bar=activation_bar,
    )
    note_ignored(opened)
    print_neurons(neurons, as_json, dict(zip(counts.languages, counts.tokens.tolist(), strict=True)))


def count(
    model: Model,
    output: Output,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    context_length: ContextLength = 4096,
    batch_tokens: BatchTokens = 16384,
    tokens_per_language: TokenBudget = None,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Count only: write one counts file, to select from as often as you like.

    Example: lape-fast count --model meta-llama/Llama-3.1-8B --corpus texts/ --output counts.safetensors
    """
    from lape_fast.identify import count_to_file

    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    counts = count_to_file(
        loaded,
        tokenizer,
        opened,
        output,
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
    )
    note_ignored(opened)
    print_facts(output, counts.summary(), as_json)


def select(
    counts: Annotated[Path, typer.Argument(help="Counts file, as written by count or identify.")],
    output: Output,
    languages: Languages = None,
    top_rate: TopRate = 0.05,
    filter_rate: FilterRate = 0.95,
    activation_bar: ActivationBar = 0.95,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Select each language's neurons from counts, in seconds, with other thresholds or fewer languages.

    Example: lape-fast select out/counts.safetensors --top-rate 0.01 --output neurons-1.safetensors
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import ActivationCounts, select_neurons

    refuse_existing(output)
    loaded = ActivationCounts.load(counts)
    if languages:
        loaded = loaded.restrict(split_codes(languages))
    neurons = select_neurons(loaded, top_rate, filter_rate, activation_bar)
    neurons.save(output)
    print_neurons(neurons, as_json)


def convert(
    source: Annotated[Path, typer.Argument(help="A published mask file (.pth), or a neuron file (.safetensors).")],
    output: Output,
    languages: Annotated[
        str | None, typer.Option("--languages", help="For a mask: its languages in order, comma-separated.")
    ] = None,
    neurons_per_layer: Annotated[
        int | None, typer.Option("--neurons-per-layer", min=1, help="For a mask: the FFN width of its model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert the published mask files to neuron files, and back.

    Example: lape-fast convert mask.pth --languages mt,af,is --neurons-per-layer 14336 --output neurons.safetensors
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import NeuronSet, export_masks, import_masks
    from lape_fast.identify.counts import canonical_or_same

    refuse_existing(output)
    if source.suffix == ".safetensors":
        neurons = NeuronSet.load(source)
        export_masks(neurons, output)
    else:
        if languages is None or neurons_per_layer is None:
            raise ConfigError(
                f"{source} holds no names and no width; add --languages with its languages in order, and "
                "--neurons-per-layer with the FFN width of its model."
            )
        codes = [canonical_or_same(code) for code in split_codes(languages)]
        neurons = import_masks(source, codes, neurons_per_layer)
        neurons.save(output)
    print_neurons(neurons, as_json)
