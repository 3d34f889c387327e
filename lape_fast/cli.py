"""The command line: thin commands over the Python functions of the same names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lape_fast import __version__
from lape_fast.errors import ConfigError, LapeFastError
from lape_fast.terminal import new_table, print_facts, print_json, print_neurons, print_scores

# Commands import what they use: torch and transformers take seconds, and `--help` should not.

app = typer.Typer(
    help="Find the feed-forward neurons of a language in a language model, and tune only those.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the values of a YAML file the defaults of a command; flags still win."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} cannot be read ({error}); give a YAML file of options.") from error
    known = {parameter.name: parameter for parameter in context.command.params}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"The configuration {path} must be a mapping such as `top_rate: 0.05`.")
    values = {name.replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"The configuration {path} sets {', '.join(unknown)}, which `{context.info_name}` does not know; its "
            f"options are {', '.join(sorted(known))}."
        )
    context.default_map = {**(context.default_map or {}), **values}
    return path


Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a causal language model.")]
CorpusSpec = Annotated[
    str,
    typer.Option(
        "--corpus", help="Folder of text files named by language code, a file, a hub id, or `cldr` (built in)."
    ),
]
Lines = Annotated[str | None, typer.Option("--lines", help="Use only these lines of each file, as in 1-1597.")]
Languages = Annotated[
    str | None, typer.Option("--languages", help="Comma-separated language codes; all of the corpus by default.")
]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="Column of .jsonl, .parquet and hub text.")]
ContextLength = Annotated[int, typer.Option("--context-length", min=2, help="Tokens per row.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens per forward pass.")]
TokenBudget = Annotated[
    int | None, typer.Option("--tokens-per-language", min=1, help="Stop a language after this many tokens.")
]
TopRate = Annotated[float, typer.Option("--top-rate", help="Share of all neurons to select, lowest entropy first.")]
FilterRate = Annotated[
    float, typer.Option("--filter-rate", help="Quantile of activation probability a neuron must exceed in a language.")
]
ActivationBar = Annotated[
    float, typer.Option("--activation-bar", help="Quantile above which a neuron belongs to a language.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...; a GPU if there is one by default.")]
Output = Annotated[Path, typer.Option("--output", help="Where to write; nothing that exists is overwritten.")]
Neurons = Annotated[Path, typer.Option("--neurons", help="Neuron file, as written by identify or select.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="Adapter folder, as written by tune.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_read_config, is_eager=True, help="YAML file of options; flags override it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # What `main` reads itself, and what its callback has done.
    del debug, version


@app.command()
def identify(
    model: Model,
    output: Output,
    corpus: CorpusSpec = "cldr",
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

    opened = _open_corpus(corpus, lines, languages, text_column)
    loaded, tokenizer = _load(model, dtype, device)
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
    _note_ignored(opened)
    print_neurons(neurons, as_json, dict(zip(counts.languages, counts.tokens.tolist(), strict=True)))


@app.command()
def count(
    model: Model,
    output: Output,
    corpus: CorpusSpec = "cldr",
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

    opened = _open_corpus(corpus, lines, languages, text_column)
    loaded, tokenizer = _load(model, dtype, device)
    counts = count_to_file(
        loaded,
        tokenizer,
        opened,
        output,
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
    )
    _note_ignored(opened)
    print_facts(output, counts.summary(), as_json)


@app.command()
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
        loaded = loaded.restrict(_split(languages))
    neurons = select_neurons(loaded, top_rate, filter_rate, activation_bar)
    neurons.save(output)
    print_neurons(neurons, as_json)


@app.command()
def tune(
    model: Model,
    neurons: Neurons,
    language: Annotated[str, typer.Option("--language", help="Whose neurons to tune, on its own text.")],
    output: Output,
    corpus: CorpusSpec = "cldr",
    lines: Lines = None,
    validation_lines: Annotated[
        str | None, typer.Option("--validation-lines", help="Lines on which the best values are chosen.")
    ] = None,
    text_column: TextColumn = None,
    method: Annotated[
        str, typer.Option("--method", help="subnetwork, or random: as many neurons, none of them the language's.")
    ] = "subnetwork",
    policy: Annotated[
        str, typer.Option("--policy", help="save, or recompute: slower, with less memory for backward.")
    ] = "save",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the text.")] = 1.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0, help="Peak learning rate.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Of AdamW.")] = 0.01,
    context_length: ContextLength = 512,
    rows_per_step: Annotated[int, typer.Option("--rows-per-step", min=1, help="Rows per optimizer step.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the row order, and of the random neurons.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Tune one language's neurons and write an adapter folder. The same command resumes an interrupted run.

    Example: lape-fast tune --model meta-llama/Llama-3.1-8B --corpus texts/ --neurons out/neurons.safetensors
    --language mlt_Latn --output adapters/mlt_Latn
    """
    from lape_fast.text import canonical
    from lape_fast.tune import SubnetworkConfig, TrainingSettings, tune_language

    choice = SubnetworkConfig(neurons, language, method, policy, seed)
    opened = _open_corpus(corpus, lines, language, text_column)
    validation = _open_corpus(corpus, validation_lines, language, text_column) if validation_lines else None
    settings = TrainingSettings(
        context_length=context_length,
        rows_per_step=rows_per_step,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    loaded, tokenizer = _load(model, dtype, device)
    subnetwork, report = tune_language(loaded, tokenizer, opened, choice, output, settings, validation)
    facts = {
        "adapter": str(output),
        "language": canonical(language),
        "neurons": sum(len(chosen) for chosen in subnetwork.neurons().values()),
        "trainable": subnetwork.trainable(),
        **{name: value for name, value in report.items() if name != "log"},
    }
    print_facts(output, facts, as_json)


@app.command()
def evaluate(
    model: Model,
    corpus: CorpusSpec = "cldr",
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

    opened = _open_corpus(corpus, lines, languages, text_column)
    loaded, tokenizer = _load(model, dtype, device)
    text = prepare_text(loaded, tokenizer, opened, context_length=context_length, batch_tokens=batch_tokens)
    columns = {"base": score(loaded, text, "evaluating the base")}
    if adapter is not None:
        load_adapter(loaded, adapter)
        columns["adapter"] = score(loaded, text, "evaluating the adapter")
    print_scores(columns, as_json)


@app.command()
def ablate(
    model: Model,
    neurons: Neurons,
    corpus: CorpusSpec = "cldr",
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
    opened = _open_corpus(corpus, lines, languages, text_column)
    loaded, tokenizer = _load(model, dtype, device)
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


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", help="Adapter folder, as written by tune.")],
    output: Output,
    dtype: Dtype = "auto",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the model with an adapter's values in its weights, as a plain Hugging Face model.

    Example: lape-fast merge --model meta-llama/Llama-3.1-8B --adapter adapters/mlt_Latn --output llama-mlt
    """
    from lape_fast.files import atomic_folder, refuse_existing
    from lape_fast.tune import load_adapter

    refuse_existing(output)
    loaded, tokenizer = _load(model, dtype, "cpu")
    load_adapter(loaded, adapter).detach(keep=True)
    with atomic_folder(output) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print_facts(output, {"model": str(output), "base": model, "adapter": str(adapter)}, as_json)


@app.command()
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
        codes = [canonical_or_same(code) for code in _split(languages)]
        neurons = import_masks(source, codes, neurons_per_layer)
        neurons.save(output)
    print_neurons(neurons, as_json)


@app.command()
def info(
    file: Annotated[Path | None, typer.Argument(help="A counts or neuron file, or an adapter folder.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a file holds; without a file, what this installation can do.

    Example: lape-fast info out/neurons.safetensors
    """
    from lape_fast.information import describe_file, describe_installation

    facts = describe_file(file) if file else describe_installation()
    print_facts(file or "lape_fast", facts, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for everything the demo makes.")] = Path("lape-demo"),
    language: Annotated[str, typer.Option("--language", help="Which of the twelve targets to tune.")] = "mlt_Latn",
    as_json: Json = False,
) -> None:
    """Train a small model on built-in text, find its language neurons, tune one language, and write a report.

    Takes under 8 minutes on 2 cores, and needs no network and no GPU.

    Example: lape-fast demo
    """
    from lape_fast.demo import run_demo

    summary = run_demo(output, language, quiet=as_json)
    if as_json:
        print_json(summary)


def main() -> None:
    """Runs the command line; an error is one sentence on standard error, a traceback only with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Taken out here so that it may stand anywhere on the line.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="lape-fast")
    except (LapeFastError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)


def _open_corpus(spec: str, lines: str | None, languages: str | None, text_column: str | None):
    from lape_fast.text import open_corpus

    return open_corpus(spec, lines=lines, languages=_split(languages), text_column=text_column)


def _load(model: str, dtype: str, device: str | None):
    from lape_fast.models import load_model

    return load_model(model, dtype=dtype, device=device)


def _split(languages: str | None) -> list[str] | None:
    return [language.strip() for language in languages.split(",") if language.strip()] if languages else None


def _note_ignored(corpus) -> None:
    if corpus.ignored:
        names = ", ".join(corpus.ignored[:6]) + (" ..." if len(corpus.ignored) > 6 else "")
        Console(stderr=True).print(f"Left out, not named by a language code: {names}", highlight=False, markup=False)
