"""Figures of what was found: each function takes plain data and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lape_fast.errors import LanguageError, ShapeError, TrainingError
from lape_fast.report.canvas import (
    HEADING_LIFT,
    INK,
    LONGEST_TITLE,
    NOTHING,
    PALETTE,
    TITLE_FONT,
    bar_axes,
    colour_bar,
    fitted,
    heading,
    heat_map_axes,
    house_style,
    label_columns,
    label_rows,
    plain,
    sized_axes,
    write_cells,
)
from lape_fast.text.languages import language_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lape_fast.identify import NeuronSet
    from lape_fast.study import AblationMatrix

__all__ = [
    "ablation_heatmap",
    "language_change",
    "language_label",
    "learning_curve",
    "neurons_by_layer",
    "neurons_per_language",
]


def language_label(code: str) -> str:
    """The English name of a language for a label, or its code where there is none; printable and not too long."""
    try:
        return plain(language_name(code))
    except LanguageError:
        return plain(code)


@house_style()
def neurons_by_layer(neurons: NeuronSet) -> Figure:
    """How many neurons each language has in each layer: a heat map, languages in alphabetical order.

    Args:
        neurons: of G languages and L layers; G x L cells are drawn.
    """
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    labels = [language_label(language) for language in neurons.languages]
    order = sorted(range(len(labels)), key=labels.__getitem__)
    counts = neurons.per_layer()[order].numpy()  # [G, L]
    figure, axes = heat_map_axes(len(labels), neurons.layers)
    image = axes.imshow(
        numpy.ma.masked_equal(counts, 0),
        cmap=colormaps["viridis_r"].with_extremes(bad=NOTHING),
        norm=LogNorm(1, max(2, counts.max())),
        aspect="auto",
        interpolation="none",
    )
    write_cells(image, [[f"{count:,}" if count else "" for count in row] for row in counts.tolist()])
    label_rows(axes, [labels[position] for position in order])
    # At most 16 of the layers are named.
    axes.set_xticks(range(0, neurons.layers, -(-neurons.layers // 16)))
    axes.set_xlabel("Layer (0 reads the embeddings)")
    colour_bar(image, LogLocator(subs=(1, 3)))
    heading(axes, "Language-specific neurons by layer", "Neurons in the layer (log scale; grey cell: none)")
    return fitted(figure, axes)


@house_style()
def neurons_per_language(neurons: NeuronSet) -> Figure:
    """How many neurons each language has over all layers: one bar per language, the longest first.

    Args:
        neurons: of G languages; G bars are drawn.
    """
    from matplotlib.ticker import MaxNLocator

    counts = sorted(neurons.per_language().items(), key=lambda item: -item[1])
    figure, axes = bar_axes(len(counts))
    bars = axes.barh(range(len(counts)), [count for _, count in counts], color=PALETTE[0])
    label_rows(axes, [language_label(language) for language, _ in counts])
    points = axes.get_yticklabels()[0].get_fontsize()
    axes.bar_label(bars, [f"{count:,}" for _, count in counts], padding=3, fontsize=points)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("Neurons over all layers")
    total = neurons.layers * neurons.neurons_per_layer
    heading(
        axes, "Neurons of each language", f"{neurons.union_count():,} of the model's {total:,} neurons have a language"
    )
    return fitted(figure, axes)


@house_style()
def ablation_heatmap(matrix: AblationMatrix) -> Figure:
    """What switching off each language's neurons costs every language: a diverging map around 0.

    Languages stand in the order of script, then name: neighbours share their letters, and often suffer together.

    Args:
        matrix: what ``ablate_neurons`` returned; each entry of its ``cost`` is a cell, and a language's effect on
            itself is outlined.

    Raises:
        ShapeError: the matrix has no rows or no columns.
    """
    import numpy
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    rows, columns = _by_script(matrix.ablated), _by_script(matrix.evaluated)
    cost = matrix.cost[rows][:, columns].numpy()  # [rows, columns]
    if not cost.size:
        raise ShapeError(
            f"The ablation matrix has {len(matrix.ablated)} rows and {len(matrix.evaluated)} columns, so there is "
            "nothing to draw; switch off and evaluate at least one language."
        )
    finite = numpy.abs(cost[numpy.isfinite(cost)])
    # A matrix of zeros still needs a scale on which 0 is the middle.
    largest = float(finite.max(initial=0)) or 1.0
    figure, axes = heat_map_axes(*cost.shape)
    image = axes.imshow(cost, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="none")
    decimals = 3 if largest < 0.1 else 2
    write_cells(image, [[_signed(value, decimals) for value in row] for row in cost.tolist()])
    label_rows(axes, [f"{language_label(matrix.ablated[row])} ({matrix.neurons[row]:,})" for row in rows])
    label_columns(axes, [language_label(matrix.evaluated[column]) for column in columns])
    places = {matrix.evaluated[column]: place for place, column in enumerate(columns)}
    for place, row in enumerate(rows):
        if matrix.ablated[row] in places:
            corner = (places[matrix.ablated[row]] - 0.5, place - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#000000", linewidth=1.4))
    colour_bar(image, MaxNLocator(5))
    heading(
        axes,
        "Cost of switching off a language's neurons",
        "Row: whose neurons were switched off (how many). Column: language measured.",
        "Outlined: the language itself. Languages are ordered by script, then name.",
        "Bits per byte added (above 0, red: worse; below 0, blue: better)",
    )
    return fitted(figure, axes)


@house_style()
def language_change(
    before: Mapping[str, float], after_by_method: Mapping[str, Mapping[str, float]], target: str
) -> Figure:
    """How tuning one language changed every language: one bar per language and method, the target first.

    Args:
        before: bits per byte of the base model, by language.
        after_by_method: the same after tuning, by what was tuned ("subnetwork", "random"); up to four.
        target: the tuned language.

    Raises:
        LanguageError: a language, perhaps the target, was measured on one side only.
        ShapeError: no method, or more than four.
    """
    if not 1 <= len(after_by_method) <= len(PALETTE):
        raise ShapeError(f"{len(after_by_method)} methods were given; compare one to {len(PALETTE)} in a figure.")
    changes = {method: _changes(before, after, target, method) for method, after in after_by_method.items()}
    first = next(iter(changes.values()))
    languages = [target, *sorted((other for other in first if other != target), key=first.__getitem__)]
    figure, axes = bar_axes(len(languages), scale=1.2)
    thickness = 0.8 / len(changes)
    for number, (method, change) in enumerate(changes.items()):
        offset = (number - (len(changes) - 1) / 2) * thickness
        axes.barh(
            [row + offset for row in range(len(languages))],
            [change[language] for language in languages],
            thickness,
            color=PALETTE[number],
            label=f"{plain(method)}: {_summary(change, target)}",
        )
    label_rows(axes, [language_label(language) for language in languages])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.axhspan(-0.5, 0.5, color=INK, alpha=0.08, linewidth=0, zorder=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("Change in bits per byte (below 0: better, above 0: worse)")
    # The legend stands above the axis and carries the title, so that neither can run into the other.
    height = axes.bbox.height / figure.dpi
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1 + HEADING_LIFT / height),
        alignment="left",
        title=f"Every language after tuning {language_label(target)}",
        title_fontproperties=TITLE_FONT,
    )
    return fitted(figure, axes)


@house_style()
def learning_curve(log: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Training and validation loss over the steps.

    Args:
        log: a dict per logged step, as the trainer writes it: ``step`` with ``loss`` or ``eval_loss`` in nats per
            token; other entries are passed over.
        title: what was trained.

    Raises:
        TrainingError: the log holds no loss.
    """
    from matplotlib.ticker import MaxNLocator

    training, validation = (
        [(entry["step"], entry[name]) for entry in log if name in entry] for name in ("loss", "eval_loss")
    )
    if not training and not validation:
        raise TrainingError(f"The log of {title!r} holds {len(log)} entries and no loss; train for a few steps first.")
    figure, axes = sized_axes(6.2, 2.9)
    if training:
        axes.plot(*zip(*training, strict=True), color=PALETTE[0], linewidth=1.4, label="training")
    if validation:
        step, lowest = min(validation, key=lambda point: point[1])
        label = f"validation (lowest: {lowest:.3f} at step {step:,})"
        axes.plot(
            *zip(*validation, strict=True), color=PALETTE[1], linewidth=1.4, marker="o", markersize=4, label=label
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Loss (nats per token)")
    axes.legend(borderaxespad=0.5)
    axes.set_title(plain(title, LONGEST_TITLE), loc="left", fontdict=TITLE_FONT)
    return fitted(figure, axes)


def _by_script(languages: Sequence[str]) -> list[int]:
    """The positions of languages in the order of script, then name."""
    keys = [(code.partition("_")[2], language_label(code)) for code in languages]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _changes(before: Mapping[str, float], after: Mapping[str, float], target: str, method: str) -> dict[str, float]:
    lacking = sorted({target, *before, *after} - (before.keys() & after.keys()))
    if lacking:
        raise LanguageError(
            f"{lacking[0]!r} was not measured both before and after tuning with the method {method!r}; evaluate the "
            "same languages, the target among them, on both sides."
        )
    return {language: after[language] - before[language] for language in before}


def _summary(change: Mapping[str, float], target: str) -> str:
    others = [value for language, value in change.items() if language != target]
    own = f"{language_label(target)} {_signed(change[target], 3)}"
    return f"{own}, mean of the others {_signed(sum(others) / len(others), 3)}" if others else own


def _signed(value: float, decimals: int) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")
