"""The command that gives neurons away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lape_fast.cli.options import Config, Json
from lape_fast.terminal import print_facts


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder to write; nothing that exists is overwritten.")],
    counts: Annotated[Path, typer.Option("--counts", help="Counts file, as written by count or identify.")],
    neurons: Annotated[
        list[Path], typer.Option("--neurons", help="Neuron file selected from these counts; may be repeated.")
    ],
    ablation: Annotated[
        list[Path] | None, typer.Option("--ablation", help="JSON file of ablate for one of them; may be repeated.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Of the release, as the hub names it, such as apache-2.0.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Lay out counts, neurons and a model card in a folder, ready for `hf upload OWNER/NAME FOLDER`.

    Example: lape-fast publish release --counts out/counts.safetensors --neurons out/neurons.safetensors
    --ablation out/neurons.ablation.json --license apache-2.0
    """
    from lape_fast.identify import publish_release

    index = publish_release(folder, counts, neurons, ablation or [], license)
    facts = {
        "model": index["model"].get("model", "not named"),
        "languages": len(index["tokens"]),
        "sets": [entry["name"] for entry in index["sets"]],
        "license": index["license"] or "not named",
        "to upload": f"hf upload OWNER/NAME {folder}",
    }
    print_facts(folder, index if as_json else facts, as_json)
