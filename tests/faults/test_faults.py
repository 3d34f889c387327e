"""A scaled fault campaign: every kind of fault once or twice, and what the commands end with is what it would be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.campaign import FAULTS
from benchmarks.faults.scenarios import SCENARIOS, broken_files, contents, differences
from lape_fast.files import atomic_folder, atomic_path, read_json, remove_unfinished, write_json, write_tensors

ROOT = Path(__file__).parents[2]


def test_every_fault_has_a_command_that_it_disturbs():
    assert {fault for scenario in SCENARIOS.values() for fault in scenario.faults} == set(FAULTS)


def test_a_short_campaign_loses_nothing(tmp_path):
    """In a process of its own: what is forked must never have used a second thread."""
    command = [sys.executable, "-m", "benchmarks.faults", "--one-each", "--json", tmp_path / "faults"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    figures = read_json(tmp_path / "faults")
    assert figures["defects"] == [], done.stdout
    assert figures["faults"] >= 5 and figures["runs_finished_and_compared"] >= 2
    assert done.returncode == 0, done.stderr


def test_a_half_written_file_is_seen(tmp_path):
    write_tensors(tmp_path / "whole.safetensors", "counts", {}, {})
    write_json(tmp_path / "whole.json", {"seconds": 1.0, "tokens": 7})
    before = contents(tmp_path)
    assert broken_files(tmp_path) == []
    write_json(tmp_path / "whole.json", {"seconds": 2.0, "tokens": 7})
    assert differences(contents(tmp_path), before) == []
    write_json(tmp_path / "whole.json", {"seconds": 2.0, "tokens": 8})
    assert differences(contents(tmp_path), before) == ["/whole.json/tokens is 8 and not 7"]
    (tmp_path / "whole.json").write_text('{"tokens": ')
    (tmp_path / ".hidden.json").write_text('{"tokens": ')
    (broken,) = broken_files(tmp_path)
    assert broken.startswith("whole.json is visible and cannot be read")


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, write):
    path = tmp_path / "out"
    code = (
        "import os, sys, lape_fast.files as files\n"
        f"with files.{write.__name__}(sys.argv[1]) as temporary:\n"
        "    (temporary / 'x' if temporary.is_dir() else temporary).write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    (left,) = tmp_path.iterdir()
    remove_unfinished(path)
    assert left.exists() and left.name.startswith(".out.") and not path.exists()
    process.kill()
    process.communicate()
    assert left.exists()
    with write(path):
        pass
    assert list(tmp_path.iterdir()) == [path]
