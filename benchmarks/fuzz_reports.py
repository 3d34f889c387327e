"""Files of what was measured, which the reports, the figures and the atlas read; see ``benchmarks.fuzz_targets``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzz_sources import Sources, Target
from lape_fast.errors import ArchitectureError, LanguageError
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.report import render_atlas, report_study
from lape_fast.study import Alignment, Steering, WeightChange
from lape_fast.tune import read_dynamics
from tests.report.samples import alignment, dynamics_records, steering, weight_change

STUDY = Path(__file__).parent / "results" / "study" / "results.json"


def _result(kind: type, value: Any) -> Callable[[Path, Sources], Target]:
    """A file that a result class saves."""

    def make(folder: Path, sources: Sources) -> Target:
        folder.mkdir(parents=True, exist_ok=True)
        value.save(folder / "result.json")
        seed = (folder / "result.json").read_bytes()
        return Target("result.json", "json", [seed], lambda path: json.dumps(kind.load(path).to_json()), folder)

    return make


def _dynamics(folder: Path, sources: Sources) -> Target:
    seed = "".join(json.dumps(record) + "\n" for record in dynamics_records(3)).encode()
    return Target("dynamics.jsonl", "bytes", [seed], read_dynamics, folder)


def _study(folder: Path, sources: Sources) -> Target:
    results = json.loads(STUDY.read_text())
    target = results["recipe"]["targets"][0]
    results["recipe"]["targets"] = [target]
    results["runs"] = [run for run in results["runs"] if run["language"] == target]
    seed = json.dumps(results).encode()
    return Target("results.json", "json", [seed], lambda path: report_study(path.parent), folder)


def _atlas_neurons(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        render_atlas(folder / "atlas.html", NeuronSet.load(path))

    return Target("neurons.safetensors", "safetensors", [sources.neurons_path.read_bytes()], read, folder)


def _atlas_counts(folder: Path, sources: Sources) -> Target:
    def read(path: Path) -> None:
        counts = ActivationCounts.load(path)
        # Counts that are whole, but not those of the neurons, are refused without a path: both may be in memory.
        with contextlib.suppress(LanguageError, ArchitectureError):
            render_atlas(folder / "atlas.html", sources.neurons, counts)

    return Target("counts.safetensors", "safetensors", [sources.counts_path.read_bytes()], read, folder)


REPORTS: dict[str, Callable[[Path, Sources], Target]] = {
    "alignment": _result(Alignment, alignment(2)),
    "steering": _result(Steering, steering(3)),
    "weight change": _result(WeightChange, weight_change(2)),
    "dynamics": _dynamics,
    "atlas neurons": _atlas_neurons,
    "atlas counts": _atlas_counts,
    "study results": _study,
}
