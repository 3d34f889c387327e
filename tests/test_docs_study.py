"""Every command and the recipe of docs/study.md, run on a tiny base in the place of the large models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from lape_fast.cli import main
from lape_fast.study.recipe import parse_recipe
from tests.study.test_runs import TINY

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    joined = PAGE.replace("\\\n", " ")
    return [" ".join(line.split()) for line in re.findall(r"^    (lape-fast .*)$", joined, re.MULTILINE)]


def run(command: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    """Those that only plan read the recipe itself; those that run take a tiny one in its place."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    one_method = {**TINY, "methods": ["subnetwork"], "learning_rates": [1e-2], "seeds": [0]}
    Path("tiny.yaml").write_text(json.dumps(one_method))
    mine = commands()
    assert len(mine) == 6
    planned = [command for command in mine if "--dry-run" in command]
    performed = [command for command in mine if "--dry-run" not in command and "--report-only" not in command]
    again = [command for command in mine if "--report-only" in command]
    assert len(planned) == 1
    for command in planned:
        run(command, monkeypatch)
    assert "tokens in all" in capsys.readouterr().out
    for command in performed:
        # The tiny base is trained in the first folder, and copied to the others.
        output = Path(re.search(r"--output (\S+)", command)[1])
        if Path("build/study-quick").exists() and output != Path("build/study-quick"):
            shutil.copytree("build/study-quick", output)
        tiny = re.sub(r"recipes/\S+", "tiny.yaml", command).replace("--corpus ../shared/corpus", "--corpus cldr")
        run(tiny.replace("--preset corrected", ""), monkeypatch)
        assert (output / "results.json").is_file()
    before = Path("benchmarks/results/study/report.html").read_bytes()
    for command in again:
        run(command, monkeypatch)
    assert Path("benchmarks/results/study/report.html").read_bytes() == before


def test_the_recipe_of_the_page_is_one():
    (listing,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(listing))
    assert recipe.rates("ffn") == (3e-6, 1e-5, 3e-5, 1e-4)
    assert recipe.rates("subnetwork") == (1e-5, 3e-5, 1e-4, 3e-4)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"paper-[\w.-]+\.yaml|quick\.yaml|small\.yaml", PAGE))))
def test_the_recipes_that_the_page_names_are_there(name):
    assert (ROOT / "recipes" / name).is_file()
