"""The pages as a whole: no broken link, every command runs on a small model, and the list of errors is up to date."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lape_fast.cli import main
from lape_fast.identify import NeuronSet
from tests.tiny_models import save_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

# What is too large or too far away for a test, and what stands for it; a torchrun command runs in one process.
SMALLER = {
    r"torchrun --nproc-per-node 8 -m lape_fast": "lape-fast",
    r" --fsdp": "",
    r"(meta-llama/Llama-3.1-\d+B|HuggingFaceTB/SmolLM2-135M|lape-demo/base)": "base",
    r"--corpus (glotcc|cldr)": "--corpus texts/",
    r"--languages mt,cy,is,ka,sk": "--languages mt,is",
    r"--tokens-per-language \d+": "--tokens-per-language 400 --context-length 32 --batch-tokens 64",
    r"--context-length 256 --batch-tokens 2048 ": "",
    r"--until-stable 0.95 --seed 0 --min-tokens 10000": "--seed 0 --min-tokens 10",
    r"--corpus texts/ --output out$": "--corpus texts/ --output out --context-length 32 --batch-tokens 64",
    r"parts/\*\.safetensors": "parts/1.safetensors parts/2.safetensors",
    r"--tasks belebele,flores --languages mlt_Latn": "--tasks local --task-folder tasks",
    r"--steps \d+": "",
    r"--gpu \S+": "",
}
TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/data.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc}]
"""


def commands(page: Path) -> list[str]:
    """The indented commands of a page, with their continuation lines joined, as a test can run them."""
    joined = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    ((?:lape-fast|torchrun) .*)$", joined, re.MULTILINE)
    return [smaller(" ".join(command.split())) for command in found]


def smaller(command: str) -> str:
    for large, small in SMALLER.items():
        command = re.sub(large, small, command)
    return command


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the base, the texts, and what a page takes for granted."""
    monkeypatch.chdir(tmp_path)
    save_tiny("base", hidden=64, neurons=128, dtype=torch.bfloat16)
    for folder in ("texts", "held-out"):
        Path(folder).mkdir()
        for language, line in (
            ("mlt_Latn", "Il-qattus numru {} qagħad fuq it-tapit."),
            ("isl_Latn", "Köttur númer {} sat á mottunni."),
            ("eng_Latn", "The cat number {} sat on the mat."),
        ):
            lines = "\n".join(line.format(number) for number in range(30))
            Path(folder, f"{language}.txt").write_text(lines, encoding="utf-8")
    neurons = {"mlt_Latn": [[1, 5, 40], [0, 2]], "isl_Latn": [[2], [2, 3]], "eng_Latn": [[7], []]}
    NeuronSet.from_lists(neurons, neurons_per_layer=128).save("out/neurons.safetensors")
    Path("tasks").mkdir()
    Path("tasks/local.yaml").write_text(TASK)
    Path("tasks/data.jsonl").write_text('{"question": "Is it?", "answer": 0}\n' * 4)
    return tmp_path


def run(command: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command


def test_the_commands_of_the_readme_run(workplace, monkeypatch):
    Path("out/neurons.safetensors").unlink()
    Path("out").rmdir()
    mine = commands(ROOT / "README.md")
    assert [command.split()[1] for command in mine[:5]] == ["doctor", "identify", "tune", "evaluate", "merge"]
    rule = " --rule lape:top_rate=0.5,filter_rate=0.5,activation_bar=0.5"
    for command in mine:
        if " identify " in command:
            # The paper's thresholds leave a model of 256 neurons with none.
            output = "again" if Path("out").exists() else "out"
            command = f"{command.replace('--output out', f'--output {output}')}{rule}"
        run(command + (" --context-length 32 --rows-per-step 2" if " tune " in command else ""), monkeypatch)
    assert Path("llama-3.1-8b-mlt/model.safetensors").is_file()


def test_the_commands_of_identify_run(workplace, monkeypatch):
    """From nothing to a release, each step on what the one before it wrote."""
    Path("out/neurons.safetensors").unlink()
    mine = commands(ROOT / "docs" / "identify.md")
    names = [command.split()[1] for command in mine]
    assert names == ["identify", "identify", "identify", "count", "merge-counts", "select", "ablate", "publish"]
    for number, command in enumerate(mine):
        if " identify " in command:
            command = f"{command.replace('--output out', f'--output out-{number}')} --rule budget:neurons=5"
        if " merge-counts " in command:
            parts = "lape-fast count --model base --corpus texts/ --context-length 32 --batch-tokens 64"
            for part in (1, 2):
                run(f"{parts} --part {part}/2 --output parts/{part}.safetensors", monkeypatch)
            Path("counts.safetensors").unlink()
        run(command, monkeypatch)
    assert Path("release/README.md").is_file()


def test_the_commands_and_the_listing_of_analyses_run(workplace, monkeypatch):
    run(
        "lape-fast tune --model base --corpus texts/ --neurons out/neurons.safetensors --language mlt_Latn --steps 2 "
        "--context-length 32 --rows-per-step 2 --output adapters/mlt_Latn",
        monkeypatch,
    )
    run("lape-fast count --model base --corpus texts/ --context-length 32 --output out/counts.safetensors", monkeypatch)
    page = ROOT / "docs" / "analyses.md"
    mine = commands(page)
    names = [command.split()[1] for command in mine]
    assert names == ["evaluate", "align", "weights", "steer", "ablate", "atlas"]
    for command in mine:
        run(command, monkeypatch)
    (listing,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    given: dict = {}
    exec(smaller(listing), given)
    assert given["generated"].shape[1] > given["inputs"]["input_ids"].shape[1]
    assert Path("atlas.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_broken(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text] == []


def test_the_list_of_errors_is_up_to_date():
    listed = runpy.run_path(str(ROOT / "docs" / "list_errors.py"))
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == listed["page"](), (
        "run `python docs/list_errors.py`"
    )
    # Not only a page that was made by itself: a message that a user has seen is in it.
    assert "choose another output or remove it first" in listed["page"]()


def test_the_commands_that_the_pages_name_are_there():
    known = subprocess.run(
        [sys.executable, "-m", "lape_fast", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for page in PAGES:
        for name in set(re.findall(r"`lape-fast ([a-z][a-z-]+)", page.read_text(encoding="utf-8"))):
            assert re.search(rf"\b{name}\b", known), f"{page.name} names lape-fast {name}"
