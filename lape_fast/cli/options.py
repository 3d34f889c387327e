"""The options that commands share, and what turns their values into corpora and models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lape_fast.cli.configuration import read_options
from lape_fast.errors import ConfigError

# Options that say how a command is started and what it prints, not what it does.
NOT_IN_CONFIG = {"config", "json", "help"}


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the values of a YAML file the defaults of a command; flags still win."""
    if path is None:
        return None
    values = read_options(path)
    known = {parameter.opts[0].lstrip("-"): parameter for parameter in context.command.params}
    known = {name: parameter for name, parameter in known.items() if name not in NOT_IN_CONFIG}
    unknown = sorted(name for name in values if name.replace("_", "-") not in known)
    if unknown:
        raise ConfigError(
            f"The configuration {path} sets {', '.join(unknown)}, which `{context.info_name}` does not know; its "
            f"options are {', '.join(sorted(known))}."
        )
    defaults = {}
    for name, value in values.items():
        option = known[name.replace("_", "-")]
        if isinstance(value, list) and not option.multiple:
            raise ConfigError(
                f"The configuration {path} gives {name} a list, but it takes one value; write it as the flag would be, "
                "several codes or tasks with commas between them."
            )
        # One value of an option that may be repeated need not be written as a list.
        defaults[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Model = Annotated[str, typer.Option("--model", help="Folder or hub id of a causal language model.")]
DEFAULT_CORPUS = ["cldr"]
CorpusSpec = Annotated[
    list[str],
    typer.Option(
        "--corpus",
        help="Folder of text files named by language code, a file, a hub id, a name from `lape-fast corpora`, or "
        "`cldr` (built in); may be repeated: the text of a language is that of each in turn.",
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
ShardsPerLanguage = Annotated[
    int, typer.Option("--shards-per-language", min=1, help="Parts of a language that different processes may count.")
]
ShuffleSeed = Annotated[
    int | None, typer.Option("--seed", help="Shuffle the documents; without, the order of the corpus.")
]
UntilStable = Annotated[
    float | None,
    typer.Option(
        "--until-stable",
        help="Stop a language once the neurons of its two halves agree to this Jaccard index, such as 0.95; off by "
        "default.",
    ),
]
SkipBadFiles = Annotated[
    bool, typer.Option("--skip-bad-files", help="Go on behind a damaged file; the report names it.")
]
CheckpointMinutes = Annotated[
    float, typer.Option("--checkpoint-minutes", min=0.0, help="Save the run this often, to resume it from there.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes that read and tokenise ahead (default: a few).")
]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Under torchrun: share one model among all devices (FSDP2).")]
RuleText = Annotated[
    str, typer.Option("--rule", help="How neurons are selected, and with --until-stable judged; see `select --help`.")
]
DEFAULT_RULES = ["lape"]
RuleTexts = Annotated[
    list[str],
    typer.Option("--rule", help="How to select: lape, paper, tang, percentile or budget, with settings; repeatable."),
]
MinTokens = Annotated[
    int, typer.Option("--min-tokens", min=0, help="Leave languages with fewer tokens out of the selection.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu, ...; a GPU if there is one by default.")]
Quantise = Annotated[
    str | None,
    typer.Option(
        "--quantise",
        help="Load the projections as nf4 or int8 (bitsandbytes) or torchao-int8, to save memory, or as fp8, to save "
        "time on Hopper and later; off by default.",
    ),
]
Output = Annotated[Path, typer.Option("--output", help="Where to write; nothing that exists is overwritten.")]
Neurons = Annotated[Path, typer.Option("--neurons", help="Neuron file, as written by identify or select.")]
Adapters = Annotated[
    list[Path], typer.Option("--adapter", help="Adapter folder of any method, as written by tune; repeatable.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Comma-separated tasks of lm-evaluation-harness, by its names or by suite: belebele, sib200, global_mmlu, "
        "arc, hellaswag, flores (in each of --languages).",
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option("--task-folder", help="Folder with more tasks in the harness's YAML; Python that they name is run."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only so many documents of each task.")]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Solved examples in a task's prompt (default: the task's).")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of tasks per forward pass.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", callback=_read_config, is_eager=True, help="YAML file of options; flags override it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def open_text(specs: list[str], lines: str | None, languages: str | None, text_column: str | None):
    """The corpus that a command was given."""
    from lape_fast.text import open_corpus

    return open_corpus(specs, lines=lines, languages=split_codes(languages), text_column=text_column)


def load(model: str, dtype: str, device: str | None, *, quantise: str | None = None, sharded: bool = False):
    """The model and the tokenizer that a command was given."""
    from lape_fast.models import load_model, load_sharded_model

    if not sharded:
        return load_model(model, dtype=dtype, device=device, quantise=quantise)
    if quantise is not None:
        raise ConfigError(
            f"A model shared among processes (--fsdp) cannot be quantised as {quantise}; use one or the other."
        )
    return load_sharded_model(model, dtype=dtype, device=device)


def number_or_name(gpu: str | None) -> float | str | None:
    """A GPU as it was given: its GiB, or its name."""
    try:
        return None if gpu is None else float(gpu)
    except ValueError:
        return gpu


def split_codes(languages: str | None) -> list[str] | None:
    """Codes that were given with commas between them; None where none were."""
    return [language.strip() for language in languages.split(",") if language.strip()] if languages else None


def note_ignored(corpus) -> None:
    """Says on standard error which files of a folder were not read, and why."""
    # A misspelt code must not go unnoticed among licences and tables.
    misnamed = [file for file in corpus.ignored if file.endswith("is no language code)")]
    ignored = misnamed or corpus.ignored
    if ignored:
        more = f" and {len(ignored) - 6} more" if len(ignored) > 6 else ""
        note(f"Ignored: {', '.join(ignored[:6])}{more}.")


def note(sentence: str) -> None:
    """Says something on standard error, where it does not disturb what a machine reads."""
    Console(stderr=True).print(sentence, highlight=False, markup=False, soft_wrap=True)


def note_left_out(tokens: dict[str, int]) -> None:
    """Says which languages had too few tokens to be selected for."""
    if tokens:
        note(f"Left out, too few tokens: {', '.join(f'{code} ({total:,})' for code, total in tokens.items())}.")


def note_counting(counts, finished: bool) -> None:
    """Says on standard error how fast the counting went, unless it was done already, and what was skipped."""
    speed = counts.metadata["speed"]
    if finished:
        note("The counts were complete already; nothing was counted.")
    elif speed["tokens_per_s"]:
        waited = f"the model waited for text {speed['waited_share']:.1%} of the time"
        note(f"{speed['tokens_per_s']:,.0f} tokens/s; {waited}.")
    for language, found in counts.metadata.get("non_finite", {}).items():
        note(f"{language}: gates were NaN or infinite on {found['tokens']:,} tokens (first layers: {found['layers']}).")
    for skipped in counts.metadata["skipped_files"]:
        note(f"Skipped: {skipped}")
