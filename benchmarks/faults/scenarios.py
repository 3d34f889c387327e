"""What is disturbed: commands on a tiny model and corpus, and what of their results has to be the same again."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lape_fast.files import read_json, read_metadata, read_safetensors

LANGUAGES = ("cym_Latn", "eng_Latn", "isl_Latn", "kat_Geor", "mlt_Latn")
LINES = (40, 25, 3, 60, 33)
RULE = "lape:top_rate=0.5,filter_rate=0.5,activation_bar=0.5"

RECIPE = """\
model: {folder}/base
text: {{corpus: {folder}/texts, train: 1-20, validation: 21-23, test: 24-25}}
targets: [mlt_Latn]
others: [cym_Latn, kat_Geor]
identify: {{rule: "{rule}", languages: [cym_Latn, kat_Geor, mlt_Latn], context_length: 48}}
methods: [subnetwork, lora]
learning_rates: [1e-2, 1e-3]
seeds: [0, 1]
training: {{steps: 4, rows_per_step: 2, context_length: 32}}
evaluation: {{other_lines: 2, test_other_lines: 2, context_length: 32, batch_tokens: 64}}
"""

# What no two runs have in common.
TIMES = ("speed", "measured_bytes", "peak_bytes", "total_flos", "date")
TIME_ENDINGS = ("seconds", "_per_second", "_runtime")

# Made of results that are compared, times included.
MADE = ("report.html", "summary.csv")


@dataclass(frozen=True)
class Scenario:
    """A command and the faults that it is given.

    Attributes:
        command: its arguments, for the folder of the inputs and that of its outputs.
        faults: names of ``FAULTS``.
        processes: joined as by ``torchrun``.
    """

    command: Callable[[Path, Path], Sequence[str | Path]]
    faults: tuple[str, ...]
    processes: int = 1


def _count(inputs: Path, outputs: Path) -> list[str | Path]:
    return [
        *(
            "count",
            "--model",
            inputs / "base",
            "--corpus",
            inputs / "texts",
            "--output",
            outputs / "counts.safetensors",
        ),
        *("--context-length", "48", "--batch-tokens", "96", "--shards-per-language", "2", "--workers", "2"),
        *("--checkpoint-minutes", "0", "--until-stable", "0.3", "--rule", RULE),
    ]


def _tune(inputs: Path, outputs: Path, *options: str) -> list[str | Path]:
    return [
        *("tune", "--model", inputs / "base", "--corpus", inputs / "texts", "--language", "mlt_Latn"),
        *("--neurons", inputs / "out" / "neurons.safetensors", "--output", outputs / "adapter"),
        *("--context-length", "32", "--rows-per-step", "4", "--steps", "10", "--learning-rate", "0.01", *options),
    ]


def _publish(inputs: Path, outputs: Path) -> list[str | Path]:
    out = inputs / "out"
    return ["publish", outputs / "release", "--counts", out / "counts.safetensors", "--neurons", out / NEURONS]


def _study(inputs: Path, outputs: Path) -> list[str | Path]:
    return ["study", inputs / "recipe.yaml", "--output", outputs / "study"]


NEURONS = "neurons.safetensors"
ALONE = ("kill", "terminate", "interrupt", "disk")

# A further command is one more row; its inputs are made by ``make_inputs``.
SCENARIOS = {
    "count": Scenario(_count, (*ALONE, "worker")),
    "count on 2 processes": Scenario(_count, (*ALONE, "worker", "rank"), processes=2),
    "tune": Scenario(lambda *folders: _tune(*folders, "--save-every", "2"), ALONE),
    "tune with validation": Scenario(
        lambda *folders: _tune(*folders, "--lines", "1-25", "--validation-lines", "26-33", "--evaluate-every", "2"),
        ALONE,
    ),
    "tune on 2 processes": Scenario(
        lambda *folders: _tune(*folders, "--save-every", "2"), (*ALONE, "rank"), processes=2
    ),
    "publish": Scenario(_publish, ALONE),
    "study": Scenario(_study, ALONE),
}


def run_command(arguments: Sequence[str | Path]) -> None:
    """What ``lape-fast`` does with these arguments."""
    from lape_fast.cli import main

    sys.argv = ["lape-fast", *map(str, arguments)]
    main()


def make_inputs(folder: Path) -> None:
    """A base, text in five languages of uneven size, and the counts and neurons that ``identify`` finds in it."""
    from tests.tiny_models import save_tiny

    save_tiny(folder / "base")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    for language, size in zip(LANGUAGES, LINES, strict=True):
        lines = [f"{language} {draw.random()} {number}" for number in range(size)]
        (folder / "texts" / f"{language}.txt").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, rule=RULE))
    run_command(
        [
            *("identify", "--model", folder / "base", "--corpus", folder / "texts", "--output", folder / "out"),
            *("--context-length", "48", "--rule", RULE),
        ]
    )


def contents(path: Path) -> dict[str, Any]:
    """Everything in a file or a folder but times, by the path inside it: tensors by their hash, JSON by its values."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if not each.is_dir())
    return {str(each.relative_to(path)): _content(each) for each in files}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        tensors = {
            name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]
            for name, tensor in read_safetensors(path).items()
        }
        return [tensors, _without_times(_metadata(path))]
    if path.suffix == ".json":
        return _without_times(read_json(path))
    if path.suffix == ".jsonl":
        # A log that is appended to is whole up to its last line end.
        return [_without_times(json.loads(line)) for line in path.read_text().rpartition("\n")[0].splitlines()]
    return path.name if path.name in MADE else hashlib.sha256(path.read_bytes()).hexdigest()


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        ours = "schema_version" in (file.metadata() or {})
        return read_metadata(path) if ours else file.metadata() or {}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_times(each)
            for name, each in value.items()
            if name not in TIMES and not name.endswith(TIME_ENDINGS)
        }
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Where two results differ, in words."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return [
            each
            for name in sorted({*found, *expected})
            for each in differences(found.get(name), expected.get(name), f"{place}/{name}")
        ]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [each for number, pair in pairs for each in differences(*pair, f"{place}/{number}")]
    return [] if found == expected else [f"{place} is {str(found)[:200]} and not {str(expected)[:200]}"]


def broken_files(folder: Path) -> list[str]:
    """The files of a folder that are neither whole nor marked as unfinished."""
    from lape_fast.tune.training import is_complete

    broken = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        # The Trainer's checkpoint is taken as a whole or not at all.
        checkpoint = next((each for each in path.parents if each.name.startswith("checkpoint-")), None)
        if hidden or not path.is_file() or (checkpoint and not is_complete(checkpoint)):
            continue
        try:
            _content(path)
        except Exception as error:
            broken.append(f"{path.relative_to(folder)} is visible and cannot be read: {error}")
    return broken
