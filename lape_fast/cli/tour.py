"""Commands that show: what a file holds, and everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lape_fast.cli.options import Dtype, Json, note, number_or_name
from lape_fast.terminal import print_counts, print_facts, print_json, print_neuron_table, print_plan


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
        print_facts(file, {"metadata": facts["metadata"]}, as_json)
        print_neuron_table(facts)
    elif facts.get("kind") == "counts" and not as_json:
        # What there is of each language stands in the table.
        origin = {name: value for name, value in facts["metadata"].items() if name not in ("stability", "shards")}
        print_facts(file, {"metadata": origin}, as_json)
        print_counts(file, facts, as_json)
    else:
        print_facts(file or "lape_fast", facts, as_json)


def doctor(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    dtype: Dtype = "auto",
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for a GPU by name, or for so many GiB; this machine's by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a model before it is loaded: its layout, its neurons, its files, and the memory that tuning would take.

    The plan is of 1 % of the neurons and one row of up to 4,096 tokens.

    Example: lape-fast doctor meta-llama/Llama-3.1-8B --gpu 24
    """
    from lape_fast.doctor import examine_model

    found, plan = examine_model(model, dtype=dtype, gpu=number_or_name(gpu))
    if as_json:
        print_json({**found, "plan": plan and plan.to_dict()})
    else:
        print_facts(model, {name: value for name, value in found.items() if name != "problems"}, as_json)
        if plan:
            print_plan(plan, as_json)
        for problem in found["problems"]:
            note(problem)
    if found["problems"]:
        raise typer.Exit(1)


def corpora(as_json: Json = False) -> None:
    """List the corpora on the Hugging Face hub that `--corpus` takes by a short name.

    Any other data set with one configuration a language can be named by its hub id, with `--text-column`.

    Example: lape-fast corpora
    """
    from lape_fast.text.corpora import CORPORA

    rows = [row.describe() for row in CORPORA]
    if as_json:
        print_json(rows)
        return
    shown = ("name", "hub_id", "licence", "gated")
    table = Table(*(column.replace("_", " ") for column in shown))
    for row in rows:
        table.add_row(*(str(row[column]) for column in shown[:-1]), "yes" if row["gated"] else "no")
    console = Console()
    console.print(table)
    for row in rows:
        console.print(f"{row['name']}: {row['note']}", highlight=False)


def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for everything the demo makes.")] = Path("lape-demo"),
    language: Annotated[str, typer.Option("--language", help="Which of the twelve targets to tune.")] = "mlt_Latn",
    as_json: Json = False,
) -> None:
    """Train a small model on built-in text, find its language neurons, tune one language, and write a report.

    Takes about 8 minutes on 2 cores, and needs no network and no GPU.

    Example: lape-fast demo
    """
    from lape_fast.demo import run_demo

    summary = run_demo(output, language, quiet=as_json)
    if as_json:
        print_json(summary)
