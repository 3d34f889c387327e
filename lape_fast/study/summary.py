"""What a study's results say: every number of its table and figures, computed from ``results.json`` alone."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from lape_fast.study.curves import Frontier, bootstrap, bootstrap_band
from lape_fast.study.runs import DONE

SUBNETWORK = "subnetwork"
GRID = 41

# Columns of the table: of the training report, the mean over a method's chosen runs.
COSTS = ("trainable", "flops_per_token", "tokens_per_second", "wall_seconds")


class Results:
    """``results.json`` as a summary asks for it."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.recipe, self.before = results["recipe"], results["before"]
        self.methods: list[str] = self.recipe["methods"]
        self.languages: list[str] = self.recipe["targets"]
        self.runs = [run for run in results["runs"] if run["status"] == DONE]
        self.failed = [run for run in results["runs"] if run["status"] != DONE]

    def of(self, method: str, language: str | None = None) -> list[dict[str, Any]]:
        """The runs of a method that succeeded."""
        return [run for run in self.runs if run["method"] == method and language in (None, run["language"])]

    def chosen(self, method: str, language: str | None = None) -> list[dict[str, Any]]:
        """Those at the chosen learning rate, a run per seed, tested."""
        return [run for run in self.of(method, language) if "test" in run]

    def measured(self, method: str) -> list[str]:
        """The languages that a method has a tested run of."""
        return [language for language in self.languages if self.chosen(method, language)]

    def points(self, run: Mapping[str, Any]) -> list[tuple[float, float]]:
        """(gain, forgetting) at every measurement of a run, on validation lines."""
        start = self.before["validation_targets"][run["language"]]
        return [(start - point["target"], point["elsewhere"]) for point in run["points"]]

    def test_point(self, run: Mapping[str, Any]) -> tuple[float, float]:
        """(gain, forgetting) of a chosen run on the test lines."""
        return self.before["test_targets"][run["language"]] - run["test"]["target"], run["test"]["elsewhere"]

    def frontiers(self, method: str, language: str) -> dict[int, Frontier]:
        """The frontier of every seed: its own run at the chosen rate, and the first seed's at the others."""
        chosen = self.chosen(method, language)
        rates = {run["learning_rate"] for run in chosen}
        others = [run for run in self.of(method, language) if run["learning_rate"] not in rates]
        shared = [point for run in others for point in self.points(run)]
        return {run["seed"]: Frontier.of([*shared, *self.points(run)]) for run in chosen}


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a study's results.

    Args:
        results: what ``run_study`` returned or ``results.json`` holds.

    Returns:
        ``methods``: per method what its runs cost, its gain and forgetting at the chosen learning rate on the test
        lines, and on the validation lines its forgetting at equal gain (``at_gain``) and its gain at equal forgetting
        (``at_forgetting``), each a mean with the ends of its interval; ``against_subnetwork``: the paired differences;
        ``curves``: gain over forgetting, averaged and by language; ``sweep``: both by learning rate; ``dynamics``: over
        tokens; ``changes``: how far weights moved; ``scripts``: forgetting by script; ``processor_seconds``;
        ``failed``.

    Example:
        >>> summarise(read_json("results.json"))["methods"]["subnetwork"]["gain"]
    """
    found = Results(results)
    levels = found.recipe["evaluation"]
    fronts = {
        method: {language: found.frontiers(method, language) for language in found.measured(method)}
        for method in found.methods
    }
    best_gains = {
        language: max(
            (front.gain[-1] for of in fronts.values() for front in of.get(language, {}).values()), default=0.0
        )
        for language in found.languages
    }

    def at_gain(share: float) -> Callable[[str, Frontier], float | None]:
        return lambda language, front: front.forgetting_at(share * best_gains[language])

    def at_forgetting(level: float) -> Callable[[str, Frontier], float | None]:
        return lambda _, front: front.gain_at(level)

    comparisons = {
        "at_forgetting": {f"{level:g}": at_forgetting(level) for level in levels["forgetting_levels"]},
        "at_gain": {f"{share:g}": at_gain(share) for share in levels["gain_shares"]},
    }
    values = {
        kind: {
            level: {method: _values(fronts[method], read) for method in found.methods}
            for level, read in by_level.items()
        }
        for kind, by_level in comparisons.items()
    }
    return {
        "languages": found.languages,
        "seeds": found.recipe["seeds"],
        "best_gains": _rounded(best_gains),
        "methods": {
            method: {
                **_costs(found, method),
                **_chosen_point(found, method),
                **{
                    kind: {level: _interval(found, by_method[method]) for level, by_method in by_level.items()}
                    for kind, by_level in values.items()
                },
            }
            for method in found.methods
        },
        "against_subnetwork": {
            kind: {
                level: {
                    method: _interval(found, _differences(by_method[SUBNETWORK], by_method[method]))
                    for method in found.methods
                    if method != SUBNETWORK
                }
                for level, by_method in by_level.items()
            }
            for kind, by_level in values.items()
            if SUBNETWORK in found.methods
        },
        "curves": _curves(found, fronts),
        "sweep": _sweep(found),
        "dynamics": {method: _dynamics(found, method) for method in found.methods},
        "changes": {method: _changes(found, method) for method in found.methods},
        "scripts": _scripts(found),
        "processor_seconds": _processor_seconds(results),
        "failed": [
            {name: run[name] for name in ("language", "method", "learning_rate", "seed", "status", "error")}
            for run in found.failed
        ],
    }


def _values(fronts: Mapping[str, Mapping[int, Frontier]], read) -> dict[str, dict[int, float]]:
    """What is read off every frontier, for the languages in which every seed reaches the level."""
    found = {
        language: {seed: read(language, front) for seed, front in by_seed.items()}
        for language, by_seed in fronts.items()
    }
    return {language: by_seed for language, by_seed in found.items() if None not in by_seed.values()}


def _differences(
    first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]
) -> dict[str, dict[int, float]]:
    """Second minus first, for the languages and seeds that both have."""
    both = {
        language: {seed: second[language][seed] - value for seed, value in by_seed.items() if seed in second[language]}
        for language, by_seed in first.items()
        if language in second
    }
    return {language: by_seed for language, by_seed in both.items() if by_seed}


def _interval(found: Results, values: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """The interval over the languages that there are values of; None where there are none."""
    if not values:
        return None
    interval = bootstrap([list(values[language].values()) for language in found.languages if language in values])
    return _rounded(asdict(interval))


def _costs(found: Results, method: str) -> dict[str, Any]:
    runs = found.chosen(method)
    costs: dict[str, Any] = {
        name: fmean(known) if (known := [run[name] for run in runs if run.get(name) is not None]) else None
        for name in COSTS
    }
    peaks = [run["memory"]["measured_bytes"] for run in runs if (run.get("memory") or {}).get("measured_bytes")]
    failed = sum(run["method"] == method for run in found.failed)
    rates = {language: found.chosen(method, language)[0]["learning_rate"] for language in found.measured(method)}
    return {
        **_rounded(costs),
        "peak_bytes": max(peaks, default=None),
        "runs": len(found.of(method)),
        "failed": failed,
        "learning_rates": rates,
    }


def _chosen_point(found: Results, method: str) -> dict[str, Any]:
    points = {
        language: {run["seed"]: found.test_point(run) for run in found.chosen(method, language)}
        for language in found.measured(method)
    }
    by_language = {
        language: {"gain": fmean(p[0] for p in by_seed.values()), "forgetting": fmean(p[1] for p in by_seed.values())}
        for language, by_seed in points.items()
    }
    gains, forgettings = (
        {language: {seed: point[place] for seed, point in by_seed.items()} for language, by_seed in points.items()}
        for place in (0, 1)
    )
    return {
        "gain": _interval(found, gains),
        "forgetting": _interval(found, forgettings),
        "by_language": _rounded(by_language),
    }


def _curves(found: Results, fronts: Mapping[str, Mapping[str, Mapping[int, Frontier]]]) -> dict[str, Any]:
    """Gain over forgetting from none to what the chosen runs forget: averaged with a band, and per language."""
    ends = [front.forgetting[-1] for of in fronts.values() for by_seed in of.values() for front in by_seed.values()]
    # Half of the frontiers end before it: beyond, most curves are flat.
    end = float(np.median(ends)) if ends else 0.0
    grid = np.linspace(0.0, max(end, 1e-3), GRID)
    averaged = {}
    for method, of in fronts.items():
        curves = [[[front.gain_at(x) for x in grid] for front in by_seed.values()] for by_seed in of.values()]
        if curves:
            mean, low, high = bootstrap_band(curves)
            averaged[method] = {
                "mean": mean.tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
                "languages": len(curves),
            }
    by_language = {
        language: {
            method: {"forgetting": list(front.forgetting), "gain": list(front.gain)}
            for method, of in fronts.items()
            if language in of
            for front in [of[language][min(of[language])]]
        }
        for language in found.languages
    }
    return _rounded({"grid": grid.tolist(), "averaged": averaged, "by_language": by_language})


def _processor_seconds(results: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of processor time, of all threads: of the base, if it was trained here, the runs and their tests."""
    tests = [run["test"] for run in results["runs"] if "test" in run]
    return {
        "base": round(results["base"].get("processor_seconds", 0.0), 1),
        "runs": round(sum(run["processor_seconds"] for run in results["runs"]), 1),
        "tests": round(sum(test["processor_seconds"] for test in tests), 1),
    }


def _sweep(found: Results) -> dict[str, list[dict[str, Any]]]:
    """Per method and rate the means over languages at the best measurement of the first seed's runs."""
    table: dict[str, list[dict[str, Any]]] = {}
    for method in found.methods:
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for run in found.of(method):
            if run["seed"] == found.recipe["seeds"][0]:
                by_rate.setdefault(run["learning_rate"], []).append(max(found.points(run)))
        table[method] = [
            {"learning_rate": rate, "gain": fmean(p[0] for p in points), "forgetting": fmean(p[1] for p in points)}
            | {"languages": len(points)}
            for rate, points in sorted(by_rate.items())
        ]
    return {
        method: [{**_rounded(row), "learning_rate": row["learning_rate"]} for row in rows]
        for method, rows in table.items()
    }


def _dynamics(found: Results, method: str) -> dict[str, list[dict[str, float]]]:
    """Means over the first seed's chosen runs, one per language: what was measured, and what the optimizer did."""
    runs = [run for run in found.chosen(method) if run["seed"] == found.recipe["seeds"][0]]
    measured: dict[int, list[tuple[float, float]]] = {}
    trained: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for point, pair in zip(run["points"], found.points(run), strict=True):
            measured.setdefault(point["tokens"], []).append(pair)
        per_step = run["points"][-1]["tokens"] // max(1, run["points"][-1]["step"])
        for record in run["records"]:
            pair = (record["loss"], record["gradient_norm"])
            trained.setdefault(record["step"] * per_step, []).append(pair)

    def means(by_tokens: Mapping[int, list[tuple[float, float]]], *names: str) -> list[dict[str, float]]:
        # Where one language stopped earlier, the mean would jump.
        whole = {tokens: pairs for tokens, pairs in sorted(by_tokens.items()) if len(pairs) == len(runs)}
        return [
            {"tokens": tokens, **{name: fmean(pair[place] for pair in pairs) for place, name in enumerate(names)}}
            for tokens, pairs in whole.items()
        ]

    return _rounded(
        {"measured": means(measured, "gain", "forgetting"), "trained": means(trained, "loss", "gradient_norm")}
    )


def _changes(found: Results, method: str) -> dict[str, float]:
    """The norm of the change of the trained values at the end, by projection, as a mean over chosen runs."""
    norms: dict[str, list[float]] = {}
    for run in found.chosen(method):
        for name, norm in run["change_norm"].items():
            norms.setdefault(name, []).append(norm)
    return _rounded({name: fmean(values) for name, values in norms.items()})


def _scripts(found: Results) -> dict[str, Any]:
    """Per method the mean change of other languages in the target's script, and in other scripts, on test lines."""
    before = found.before["test_others"]
    table = {}
    for method in found.methods:
        shares: dict[str, dict[str, dict[int, float]]] = {"same": {}, "other": {}}
        for run in found.chosen(method):
            script = run["language"].partition("_")[2]
            groups: dict[str, list[float]] = {"same": [], "other": []}
            for language, bits in run["test"]["others"].items():
                same = language.partition("_")[2] == script
                groups["same" if same else "other"].append(bits - before[language])
            for name, changes in groups.items():
                if changes:
                    shares[name].setdefault(run["language"], {})[run["seed"]] = fmean(changes)
        table[method] = {name: _interval(found, values) for name, values in shares.items()}
    return table


def to_csv(summary: Mapping[str, Any]) -> str:
    """The table of a summary: a row per method, each mean with the ends of its interval."""
    rows = []
    for method, facts in summary["methods"].items():
        row: dict[str, Any] = {
            "method": method,
            **{name: facts[name] for name in ("runs", "failed", *COSTS, "peak_bytes")},
        }
        measured = {"gain": facts["gain"], "forgetting": facts["forgetting"]}
        measured |= {f"gain at forgetting {level}": value for level, value in facts["at_forgetting"].items()}
        measured |= {
            f"forgetting at {float(level):.0%} of the best gain": value for level, value in facts["at_gain"].items()
        }
        for name, interval in measured.items():
            for end in ("mean", "low", "high", "languages"):
                row[name if end == "mean" else f"{name}, {end}"] = interval[end] if interval else ""
        rows.append(row)
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Who gains most at equal forgetting and forgets least at equal gain, level by level, and by how much."""
    sentences = []
    for level, _ in _levels(summary, "at_forgetting"):
        means = _means(summary, "at_forgetting", level)
        if means:
            best = max(means, key=means.__getitem__)
            sentences.append(
                f"Where others may get worse by at most {float(level):g} bits per byte on average, {best} gains most "
                f"({means[best]:.3f} bits per byte)" + _beside(summary, "at_forgetting", level, best, means) + "."
            )
    for level, _ in _levels(summary, "at_gain"):
        means = _means(summary, "at_gain", level)
        complete = {
            m: v
            for m, v in means.items()
            if summary["methods"][m]["at_gain"][level]["languages"] == len(summary["languages"])
        }
        if complete:
            best = min(complete, key=complete.__getitem__)
            sentences.append(
                f"At {float(level):.0%} of the best gain of any method, {best} costs others least "
                f"({complete[best]:+.3f} bits per byte)" + _beside(summary, "at_gain", level, best, complete) + "."
            )
    return sentences


def _levels(summary: Mapping[str, Any], kind: str) -> Sequence[tuple[str, Any]]:
    return list(next(iter(summary["methods"].values()))[kind].items())


def _means(summary: Mapping[str, Any], kind: str, level: str) -> dict[str, float]:
    return {method: facts[kind][level]["mean"] for method, facts in summary["methods"].items() if facts[kind][level]}


def _beside(summary: Mapping[str, Any], kind: str, level: str, best: str, means: Mapping[str, float]) -> str:
    """How the subnetwork compares with the best."""
    if best == SUBNETWORK or SUBNETWORK not in summary["methods"]:
        return ""
    if SUBNETWORK not in means:
        return f"; the {SUBNETWORK} does not reach it in every language"
    difference = summary["against_subnetwork"][kind][level][best]
    return (
        f"; the {SUBNETWORK} has {means[SUBNETWORK]:.3f}, a difference of {difference['mean']:+.3f} "
        f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
    )


def _rounded(value: Any, digits: int = 6) -> Any:
    """Floats to so many decimals, which is far behind what is measured."""
    if isinstance(value, Mapping):
        return {name: _rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each, digits) for each in value]
    if isinstance(value, float):
        return round(value, digits) + 0.0 if math.isfinite(value) else None
    return value
