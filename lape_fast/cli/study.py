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
    number_or_name,
    open_text,
    split_codes,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_ablation, print_scores, print_study, print_study_plan


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

    named = name_adapters(adapter)
    # Of one adapter it is clear which.
    if len(adapter) == 1:
        named = {"adapter": adapter[0]}
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
    if results and all(row.why for row in results.rows):
        first = results.rows[0]
        raise ConfigError(f"No task could be measured; why {first.task} could not: {first.why}")


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

    Writes the whole matrix as JSON, and beside it a table for pandas (.csv) and a heat map (.png, .svg). The same
    command goes on with an interrupted run.

    Example: lape-fast ablate --model M --neurons out/neurons.safetensors --corpus texts/ --lines 1798-1997
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import NeuronSet
    from lape_fast.report import ablation_heatmap, figure_paths, save_figure
    from lape_fast.study import ablate_to_file, prepare_text

    output = output or neurons.with_suffix(".ablation.json")
    if output.suffix != ".json":
        raise ConfigError(f"The output {output} is a JSON file beside which more is written; name one ending in .json.")
    table, figure = output.with_suffix(".csv"), figure_paths(output)
    if not output.exists():
        for path in (table, *figure):
            refuse_existing(path)
    chosen = NeuronSet.load(neurons)
    opened = open_text(corpus, lines, languages, text_column)
    loaded, tokenizer = load(model, dtype, device)
    text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
    matrix = ablate_to_file(loaded, chosen, text, output)
    # A run that is repeated finds them, unless it was stopped between them.
    if not table.exists():
        matrix.save_csv(table)
    if not all(path.exists() for path in figure):
        alt = "Heat map of what every language loses when each language's neurons are switched off."
        save_figure(ablation_heatmap(matrix), figure[0], alt)
    print_ablation(matrix, as_json)


def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file, such as those in recipes/.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the study; the same command goes on with what is there.")
    ] = None,
    corpus: Annotated[str | None, typer.Option("--corpus", help="Folder of text in the place of the recipe's.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="paper or corrected, in the place of the recipe's.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder of results and report; --output by default.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; make the report again from the results that are there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print what it would run; load no weight.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="With --dry-run: a GPU by name, or its GiB; by default this machine's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods, languages, learning rates and seeds on one base, and write one report.

    Writes results.json, from which everything else is made: summary.json, summary.csv, report.html and figures. A run
    that fails is a row that says so; an interrupted study goes on.

    Example: lape-fast study recipes/small.yaml --corpus texts/ --output out/study
    """
    from lape_fast.files import write_bytes
    from lape_fast.report import report_study, summary_table
    from lape_fast.study import plan_study, read_recipe, run_study

    asked = read_recipe(recipe, preset).with_corpus(corpus)
    if dry_run:
        print_study_plan(recipe, *plan_study(asked, number_or_name(gpu)), as_json)
        return
    folder = report or output
    if folder is None:
        raise ConfigError("study needs --output, the folder that it works in; --dry-run writes nothing.")
    if not report_only:
        if output is None:
            raise ConfigError("study needs --output beside --report, or --report-only.")
        run_study(asked, output)
        if folder != output:
            write_bytes(folder / "results.json", (output / "results.json").read_bytes())
    summary = report_study(folder)
    print_study(summary, summary_table(summary), folder, as_json)
