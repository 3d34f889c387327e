"""The command line: thin commands over the Python functions of the same names."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from lape_fast import __version__
from lape_fast.cli import analyses, atlas, identify, publish, study, tour, tune
from lape_fast.errors import LapeFastError, StoppedError

# Commands import what they use: torch and transformers take seconds, and `--help` should not.

# What torchao and bitsandbytes say when they are imported is nothing that a user could act on.
TALKATIVE = ("torch.utils._pytree", "bitsandbytes", "torchao")

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130


class _Commands(TyperGroup):
    def invoke(self, context: typer.Context):
        try:
            return super().invoke(context)
        # Typer itself ends without a word.
        except KeyboardInterrupt as error:
            raise StoppedError("Interrupted; the same command goes on from what is saved.") from error


def _paragraphs(docstring: str) -> str:
    """A docstring with one line a paragraph, for typer to break at the terminal's width and not at ours."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


app = typer.Typer(
    cls=_Commands,
    help="Find the feed-forward neurons of a language in a language model, and tune only those.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# In the order of `--help`.
COMMANDS = (
    identify.identify,
    identify.count,
    identify.merge_counts,
    identify.select,
    tune.tune,
    study.evaluate,
    study.ablate,
    analyses.align,
    analyses.weights,
    analyses.steer,
    study.study,
    tune.merge,
    publish.publish,
    atlas.atlas,
    identify.convert,
    tour.corpora,
    tour.info,
    tour.doctor,
    tour.demo,
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"), help=_paragraphs(command.__doc__))(command)


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


def main() -> None:
    """Runs the command line; an error is one sentence on standard error, a traceback only with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Taken out here so that it may stand anywhere on the line.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="lape-fast")
    except (LapeFastError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        stopped = isinstance(error, StoppedError)
        prefix = "" if stopped else "[red]Error:[/red] "
        Console(stderr=True, soft_wrap=True).print(f"{prefix}{escape(str(error))}", highlight=False)
        sys.exit(INTERRUPTED if stopped else 1)
    # One that comes before the command runs.
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        sys.exit(INTERRUPTED)
