"""Commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    Adapters,
    BatchSize,
    BatchTokens,
    Config,
    ContextLength,
    CorpusSpec,
    Device,
    Dtype,
    Fewshot,
    Json,
    Languages,
    Limit,
    Lines,
    Model,
    Neurons,
    Quantise,
    TaskFolder,
    Tasks,
    TextColumn,
    load,
    open_text,
    split_codes,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_ablation, print_scores


def evaluate(
    model: Model,
    corpus: CorpusSpec = [],  # noqa: B006
    adapter: Adapters = [],  # noqa: B006
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    context_length: ContextLength = 512,
    batch_tokens: BatchTokens = 8192,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure bits per byte and perplexity of each language, or tasks, or both; with adapters, before and after each.

    The base is loaded once, whatever methods the adapters are of. The text is the built-in one, unless --corpus names
    another; with --tasks, text is measured only if --corpus names some.

    Example: lape-fast evaluate --model meta-llama/Llama-3.1-8B --adapter adapters/mlt_Latn --corpus texts/
    --lines 1798-1997 --tasks belebele,flores --languages mlt_Latn
    """
    from lape_fast.study import evaluate_tasks, expand_tasks, prepare_text, score
    from lape_fast.tune import load_adapter, name_adapters

    # Of one adapter it is clear which.
    named = {"adapter": adapter[0]} if len(adapter) == 1 else name_adapters(adapter)
    codes, names = split_codes(languages), split_codes(tasks)
    if names:
        # What is misspelt is told before a model is loaded.
        expand_tasks(names, codes)
    opened = open_text(corpus or DEFAULT_CORPUS, lines, languages, text_column) if corpus or not names else None
    loaded, tokenizer = load(model, dtype, device, quantise=quantise)
    results, columns = None, {}
    if names:
        counts = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
        results = evaluate_tasks(loaded, tokenizer, names, codes, adapters=adapter, include_path=task_folder, **counts)
    if opened is not None:
        text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
        columns = {"base": score(loaded, text, "evaluating the base")}
        for name, folder in named.items():
            loaded_adapter = load_adapter(loaded, folder)
            columns[name] = score(loaded, text, f"evaluating {name}")
            loaded_adapter.detach(keep=False)
    print_scores(columns, as_json, results)


def ablate(
    model: Model,
    neurons: Neurons,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="JSON file; NAME.ablation.json beside NAME.safetensors by default."),
    ] = None,
    context_length: ContextLength = 512,
    batch_tokens: BatchTokens = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Switch each language's neurons off in turn and measure what that costs every language.

    Writes the whole matrix as JSON, and beside it a table for pandas (.csv) and a heat map (.png). The same command
    goes on with an interrupted run.

    Example: lape-fast ablate --model M --neurons out/neurons.safetensors --corpus texts/ --lines 1798-1997
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import NeuronSet
    from lape_fast.report import ablation_heatmap, save_figure
    from lape_fast.study import ablate_to_file, prepare_text

    output = output or neurons.with_suffix(".ablation.json")
    if output.suffix != ".json":
        raise ConfigError(f"The output {output} is a JSON file beside which more is written; name one ending in .json.")
    writers = {
        output.with_suffix(".csv"): lambda path: matrix.save_csv(path),
        output.with_suffix(".png"): lambda path: save_figure(ablation_heatmap(matrix), path),
    }
    if not output.exists():
        for path in writers:
            refuse_existing(path)
    chosen = NeuronSet.load(neurons)
    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
    matrix = ablate_to_file(loaded, chosen, text, output)
    for path, write in writers.items():
        # A run that is repeated finds them, unless it was stopped between them.
        if not path.exists():
            write(path)
    print_ablation(matrix, as_json)
