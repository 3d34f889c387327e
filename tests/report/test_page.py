"""The report page: self-contained, escaped, complete and accessible."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from lape_fast.errors import ShapeError
from lape_fast.report import (
    Picture,
    Section,
    Table,
    ablation_heatmap,
    learning_curve,
    neurons_per_language,
    render_report,
)
from tests.report.samples import ablation_matrix, neuron_set, training_log

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
CSV = "data:text/csv;charset=utf-8,"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text inside), and the tags that were left open."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(text).strip()
            for name, held, text in self.elements
            if name == tag and attributes.items() <= held.items()
        ]


@pytest.fixture
def sections() -> list[Section]:
    table = Table(
        "Bits per byte on held-out text",
        ("Language", "Before", "Change", "Corpus"),
        [("Maltese", "1.930", "\N{MINUS SIGN}0.083", "texts/a"), ("Welsh", "1.75", "+0.01", "texts/b")],
    )
    return [
        Section("Scores", ["First paragraph.", "Second paragraph."], table=table),
        Section("Ablation", picture=Picture(ablation_heatmap(ablation_matrix(3, 5)), "What it costs.", "A heat map.")),
        Section("Learning", picture=Picture(learning_curve(training_log(), "Maltese"), "The loss.", "Two curves.")),
    ]


def _render(tmp_path, **arguments) -> Page:
    path = tmp_path / "report.html"
    render_report(path, **{"title": "A title", "lead": "A lead.", "sections": [], **arguments})
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


def test_everything_given_is_on_the_page(tmp_path, sections):
    page = _render(tmp_path, sections=sections)
    assert page.texts("title") == page.texts("h1") == ["A title"]
    assert page.texts("h2") == ["Scores", "Ablation", "Learning"]
    assert page.texts("p") == ["A lead.", "First paragraph.", "Second paragraph."]
    assert page.texts("caption") == ["Bits per byte on held-out text"]
    assert page.texts("th", scope="col") == ["Language", "Before", "Change", "Corpus"]
    assert page.texts("th", scope="row") == ["Maltese", "Welsh"]
    assert page.texts("td") == ["1.930", "\N{MINUS SIGN}0.083", "texts/a", "1.75", "+0.01", "texts/b"]
    assert page.texts("figcaption") == ["What it costs.", "The loss."]
    assert len(page.texts("svg")) == 2
    labels = [attributes["aria-label"] for _, attributes, _ in page.elements if attributes.get("role") == "img"]
    assert labels == ["A heat map.", "Two curves."]


def test_only_columns_of_numbers_are_set_right(tmp_path, sections):
    page = _render(tmp_path, sections=sections)
    assert page.texts("th", **{"class": "number"}) == ["Before", "Change"]
    assert page.texts("td", **{"class": "number"}) == ["1.930", "\N{MINUS SIGN}0.083", "1.75", "+0.01"]


def test_nothing_is_loaded_and_no_script_runs(tmp_path, sections):
    page = _render(tmp_path, sections=sections)
    for tag, attributes, _ in page.elements:
        assert tag not in {"script", "iframe", "object", "embed"}
        # An empty icon, since a browser asks for one otherwise.
        assert tag != "link" or attributes == {"rel": "icon", "href": "data:,"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;", CSV, "data:,"))
    styles = " ".join(page.texts("style"))
    assert "url(" not in styles and "@import" not in styles
    (policy,) = [held["content"] for tag, held, _ in page.elements if tag == "meta" and "http-equiv" in held]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_links_lead_to_the_sections_and_ids_are_unique(tmp_path, sections):
    page = _render(tmp_path, sections=sections)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes, _ in page.elements if tag == "a"]
    skip, *links = [link.removeprefix("#") for link in links if link.startswith("#")]
    assert skip == "main" and len(links) == 3 and {skip, *links} <= set(ids)
    described = [held["aria-labelledby"] for _, held, _ in page.elements if held.get("role") == "group"]
    assert len(described) == 2 and set(described) <= set(ids)
    named = [attributes["aria-labelledby"] for tag, attributes, _ in page.elements if tag == "section"]
    assert named == links


def test_hostile_text_stays_text(tmp_path):
    table = Table(HOSTILE, (HOSTILE, "n"), [(HOSTILE, HOSTILE)])
    figure = learning_curve(training_log(), HOSTILE)
    section = Section(HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, table, Picture(figure, HOSTILE, HOSTILE))
    page = _render(tmp_path, title=HOSTILE, lead=HOSTILE, sections=[section] * 3)
    assert not {"script", "img"} & {tag for tag, _, _ in page.elements}
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert page.texts("h1") == [HOSTILE] and page.texts("td") == [HOSTILE] * 3
    assert page.texts("dt") == page.texts("dd") == [HOSTILE] * 3
    assert sum(HOSTILE in text for text in page.texts("text")) == 3


def test_names_stand_beside_their_values(tmp_path):
    page = _render(tmp_path, sections=[Section("Settings", facts={"Steps": "12", "Corpus": "texts/"})])
    assert page.texts("dt") == ["Steps", "Corpus"] and page.texts("dd") == ["12", "texts/"]


def test_a_table_can_be_saved_as_csv(tmp_path):
    """A spreadsheet runs a text that begins as a formula does, so it gets an apostrophe; numbers stay numbers."""
    rows = [("=1+1", "-0.5"), ('Maltese, "mlt"', "+3 %"), ("@cmd", "\N{EN DASH}")]
    page = _render(tmp_path, sections=[Section("At equal gain", table=Table("t", ("Language", "Change"), rows))])
    (link,) = [held for tag, held, _ in page.elements if tag == "a" and "download" in held]
    assert link["download"] == "at-equal-gain.csv"
    saved = list(csv.reader(io.StringIO(unquote(link["href"].removeprefix(CSV)))))
    assert saved == [["Language", "Change"], ["'=1+1", "-0.5"], list(rows[1]), ["'@cmd", "\N{EN DASH}"]]


def test_the_page_is_the_same_every_time(tmp_path):
    files = []
    for name in ("a.html", "b.html"):
        picture = Picture(neurons_per_language(neuron_set(5)), "caption", "alt")
        render_report(tmp_path / name, title="t", lead="l", sections=[Section("s", picture=picture)])
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_a_report_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    _render(tmp_path, title="the old one")
    broken = Section("s", picture=Picture(None, "caption", "alt"))
    with pytest.raises(AttributeError):
        _render(tmp_path, sections=[broken])
    assert "the old one" in (tmp_path / "report.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_wide_parts_scroll_in_their_own_box(tmp_path, sections):
    page = _render(tmp_path, sections=sections)
    boxes = [element for element in page.elements if element[1].get("class") == "scroll"]
    assert len(boxes) == 3
    assert all(attributes.get("tabindex") == "0" for _, attributes, _ in boxes)
    styles = " ".join(page.texts("style"))
    assert "prefers-color-scheme: dark" in styles and "@media print" in styles and "overflow-x: auto" in styles


def test_a_row_that_does_not_fit_its_header_is_refused():
    with pytest.raises(ShapeError, match="2 cells, but the header has 3"):
        Table("caption", ("a", "b", "c"), [("1", "2", "3"), ("1", "2")])
