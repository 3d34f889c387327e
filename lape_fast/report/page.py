"""The report: one self-contained HTML file, without scripts and without anything from a network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lape_fast.errors import ShapeError
from lape_fast.files import write_text
from lape_fast.report.canvas import figure_svg

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

TEMPLATE = "report.html.j2"

# "1,234", "-0.05", "+3 %" or "n/a": what is set flush right.
NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d.,\s]*\d\s?(%|x|[kMG]?i?B|s|ms)?|n/a|\N{EN DASH}|")


@dataclass(frozen=True)
class Table:
    """A table of text; the first cell of a row names the row.

    Attributes:
        caption: what the table shows, with units.
        header: names of the columns.
        rows: cells, as many per row as the header has.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ShapeError(
                    f"The row {list(row)!r} of the table {self.caption!r} has {len(row)} cells, but the header has "
                    f"{len(self.header)}; give one cell per column."
                )

    def numeric(self) -> list[bool]:
        """Whether a column holds numbers only, for every column."""
        return [
            bool(self.rows) and all(NUMBER.fullmatch(row[column]) for row in self.rows)
            for column in range(len(self.header))
        ]


@dataclass(frozen=True)
class Picture:
    """A figure with the words that go with it.

    Attributes:
        figure: a matplotlib figure.
        caption: what to see in it.
        alt: the same for those who cannot see it.
    """

    figure: Figure
    caption: str
    alt: str

    def svg(self) -> str:
        """The figure as an SVG element."""
        return figure_svg(self.figure)


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, then paragraphs of plain text, a table, a figure."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    picture: Picture | None = None


def render_report(output: str | os.PathLike, *, title: str, lead: str, sections: Iterable[Section]) -> None:
    """Writes a report as one HTML file, atomically; all text is escaped.

    Args:
        output: the file.
        title: of the page.
        lead: the finding in a sentence or two.
        sections: what follows, in order.

    Example:
        >>> table = Table("Bits per byte", ("Language", "Before", "After"), [("Maltese", "1.93", "1.85")])
        >>> sections = [Section("Scores", ["On 200 sentences."], table=table)]
        >>> render_report("report.html", title="Maltese", lead="It improved.", sections=sections)
    """
    page = environment().get_template(TEMPLATE).render(title=title, lead=lead, sections=list(sections))
    write_text(output, page)


def environment() -> Environment:
    """What renders the templates of this package: everything is escaped unless a template says otherwise."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lape_fast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
