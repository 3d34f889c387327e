"""Every command and every listing of docs/tune.md, run on a small model in the place of the large ones."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lape_fast.cli import main
from lape_fast.identify import NeuronSet
from lape_fast.tune import TrainingSettings
from tests.tiny_models import save_tiny

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "tune.md").read_text(encoding="utf-8")

# What is too large for a test, and what stands for it.
SMALLER = {
    "meta-llama/Llama-3.1-8B": "base",
    "mistralai/Mistral-Nemo-Base-2407": "base",
    "--context-length 4096": "--context-length 32",
    "--context-length 2048": "--context-length 32",
    "--rows-per-step 32": "--rows-per-step 4 --steps 2",
    "--lines 1-90000": "--lines 1-25",
    "--validation-lines 90001-90500": "--validation-lines 26-30",
    "--lines 90001-90500": "--lines 26-30",
    "rank=32,alpha=64": "rank=4",
}


def smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def commands() -> list[str]:
    """The indented commands of the page, with their continuation lines joined."""
    joined = PAGE.replace("\\\n", " ")
    return [" ".join(line.split()) for line in re.findall(r"^    ((?:lape-fast|torchrun) .*)$", joined, re.MULTILINE)]


def listings() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the page starts from."""
    monkeypatch.chdir(tmp_path)
    save_tiny("base", hidden=64, neurons=128, dtype=torch.bfloat16)
    neurons = {"mlt_Latn": [[1, 5, 40], [0, 2]], "isl_Latn": [[], [2, 3]]}
    NeuronSet.from_lists(neurons, neurons_per_layer=128).save("out/neurons.safetensors")
    Path("texts").mkdir()
    lines = "\n".join(f"Il-qattus numru {number} qagħad fuq it-tapit." for number in range(30))
    Path("texts/mlt_Latn.txt").write_text(lines, encoding="utf-8")
    Path("texts/isl_Latn.txt").write_text(lines, encoding="utf-8")
    return tmp_path


def run(command: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(smaller(command)))
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, command


def test_every_command_runs(workplace, monkeypatch, capfd):
    # The torchrun command is run by tests/tune/test_distributed.py, with two processes.
    mine = [command for command in commands() if command.startswith("lape-fast")]
    assert [command.split()[1] for command in mine] == ["tune", "tune", "tune", "tune", "merge", "tune", "evaluate"]
    for command in mine:
        adapter = Path("adapters/mlt_Latn")
        if " evaluate " in command:
            # The one of this base is the first that was moved aside.
            Path("adapters/1").rename(adapter)
        if adapter.exists() and " tune " in f" {command} ":
            adapter.rename(f"adapters/{len(list(Path('adapters').iterdir()))}")
        run(command, monkeypatch)
    assert "With policy" in capfd.readouterr().out
    assert Path("nemo-mlt/model.safetensors").is_file()


def test_every_listing_runs(workplace, monkeypatch, capfd):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainingArguments

    small = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    ids = torch.randint(3, 300, (8, 16)).tolist()
    trainer_listing, optimizer_listing, sft_listing, methods_listing, adapters_listing = listings()
    given = {
        "dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "arguments": TrainingArguments("run-2", **small),
    }
    exec(smaller(trainer_listing).replace('"run", ', f'"run", **{small!r}, '), given)
    assert Path("adapters/mlt_Latn/adapter_config.json").is_file()
    exec(smaller(optimizer_listing), given)
    given["trainer"].train()

    texts = Dataset.from_dict({"text": ["Il-qattus qagħad fuq it-tapit."] * 8})
    sft = smaller(sft_listing).replace(
        'SFTConfig("run", ', f'SFTConfig("run-3", bf16=False, max_length=32, **{small!r}, '
    )
    exec(sft, {"dataset": texts})

    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=2)
    compared = {"settings": settings}
    exec(smaller(methods_listing), compared)
    assert compared["adapter"].trainable() == 2 * 3 * 64 * 128

    for language in ("mlt", "isl"):
        run(
            "lape-fast tune --model base --corpus texts/ --neurons out/neurons.safetensors --rows-per-step 2 --steps 2 "
            f"--context-length 32 --language {language} --output adapters/{language}_Latn-2",
            monkeypatch,
        )
    names = {"adapters/mlt_Latn": "adapters/mlt_Latn-2", "adapters/isl_Latn": "adapters/isl_Latn-2"}
    for before, after in names.items():
        adapters_listing = adapters_listing.replace(before, after)
    last = {"base": AutoModelForCausalLM.from_pretrained("base")}
    exec(adapters_listing, last)
    # Neuron 2 of the upper layer is in both languages.
    assert last["report"] == {"neurons": 6, "shared": 1}
    assert type(last["merged"]) is type(AutoModelForCausalLM.from_pretrained("base"))
