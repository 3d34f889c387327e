"""Commands that look into what neurons and adapters do: alignment, weight change and steering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    Adapters,
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
    Quantise,
    TextColumn,
    load,
    note,
    open_text,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_alignment, print_steering, print_weight_change

JsonOutput = Annotated[
    Path,
    typer.Option("--output", help="JSON file, beside which the figure is written as .png and .svg; none may exist."),
]


def align(
    model: Model,
    corpus: CorpusSpec,
    target: Annotated[str, typer.Option("--target", help="Language to compare with all others.")],
    pivot: Annotated[str, typer.Option("--pivot", help="The one among them that is shown by itself.")] = "eng_Latn",
    adapter: Adapters = [],  # noqa: B006
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    output: JsonOutput = Path("alignment.json"),
    context_length: ContextLength = 512,
    batch_tokens: BatchTokens = 8192,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure how alike the hidden states of translations are, layer by layer; with adapters, before and after each.

    Line N of every file of the corpus must be the same sentence. A language with fewer lines is left out.

    Example: lape-fast align --model meta-llama/Llama-3.1-8B --corpus flores/ --lines 1-500 --target mlt_Latn
    --adapter adapters/mlt_Latn --output out/alignment.json
    """
    from lape_fast.report import alignment_curves, save_figure
    from lape_fast.study import align_languages
    from lape_fast.tune import name_adapters

    figure = _check_output(output)
    adapters = name_adapters(adapter)
    opened = open_text(corpus, lines, f"{languages},{target},{pivot}" if languages else None, text_column)
    loaded, tokenizer = load(model, dtype, device, quantise=quantise)
    options = {"pivot": pivot, "adapters": adapters, "context_length": context_length, "batch_tokens": batch_tokens}
    alignment = align_languages(loaded, tokenizer, opened, target, **options)
    alignment.save(output)
    save_figure(
        alignment_curves(alignment), figure, "Curves over the layers: how alike the states of translations are."
    )
    for language, reason in alignment.left_out.items():
        note(f"Left out: {language}: {reason}")
    print_alignment(alignment, as_json)


def weights(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one base, of any method.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The base: a folder or a hub id in the local cache; by default the one that the adapters name.",
        ),
    ] = None,
    output: JsonOutput = Path("weights.json"),
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Measure what adapters changed in each layer's FFN, without loading a model.

    Per layer and projection: norm, distribution, direction, effective rank and share of the weights that moved; for
    several adapters, whether they moved the neurons that they share into the same direction.

    Example: lape-fast weights adapters/mlt_Latn adapters/isl_Latn --output out/weights.json
    """
    from lape_fast.report import save_figure, weight_change_map
    from lape_fast.study import measure_weight_change

    figure = _check_output(output)
    change = measure_weight_change(adapters, model)
    change.save(output)
    save_figure(weight_change_map(change), figure, "Heat map of how far the weights moved, by layer and projection.")
    print_weight_change(change, as_json)


def steer(
    model: Model,
    neurons: Neurons,
    language: Annotated[str, typer.Option("--language", help="By whose neurons to steer.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to go on from; repeatable.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Text file of more of them, one a line.")] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="Multiply the activations by this; 0 silences the neurons.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace them by their means on the language's text in the corpus.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of each text.")] = 64,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    languages: Languages = None,
    text_column: TextColumn = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON file, beside which the figure is written as .png and .svg.")
    ] = None,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Let the model write with and without a language's neurons steered, and count the texts in that language.

    What language a text is in is told by a classifier trained on the corpus, which knows its languages alone; running
    text makes a better one than the built-in corpus.

    Example: lape-fast steer --model meta-llama/Llama-3.1-8B --neurons out/neurons.safetensors --language mlt_Latn
    --scale 2 --prompt "The weather today" --corpus texts/
    """
    from lape_fast.identify import NeuronSet
    from lape_fast.report import save_figure, steered_languages
    from lape_fast.study import force_language, mean_activations, train_identifier
    from lape_fast.text import canonical

    if replace == (scale is not None):
        raise ConfigError("Steering needs either --scale, such as 2, or --replace; give one of the two.")
    figure = _check_output(output) if output is not None else None
    chosen = NeuronSet.load(neurons)
    code = canonical(language)
    opened = open_text(corpus, lines, f"{languages},{code}" if languages else None, text_column)
    identify = train_identifier(opened)
    loaded, tokenizer = load(model, dtype, device, quantise=quantise)
    own = chosen[code]
    values = mean_activations(loaded, tokenizer, opened, code, own) if replace else None
    texts = [*prompt, *(_lines_of(prompts) if prompts else [])]
    options = {"scale": scale, "values": values, "max_new_tokens": max_new_tokens}
    steering = force_language(loaded, tokenizer, own, code, texts, identify, **options)
    if output is not None:
        steering.save(output)
        save_figure(steered_languages(steering), figure, "Bars: how many texts are in which language.")
    print_steering(steering, as_json)


def _check_output(output: Path) -> Path:
    """The figure beside a JSON file, after making sure that none of the files is there yet."""
    from lape_fast.files import refuse_existing
    from lape_fast.report import figure_paths

    if output.suffix != ".json":
        raise ConfigError(f"The output {output} is a JSON file beside which a figure is written; end it in .json.")
    figures = figure_paths(output)
    for path in (output, *figures):
        refuse_existing(path)
    return figures[0]


def _lines_of(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prompts {path} are not UTF-8 ({error}); write them again.") from error
