"""Writes the tables of README.md out of the files in benchmarks/results, between lines that name them.

python -m benchmarks.tables            write them
python -m benchmarks.tables --check    fail if README.md says anything else than the files
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import STAGES
from benchmarks.gpu.goals import GOALS, worst_values
from lape_fast.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured"

# What the tables call a row of the files, in their order; ours is set in bold.
COUNTING = {
    "stock": "stock",
    "boolean-hook": "boolean hook",
    "published": "the published scripts' operations",
    "ours": "**ours**, the same layers",
    "ours-identify": "**ours**, as `identify` runs it (last projections and norm left out)",
}
TRAINING = {
    "floor": "floor",
    "ours": "**ours** (`save`)",
    "ours-tune": "**ours** as `tune` runs it (`save`, loss without logits)",
    "ours-recompute": "**ours** (`recompute`)",
    "ours-checkpoint": "**ours** (`checkpoint`)",
    "lora-qv": "LoRA r16 on queries and values (PEFT's default)",
    "lora": "LoRA r16 on all linear layers (PEFT)",
    "clone-scatter": "clone and scatter (the published scripts)",
    "masked": "FFN gradients times a mask",
    "ffn": "all FFN weights",
    "full": "all weights",
}


# Folders of results that are of no GPU.
NO_GPU = ("cpu", "static", "study")


def counting_table(results: Path) -> str:
    """What counting costs on the CPU."""
    lines = [
        [
            COUNTING.get(row["name"], row["name"]),
            f"{row['step_ms']:,.0f} ms",
            bold_if_ours(row["name"], f"{row['ratio_to_stock']:.3f}"),
            interval(row, "stock", 3),
        ]
        for row in in_order(read_json(results / "cpu" / "count_overhead.json"), COUNTING)
    ]
    return table(["", "step", "x stock", "95 %"], lines)


def training_table(results: Path) -> str:
    """A training step on the CPU."""
    lines = [
        [
            TRAINING.get(row["name"], row["name"]),
            f"{row['step_ms']:,.0f} ms",
            # Bold where ours is as fast as the floor.
            bold_if_ours(row["name"] if row["ratio_to_floor"] <= 1 else "", f"{row['ratio_to_floor']:.3f}"),
            interval(row, "floor", 2),
            f"{row['flops_per_token'] / 1e6:,.0f}",
            f"{row['saved_bytes_per_token_layer'] / 1e3:,.1f} kB",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['trainable'] / 1e6:,.1f} M" if row["trainable"] else "0",
        ]
        for row in in_order(read_json(results / "cpu" / "train_step.json"), TRAINING)
    ]
    headings = ["", "step", "x floor", "95 %", "MFLOP per token", "kept for backward, per token and layer"]
    return table([*headings, "live at the peak", "trained"], lines)


def goals_table(results: Path) -> str:
    """What is to be reached on a GPU, and what was; bold where it was reached."""
    gpus = gpu_results(results)
    columns = [(machine["device"], worst_values(rows)) for machine, rows in gpus] or [("measured", {})]
    lines = []
    for name, goal in GOALS.items():
        reached = [
            NOT_MEASURED if name not in values else shown_value(goal.form(values[name]), goal.reached(values[name]))
            for _, values in columns
        ]
        lines.append([goal.text, f"{goal.bound} {goal.form(goal.limit)}", *reached])
    return table(["", "goal", *(device for device, _ in columns)], lines)


def shown_value(text: str, reached: bool) -> str:
    """Bold where the goal is reached."""
    return f"**{text}**" if reached else text


def gpu_results(results: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of each GPU: the facts of its machine, and the rows of all stages, at the models' true sizes."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and path.name not in NO_GPU):
        paths = [folder / f"{name}.json" for name in STAGES]
        stages = [stage for stage in map(read_json, filter(Path.exists, paths)) if stage["settings"]["size"] == "true"]
        if stages:
            found.append((stages[-1]["machine"], [row for stage in stages for row in stage["rows"]]))
    return found


TABLES: dict[str, Callable[[Path], str]] = {
    "counting": counting_table,
    "training-step": training_table,
    "gpu-goals": goals_table,
}


def in_order(rows: Iterable[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows as a table of names has them; what it does not name comes last."""
    order = list(names)
    return sorted(rows, key=lambda row: order.index(row["name"]) if row["name"] in names else len(order))


def bold_if_ours(name: str, value: str) -> str:
    """Bold in a row of ours."""
    return f"**{value}**" if name.startswith("ours") else value


def interval(row: Mapping[str, Any], baseline: str, digits: int) -> str:
    """The interval of a ratio; nothing for the baseline's own."""
    if row["name"] == baseline:
        return ""
    low, high = row["ratio_ci"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join(re.sub(r" +", " ", f"| {' | '.join(cells)} |") for cells in rows)


def with_tables(text: str, results: Path) -> str:
    """A document with its tables made anew; a table stands between its two marks.

    Raises:
        ValueError: a table is marked that does not exist, or one is not marked exactly once.
    """
    for name, make in TABLES.items():
        start, end = f"<!-- table:{name} -->", "<!-- /table -->"
        if text.count(start) != 1:
            raise ValueError(f"The mark {start} stands {text.count(start)} times in the document; write it once.")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make(results)}\n{end}{rest.partition(end)[2]}"
    unknown = set(re.findall(r"<!-- table:(.+?) -->", text)) - set(TABLES)
    if unknown:
        raise ValueError(f"There is no table {sorted(unknown)[0]!r}; choose one of {', '.join(TABLES)}.")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the tables.

    Returns:
        0, or 1 if a check finds others than the files give.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    parser.add_argument("--document", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    options = parser.parse_args(arguments)
    old = options.document.read_text(encoding="utf-8")
    new = with_tables(old, options.results)
    if options.check and new != old:
        sys.stderr.write(f"The tables of {options.document.name} are out of date; run `make tables`.\n")
        return 1
    if new != old:
        write_text(options.document, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
