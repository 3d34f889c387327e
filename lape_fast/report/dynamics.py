"""The figure of how a training run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lape_fast.errors import TrainingError
from lape_fast.report.canvas import INK, LONGEST_TITLE, PALETTE, TITLE_FONT, fitted, house_style, plain, sized_axes
from lape_fast.report.figures import language_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Projection -> colour; the total is drawn in ink.
COLOURS = dict(zip(("gate", "up", "down", "other"), PALETTE, strict=True)) | {"gate_up": PALETTE[0], "total": INK}

PANEL = (3.6, 2.1)
GAP = (0.95, 0.5)


@house_style()
def training_dynamics(records: Sequence[Mapping[str, Any]], title: str, target: str | None = None) -> Figure:
    """Four panels over the steps: loss, gradient norm, update norm, and what was measured of the target and others.

    Args:
        records: as ``read_dynamics`` returns them.
        title: what was trained.
        target: which of the measured names is the tuned language; the others are drawn as their mean and range.

    Raises:
        TrainingError: there is no record of a step.
    """
    from matplotlib.ticker import NullFormatter

    if not any("loss" in record for record in records):
        raise TrainingError(f"{title!r} has {len(records)} records and no loss among them; train for a few steps.")
    figure, first = sized_axes(*(2 * size + gap for size, gap in zip(PANEL, GAP, strict=True)))
    panels = [first, *(figure.add_axes((0, 0, 1, 1)) for _ in range(3))]
    width, height = figure.get_size_inches()
    for number, panel in enumerate(panels):
        row, column = divmod(number, 2)
        place = (column * (PANEL[0] + GAP[0]) / width, (1 - row) * (PANEL[1] + GAP[1]) / height)
        panel.set_position((*place, PANEL[0] / width, PANEL[1] / height))
        panel.grid(True)
    loss, gradient, update, change = panels
    _lines(loss, {"training": _series(records, "loss"), "validation": _series(records, "validation_loss")}, PALETTE)
    loss.set_ylabel("Loss (nats per token)")
    for panel, name, label in (
        (gradient, "gradient_norm", "Norm of the gradient"),
        (update, "update_norm", "Norm of the update\nof that step"),
    ):
        parts = list(dict.fromkeys(part for record in records for part in record.get(name, {})))
        series = {part: _series(records, name, part) for part in parts}
        _lines(panel, series, [COLOURS.get(part, INK) for part in parts])
        panel.set_ylabel(label)
        positive = [value for points in series.values() for _, value in points if value > 0]
        # Within a factor of ten a logarithmic axis might have no number on it.
        if positive and max(positive) > 10 * min(positive):
            # The first step of a warm-up changes nothing.
            panel.set_yscale("log", nonpositive="mask")
            # matplotlib's own are formulas, which the house style shows as they are written.
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    _measured(change, records, target)
    tokens = max(round(record["tokens"] / record["step"]) for record in records if record["step"])
    for panel in panels:
        panel.set_xlim(0, max(record["step"] for record in records))
    for panel in (update, change):
        panel.set_xlabel(f"Optimizer step ({tokens:,} tokens each)")
    loss.set_title(plain(title, LONGEST_TITLE), loc="left", fontdict=TITLE_FONT)
    return fitted(figure, *panels)


def _series(records: Sequence[Mapping[str, Any]], name: str, part: str | None = None) -> list[tuple[int, float]]:
    found = [(record["step"], record[name]) for record in records if name in record]
    return found if part is None else [(step, values[part]) for step, values in found if part in values]


def _lines(panel: Axes, series: Mapping[str, Sequence[tuple[int, float]]], colours: Sequence[str]) -> None:
    for (name, points), colour in zip(series.items(), colours, strict=False):
        if points:
            marker = "o" if name == "validation" else None
            panel.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, marker=marker, markersize=3, label=name)
    if any(series.values()):
        panel.legend(borderaxespad=0.4, fontsize=7.5)


def _measured(panel: Axes, records: Sequence[Mapping[str, Any]], target: str | None) -> None:
    """The change of what was measured since the first time."""
    measured = [(record["step"], record["measured"]) for record in records if record.get("measured")]
    if not measured:
        panel.text(0.5, 0.5, "no other languages were measured", ha="center", va="center", transform=panel.transAxes)
        return
    before = measured[0][1]
    steps = [step for step, _ in measured]
    changes = [{name: values[name] - before[name] for name in before} for _, values in measured]
    if target in before:
        label = language_label(target)
        panel.plot(steps, [change.pop(target) for change in changes], color=PALETTE[1], linewidth=1.6, label=label)
    if changes[0]:
        low, high = ([pick(change.values()) for change in changes] for pick in (min, max))
        panel.fill_between(steps, low, high, color=PALETTE[0], alpha=0.15, linewidth=0)
        label = f"mean of {len(changes[0])} others, and their range" if target in before else "mean, and range"
        panel.plot(steps, [fmean(change.values()) for change in changes], color=PALETTE[0], linewidth=1.4, label=label)
    panel.axhline(0, color=INK, linewidth=0.8)
    panel.set_ylabel("Measured: change since step 0")
    panel.legend(borderaxespad=0.4, fontsize=7.5)
