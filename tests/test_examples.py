"""The examples run as they are given, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lape_fast.identify import NeuronSet
from tests.tiny_models import save_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments) -> str:
    command = [sys.executable, EXAMPLES / name, *arguments]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_one_language_and_then_an_own_loop_on_its_neurons(tmp_path):
    base, output = save_tiny(tmp_path / "base", neurons=128), tmp_path / "out"
    printed = run("one_language.py", "--model", base, "--output", output, "--steps", 2, "--others", "isl_Latn,eng_Latn")
    assert re.findall(r"^(\w+): \d", printed, re.MULTILINE) == ["mlt_Latn", "isl_Latn", "eng_Latn"]
    assert NeuronSet.load(output / "neurons.safetensors").count("mlt_Latn") > 0
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    printed = run("own_loop.py", "--model", base, "--neurons", output / "neurons.safetensors", "--steps", 12)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_every_example_is_named_in_the_readme():
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f"examples/{path.name}" not in text] == []
