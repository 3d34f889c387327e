"""A scaled fault campaign: every kind of fault once or twice, and what the commands end with is what it would be."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.faults.campaign import FAULTS
from benchmarks.faults.scenarios import SCENARIOS, broken_files, contents, differences
from lape_fast.errors import FileExistsAlreadyError, LapeFastError
from lape_fast.files import (
    alone_in,
    atomic_folder,
    atomic_path,
    lacks_room,
    read_json,
    remove_unfinished,
    write_json,
    write_tensors,
)
from lape_fast.identify import ActivationCounts, CountingSettings, NeuronSet, count_activations
from lape_fast.models import load_model
from lape_fast.text import open_corpus
from lape_fast.tune import TrainingSettings, TuningConfig, tune_language
from tests.tiny_models import save_tiny

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


def test_a_folder_belongs_to_one_run_until_it_ends(tmp_path):
    code = (
        "import sys, lape_fast.files as files\n"
        "with files.alone_in(sys.argv[1]):\n"
        "    print('there', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    with pytest.raises(FileExistsAlreadyError, match="still going on"), alone_in(tmp_path / "run"):
        pass
    process.kill()
    process.communicate()
    with alone_in(tmp_path / "run"):
        pass


# Bytes of the largest file: of the adapter, of the optimizer, of the Trainer's state, of its random state.
@pytest.mark.parametrize("limit", [200, 1500, 5000, 9000])
@pytest.mark.filterwarnings("ignore")
def test_training_without_room_is_one_sentence_and_goes_on_with_room(tmp_path, limit):
    (tmp_path / "texts").mkdir()
    lines = "\n".join(f"Il-qattus numru {number} qagħad." for number in range(40))
    (tmp_path / "texts" / "mlt_Latn.txt").write_text(lines, encoding="utf-8")
    base, corpus = save_tiny(tmp_path / "base"), open_corpus(str(tmp_path / "texts"))
    neurons = NeuronSet.from_lists({"mlt_Latn": [[1, 5, 40], [0, 2]]}, neurons_per_layer=48)
    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=4, save_every=2, learning_rate=1e-2)
    config = TuningConfig("subnetwork", "mlt_Latn", neurons, policy="save")

    def tune(output):
        model, tokenizer = load_model(base, device="cpu")
        tune_language(model, tokenizer, corpus, config, output, settings)

    tune(tmp_path / "straight")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((LapeFastError, OSError)) as error:
            tune(tmp_path / "resumed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lacks_room(error.value) and not (tmp_path / "resumed").exists()
    tune(tmp_path / "resumed")
    assert differences(contents(tmp_path / "resumed"), contents(tmp_path / "straight")) == []


def test_a_rank_that_dies_under_torchrun_ends_the_run_and_the_next_start_loses_nothing(tmp_path):
    (tmp_path / "texts").mkdir()
    for language in ("cym_Latn", "mlt_Latn"):
        lines = "\n".join(f"{language} line {number} of a text that takes a while" for number in range(400))
        (tmp_path / "texts" / f"{language}.txt").write_text(lines)
    save_tiny(tmp_path / "base")
    output = tmp_path / "resumed" / "counts.safetensors"
    options = ["--model", tmp_path / "base", "--corpus", tmp_path / "texts", "--context-length", "32"]
    options += ["--batch-tokens", "64", "--workers", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lape_fast", "count", *options, "--output", output, "--checkpoint-minutes", "0"]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "resumed").rglob("*.safetensors")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode != 0 and not output.exists() and not broken_files(tmp_path / "resumed")
    model, tokenizer = load_model(tmp_path / "base", device="cpu")
    settings = CountingSettings(context_length=32, batch_tokens=64)
    expected = count_activations(model, tokenizer, open_corpus(str(tmp_path / "texts")), settings)
    # In another number of processes.
    command = ["count", *options, "--output", output]
    subprocess.run(list(map(str, [sys.executable, "-m", "lape_fast", *command])), cwd=ROOT, check=True)
    found = ActivationCounts.load(output)
    assert torch.equal(found.positive, expected.positive) and torch.equal(found.tokens, expected.tokens)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
