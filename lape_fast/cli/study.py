"""Commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    Adapter,
    BatchTokens,
    Config,
    ContextLength,
    CorpusSpec,
    Device,
    Dtype,
    Json,
    Languages,
    Lines,
    Model,
    Neurons,
    TextColumn,
    load,
    open_text,
)
from lape_fast.terminal import new_table, print_json, print_scores


def evaluate(
    model: Model,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    adapter: Adapter = None,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    context_length: ContextLength = 512,
    batch_tokens: BatchTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure bits per byte and perplexity of each language; with an adapter, before and after.

    Example: lape-fast evaluate --model meta-llama/Llama-3.1-8B --adapter adapters/mlt_Latn --corpus texts/
    --lines 1798-1997
    """
    from lape_fast.study import prepare_text, score
    from lape_fast.tune import load_adapter

    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
    columns = {"base": score(loaded, text, "evaluating the base")}
    if adapter is not None:
        load_adapter(loaded, adapter)
        columns["adapter"] = score(loaded, text, "evaluating the adapter")
    print_scores(columns, as_json)


def ablate(
    model: Model,
    neurons: Neurons,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSON file for the whole matrix.")] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="PNG file for the matrix as a heat map.")] = None,
    context_length: ContextLength = 512,
    batch_tokens: BatchTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Switch each language's neurons off in turn and measure what that costs every language.

    Example: lape-fast ablate --model M --neurons out/neurons.safetensors --corpus texts/ --lines 1798-1997
    --figure ablation.png
    """
    from lape_fast.files import refuse_existing, write_json
    from lape_fast.identify import NeuronSet
    from lape_fast.study import ablate_neurons, prepare_text

    for path in filter(None, (output, figure)):
        refuse_existing(path)
    chosen = NeuronSet.load(neurons)
    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
    matrix = ablate_neurons(loaded, chosen, text)
    if output is not None:
        write_json(output, matrix.to_json())
    if figure is not None:
        from lape_fast.report import ablation_heatmap, save_figure

        save_figure(ablation_heatmap(matrix), figure)
    if as_json:
        print_json(matrix.to_json())
        return
    table = new_table("switched off", "neurons", "costs itself (bits per byte)", "costs the others, mean")
    own, others = matrix.own(), matrix.others()
    for language, size in zip(matrix.ablated, matrix.neurons, strict=True):
        table.add_row(language, f"{size:,}", f"{own[language]:+.4f}", f"{others[language]:+.4f}")
    Console().print(table)
