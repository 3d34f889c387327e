"""The report of a study: tables and figures made from ``results.json`` alone, so that it can be made again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import FileFormatError, LapeFastError
from lape_fast.files import read_json, write_json, write_text
from lape_fast.report.figures import language_label
from lape_fast.report.page import Picture, Section, Table, render_report
from lape_fast.report.study_figures import averaged_curves, language_curves, learning_rates, training_dynamics
from lape_fast.study.summary import summarise, to_csv, verdict

RESULTS_NAME, SUMMARY_NAME, TABLE_NAME, REPORT_NAME = "results.json", "summary.json", "summary.csv", "report.html"

NONE = "\N{EN DASH}"


def report_study(folder: str | os.PathLike) -> dict[str, Any]:
    """Makes the report of a study from the ``results.json`` in its folder; the same results give the same bytes.

    Args:
        folder: where ``results.json`` is, and where ``summary.json``, ``summary.csv``, ``report.html`` and the figures
            as PNG and SVG are written.

    Returns:
        The summary.

    Raises:
        FileFormatError: there are no results, or none that could be reported on.

    Example:
        >>> report_study("benchmarks/results/study")["methods"].keys()
    """
    folder = Path(folder)
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist; run the study first, or name the folder of its results.")
    results = read_json(path)
    try:
        summary = _summary(results, path)
        pictures = _pictures(summary)
        sections = _sections(results, summary, pictures)
    # Only the study writes such a file. What changed it may have changed anything in it.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        if isinstance(error, LapeFastError):
            raise
        raise FileFormatError(
            f"{path} holds no whole results of a study ({type(error).__name__}: {error!s:.100}); run the "
            "study again to have them written anew."
        ) from error
    write_json(folder / SUMMARY_NAME, summary)
    write_text(folder / TABLE_NAME, to_csv(summary))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    languages = ", ".join(map(language_label, summary["languages"]))
    render_report(
        folder / REPORT_NAME,
        title=f"{len(summary['methods'])} ways to tune {languages}",
        lead=" ".join(summary["verdict"][:1]),
        sections=sections,
    )
    return summary


def _summary(results: Mapping[str, Any], path: Path) -> dict[str, Any]:
    summary = summarise(results)
    if not any(facts["gain"] for facts in summary["methods"].values()):
        raise FileFormatError(
            f"{path} holds no run that was tested, so there is nothing to report; {len(summary['failed'])} failed."
        )
    summary["verdict"] = verdict(summary)
    return summary


def summary_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the summary table: each method at its chosen learning rate, on the test lines."""
    header = ["Method", "Trained weights", "Gain", "Rise elsewhere", "Learning rates", "Runs", "Failed"]
    rows = []
    for method, facts in summary["methods"].items():
        rates = sorted(set(facts["learning_rates"].values()))
        rows.append(
            [
                method,
                _whole(facts["trainable"]),
                interval(facts["gain"]),
                interval(facts["forgetting"]),
                ", ".join(f"{rate:g}" for rate in rates) or NONE,
                str(facts["runs"]),
                str(facts["failed"]),
            ]
        )
    return header, rows


def interval(values: Mapping[str, Any] | None) -> str:
    """A mean with the ends of its interval."""
    if values is None:
        return NONE
    return f"{values['mean']:+.3f} [{values['low']:+.3f}, {values['high']:+.3f}]"


def _pictures(summary: Mapping[str, Any]) -> dict[str, Picture]:
    """By the names of their files."""
    return {
        "curves": Picture(
            averaged_curves(summary),
            "Higher and further left is better: more gain for less harm elsewhere. The band is the interval.",
            "Curves of the gain of the target over the mean rise elsewhere, one per method.",
        ),
        "curves-by-language": Picture(
            language_curves(summary),
            "The frontier of each method with the first seed; left of 0, other languages got better too.",
            "A panel per language with a curve of gain over forgetting per method.",
        ),
        "learning-rates": Picture(
            learning_rates(summary),
            "Means over languages at each run's best measurement on the validation lines.",
            "Two panels over the learning rate: the gain of the target and the mean rise elsewhere.",
        ),
        "dynamics": Picture(
            training_dynamics(summary),
            "At the chosen learning rates, means over the languages, first seed.",
            "Four panels over tokens: gain, forgetting, training loss and gradient norm.",
        ),
    }


def _sections(results: Mapping[str, Any], summary: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Section]:
    seeds, languages = summary["seeds"], summary["languages"]
    header, rows = summary_table(summary)
    chosen = (
        f"Every learning rate was run with seed {seeds[0]}; the one with the lowest bits per byte of the target on the "
        f"validation lines was run with {len(seeds)} seed{'s' if len(seeds) > 1 else ''} and measured on the test "
        "lines. Gain is the fall of the target's bits per byte, the rise elsewhere the mean over all other measured "
        f"languages. Intervals are 95 % bootstrap intervals over {len(languages)} languages and {len(seeds)} "
        "seeds; of so few languages they are rough."
    )
    return [
        Section("What was compared", _setup(results, summary)),
        Section(
            "At the chosen learning rate",
            [chosen, "A method that gains more may only have been trained harder: compare the curves below."],
            table=Table("Bits per byte on the test lines: mean [interval].", header, rows),
        ),
        Section(
            "At equal forgetting and at equal gain",
            [
                *summary["verdict"],
                "Read off the frontiers of all measurements (learning rates and steps) on the validation lines, with "
                "straight lines between neighbours. A frontier of a seed is made of its own run at the chosen learning "
                "rate and of the first seed's runs at the others.",
            ],
            table=_levels_table(summary),
            picture=pictures["curves"],
        ),
        Section(
            "Language by language",
            [],
            table=_language_table(summary),
            picture=pictures["curves-by-language"],
        ),
        Section(
            "Subnetwork against each method",
            ["The method's value minus the subnetwork's on the same language and seed, mean [interval]."],
            table=_differences_table(summary),
        ),
        Section(
            "Learning rates",
            [],
            picture=pictures["learning-rates"],
        ),
        Section(
            "While training",
            ["How far the trained values had moved from the base at the end (Euclidean norm, mean over chosen runs):"],
            table=_changes_table(summary),
            picture=pictures["dynamics"],
        ),
        Section("Where it was forgotten", [], table=_scripts_table(summary)),
        Section("What a run costs", [], table=_costs_table(summary)),
        *([Section("Tasks", [], table=_tasks_table(results))] if results["tasks"] else []),
        *([Section("Runs that failed", [], table=_failures_table(summary))] if summary["failed"] else []),
        Section("The recipe", facts=_settings(results)),
    ]


def _setup(results: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    recipe, base, machine = results["recipe"], results["base"], results["machine"]
    training = recipe["training"]
    length = f"{training['steps']:,} steps" if training["steps"] else f"{training['tokens']:,} tokens"
    trained = (
        f" of {base['parameters']:,} parameters, trained for {base['steps']:,} steps with the targets "
        f"under-represented ({recipe['base']['target_share']:g} of their lines)"
        if "parameters" in base
        else ""
    )
    counts = ", ".join(f"{language_label(code)} {number:,}" for code, number in results["neurons"].items())
    done, failed = (sum(facts[name] for facts in summary["methods"].values()) for name in ("runs", "failed"))
    return [
        f"The base is {'a model' if trained else base['name']}{trained}. Every method is trained alike: {length} of "
        f"{training['rows_per_step']} rows of {training['context_length']} tokens, packed, loss on real tokens "
        "only, one optimizer from start to end, best measurement on the validation lines kept.",
        f"Neurons by the rule {recipe['identify']['rule']}, of {results['neurons_total']:,}: {counts}.",
        f"Change elsewhere is measured in {len(results['before']['test_others']):,} languages. {done} runs "
        f"succeeded and {failed} failed, on {machine['device']} with {machine['threads']} "
        f"{'thread' if machine['threads'] == 1 else 'threads'}, torch {machine['torch']}. In seconds of processor "
        "time: " + ", ".join(f"{name} {seconds:,.0f}" for name, seconds in summary["processor_seconds"].items()) + ".",
    ]


def _settings(results: Mapping[str, Any]) -> dict[str, str]:
    """Every setting of the recipe."""
    settings = {}
    for name, value in results["recipe"].items():
        named = value.items() if isinstance(value, dict) else [(None, value)]
        settings |= {f"{name}: {key}" if key else name: _words(each) for key, each in named if each is not None}
    return {name.replace("_", " "): words for name, words in settings.items()}


def _levels_table(summary: Mapping[str, Any]) -> Table:
    first = next(iter(summary["methods"].values()))
    header = ["Method"]
    header += [f"Gain at a rise of {float(level):g}" for level in first["at_forgetting"]]
    header += [f"Rise at {float(share):.0%} of the best gain" for share in first["at_gain"]]
    rows = []
    for method, facts in summary["methods"].items():
        cells = [interval(value) for value in facts["at_forgetting"].values()]
        cells += [_reached(value, len(summary["languages"])) for value in facts["at_gain"].values()]
        rows.append([method, *cells])
    caption = (
        "Bits per byte on the validation lines: mean [interval]; the best gain is that of any method on a language."
    )
    return Table(caption, header, rows)


def _reached(value: Mapping[str, Any] | None, languages: int) -> str:
    if value is None:
        return "not reached"
    return interval(value) + (f" in {value['languages']} of {languages}" if value["languages"] < languages else "")


def _language_table(summary: Mapping[str, Any]) -> Table:
    header = ["Method", *(f"{language_label(code)}: gain, rise" for code in summary["languages"])]
    rows = []
    for method, facts in summary["methods"].items():
        points = [facts["by_language"].get(code) for code in summary["languages"]]
        rows.append([method, *(f"{p['gain']:+.3f}, {p['forgetting']:+.3f}" if p else NONE for p in points)])
    return Table("Test lines, chosen learning rate, mean over seeds.", header, rows)


def _differences_table(summary: Mapping[str, Any]) -> Table | None:
    against = summary["against_subnetwork"]
    if not against:
        return None
    columns = [(kind, level) for kind, levels in against.items() for level in levels]
    names = {"at_forgetting": "Gain at a rise of {:g}", "at_gain": "Rise at {:.0%} of the best gain"}
    header = ["Method", *(names[kind].format(float(level)) for kind, level in columns)]
    others = [method for method in summary["methods"] if method != "subnetwork"]
    rows = [[method, *(interval(against[kind][level][method]) for kind, level in columns)] for method in others]
    return Table("A gain above 0, or a rise below 0, is in the method's favour.", header, rows)


def _changes_table(summary: Mapping[str, Any]) -> Table:
    names = sorted(
        {name for norms in summary["changes"].values() for name in norms}, key=lambda name: (name == "total", name)
    )
    rows = [
        [method, *(f"{norms[name]:.3g}" if name in norms else NONE for name in names)]
        for method, norms in summary["changes"].items()
    ]
    return Table("By projection.", ["Method", *names], rows)


def _scripts_table(summary: Mapping[str, Any]) -> Table:
    rows = [[method, interval(of["same"]), interval(of["other"])] for method, of in summary["scripts"].items()]
    header = ["Method", "The target's script", "Other scripts"]
    return Table("Mean rise on the test lines of the other languages, by their script: mean [interval].", header, rows)


def _costs_table(summary: Mapping[str, Any]) -> Table:
    header = [
        "Method",
        "Trained weights",
        "FLOPs per token",
        "Tokens per second",
        "Peak memory, MiB",
        "Seconds of a run",
    ]
    rows = [
        [
            method,
            _whole(facts["trainable"]),
            _whole(facts["flops_per_token"]),
            _whole(facts["tokens_per_second"]),
            NONE if facts["peak_bytes"] is None else f"{facts['peak_bytes'] / 2**20:,.0f}",
            _whole(facts["wall_seconds"]),
        ]
        for method, facts in summary["methods"].items()
    ]
    return Table("Means over the chosen runs; memory is the most of any.", header, rows)


def _failures_table(summary: Mapping[str, Any]) -> Table:
    rows = [
        [
            f"{each['language']} {each['method']} at {each['learning_rate']:g}, seed {each['seed']}",
            each["status"],
            each["error"],
        ]
        for each in summary["failed"]
    ]
    return Table("Each is left out of every figure above.", ["Run", "Status", "Error"], rows)


def _tasks_table(results: Mapping[str, Any]) -> Table:
    header = ["Task", "Language", "Metric", "Method", "Score", "Standard error", "Minus the base", "Documents"]
    rows = []
    for row in results["tasks"]:
        if row["why"]:
            cells = ["failed", row["adapter"], NONE, NONE, row["why"], NONE]
        else:
            numbers = [NONE if row[name] is None else f"{row[name]:.4g}" for name in ("value", "stderr", "difference")]
            cells = [row["metric"], row["adapter"], *numbers, f"{row['n']:,}"]
        rows.append([row["task"], language_label(row["language"]), *cells])
    return Table("The base and the first seed of each method at its chosen learning rate.", header, rows)


def _whole(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_words(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
