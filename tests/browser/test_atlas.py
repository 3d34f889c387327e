"""The atlas in a real browser: every view, the search, links, exports, the keyboard, a phone, and hostile names."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch

from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.report import render_atlas
from lape_fast.text.languages import language_name
from tests.report.atlas_samples import alignment_of, sample
from tests.report.samples import ablation_matrix, codes, matrix_of

LANGUAGES = 12
VIEWS = {
    "layers": "Neurons by layer",
    "similarity": "Languages that share neurons",
    "languages": "Languages",
    "neurons": "Neurons",
    "ablation": "What switching neurons off costs",
    "alignment": "Alignment of Maltese",
}


@pytest.fixture(scope="module")
def data() -> tuple[NeuronSet, ActivationCounts]:
    return sample(LANGUAGES)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("atlas") / "atlas.html"
    alignment = alignment_of(["mlt_Latn", "deu_Latn"], ("base", "tuned"), layers=5)
    render_atlas(path, *data, ablation=ablation_matrix(LANGUAGES, LANGUAGES), alignment=alignment)
    return path


def shows(page, title: str) -> None:
    """Waits for a view with this title."""
    from playwright.sync_api import expect

    expect(page.locator("main h2")).to_have_text(title)


def has_figures(page, number: int) -> None:
    """Waits for a view with so many figures."""
    from playwright.sync_api import expect

    expect(page.locator("canvas")).to_have_count(number)


def go(page, fragment: str) -> None:
    page.evaluate("address => { location.hash = address; }", fragment)
    # A task later, as the event comes.
    page.evaluate("() => new Promise(done => setTimeout(done, 0))")


def first_cell(page, column: int = 1) -> str:
    return page.locator(f"tbody tr:first-child > :nth-child({column})").text_content()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_opens_from_the_navigation(open_page, path, picture, view, dark):
    page = open_page(path, dark=dark)
    page.locator("#views a", has_text=view.capitalize()).click()
    shows(page, VIEWS[view])
    assert page.locator("#views [aria-current=page]").text_content() == view.capitalize()
    picture(page)


@pytest.mark.parametrize("view", ["layers", "similarity", "ablation", "alignment"])
def test_a_figure_is_drawn_and_is_a_table_too(open_page, path, view):
    page = open_page(path, fragment=f"#view={view}")
    colours = page.evaluate(
        """() => {
          const canvas = document.querySelector("canvas");
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const found = new Set();
          for (let place = 0; place < pixels.length; place += 4) found.add(pixels.slice(place, place + 4).join());
          return found.size;
        }"""
    )
    assert colours > 10
    figures = page.locator("canvas").count()
    page.get_by_role("button", name="Show as a table").first.click()
    has_figures(page, 0)
    assert page.locator("tbody tr").count() > 1
    page.get_by_role("button", name="Show as a figure").first.click()
    has_figures(page, figures)


def test_the_table_of_layers_holds_the_counts_of_the_neurons(open_page, path, data):
    page = open_page(path, fragment="#view=layers&as=table")
    rows = page.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    expected = {code: [len(layer) for layer in data[0][code]] for code in data[0].languages}
    assert {row[1]: list(map(int, row[3:])) for row in rows} == expected


@pytest.mark.parametrize("written", ["Afrikaans", "afrik", "afr_Latn", "AFR"])
def test_a_language_is_found_by_name_and_code(open_page, path, written):
    assert "afr_Latn" in codes(LANGUAGES)
    page = open_page(path)
    page.locator("#search").fill(written)
    page.keyboard.press("Enter")
    shows(page, "Afrikaans")


def test_a_neuron_is_found_and_shows_its_languages(open_page, path, data, picture):
    neurons, counts = data
    code = neurons.languages[0]
    layer = next(layer for layer, chosen in enumerate(neurons[code]) if len(chosen))
    neuron = int(neurons[code][layer][0])
    page = open_page(path)
    page.locator("#search").fill(f"{layer}.{neuron}")
    page.keyboard.press("Enter")
    shows(page, f"Neuron {layer}.{neuron}")
    assert language_name(code) in page.locator("dl").text_content()
    picture(page)
    page.get_by_role("button", name="Show as a table").click()
    page.wait_for_selector("tbody tr")
    shown = dict(
        page.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [row.cells[1].textContent, row.cells[3].textContent])"
        )
    )
    for place, language in enumerate(counts.languages):
        p = (counts.positive[place, layer, neuron] / counts.tokens[place]).item()
        # Rounded to one of 64 levels of the square root, then to a tenth of a percent.
        assert abs(float(shown[language].rstrip(" %")) / 100 - p) <= (2 * p**0.5 + 0.01) / 126 + 0.0005


def test_the_search_lists_what_fits_and_the_arrows_choose(open_page, path):
    page = open_page(path)
    page.locator("#search").fill("a")
    options = page.locator("#found [role=option]")
    assert options.count() > 1
    second = options.nth(1).text_content()
    page.keyboard.press("ArrowDown")
    assert page.locator("#found [aria-selected=true]").text_content() == second
    page.keyboard.press("Enter")
    shows(page, second.rpartition(" (")[0])
    assert page.locator("#found").is_hidden()


def test_what_is_not_there_is_said(open_page, path):
    page = open_page(path)
    page.locator("#search").fill("no such language")
    assert page.locator("#status").text_content() == "Nothing found"
    for fragment in ("view=language&id=xxx", "view=neuron&id=99.1", "view=neuron&id=a", "view=constructor", "view="):
        go(page, fragment)
        shows(page, "Not found")


def test_a_language_page_has_its_neurons_and_leads_to_its_neighbours(open_page, path, data, picture):
    code = data[0].languages[3]
    page = open_page(path, fragment=f"#view=language&id={code}")
    shows(page, language_name(code))
    assert page.locator("tbody tr").count() == data[0].count(code)
    picture(page)
    nearest = page.locator("canvas").nth(1)
    nearest.click(position={"x": 200, "y": 12})
    similarity = data[0].jaccard()[3]
    similarity[3] = -1
    shows(page, language_name(data[0].languages[int(similarity.argmax())]))


def test_tables_sort_both_ways_and_the_address_keeps_it(open_page, path, data):
    page = open_page(path, fragment="#view=languages")
    sizes = {language_name(code): data[0].count(code) for code in data[0].languages}
    page.get_by_role("button", name="Neurons", exact=True).click()
    # Waits for the table that the new address brings.
    assert page.locator("th[aria-sort=descending]").text_content() == "Neurons"
    assert sizes[first_cell(page)] == max(sizes.values())
    page.get_by_role("button", name="Neurons", exact=True).click()
    assert page.locator("th[aria-sort=ascending]:nth-child(3)").text_content() == "Neurons"
    assert sizes[first_cell(page)] == min(sizes.values())
    address = page.url
    again = open_page(path, fragment=address[address.index("#") :])
    assert first_cell(again) == first_cell(page)
    page.go_back()
    assert page.locator("th[aria-sort=descending]").text_content() == "Neurons"
    assert sizes[first_cell(page)] == max(sizes.values())


def test_the_order_of_languages_can_be_chosen(open_page, path, data):
    page = open_page(path, fragment="#view=layers&as=table")
    page.locator("#order").select_option("neurons")
    page.wait_for_function("location.hash.includes('order=neurons')")
    page.get_by_role("button", name="Show as a figure").click()
    has_figures(page, 1)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    largest = max(data[0].languages, key=data[0].count)
    assert page.locator("#status").text_content().startswith(language_name(largest))


def test_the_table_goes_out_as_csv(open_page, path, data):
    page = open_page(path, fragment="#view=languages&sort=2-")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "languages.csv"
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert {row["Code"]: int(row["Neurons"]) for row in rows} == data[0].per_language()
    counts = [int(row["Neurons"]) for row in rows]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("view", ["layers", "similarity", "ablation", "alignment", "language&id=afr_Latn"])
def test_a_figure_goes_out_as_svg(open_page, path, view):
    page = open_page(path, fragment=f"#view={view}")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download SVG").first.click()
    drawing = xml.fromstring(Path(download.value.path()).read_text(encoding="utf-8"))
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    marks = [each.tag.rpartition("}")[2] for each in drawing.iter()]
    assert marks.count("text") > 4 and marks.count("rect") + marks.count("polyline") > 4


def test_the_keyboard_reaches_everything(open_page, path):
    page = open_page(path)
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "INPUT", "SELECT", "BUTTON", "CANVAS"} <= reached
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".cursor").is_visible()
    words = page.locator("#status").text_content()
    assert re.fullmatch(r".+, layer 0: [\d,]+ neurons", words)
    page.keyboard.press("ArrowRight")
    assert ", layer 1:" in page.locator("#status").text_content()
    page.keyboard.press("Enter")
    shows(page, words.split(",")[0])
    assert page.evaluate("document.activeElement.id") == "title"


def test_the_first_link_skips_to_the_view(open_page, path):
    page = open_page(path)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_a_pointer_gets_the_words_of_a_cell(open_page, path):
    page = open_page(path)
    page.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    cell = page.locator(".cursor").bounding_box()
    page.mouse.move(cell["x"] + 5, cell["y"] + 5)
    assert re.fullmatch(r".+, layer \d+: [\d,]+ neurons", page.locator(".tip").text_content())
    page.mouse.move(5, 5)
    assert page.locator(".tip").is_hidden()


@pytest.mark.parametrize("view", [*VIEWS, "language&id=afr_Latn", "languages&as=table"])
def test_a_phone_shows_it_without_scrolling_sideways(open_page, path, picture, view):
    page = open_page(path, width=375, fragment=f"#view={view}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    small = page.locator("main a, main button, #views a, #search").evaluate_all(
        "all => all.filter(each => each.closest('td, th') === null && each.getBoundingClientRect().height < 24).length"
    )
    assert small == 0
    picture(page)


def test_everything_that_acts_has_a_name(open_page, path):
    page = open_page(path)
    for view in VIEWS:
        go(page, f"view={view}")
        nameless = page.locator("a, button, input, select, canvas, [tabindex='0']").evaluate_all(
            """all => all.filter(each => !(each.getAttribute("aria-label") || each.textContent.trim()
              || each.labels?.length || each.querySelector("[aria-label]"))).map(each => each.outerHTML)"""
        )
        assert nameless == []
    assert page.locator("h1").count() == 1 and page.locator("html[lang=en]").count() == 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(open_page, path, dark):
    page = open_page(path, dark=dark)
    # WCAG AA asks for 4.5 to 1.
    contrasts = page.evaluate(
        """() => {
          const style = getComputedStyle(document.documentElement);
          const light = colour => {
            const channels = [1, 3, 5].map(place => parseInt(colour.slice(place, place + 2), 16) / 255)
              .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2];
          };
          const names = ["page", "text", "quiet", "accent"];
          const [page, ...inks] = names.map(name => light(style.getPropertyValue(`--${name}`).trim()));
          return inks.map(ink => (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05));
        }"""
    )
    assert min(contrasts) >= 4.5


def test_a_printed_page_has_the_figure_and_no_controls(open_page, path):
    page = open_page(path)
    page.emulate_media(media="print")
    assert page.locator("canvas").is_visible()
    assert page.locator("#views").is_hidden() and page.get_by_role("button", name="Download CSV").is_hidden()


def test_colours_follow_when_the_reader_goes_dark(open_page, path):
    page = open_page(path)
    light = page.evaluate("document.querySelector('canvas').toDataURL()")
    page.emulate_media(color_scheme="dark")
    # Told by the browser a moment later; times out if nothing is drawn again.
    page.wait_for_function("light => document.querySelector('canvas').toDataURL() !== light", arg=light)


def test_hostile_names_stay_text(open_page, tmp_path):
    hostile = '"></script><script>document.title="taken"</script><img src=x onerror=alert(1)>'
    formula = '=HYPERLINK("http://x","y")'
    neurons = NeuronSet.from_lists(
        {hostile: [[0, 1]], formula: [[1, 2]], "mlt_Latn": [[2]]}, 16, {"model": hostile, "name": hostile}
    )
    matrix = matrix_of([hostile], [hostile, "mlt_Latn"], torch.tensor([[0.1, 0.2]]), [2])
    render_atlas(tmp_path / "atlas.html", neurons, ablation=matrix)
    page = open_page(tmp_path / "atlas.html")
    for view in ("layers", "layers&as=table", "similarity", "languages", "neurons", "ablation"):
        go(page, f"view={view}")
        assert page.locator("main img, main script").count() == 0
        assert "taken" not in page.locator("main h2").text_content()
    page.locator("#search").fill("script")
    page.keyboard.press("Enter")
    shows(page, hostile)
    go(page, "view=languages")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert [row[1] for row in rows if "HYPERLINK" in row[1]] == [f"'{formula}"]
    go(page, "view=layers")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download SVG").click()
    drawing = xml.fromstring(Path(download.value.path()).read_text(encoding="utf-8"))
    assert {each.tag.rpartition("}")[2] for each in drawing.iter()} <= {"svg", "rect", "text", "polyline"}
