"""The atlas: whose neurons were found and where, as one self-contained page to look around in."""

from __future__ import annotations

import json
import os
from typing import Any

from lape_fast.files import write_text
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.report.atlas_data import pack_atlas
from lape_fast.report.figures import language_label
from lape_fast.report.page import STYLE, environment, policy_hash, source
from lape_fast.study import AblationMatrix, Alignment

TEMPLATE = "atlas.html.j2"
# In the order in which the page runs them.
SCRIPTS = ("data", "draw", "figures", "table", "views", "app")
STYLES = (STYLE, "atlas.css")

# Of the alignment: title, the measures that are averaged, and the baseline.
CHARTS = (
    ("Cosine", ("cosine",), "cosine_misaligned"),
    ("Linear CKA", ("cka",), "cka_misaligned"),
    ("Retrieval accuracy", ("retrieval_from_target", "retrieval_to_target"), None),
)

# What would end a script element, or a line of JavaScript, inside a JSON string.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render_atlas(
    output: str | os.PathLike,
    neurons: NeuronSet,
    counts: ActivationCounts | None = None,
    *,
    ablation: AblationMatrix | None = None,
    alignment: Alignment | None = None,
    title: str | None = None,
) -> None:
    """Writes the atlas of a neuron set as one HTML file, atomically; it loads nothing, and all text in it is escaped.

    Args:
        output: the file. With 188 languages, 40 layers and 14,336 neurons a layer it stays under 6 MB.
        neurons: of G languages.
        counts: what the neurons were selected from; adds activation probabilities, entropies, tokens and stability.
        ablation: what switching each language's neurons off cost.
        alignment: how alike the states of translations are, layer by layer.
        title: of the page; names the model by default.

    Raises:
        LanguageError, ArchitectureError: the counts do not fit the neurons.
        SelectionError: no language has a neuron.

    Example:
        >>> render_atlas("atlas.html", NeuronSet.load("out/neurons.safetensors"), counts)
    """
    header, blocks = pack_atlas(neurons, counts)
    header["ablation"] = ablation and _ablation(ablation, header["languages"])
    header["alignment"] = alignment and {
        "target": language_label(alignment.target),
        "sentences": alignment.sentences,
        "charts": _alignment(alignment),
    }
    header["title"] = title or f"Language neurons of {neurons.metadata.get('model') or 'a language model'}"
    style = "".join(map(source, STYLES))
    script = "\n".join(source(f"atlas/{name}.js") for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    page = (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=header["title"],
            style=style,
            script=script,
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
            header=_json(header),
            blocks=blocks,
        )
    )
    write_text(output, page)


def _ablation(matrix: AblationMatrix, languages: list[dict[str, Any]]) -> dict[str, Any]:
    """Costs in bits per byte, rows and columns in the order of the atlas."""
    place = {language["code"]: number for number, language in enumerate(languages)}

    def ordered(codes: tuple[str, ...]) -> list[int]:
        return sorted(range(len(codes)), key=lambda number: (place.get(codes[number], len(place)), codes[number]))

    rows, columns = ordered(matrix.ablated), ordered(matrix.evaluated)
    cost = matrix.cost[rows][:, columns]
    return {
        "rows": [matrix.ablated[number] for number in rows],
        "columns": [matrix.evaluated[number] for number in columns],
        "cost": [_rounded(row) for row in cost.tolist()],
    }


def _alignment(alignment: Alignment) -> list[dict[str, Any]]:
    """A chart per measure: over the layers, every stage against the pivot, all languages and misaligned sentences."""
    pivot = language_label(alignment.pivot)
    charts = []
    for title, names, baseline in CHARTS:
        series = []
        for stage in alignment.stages:
            curves = {
                pivot: sum(alignment.to_pivot(name, stage) for name in names) / len(names),
                f"mean of {len(alignment.languages):,} languages": sum(alignment.mean(name, stage) for name in names)
                / len(names),
            }
            if baseline:
                curves["misaligned sentences"] = alignment.mean(baseline, stage)
            series += [
                {"name": f"{stage}: {name}", "group": stage, "style": style, "values": _rounded(curve.tolist())}
                for style, (name, curve) in enumerate(curves.items())
            ]
        charts.append({"title": title, "series": series})
    return charts


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _json(value: Any) -> str:
    # Metadata may hold what the browser's JSON does not know.
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(str.maketrans(ESCAPES))
