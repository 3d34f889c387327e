"""The report: one self-contained HTML file, without scripts and without anything from a network."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

from lape_fast.errors import ShapeError
from lape_fast.files import write_text
from lape_fast.report.canvas import figure_svg, save_figure

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

TEMPLATE = "report.html.j2"
# Of every page.
STYLE = "style.css"

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

    def csv(self) -> str:
        """The table as CSV; a text that a spreadsheet would run gets an apostrophe in front."""
        buffer = io.StringIO()
        csv.writer(buffer).writerows([_harmless(cell) for cell in row] for row in (self.header, *self.rows))
        return buffer.getvalue()

    def csv_link(self) -> str:
        """An address that holds the CSV itself."""
        return f"data:text/csv;charset=utf-8,{quote(self.csv())}"


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

    def save(self, path: str | os.PathLike) -> None:
        """Writes it beside the page, as a PNG under this path and as an SVG."""
        save_figure(self.figure, path, self.alt)


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, then paragraphs of plain text, names with values, a table, a figure."""

    heading: str
    paragraphs: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
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
    page = environment().get_template(TEMPLATE)
    write_text(output, page.render(title=title, lead=lead, sections=list(sections), style=source(STYLE)))


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


def source(name: str) -> str:
    """What a template, a style or a script of this package holds."""
    jinja = environment()
    return jinja.loader.get_source(jinja, name)[0]


def policy_hash(text: str) -> str:
    """What a page's policy allows: this very style or script and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _harmless(cell: str) -> str:
    return f"'{cell}" if cell[:1] in set("=+-@\t\r") and not NUMBER.fullmatch(cell) else cell
