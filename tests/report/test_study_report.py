"""The report of a study, made from hand-made results whose numbers follow from closed forms."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from lape_fast.cli import main
from lape_fast.errors import FileFormatError
from lape_fast.report import report_study
from lape_fast.study.recipe import parse_recipe
from lape_fast.study.summary import summarise

LANGUAGES, OTHERS, SEEDS = ["mlt_Latn", "kat_Geor"], ["eng_Latn", "rus_Cyrl", "ita_Latn"], [0, 1]
RATES = (1e-3, 1e-2)
FIGURES = ("curves", "curves-by-language", "learning-rates", "dynamics")

# Gain of a run that has forgotten x: the better method has a lower price.
PRICE = {"subnetwork": 4.0, "lora": 2.0}


def one_run(language: str, method: str, rate: float, seed: int) -> dict:
    """The lower rate ends at a gain of 0.1 and the higher at 0.4, both on the line gain = forgetting / price."""
    end = {1e-3: 0.1, 1e-2: 0.4}[rate] + 0.02 * seed
    points = [
        {"step": step, "tokens": 10 * step, "target": 3.0 - end * step / 4, "elsewhere": end * step / 4 / PRICE[method]}
        for step in (0, 2, 4)
    ]
    norms = {"gate": 0.3, "up": 0.4, "total": 0.5}
    records = [{"step": step, "loss": 5.0 - step, "gradient_norm": 0.5} for step in (2, 4)]
    run = {
        "language": language,
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "status": "done",
        "trainable": 1000,
        "neurons": None,
        "flops_per_token": 5e6,
        "tokens_per_second": 123.0,
        "steps": 4,
        "best_step": 4,
        "seconds": 1.0,
        "memory": {"measured_bytes": 3 * 2**20},
        "wall_seconds": 2.0,
        "processor_seconds": 2.0,
        "points": points,
        "records": records,
        "change_norm": norms,
    }
    if rate == 1e-2:
        rise = end / PRICE[method]
        bits = {"eng_Latn": 2.0 + rise, "rus_Cyrl": 2.0 + 2 * rise, "ita_Latn": 2.0}
        run["test"] = {"target": 3.5 - end, "elsewhere": rise, "others": bits, "processor_seconds": 3.0}
    return run


def results(methods=("subnetwork", "lora"), failed=()) -> dict:
    recipe = parse_recipe(
        {
            "model": "some/model",
            "text": {"corpus": "cldr", "train": "1-10", "validation": "11-20", "test": "21-30"},
            "targets": LANGUAGES,
            "others": [*LANGUAGES, *OTHERS],
            "methods": [*methods, *failed],
            "learning_rates": list(RATES),
            "seeds": SEEDS,
            "training": {"steps": 4},
            "evaluation": {"forgetting_levels": [0.02, 0.05], "gain_shares": [0.5, 1.0]},
        }
    )
    runs = []
    for language in LANGUAGES:
        for method in methods:
            runs += [one_run(language, method, rate, 0) for rate in RATES] + [one_run(language, method, 1e-2, 1)]
        for method in failed:
            chosen = {"language": language, "method": method, "learning_rate": 1e-2, "seed": 0}
            runs.append(
                {
                    **chosen,
                    "status": "out of memory",
                    "error": "OutOfMemoryError: <20 GiB & more>",
                    "processor_seconds": 1.0,
                }
            )
    before = {
        "validation_targets": dict.fromkeys(LANGUAGES, 3.0),
        "validation_others": dict.fromkeys([*LANGUAGES, *OTHERS], 2.0),
        "test_targets": dict.fromkeys(LANGUAGES, 3.5),
        "test_others": dict.fromkeys([*LANGUAGES, *OTHERS], 2.0),
    }
    return {
        "recipe": recipe.to_json(),
        "machine": {"device": "x86_64", "cores": 2, "threads": 2, "python": "3", "torch": "2", "lape_fast": "0"},
        "base": {"name": "some/model"},
        "neurons": dict.fromkeys(LANGUAGES, 10),
        "neurons_total": 100,
        "before": before,
        "runs": runs,
        "tasks": [],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results(failed=["full"])))
    return tmp_path


def test_the_chosen_point_is_the_mean_over_languages_and_seeds_on_the_test_lines():
    summary = summarise(results())
    for method, price in PRICE.items():
        facts = summary["methods"][method]
        assert facts["gain"]["mean"] == pytest.approx(0.41)
        assert facts["forgetting"]["mean"] == pytest.approx(0.41 / price, abs=1e-6)
        assert facts["learning_rates"] == dict.fromkeys(LANGUAGES, 1e-2)
        assert (facts["runs"], facts["failed"], facts["trainable"]) == (6, 0, 1000)
        assert facts["gain"]["languages"] == 2
        assert facts["gain"]["values"] == 4
        # Seeds 0 and 1 end at 0.4 and 0.42.
        assert 0.4 <= facts["gain"]["low"] <= 0.41 <= facts["gain"]["high"] <= 0.42


def test_equal_forgetting_and_equal_gain_are_read_off_the_straight_lines():
    summary = summarise(results())
    for method, price in PRICE.items():
        facts = summary["methods"][method]
        # All points lie on gain = forgetting * price.
        assert facts["at_forgetting"]["0.02"]["mean"] == pytest.approx(0.02 * price, abs=1e-6)
        assert facts["at_forgetting"]["0.05"]["mean"] == pytest.approx(0.05 * price, abs=1e-6)
        # The best gain of a language is that of seed 1, 0.42.
        assert facts["at_gain"]["0.5"]["mean"] == pytest.approx(0.21 / price, abs=1e-6)
        # The first seed ends at 0.4 and does not reach it, so no language does.
        assert facts["at_gain"]["1"] is None
    assert summary["best_gains"] == dict.fromkeys(LANGUAGES, 0.42)
    difference = summary["against_subnetwork"]["at_forgetting"]["0.05"]["lora"]
    assert difference["mean"] == difference["low"] == difference["high"] == pytest.approx(-0.1, abs=1e-6)


def test_forgetting_is_told_apart_by_script():
    """For Maltese, English and Italian share its script, with rises of x and 0; for Georgian nothing does."""
    facts = summarise(results())["scripts"]["lora"]
    rise = 0.41 / 2
    assert facts["same"]["languages"] == 1
    assert facts["same"]["mean"] == pytest.approx(rise / 2, abs=1e-6)
    # Maltese: Russian, 2 x. Georgian: the mean of x, 2 x and 0.
    assert facts["other"]["mean"] == pytest.approx((2 * rise + rise) / 2, abs=1e-6)


def test_the_verdict_says_who_is_best_and_by_how_much_the_subnetwork_is_not(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    best = report_study(tmp_path)["verdict"]
    assert any("at most 0.05" in each and "subnetwork gains most (0.200" in each for each in best)
    PRICE.update(subnetwork=2.0, lora=4.0)
    try:
        (tmp_path / "results.json").write_text(json.dumps(results()))
        worse = report_study(tmp_path)["verdict"]
    finally:
        PRICE.update(subnetwork=4.0, lora=2.0)
    assert any(
        "lora gains most (0.200" in each and "the subnetwork has 0.100, a difference of +0.100 [+0.100, +0.100]" in each
        for each in worse
    )


def test_the_same_results_give_the_same_bytes_and_every_figure(folder):
    def made() -> dict[str, str]:
        report_study(folder)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    first = made()
    assert first.keys() == {
        *("results.json", "report.html", "summary.json", "summary.csv"),
        *(f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")),
    }
    assert made() == first


def test_hostile_names_stay_text_on_the_page_and_in_the_figures(folder):
    hostile = '"><script>alert(1)</script>&'
    held = results()
    held["base"]["name"] = held["recipe"]["text"]["corpus"] = hostile
    text = json.dumps(held).replace('"lora"', json.dumps(hostile))
    (folder / "results.json").write_text(text.replace('"mlt_Latn"', json.dumps(f"{hostile}_Latn")))
    report_study(folder)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;") > 10
    for name in FIGURES:
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert any(each.text and "<script>" in each.text for each in root.iter())


def test_the_page_is_complete_in_itself_and_tells_what_the_files_beside_it_hold(folder):
    summary = report_study(folder)
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert page.count("<svg") == 4
    assert summary == json.loads((folder / "summary.json").read_text())
    gain = summary["methods"]["subnetwork"]["gain"]
    assert f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" in page
    with (folder / "summary.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["lora"]["gain at forgetting 0.05"]) == pytest.approx(0.1)
    assert float(rows["subnetwork"]["gain, low"]) == gain["low"]
    # Formulas in labels would be drawn as text.
    assert "mathdefault" not in page


def test_the_time_of_everything_is_told(folder):
    # 12 runs of 2 s and 2 of 1 s, 8 tests of 3 s.
    assert report_study(folder)["processor_seconds"] == {"base": 0.0, "runs": 26.0, "tests": 24.0}


def test_failed_runs_are_rows_and_their_errors_are_escaped(folder):
    summary = report_study(folder)
    page = (folder / "report.html").read_text()
    assert summary["methods"]["full"]["failed"] == 2
    assert summary["methods"]["full"]["gain"] is None
    assert "kat_Geor full at 0.01, seed 0" in page
    assert "&lt;20 GiB &amp; more&gt;" in page


def test_tasks_are_rows_and_so_are_those_that_failed(folder):
    row = {
        "task": "letters",
        "language": "mlt_Latn",
        "adapter": "lora",
        "metric": "acc",
        "value": 0.4375,
        "stderr": 0.1,
    }
    scored = {**row, "n": 16, "difference": 0.125, "difference_stderr": 0.05, "why": None}
    failed = {
        **dict.fromkeys(scored),
        "task": "far",
        "language": "mlt_Latn",
        "adapter": "base",
        "why": "It is offline.",
    }
    (folder / "results.json").write_text(json.dumps(results() | {"tasks": [scored, failed]}))
    report_study(folder)
    page = (folder / "report.html").read_text()
    assert "0.4375" in page and "0.125" in page and "It is offline." in page


def test_a_study_that_is_not_over_can_be_reported_on(tmp_path):
    halfway = results()
    halfway["runs"] = [run for run in halfway["runs"] if run["language"] == "mlt_Latn"][:4]
    (tmp_path / "results.json").write_text(json.dumps(halfway))
    summary = report_study(tmp_path)
    assert summary["methods"]["subnetwork"]["gain"]["languages"] == 1
    assert summary["methods"]["lora"]["gain"] is None


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(FileFormatError, match="does not exist; run the study first"):
        report_study(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results() | {"runs": []}))
    with pytest.raises(FileFormatError, match="no run that was tested"):
        report_study(tmp_path)


def test_the_command_makes_the_report_again_without_running_anything(folder, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: some/model\ntargets: [mlt_Latn]\ntraining: {steps: 4}\n"
        "text: {corpus: cldr, train: 1-10, validation: 11-20, test: 21-30}\n"
    )
    arguments = ["lape-fast", "study", str(recipe), "--report", str(folder), "--report-only"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "subnetwork gains most" in printed
    assert "+0.410" in printed
