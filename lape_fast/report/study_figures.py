"""Figures of a study: gain against forgetting, learning rates, and what happened while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lape_fast.report.canvas import INK, MARGIN, TITLE_FONT, house_style, plain
from lape_fast.report.figures import language_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, the palest left out, each with a marker of its own: a method keeps both in every figure.
STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    (INK, "X"),
    ("#8c6d31", "*"),
)
WIDTH, HEIGHT = 2.9, 2.2
LEFT, GAP, BOTTOM, ABOVE = 0.62, 0.72, 0.55, 0.3
LEGEND_ROW, LEGEND_WIDTH = 0.2, 1.45
GAIN, FORGETTING = "Gain of the target (bits per byte)", "Mean rise elsewhere (bits per byte)"


def method_styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, by its place."""
    return {
        method: {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3}
        for method, (colour, marker) in zip(methods, STYLES * -(-len(methods) // len(STYLES)), strict=False)
    }


@house_style()
def averaged_curves(summary: Mapping[str, Any]) -> Figure:
    """Gain over forgetting, averaged over languages, with the interval as a band."""
    curves, methods = summary["curves"], list(summary["methods"])
    grid = curves["grid"]

    def draw(axes: Axes) -> None:
        for method, style in method_styles(methods).items():
            band = curves["averaged"].get(method)
            if band:
                axes.plot(grid, band["mean"], markevery=8, **style)
                axes.fill_between(grid, band["low"], band["high"], color=style["color"], alpha=0.12, linewidth=0)
        _label(axes, f"Mean of {len(summary['languages'])} languages", FORGETTING, GAIN)

    return _panels("Gain at equal forgetting", methods, [draw], columns=1, width=6.0, height=3.4)


@house_style()
def language_curves(summary: Mapping[str, Any]) -> Figure:
    """The frontier of every method on every language, a panel each."""
    methods, end = list(summary["methods"]), summary["curves"]["grid"][-1]

    def panel(language: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            curves = summary["curves"]["by_language"][language]
            for method, style in method_styles(methods).items():
                if method in curves:
                    axes.plot(curves[method]["forgetting"], curves[method]["gain"], **style)
            axes.set_xlim(right=2 * end)
            _label(axes, language_label(language), FORGETTING, GAIN)

        return draw

    return _panels("Frontiers by language", methods, [panel(language) for language in summary["languages"]], columns=2)


@house_style()
def learning_rates(summary: Mapping[str, Any]) -> Figure:
    """Gain and forgetting by learning rate, at the best measurement of each run of the first seed."""

    def panel(name: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for method, style in method_styles(list(summary["methods"])).items():
                rows = summary["sweep"][method]
                axes.plot([row["learning_rate"] for row in rows], [row[name] for row in rows], **style)
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
            _label(axes, label.split(" (")[0], "Learning rate", label)

        return draw

    panels = [panel("gain", GAIN), panel("forgetting", FORGETTING)]
    return _panels("What the learning rate does", list(summary["methods"]), panels, columns=2)


@house_style()
def training_dynamics(summary: Mapping[str, Any]) -> Figure:
    """Gain, forgetting, training loss and gradient norm over tokens, at the chosen learning rates."""

    def panel(kind: str, name: str, title: str, label: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for method, style in method_styles(list(summary["methods"])).items():
                rows = summary["dynamics"][method][kind]
                axes.plot([row["tokens"] for row in rows], [row[name] for row in rows], **style)
            if name == "gradient_norm":
                axes.set_yscale("log")
                _plain_ticks(axes.yaxis)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=4)
            _label(axes, title, "Tokens trained on", label)

        return draw

    panels = [
        panel("measured", "gain", "Target, validation lines", GAIN),
        panel("measured", "forgetting", "Elsewhere, validation lines", FORGETTING),
        panel("trained", "loss", "Training loss", "Nats per token"),
        panel("trained", "gradient_norm", "Norm of the gradient", "Before clipping"),
    ]
    return _panels("While training, mean of languages", list(summary["methods"]), panels, columns=2)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(plain(title), loc="left", fontsize=9)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True)


def _plain_ticks(axis: Axis) -> None:
    """Numbers at the ticks of a logarithmic axis, where powers would be formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _panels(
    title: str,
    methods: Sequence[str],
    panels: Sequence[Callable[[Axes], None]],
    *,
    columns: int,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Figure:
    """Panels in rows under a title and one legend; sizes in inches."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    inches = columns * width + (columns - 1) * GAP
    legend_columns = min(len(methods), max(1, int(inches / LEGEND_WIDTH)))
    top = 0.35 + LEGEND_ROW * -(-len(methods) // legend_columns)
    full = (
        LEFT + inches + 2 * MARGIN,
        top + rows * (ABOVE + height + BOTTOM) + MARGIN,
    )
    figure = Figure(figsize=full)
    for number, draw in enumerate(panels):
        row, column = divmod(number, columns)
        left = LEFT + column * (width + GAP)
        bottom = full[1] - top - (row + 1) * (ABOVE + height) - row * BOTTOM
        draw(figure.add_axes((left / full[0], bottom / full[1], width / full[0], height / full[1])))
    handles = [Line2D([], [], label=plain(method, 40), **style) for method, style in method_styles(methods).items()]
    figure.text(LEFT / full[0], 1 - 0.05 / full[1], title, va="top", fontdict=TITLE_FONT)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(LEFT / full[0], 1 - 0.3 / full[1]),
        ncols=legend_columns,
        fontsize=8,
        columnspacing=1.2,
    )
    return figure
