"""Commands that show: what a file holds, and everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import Json
from lape_fast.terminal import print_facts, print_json, print_neuron_table


def info(
    file: Annotated[Path | None, typer.Argument(help="A counts or neuron file, or an adapter folder.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a file holds; without a file, what this installation can do.

    Example: lape-fast info out/neurons.safetensors
    """
    from lape_fast.information import describe_file, describe_installation

    facts = describe_file(file) if file else describe_installation()
    if facts.get("kind") == "neurons" and not as_json:
        print_facts(file, facts["metadata"], as_json)
        print_neuron_table(facts)
    else:
        print_facts(file or "lape_fast", facts, as_json)


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
