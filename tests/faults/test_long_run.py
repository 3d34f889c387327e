"""A scaled long run: what is open stays as it is, and memory does not go up with the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.long_run import fit_slope
from lape_fast.files import read_json

ROOT = Path(__file__).parents[2]

# Allowed growth behind the warm-up, MiB: a few of the allocator's arenas of 1 MiB fill up late. The tensors of one
# forgotten batch a step would be ten times as much.
GROWTH = 16


def test_half_a_minute_of_counting_and_tuning_leaves_memory_files_and_processes_as_they_are(tmp_path):
    command = [sys.executable, "-m", "benchmarks.long_run", "--minutes", "0.5", "--json", tmp_path / "figures"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=500)
    figures = read_json(tmp_path / "figures")
    for name in ("count", "tune"):
        found = figures[name]
        assert found["samples"] > 20
        # Of open files the most depends on which moments were sampled; what was never closed is left behind a run.
        for open_ones in ("left_open", "processes", "threads"):
            early, late = found[open_ones]
            assert late <= early, (name, open_ones, found)
        early, late = found["rss_mib"]
        assert late - early < GROWTH, (name, found)


def test_a_leak_is_told_from_noise():
    times = list(range(200))
    noise = [(37 * number * number) % 11 for number in times]
    slope, error = fit_slope(times, noise)
    assert abs(slope) < 3 * error
    slope, error = fit_slope(times, [0.5 * time + each for time, each in zip(times, noise, strict=True)])
    assert slope == pytest.approx(0.5, abs=3 * error)
    assert slope > 10 * error
