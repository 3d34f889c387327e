"""Commands that find neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import (
    DEFAULT_CORPUS,
    DEFAULT_RULES,
    BatchTokens,
    CheckpointMinutes,
    Config,
    ContextLength,
    CorpusSpec,
    Device,
    Dtype,
    Fsdp,
    Json,
    Languages,
    Lines,
    MinTokens,
    Model,
    Output,
    Quantise,
    RuleText,
    RuleTexts,
    ShardsPerLanguage,
    ShuffleSeed,
    SkipBadFiles,
    TextColumn,
    TokenBudget,
    UntilStable,
    Workers,
    load,
    note,
    note_counting,
    note_ignored,
    note_left_out,
    open_text,
    split_codes,
)
from lape_fast.errors import ConfigError
from lape_fast.terminal import print_counts, print_neurons, print_selections


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
    until_stable: UntilStable = None,
    seed: ShuffleSeed = None,
    shards_per_language: ShardsPerLanguage = 1,
    skip_bad_files: SkipBadFiles = False,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    workers: Workers = None,
    fsdp: Fsdp = False,
    rule: RuleText = "lape",
    min_tokens: MinTokens = 0,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Count how often each neuron fires per language, and select each language's neurons.

    Writes counts.safetensors and neurons.safetensors into the output folder. The same command resumes an interrupted
    run.

    Example: lape-fast identify --model meta-llama/Llama-3.1-8B --corpus texts/ --output out
    """
    from lape_fast.identify import CountingSettings, identify_neurons, joined_world

    opened = open_text(corpus, lines, languages, text_column)
    finished = (output / "counts.safetensors").exists()
    settings = CountingSettings(
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
        shards_per_language=shards_per_language,
        seed=seed,
        until_stable=until_stable,
        rule=rule,
        skip_bad_files=skip_bad_files,
    )
    with joined_world() as world:
        if world.is_main:
            note_ignored(opened)
        loaded, tokenizer = load(model, dtype, device or world.device, quantise=quantise, sharded=fsdp)
        counts, neurons = identify_neurons(
            loaded,
            tokenizer,
            opened,
            output,
            settings,
            min_tokens=min_tokens,
            checkpoint_seconds=60 * checkpoint_minutes,
            workers=workers,
            world=world,
        )
    if world.is_main:
        note_counting(counts, finished)
        tokens = counts.summary()["tokens"]
        note_left_out({code: total for code, total in tokens.items() if code not in neurons.languages})
        print_neurons(neurons, as_json, counts.metadata["stability"])
        note(f"Wrote {output / 'counts.safetensors'} and {output / 'neurons.safetensors'}.")


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
    until_stable: UntilStable = None,
    rule: RuleText = "lape",
    seed: ShuffleSeed = None,
    shards_per_language: ShardsPerLanguage = 1,
    part: Annotated[
        str, typer.Option("--part", help="Count one part, as in 3/16; separate jobs count the others, to be merged.")
    ] = "1/1",
    skip_bad_files: SkipBadFiles = False,
    checkpoint_minutes: CheckpointMinutes = 5.0,
    workers: Workers = None,
    fsdp: Fsdp = False,
    dtype: Dtype = "auto",
    quantise: Quantise = None,
    device: Device = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Count only: write one counts file, to select from as often as you like.

    Example: lape-fast count --model meta-llama/Llama-3.1-8B --corpus texts/ --output counts.safetensors
    """
    from lape_fast.identify import CountingSettings, count_to_file, joined_world

    opened = open_text(corpus, lines, languages, text_column)
    finished = output.exists()
    number, parts = _part(part)
    settings = CountingSettings(
        context_length=context_length,
        batch_tokens=batch_tokens,
        tokens_per_language=tokens_per_language,
        shards_per_language=shards_per_language,
        seed=seed,
        until_stable=until_stable,
        rule=rule,
        skip_bad_files=skip_bad_files,
        part=number,
        parts=parts,
    )
    with joined_world() as world:
        if world.is_main:
            note_ignored(opened)
        loaded, tokenizer = load(model, dtype, device or world.device, quantise=quantise, sharded=fsdp)
        counts = count_to_file(
            loaded,
            tokenizer,
            opened,
            output,
            settings,
            checkpoint_seconds=60 * checkpoint_minutes,
            workers=workers,
            world=world,
        )
    if world.is_main:
        note_counting(counts, finished)
        print_counts(output, counts.summary(), as_json)


def merge_counts(
    counts: Annotated[list[Path], typer.Argument(help="Counts files of one model, on different text.")],
    output: Output,
    as_json: Json = False,
) -> None:
    """Add up the counts of separate jobs, such as the parts of a Slurm array.

    Example: lape-fast merge-counts parts/*.safetensors --output counts.safetensors
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import merge_files, missing_parts

    refuse_existing(output)
    merged = merge_files(counts)
    merged.save(output)
    if missing := missing_parts(merged):
        note(f"Not among them: part {', '.join(missing)}. Some text, or whole languages, may be missing.")
    print_counts(output, merged.summary(), as_json)


def select(
    counts: Annotated[Path, typer.Argument(help="Counts file, as written by count or identify.")],
    output: Annotated[
        Path, typer.Option("--output", help="File; with several rules a folder, with a file named after each rule.")
    ],
    rule: RuleTexts = DEFAULT_RULES,
    languages: Languages = None,
    min_tokens: MinTokens = 0,
    ablation: Annotated[
        list[Path] | None,
        typer.Option("--ablation", help="JSON file of ablate, if this selection was ablated before; may be repeated."),
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Select each language's neurons from counts, in seconds, by one rule or by many at once.

    A rule is NAME or NAME:SETTING,SETTING. The names and their settings:

    lape: the neurons of lowest entropy over languages (top_rate=0.05, filter_rate=0.95, activation_bar=0.95). paper is
    the same, tang has top_rate=0.01. To reproduce published results; languages differ in size, and some may get none.

    budget: as many neurons for every language, those it uses most compared with the mean of the others (neurons=0.01,
    a share or a whole number; floor=0.05, the least probability). To compare languages, or tune one that LAPE leaves
    with few.

    percentile: the neurons a language itself uses most (percentile=0.99), whatever others do.

    Settings of every rule: exclusive (drop neurons of several languages) and layers=16-31 (look at these only).
    Several values, as in top_rate=0.01/0.02/0.05, are several rules.

    Example: lape-fast select out/counts.safetensors --rule lape:top_rate=0.01/0.05 --rule
    budget:neurons=150,floor=0.05,exclusive --output selections
    """
    from lape_fast.files import atomic_folder, refuse_existing
    from lape_fast.identify import ActivationCounts, parse_rules, rule_name, select_many
    from lape_fast.information import ablation_beside, match_ablations

    refuse_existing(output)
    rules = {rule_name(each): each for text in rule for each in parse_rules(text)}
    loaded = ActivationCounts.load(counts)
    if languages:
        loaded = loaded.restrict(split_codes(languages))
    loaded, left_out = loaded.with_tokens(min_tokens)
    note_left_out(left_out)
    selections = dict(zip(rules, select_many(loaded, list(rules.values())), strict=True))
    measured = match_ablations(selections, ablation or [], ablation_beside(output))
    if len(selections) == 1:
        ((name, neurons),) = selections.items()
        neurons.save(output)
        print_neurons(neurons, as_json, ablation=measured.get(name))
        note(f"Wrote {output}.")
        return
    with atomic_folder(output) as folder:
        for name, neurons in selections.items():
            neurons.save(folder / f"{name}.safetensors")
    print_selections(selections, as_json, measured)
    note(f"Wrote {len(selections)} neuron files into {output}.")


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


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise ConfigError(f"The part {text!r} must be written like 3/16: its number from 1, and how many there are.")
    return int(number), int(parts)
