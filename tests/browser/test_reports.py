"""The reports of the demo, a study and a training in a real browser: on a phone and a desk, light and dark."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lape_fast.report import Picture, Section, Table, ablation_heatmap, render_report, report_study, report_tuning
from tests.report.samples import ablation_matrix, write_training
from tests.report.test_study_report import results

LONG = "corpora/" + "unbroken" * 30
REPORTS = ("demo", "study", "tune")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A page of each kind, with what is too wide for a phone: a map of 24 languages, long names, many columns."""
    folders = {name: tmp_path_factory.mktemp(name) for name in REPORTS}
    wide = Table("A wide table", [f"column {number}" for number in range(20)], [[LONG[:40]] * 20] * 3)
    picture = Picture(ablation_heatmap(ablation_matrix(24, 24)), "What it costs.", "A heat map.")
    sections = [Section("Costs", [LONG], {"Corpus": LONG, LONG: "1"}, wide, picture), Section("Two"), Section("Three")]
    render_report(folders["demo"] / "report.html", title=f"A demo {LONG}", lead=LONG, sections=sections)
    (folders["study"] / "results.json").write_text(json.dumps(results(failed=["full"])))
    report_study(folders["study"])
    languages = ["mlt_Latn", "isl_Latn", "eng_Latn"]
    report_tuning(write_training(folders["tune"], languages), "mlt_Latn", {"Model": LONG, "Corpus": LONG})
    return {name: folder / "report.html" for name, folder in folders.items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_fits_its_window_and_has_a_heading_and_alternatives(open_page, reports, picture, name, width, dark):
    page = open_page(reports[name], width=width, dark=dark, ready="footer")
    picture(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == width
    assert page.locator("h1").count() == 1
    # Every drawing is one picture with a name, inside what a keyboard can scroll.
    for drawing in page.locator("svg, img").all():
        assert drawing.evaluate("each => each.closest('[role=img][aria-label]').ariaLabel.length") > 5
        assert drawing.evaluate("each => each.closest('.scroll').tabIndex") == 0
    assert page.locator("svg").count() == {"demo": 1, "study": 4, "tune": 1}[name]
    colours = page.evaluate(
        """() => ['color', 'backgroundColor'].map(
             name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"""
    )
    brightness = [sum(channels[:3]) for channels in colours]
    assert (brightness[0] > brightness[1]) == dark and abs(brightness[0] - brightness[1]) > 500


def test_a_table_wider_than_a_phone_scrolls_in_its_box(open_page, reports):
    page = open_page(reports["demo"], width=375, ready="footer")
    box = page.locator(".scroll").first
    assert box.evaluate("each => each.scrollWidth > each.clientWidth && each.getBoundingClientRect().right <= 375")
    name = page.locator("tbody th").first
    place = name.evaluate("each => each.getBoundingClientRect().left")
    box.evaluate("each => { each.scrollLeft = 500; }")
    # The name of a row stays where it is.
    assert name.evaluate("each => each.getBoundingClientRect().left") == place


def test_a_table_is_saved_as_csv_without_a_script(open_page, reports, tmp_path):
    page = open_page(reports["tune"], ready="footer")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as CSV (What changed)").click()
    assert download.value.suggested_filename == "what-changed.csv"
    download.value.save_as(tmp_path / "saved.csv")
    with (tmp_path / "saved.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file)) == {
            "Language": "Maltese",
            "Before": "2.000",
            "Step 40": "1.960",
            "Change": "-0.040",
        }


def test_the_first_key_leads_past_the_contents(open_page, reports):
    page = open_page(reports["study"], ready="footer")
    page.keyboard.press("Tab")
    assert page.locator(":focus").text_content() == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.locator(":focus").get_attribute("id") == "main"


def test_a_printed_report_is_dark_on_white_and_whole(open_page, reports):
    page = open_page(reports["study"], dark=True, ready="footer")
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and not page.locator(".save").first.is_visible()
    assert page.evaluate("() => getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
