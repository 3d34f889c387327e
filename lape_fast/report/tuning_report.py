"""The report of a training: one page made from what ``tune`` wrote into an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lape_fast.files import read_json
from lape_fast.report.dynamics import training_dynamics
from lape_fast.report.figures import language_label
from lape_fast.report.page import Picture, Section, Table, render_report
from lape_fast.tune import read_dynamics
from lape_fast.tune.tuning import LOG_NAME

FIGURE_NAME, REPORT_NAME = "training-dynamics.png", "report.html"


def report_tuning(folder: str | os.PathLike, language: str, origin: Mapping[str, Any]) -> None:
    """Writes ``report.html`` and the figure of the training into an adapter folder; the same files give the same bytes.

    Args:
        folder: what ``tune_language`` wrote. What it ``measure``d, if anything, were bits per byte by language.
        language: the tuned language.
        origin: what the folder does not tell, by name, such as the model and the corpus; None is left out.

    Raises:
        FileFormatError: the folder holds no training.
        TrainingError: the training recorded no loss.

    Example:
        >>> report_tuning("adapters/mlt_Latn", "mlt_Latn", {"Model": "meta-llama/Llama-3.1-8B", "Corpus": "texts/"})
    """
    folder = Path(folder)
    report, records = read_json(folder / LOG_NAME), read_dynamics(folder)
    title = f"{language_label(language)}: {report['method']}"
    picture = Picture(
        training_dynamics(records, title, language),
        "Loss, norms of the gradient and of the updates, and the change of what was measured, over the steps.",
        "Four panels over optimizer steps: loss, norm of the gradient, norm of the updates, change of the languages.",
    )
    picture.save(folder / FIGURE_NAME)
    kept = _kept(report, records)
    sections = [
        *([_measured(language, records[0]["measured"], kept)] if kept.get("measured") else []),
        Section("While training", picture=picture),
        Section("What was trained, and what it took", facts=_costs(report)),
        Section("Settings", facts=_settings(report, language, origin)),
    ]
    render_report(folder / REPORT_NAME, title=title, lead=_lead(report, language, records, kept), sections=sections)


def _kept(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the step whose values were kept."""
    step = report.get("best_step", report["steps"])
    return next((record for record in records if record["step"] == step), {})


def _lead(
    report: Mapping[str, Any], language: str, records: Sequence[Mapping[str, Any]], kept: Mapping[str, Any]
) -> str:
    sentences = [f"{report['trainable']:,} weights were trained for {report['steps']:,} steps."]
    if "best_step" in report:
        before = records[0].get("validation_loss")
        sentences.append(
            f"The values of step {report['best_step']:,} were kept, where the validation loss is "
            f"{report['validation_loss']:.3f} nats per token" + (f"; it began at {before:.3f}." if before else ".")
        )
    if kept.get("measured"):
        changes = {name: value - records[0]["measured"][name] for name, value in kept["measured"].items()}
        words = [f"{language_label(language)} {changes.pop(language):+.3f}"] if language in changes else []
        words += [f"{len(changes)} others {fmean(changes.values()):+.3f} on average"] if changes else []
        sentences.append(f"Bits per byte changed: {', '.join(words)}.")
    return " ".join(sentences)


def _measured(language: str, before: Mapping[str, float], kept: Mapping[str, Any]) -> Section:
    """The tuned language first, then the others by name."""
    names = sorted(before, key=lambda name: (name != language, language_label(name)))
    after = kept["measured"]
    rows = [
        (language_label(name), f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] - before[name]:+.3f}")
        for name in names
    ]
    header = ("Language", "Before", f"Step {kept['step']:,}", "Change")
    return Section("What changed", table=Table("Bits per byte on the validation lines; lower is better.", header, rows))


def _costs(report: Mapping[str, Any]) -> dict[str, str]:
    memory = report["memory"]
    found = {
        "Trained weights": ("{:,}", report["trainable"]),
        "Neurons": ("{:,}", report.get("neurons")),
        "Policy": ("{}", memory.get("policy")),
        "Memory planned": ("{:,.1f} MiB", _mebibytes(memory.get("predicted_bytes"))),
        f"Memory measured ({memory['measured']})": ("{:,.1f} MiB", _mebibytes(memory["measured_bytes"])),
        "Tokens per second": ("{:,.0f}", report["tokens_per_second"]),
        "Seconds of training": ("{:,.1f}", report["training_seconds"]),
        "Seconds since the last start, with measurements": ("{:,.1f}", report["seconds"]),
        "FLOPs per token": ("{:,.0f}", report["flops_per_token"]),
        "Mean training loss": ("{:.3f} nats per token", report["train_loss"]),
    }
    return {name: form.format(value) for name, (form, value) in found.items() if value is not None}


def _settings(report: Mapping[str, Any], language: str, origin: Mapping[str, Any]) -> dict[str, str]:
    named = {"Language": language, "Method": report["method"], **origin}
    named |= {name.replace("_", " ").capitalize(): value for name, value in report["settings"].items()}
    return {name: _words(value) for name, value in named.items() if value not in (None, [], ())}


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mebibytes(value: int | None) -> float | None:
    return None if value is None else value / 2**20
