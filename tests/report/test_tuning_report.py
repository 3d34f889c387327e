"""The page of a training tells what the files beside it hold, and stays text, closed and the same every time."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lape_fast.errors import FileFormatError
from lape_fast.report import report_tuning
from tests.report.samples import write_training
from tests.report.test_page import Page

HOSTILE = '"><script>alert(1)</script>&'
ORIGIN = {"Model": "some/model", "Corpus": "texts/", "Lines": None}


def made(folder: Path, language: str = "mlt_Latn", origin=ORIGIN) -> Page:
    report_tuning(folder, language, origin)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    return page


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.texts("dt"), page.texts("dd"), strict=True))


def test_the_page_tells_what_was_trained_with_what_and_what_it_took(tmp_path):
    known = facts(made(write_training(tmp_path)))
    assert known["Trained weights"] == "12,345" and known["Neurons"] == "5"
    assert known["Memory planned"] == "2.0 MiB" and known["Memory measured (allocated)"] == "1.5 MiB"
    assert known["Tokens per second"] == "1,024" and known["FLOPs per token"] == "337,152"
    assert known["Model"] == "some/model" and known["Corpus"] == "texts/"
    assert known["Learning rate"] == "0.0001" and known["Context length"] == "512"
    # What was not asked for is not there.
    assert not {"Lines", "Patience", "Report to"} & known.keys()


def test_the_kept_values_are_compared_with_those_before(tmp_path):
    """Those of step 40: the target fell by 0.04, the others rose by 0 and 0.04."""
    folder = write_training(tmp_path, languages=["mlt_Latn", "isl_Latn", "eng_Latn"])
    page = made(folder)
    assert page.texts("th", scope="col") == ["Language", "Before", "Step 40", "Change"]
    assert page.texts("th", scope="row") == ["Maltese", "English", "Icelandic"]
    cells = page.texts("td")
    assert [cells[place : place + 3] for place in (0, 3, 6)] == [
        ["2.000", "1.960", "-0.040"],
        ["2.000", "2.040", "+0.040"],
        ["2.000", "2.000", "+0.000"],
    ]
    (lead,) = page.texts("p", **{"class": "lead"})
    assert "step 40 were kept, where the validation loss is 3.500 nats per token; it began at 4.000." in lead
    assert "Maltese -0.040, 2 others +0.020 on average" in lead


def test_what_was_not_measured_is_left_out(tmp_path):
    folder = write_training(
        tmp_path, languages=[], drop=("best_step", "validation_loss", "neurons"), memory={"measured_bytes": None}
    )
    page = made(folder)
    assert "What changed" not in page.texts("h2") and not page.texts("table")
    assert page.texts("p", **{"class": "lead"}) == ["12,345 weights were trained for 80 steps."]
    assert not {"Neurons", "Memory measured (allocated)"} & facts(page).keys()


def test_hostile_names_stay_text_and_the_same_files_give_the_same_bytes(tmp_path):
    folder = write_training(tmp_path, languages=[HOSTILE, "eng_Latn"], method=HOSTILE)
    page = made(folder, HOSTILE, {"Model": HOSTILE, "Corpus": HOSTILE})
    assert not {"script", "img"} & {tag for tag, _, _ in page.elements}
    assert page.texts("h1") == [f"{HOSTILE}: {HOSTILE}"]
    assert facts(page)["Corpus"] == facts(page)["Model"] == facts(page)["Method"] == HOSTILE
    root = ElementTree.parse(folder / "training-dynamics.svg").getroot()
    assert any(each.text and "<script>" in each.text for each in root.iter())
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"report.html", "training-dynamics.png", "training-dynamics.svg"} < first.keys()
    made(folder, HOSTILE, {"Model": HOSTILE, "Corpus": HOSTILE})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_folder_without_a_training_is_named(tmp_path):
    (write_training(tmp_path) / "dynamics.jsonl").unlink()
    with pytest.raises(FileFormatError, match=r"dynamics\.jsonl does not exist"):
        report_tuning(tmp_path, "mlt_Latn", {})
    (tmp_path / "training.json").write_text(json.dumps([1])[:-1])
    with pytest.raises(FileFormatError, match=r"training\.json is not valid JSON"):
        report_tuning(tmp_path, "mlt_Latn", {})
