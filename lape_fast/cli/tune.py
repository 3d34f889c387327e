"""Commands that train neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    Config,
    ContextLength,
    CorpusSpec,
    Device,
    Dtype,
    Json,
    Lines,
    Model,
    Neurons,
    Output,
    Quantise,
    TextColumn,
    load,
    open_text,
)
from lape_fast.terminal import print_facts


def tune(
    model: Model,
    neurons: Neurons,
    language: Annotated[str, typer.Option("--language", help="Whose neurons to tune, on its own text.")],
    output: Output,
    corpus: CorpusSpec = DEFAULT_CORPUS,
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
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Tune one language's neurons and write an adapter folder. The same command resumes an interrupted run.

    Under torchrun each GPU computes its share of the rows of every step.

    Example: lape-fast tune --model meta-llama/Llama-3.1-8B --corpus texts/ --neurons out/neurons.safetensors
    --language mlt_Latn --output adapters/mlt_Latn
    """
    from lape_fast.identify import joined_world
    from lape_fast.text import canonical
    from lape_fast.tune import SubnetworkConfig, TrainingSettings, tune_language

    choice = SubnetworkConfig(neurons=neurons, language=language, method=method, policy=policy, seed=seed)
    opened = open_text(corpus, lines, language, text_column)
    validation = open_text(corpus, validation_lines, language, text_column) if validation_lines else None
    settings = TrainingSettings(
        context_length=context_length,
        rows_per_step=rows_per_step,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    with joined_world() as world:
        loaded, tokenizer = load(model, dtype, device or world.device, quantise=quantise)
        _, report = tune_language(loaded, tokenizer, opened, choice, output, settings, validation)
    facts = {
        "adapter": str(output),
        "language": canonical(language),
        **{name: value for name, value in report.items() if name != "log"},
    }
    if world.is_main:
        print_facts(output, facts, as_json)


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
    loaded, tokenizer = load(model, dtype, "cpu")
    load_adapter(loaded, adapter).detach(keep=True)
    with atomic_folder(output) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print_facts(output, {"model": str(output), "base": model, "adapter": str(adapter)}, as_json)
