"""What every figure shares: colours, sizes in inches, headings, and how it becomes a PNG or an SVG.

Axes have a size in inches that follows from their rows and columns, and the figure grows around whatever the labels
need, so that 1 language and 123 are both readable. Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lape_fast.files import atomic_path, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Locator

# The colour of text and lines; in a page it becomes the colour of the text around the figure, light or dark.
INK = "#1f2328"

# Blue, vermillion, green, purple of Okabe and Ito: told apart with any kind of colour vision, and in grey.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

# Up to so many rows: inches per row, points of their labels.
DENSITIES = ((40, 0.26, 9.0), (10**9, 0.16, 7.5))

# Up to so many columns of a heat map: inches per column.
COLUMN_WIDTHS = ((12, 0.45), (26, 0.38), (40, 0.27), (10**9, 0.16))

# Numbers are written into cells of at least this width and height, in inches.
SMALLEST_WRITTEN = (0.38, 0.26)

# A cell without neurons, told from every colour of the map on a light and on a dark page.
NOTHING = "#d4d4d4"

MARGIN = 0.08
# Above the axes: room for a colour bar or an axis with its ticks, in inches.
HEADING_LIFT = 0.55
DOTS_PER_INCH = 150
LONGEST_LABEL = 30
LONGEST_TITLE = 70

# Where an SVG is opened the first may be missing; the second is as wide.
FONTS = "'DejaVu Sans', Verdana, sans-serif"

TITLE_FONT = {"size": 11, "weight": "bold"}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    # A language called "$x" is not a formula.
    "text.parse_math": False,
    # Text then has the same width at every resolution, so what fitted once fits in every file.
    "text.hinting": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "lape_fast",
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Within it, or in a function it decorates, figures are drawn and written in the style of this package."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def figure_paths(path: str | os.PathLike) -> tuple[Path, Path]:
    """The two files of a figure, a PNG and an SVG of the same name."""
    return Path(path).with_suffix(".png"), Path(path).with_suffix(".svg")


def save_figure(figure: Figure, path: str | os.PathLike, alt: str) -> None:
    """Writes a figure on white as a PNG and, beside it, as an SVG: the same figure gives the same bytes every time.

    The text of the SVG stays text, which can be searched and read aloud; nothing in it refers to anything outside.

    Args:
        figure: any matplotlib figure.
        path: the PNG; the SVG has the same name but for its ending. Their folder is made if need be.
        alt: what is to be seen, for those who cannot see it; the title of the SVG.

    Example:
        >>> save_figure(neurons_by_layer(neurons), "out/layers.png", "Heat map of the neurons by language and layer.")
    """
    png, svg = figure_paths(path)
    with house_style(), atomic_path(png) as temporary:
        figure.savefig(
            temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": "lape_fast"}
        )
    root, drawing = _svg(figure, "white").split(">", 1)
    title = escape(plain(alt, len(alt)))
    write_text(svg, f'<?xml version="1.0" encoding="utf-8"?>\n{root} role="img">\n <title>{title}</title>{drawing}')


def figure_svg(figure: Figure) -> str:
    """A figure as an SVG element to put into a page: the same figure gives the same text every time.

    Text stays text, lines and labels take the colour of the page's text, and nothing refers to anything outside.
    """
    return re.sub(r"<[^>]+>", lambda tag: tag[0].replace(INK, "currentColor"), _svg(figure, "none"))


def _svg(figure: Figure, background: str) -> str:
    """The svg element of a figure, with ids of its own and no more decimals than can be seen."""
    buffer = io.StringIO()
    with house_style():
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", facecolor=background, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures share a page, where ids must be unique: those in use get a prefix of this figure's own, the
    # others (axes_1, text_1 ...) go. Only tags are touched, never the text between them.
    referenced = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    own = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]

    def rewritten(tag: re.Match) -> str:
        text = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in referenced else "", tag[0])
        text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}-", text)
        # A thousandth of a point.
        text = re.sub(r"(\d\.\d{3})\d+", r"\1", text)
        return text.replace("'DejaVu Sans'", FONTS)

    return re.sub(r"<[^>]+>", rewritten, svg)


def plain(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text on one line without control characters, cut where it would push the figure aside."""
    words = "".join(character if character.isprintable() else " " for character in text).split()
    line = " ".join(words)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def at_most(table: Sequence[tuple], count: int) -> tuple:
    """The first row of a table of sizes that is meant for so many."""
    return next(row for row in table if count <= row[0])


def sized_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes fill it; ``fitted`` adds the room for what stands around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes((0, 0, 1, 1))


def heat_map_axes(rows: int, columns: int) -> tuple[Figure, Axes]:
    """Axes for ``imshow``, sized for so many rows and columns."""
    _, row_height, _ = at_most(DENSITIES, rows)
    _, column_width = at_most(COLUMN_WIDTHS, columns)
    figure, axes = sized_axes(columns * column_width, rows * row_height)
    # Thin lines between the cells.
    axes.set_xticks([column + 0.5 for column in range(columns - 1)], minor=True)
    axes.set_yticks([row + 0.5 for row in range(rows - 1)], minor=True)
    axes.grid(which="minor", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(False)
    return figure, axes


def bar_axes(rows: int, scale: float = 1.0) -> tuple[Figure, Axes]:
    """Axes for ``barh``, sized for so many rows, the first on top; ``scale`` makes the rows higher."""
    _, row_height, _ = at_most(DENSITIES, rows)
    figure, axes = sized_axes(5.6, rows * row_height * scale)
    # Long figures are read from the top, so the axis is there.
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_ylim(rows - 0.5, -0.5)
    return figure, axes


def label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of a heat map or the bars."""
    axes.set_yticks(range(len(names)), names, fontsize=at_most(DENSITIES, len(names))[-1])


def label_columns(axes: Axes, names: Sequence[str]) -> None:
    """Names the columns of a heat map, downwards."""
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=at_most(DENSITIES, len(names))[-1])


def write_cells(image: AxesImage, texts: Sequence[Sequence[str]]) -> None:
    """Writes a text into every cell of a heat map, in black or white, unless the cells are too small."""
    axes, values = image.axes, image.get_array()
    _, row_height, _ = at_most(DENSITIES, values.shape[0])
    _, column_width = at_most(COLUMN_WIDTHS, values.shape[1])
    if column_width < SMALLEST_WRITTEN[0] or row_height < SMALLEST_WRITTEN[1]:
        return
    colours = image.to_rgba(values)  # [rows, columns, 4]
    dark = colours[..., :3] @ (0.2126, 0.7152, 0.0722) < 0.5
    for row, cells in enumerate(texts):
        for column, text in enumerate(cells):
            colour = "#ffffff" if dark[row, column] else "#000000"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)


def colour_bar(image: AxesImage, ticks: Locator) -> None:
    """A colour bar between the axes and their heading, of a readable length whatever the columns."""
    axes = image.axes
    width, height = axes.figure.get_size_inches()
    above = axes.inset_axes((0, 1 + 0.38 / height, 2.8 / width, 0.13 / height))
    bar = axes.figure.colorbar(image, cax=above, orientation="horizontal", ticks=ticks, format="{x:g}")
    bar.minorticks_off()
    bar.outline.set_linewidth(0.5)
    above.tick_params(labelsize=7.5)


def heading(axes: Axes, title: str, *lines: str) -> None:
    """A bold title and lines of plain text above the axes and what stands on them."""
    lift = 72 * HEADING_LIFT
    place = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    text = axes.annotate("\n".join(lines), xytext=(0, lift), **place)
    axes.annotate(title, xytext=(0, lift + 5 + 1.2 * text.get_fontsize() * len(lines)), **TITLE_FONT, **place)


def fitted(figure: Figure, *axes: Axes) -> Figure:
    """Grows the figure around its axes, which keep their size, until all labels are inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    full_width, full_height = box.width + 2 * MARGIN, box.height + 2 * MARGIN
    figure.set_size_inches(full_width, full_height)
    for each in axes:
        place = each.get_position()
        left, bottom = MARGIN - box.x0 + place.x0 * width, MARGIN - box.y0 + place.y0 * height
        size = (place.width * width / full_width, place.height * height / full_height)
        each.set_position((left / full_width, bottom / full_height, *size))
    return figure
