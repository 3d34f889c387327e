"""The demo, scaled down: every stage runs, and what it prints is what it measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import lape_fast.demo as demo
from lape_fast.errors import ConfigError
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.text import open_corpus
from lape_fast.tune import BaseSize

LANGUAGES = ["deu_Latn", "eng_Latn", "mlt_Latn", "rus_Cyrl"]


@pytest.fixture
def small(monkeypatch):
    """Four languages, a model of two narrow layers, a few steps; 24 lines of six languages in the last pass."""
    monkeypatch.setattr(demo, "LANGUAGES", LANGUAGES)
    monkeypatch.setattr(demo, "SIZE", BaseSize(hidden_size=32, neurons_per_layer=64, layers=2, heads=2, vocabulary=400))
    monkeypatch.setattr(demo, "BASE_SETTINGS", replace(demo.BASE_SETTINGS, context_length=64, steps=40))
    monkeypatch.setattr(
        demo, "TUNE_SETTINGS", replace(demo.TUNE_SETTINGS, context_length=64, steps=8, evaluate_every=4)
    )
    monkeypatch.setattr(demo, "TRAIN_LINES", "1-60")
    monkeypatch.setattr(demo, "TRAIN_DOCUMENTS", 60)
    monkeypatch.setattr(demo, "VALIDATION_LINES", "61-70")
    monkeypatch.setattr(demo, "TEST_LINES", "71-80")
    monkeypatch.setattr(demo, "ALL_LANGUAGES_LINES", "1-2")


def test_the_demo_writes_everything_it_promises_and_a_second_run_shows_it_again(small, tmp_path, capsys):
    output = tmp_path / "lape-demo"
    summary = demo.run_demo(output)
    printed = capsys.readouterr().out
    assert json.loads((output / "summary.json").read_text()) == summary
    counts = ActivationCounts.load(output / "identify" / "counts.safetensors")
    assert counts.languages == LANGUAGES
    assert summary["identify"]["tokens"] == int(counts.tokens.sum())
    neurons = NeuronSet.load(output / "identify" / "neurons.safetensors")
    assert summary["identify"]["per_language"] == neurons.per_language()
    everything = ActivationCounts.load(output / "all-languages-counts.safetensors")
    assert summary["all_languages"]["languages"] == len(everything.languages) == len(open_corpus("cldr").languages)
    assert len(everything.languages) >= 120
    methods = summary["tuning"]["methods"]
    assert methods["subnetwork"]["neurons"] == methods["random"]["neurons"] == neurons.count("mlt_Latn")
    for result in methods.values():
        change = result["bits_per_byte"]["mlt_Latn"] - summary["tuning"]["before"]["mlt_Latn"]
        assert result["target_change"] == pytest.approx(change)
        assert f"{change:+.3f}" in printed
    assert (output / "base" / "model.safetensors").exists()
    assert (output / "adapter-subnetwork" / "adapter_model.safetensors").exists()
    page = (output / "report.html").read_text()
    assert "Maltese" in page and page.count("<svg") == 4
    assert "lape_fast demo" in (output / "atlas.html").read_text()
    figures = {"neurons-by-layer", "ablation", "change", "learning-curve"}
    for ending in ("png", "svg"):
        assert {path.stem for path in output.glob(f"*.{ending}")} == figures
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert demo.run_demo(output) == summary
    assert "finished" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ConfigError, match="tuned mlt_Latn"):
        demo.run_demo(output, "isl_Latn", quiet=True)


def test_only_targets_can_be_tuned(tmp_path):
    with pytest.raises(ConfigError, match="not eng_Latn"):
        demo.run_demo(tmp_path / "demo", "en")
