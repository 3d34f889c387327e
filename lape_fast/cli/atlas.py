"""The command that turns neurons into a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import Json
from lape_fast.terminal import print_facts


def atlas(
    neurons: Annotated[Path, typer.Argument(help="Neuron file, as written by identify or select.")],
    counts: Annotated[
        Path | None,
        typer.Argument(help="The counts they were selected from: adds probabilities, entropies, tokens, stability."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="HTML file to write; nothing that exists is overwritten.")
    ] = Path("atlas.html"),
    ablation: Annotated[Path | None, typer.Option("--ablation", help="JSON file of ablate.")] = None,
    alignment: Annotated[Path | None, typer.Option("--alignment", help="JSON file of align.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page; names the model by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write the atlas: one page to look around in languages, layers and neurons, which loads nothing from anywhere.

    Example: lape-fast atlas out/neurons.safetensors out/counts.safetensors --ablation out/neurons.ablation.json
    --output atlas.html
    """
    from lape_fast.files import refuse_existing
    from lape_fast.identify import ActivationCounts, NeuronSet
    from lape_fast.report import render_atlas
    from lape_fast.study import AblationMatrix, Alignment

    refuse_existing(output)
    chosen = NeuronSet.load(neurons)
    render_atlas(
        output,
        chosen,
        ActivationCounts.load(counts) if counts else None,
        ablation=AblationMatrix.load(ablation) if ablation else None,
        alignment=Alignment.load(alignment) if alignment else None,
        title=title,
    )
    facts = {
        "atlas": str(output),
        "languages": len(chosen.languages),
        "neurons with a language": chosen.union_count(),
        "size": f"{output.stat().st_size / 1e6:.1f} MB",
    }
    print_facts(output, facts, as_json)
