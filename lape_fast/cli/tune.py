"""Commands that train neurons."""

from __future__ import annotations

import functools
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
    Output,
    Quantise,
    TextColumn,
    load,
    note,
    number_or_name,
    open_text,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_facts, print_plan

# The methods whose memory can be planned.
PLANNED = ("subnetwork", "random", "random-per-layer")


def tune(
    model: Model,
    language: Annotated[str, typer.Option("--language", help="Which language to tune, on its own text.")],
    neurons: Annotated[
        Path | None,
        typer.Option("--neurons", help="Neuron file, for the methods subnetwork, random, random-per-layer and masked."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Adapter folder to write; nothing that exists is overwritten.")
    ] = None,
    corpus: CorpusSpec = DEFAULT_CORPUS,
    lines: Lines = None,
    validation_lines: Annotated[
        str | None, typer.Option("--validation-lines", help="Lines on which the best values are chosen.")
    ] = None,
    text_column: TextColumn = None,
    others: Annotated[
        str | None,
        typer.Option(
            "--others",
            help="Comma-separated languages to measure beside it on the validation lines while it is tuned.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="subnetwork; as controls random or random-per-layer (as many neurons, none of them the language's) "
            "and masked (dense gradients times a mask); ffn, full; lora and ia3, with options as in "
            "lora:rank=32,alpha=64,dropout=0.1,targets=gate+up+down or ia3:targets=down.",
        ),
    ] = "subnetwork",
    policy: Annotated[
        str,
        typer.Option(
            "--policy",
            help="What is kept for backward, from fast to lean: save, recompute, checkpoint; auto is the fastest that "
            "fits.",
        ),
    ] = "auto",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps; overrides --epochs.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the text.")] = 1.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0.0, help="Peak learning rate.")] = 1e-4,
    schedule: Annotated[
        str, typer.Option("--schedule", help="How the learning rate falls: cosine, linear, constant, ...")
    ] = "cosine",
    warmup: Annotated[
        float, typer.Option("--warmup", min=0.0, max=1.0, help="Share of the steps in which it rises.")
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Of AdamW.")] = 0.01,
    context_length: ContextLength = 512,
    rows_per_step: Annotated[
        int, typer.Option("--rows-per-step", min=1, help="Rows per optimizer step, over all processes.")
    ] = 8,
    rows_per_pass: Annotated[
        int | None,
        typer.Option("--rows-per-pass", min=1, help="Rows that a device computes at once; gradients add up to a step."),
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", min=1, help="Steps between looks at the validation lines.")
    ] = 50,
    patience: Annotated[
        int | None, typer.Option("--patience", min=1, help="Stop after this many of them without a better one.")
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", min=1, help="Steps between checkpoints, without validation lines.")
    ] = 200,
    report_to: Annotated[
        list[str], typer.Option("--report-to", help="tensorboard, wandb, trackio, ...; repeatable.")
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", help="Of the row order, and of the random neurons.")] = 0,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the memory that training would take, and load no weight.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="With --dry-run: a GPU by name, or its GiB; by default this machine's."),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Tune one language's neurons, or all weights or an adapter of PEFT in comparison, and write an adapter folder.

    The folder holds the trained values, the facts as training.json, the records of the training as dynamics.jsonl and
    training-dynamics.png and .svg, and all of it to look at as report.html. The same command resumes an interrupted
    run. Under torchrun each GPU computes its share of the rows of every step.

    Example: lape-fast tune --model meta-llama/Llama-3.1-8B --corpus texts/ --neurons out/neurons.safetensors
    --language mlt_Latn --output adapters/mlt_Latn

    In comparison: lape-fast tune --model meta-llama/Llama-3.1-8B --corpus texts/ --method lora:rank=32,alpha=64
    --language mlt_Latn --output adapters/mlt_Latn-lora
    """
    from lape_fast.identify import joined_world
    from lape_fast.report import report_tuning
    from lape_fast.text import canonical
    from lape_fast.tune import TrainingSettings, TuningConfig, plan, refuse_tuned, tune_language

    choice = TuningConfig(method=method, language=language, neurons=neurons, policy=policy, seed=seed)
    if dry_run:
        if choice.method.name not in PLANNED:
            raise ConfigError(
                f"--dry-run plans the memory of {', '.join(PLANNED)} only, not of {method}; leave --dry-run out."
            )
        predicted = plan(
            model,
            neurons,
            language=language,
            rows_per_step=rows_per_step,
            rows_per_pass=rows_per_pass,
            context_length=context_length,
            policy=policy,
            gpu=number_or_name(gpu),
            quantise=quantise,
            dtype=dtype,
        )
        print_plan(predicted, as_json)
        return
    if output is None:
        raise ConfigError("tune needs --output, the folder of the adapter that it writes; --dry-run writes none.")
    # Before a large model is loaded for nothing.
    refuse_tuned(output)
    if others and not validation_lines:
        raise ConfigError(
            f"--others {others} is measured on the validation lines; name them, as in --validation-lines 1598-1797."
        )
    opened = open_text(corpus, lines, language, text_column)
    validation = open_text(corpus, validation_lines, language, text_column) if validation_lines else None
    settings = TrainingSettings(
        context_length=context_length,
        rows_per_step=rows_per_step,
        rows_per_pass=rows_per_pass,
        steps=steps,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        save_every=save_every,
        evaluate_every=evaluate_every,
        patience=patience,
        report_to=tuple(report_to),
    )
    with joined_world() as world:
        loaded, tokenizer = load(model, dtype, device or world.device, quantise=quantise)
        measure = None
        if others:
            measured = open_text(corpus, validation_lines, f"{language},{others}", text_column)
            measure = _bits_per_byte(loaded, tokenizer, measured, context_length)
        origin = {
            "Model": model,
            "Quantised as": quantise,
            "Neuron file": neurons,
            "Corpus": corpus,
            "Lines": lines,
            "Validation lines": validation_lines,
        }
        present = functools.partial(report_tuning, language=choice.language, origin=origin)
        _, report = tune_language(
            loaded, tokenizer, opened, choice, output, settings, validation, measure=measure, present=present
        )
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
    quantise: Quantise = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Write the model with an adapter's values in its weights, as a plain Hugging Face model.

    An adapter that was tuned on a quantised base needs the same --quantise; the whole base is then written in 16 bits.

    Example: lape-fast merge --model meta-llama/Llama-3.1-8B --adapter adapters/mlt_Latn --output llama-mlt
    """
    from lape_fast.files import atomic_folder, refuse_existing
    from lape_fast.tune import merge_adapter

    refuse_existing(output)
    loaded, tokenizer = load(model, dtype, "cpu", quantise=quantise)
    merged = merge_adapter(loaded, adapter)
    with atomic_folder(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    facts = {"model": str(output), "base": model, "adapter": str(adapter), "dtype": str(merged.dtype)[6:]}
    if quantise:
        note(f"The base was {quantise}; what was written is the dequantised model in {facts['dtype']}.")
    print_facts(output, facts, as_json)


def _bits_per_byte(model, tokenizer, corpus, context_length: int):
    """Measures the bits per byte of every language of a corpus."""
    from lape_fast.study import bits_per_byte, prepare_text

    return functools.partial(bits_per_byte, text=prepare_text(model, tokenizer, corpus, context_length=context_length))
