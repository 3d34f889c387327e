"""The figures of the study's analyses: alignment, weight change and steering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lape_fast.errors import ShapeError
from lape_fast.report.canvas import (
    HEADING_LIFT,
    INK,
    LONGEST_TITLE,
    PALETTE,
    TITLE_FONT,
    bar_axes,
    colour_bar,
    fitted,
    heading,
    heat_map_axes,
    house_style,
    label_rows,
    plain,
    sized_axes,
    write_cells,
)
from lape_fast.report.figures import language_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lape_fast.study import Alignment, Steering, WeightChange

# What a panel shows: its label, the measure in bold and in thin lines, and the one that is its chance or baseline.
PANELS = (
    ("Cosine of translations", ("cosine",), "cosine_misaligned"),
    ("Linear CKA", ("cka",), "cka_misaligned"),
    ("Retrieval of translations", ("retrieval_from_target", "retrieval_to_target"), None),
)
PANEL = (3.6, 2.6)
GAP = 0.75

# Languages that are named in the figure of what was written.
NAMED = 12


@house_style()
def alignment_curves(alignment: Alignment) -> Figure:
    """Three panels over the layers: cosine, CKA and retrieval of the target against pivot and all, before and after.

    Retrieval is the mean of its two directions.

    Args:
        alignment: of up to four stages, one colour each.

    Raises:
        ShapeError: it has more stages.
    """
    if len(alignment.stages) > len(PALETTE):
        raise ShapeError(
            f"The alignment has {len(alignment.stages)} stages; measure the base and at most {len(PALETTE) - 1} "
            "adapters for a figure."
        )
    from matplotlib.ticker import MaxNLocator

    figure, first = sized_axes(3 * PANEL[0] + 2 * GAP, PANEL[1])
    panels = [first, *(figure.add_axes((0, 0, 1, 1)) for _ in PANELS[1:])]
    width = figure.get_size_inches()[0]
    pivot, layers = language_label(alignment.pivot), range(alignment.layers)
    for number, (panel, (label, names, baseline)) in enumerate(zip(panels, PANELS, strict=True)):
        panel.set_position((number * (PANEL[0] + GAP) / width, 0, PANEL[0] / width, 1))
        for colour, stage in zip(PALETTE, alignment.stages, strict=False):
            curves = {
                f"{pivot}": ("-", 1.8, sum(alignment.to_pivot(name, stage) for name in names) / len(names)),
                f"mean of {len(alignment.languages):,}": (
                    "--",
                    1.2,
                    sum(alignment.mean(name, stage) for name in names) / len(names),
                ),
            }
            if baseline:
                curves["misaligned (mean)"] = (":", 1.2, alignment.mean(baseline, stage))
            for name, (style, thickness, curve) in curves.items():
                text = f"{plain(stage)}: {name}"
                panel.plot(layers, curve.tolist(), color=colour, linestyle=style, linewidth=thickness, label=text)
        if baseline is None:
            panel.axhline(1 / alignment.sentences, color=INK, linestyle=":", linewidth=0.8, label="chance")
        panel.set_ylabel(label)
        panel.set_xlabel("Layer (0: embeddings)")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panel.grid(True)
    # All panels have the lines of the first, and the last their chance.
    _legend_beside(panels[-1], [panels[0], panels[-1]])
    target = language_label(alignment.target)
    title = f"Alignment of {target} on {alignment.sentences:,} parallel sentences"
    first.set_title(plain(title, LONGEST_TITLE), loc="left", fontdict=TITLE_FONT)
    return fitted(figure, *panels)


@house_style()
def weight_change_map(change: WeightChange) -> Figure:
    """How far each layer's projections moved, relative to what they were: a heat map, a row per adapter and projection.

    Args:
        change: of any number of adapters; a place that an adapter does not change is an empty cell.

    Raises:
        ShapeError: it holds no change.
    """
    import numpy
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    if not change.changes:
        raise ShapeError("The weight change holds no projection, so there is nothing to draw; measure an adapter.")
    rows = list(dict.fromkeys((each.adapter, each.projection) for each in change.changes))
    layers = 1 + max(each.layer for each in change.changes)
    values = numpy.ma.masked_all((len(rows), layers))
    for each in change.changes:
        values[rows.index((each.adapter, each.projection)), each.layer] = each.relative_norm
    figure, axes = heat_map_axes(len(rows), layers)
    image = axes.imshow(
        values,
        cmap=colormaps["viridis_r"].with_extremes(bad="none"),
        vmin=0,
        vmax=values.max() or 1.0,
        aspect="auto",
        interpolation="none",
    )
    write_cells(
        image,
        [
            ["" if hidden else f"{value:.2g}" for value, hidden in zip(*row, strict=True)]
            for row in zip(values.filled(0).tolist(), numpy.ma.getmaskarray(values).tolist(), strict=True)
        ],
    )
    label_rows(axes, [f"{plain(adapter)}: {projection}" for adapter, projection in rows])
    axes.set_xticks(range(0, layers, -(-layers // 16)))
    axes.set_xlabel("Layer (0 reads the embeddings)")
    colour_bar(image, MaxNLocator(5))
    heading(axes, "Change of the tuned weights", "Norm of the change over the norm of the same weights before")
    return fitted(figure, axes)


@house_style()
def steered_languages(steering: Steering) -> Figure:
    """The languages in which a model wrote without and with steering: two bars per language, the one aimed at first.

    Args:
        steering: what ``force_language`` returned; all languages behind the twelfth are drawn as one.
    """
    shares = steering.shares()
    named = list(shares)[:NAMED]
    rest = [shares[code] for code in list(shares)[NAMED:]]
    rows = [(language_label(code) if code != "und" else "undetermined", shares[code]) for code in named]
    if rest:
        rows.append((f"{len(rest)} others", tuple(map(sum, zip(*rest, strict=True)))))
    figure, axes = bar_axes(len(rows), scale=1.4)
    stages = {"without": steering.plain_accuracy, "with": steering.steered_accuracy}
    for number, (name, accuracy) in enumerate(stages.items()):
        axes.barh(
            [row + (number - 0.5) * 0.4 for row in range(len(rows))],
            [100 * share[number] for _, share in rows],
            0.4,
            color=PALETTE[number],
            label=f"{name} steering: {accuracy:.0%} in {language_label(steering.language)}",
        )
    label_rows(axes, [name for name, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"Share of {len(steering.prompts):,} texts (%)")
    height = axes.bbox.height / figure.dpi
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1 + HEADING_LIFT / height),
        alignment="left",
        title="The languages that the model wrote",
        title_fontproperties=TITLE_FONT,
    )
    return fitted(figure, axes)


def _legend_beside(axes: Axes, sources: list[Axes]) -> None:
    handles = {label: line for each in sources for line, label in zip(*each.get_legend_handles_labels(), strict=True)}
    axes.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.04, 1), fontsize=8)
