"""Nothing is fetched that nobody named, no code of a checkpoint is run, and weights are no pickles."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from benchmarks.fuzz_targets import make_targets
from lape_fast.errors import ArchitectureError, ConfigError, LapeFastError
from lape_fast.models import load_model
from tests.tiny_models import SENTENCES, save_tiny, tiny_model

# Run as a program, and by every process that it starts.
SITE = """
import socket

def refuse(self, address, *rest):
    if self.family != socket.AF_UNIX:
        raise AssertionError(f"connects to {address}")

def look_up(*arguments, **options):
    raise AssertionError(f"looks up {arguments}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = look_up
"""

COMMANDS = (
    "identify --model base --corpus texts --output found --tokens-per-language 200 --context-length 32 "
    "--rule lape:top_rate=0.2,filter_rate=0.5 --workers 1",
    "select found/counts.safetensors --output chosen.safetensors --rule lape:top_rate=0.2,filter_rate=0.5",
    "tune --model base --neurons chosen.safetensors --language mlt_Latn --corpus texts --output adapter --steps 1 "
    "--context-length 16",
    "evaluate --model base --corpus texts --adapter adapter",
    "ablate --model base --corpus texts --neurons chosen.safetensors --output ablation.json",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    save_tiny(folder / "base")
    (folder / "texts").mkdir()
    for code, line in zip(("eng_Latn", "mlt_Latn"), SENTENCES, strict=False):
        (folder / "texts" / f"{code}.txt").write_text(f"{line}\n" * 20, encoding="utf-8")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return folder


@pytest.fixture(scope="module")
def blocked(workplace):
    """The environment in which every connection is an error, and the variables that switch the hub off are not set."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    root = str(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    return {**kept, "PYTHONPATH": os.pathsep.join([str(workplace / "site"), root])}


def test_connections_are_blocked_in_these_tests(workplace, blocked):
    code = "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    done = subprocess.run([sys.executable, "-c", code], env=blocked, capture_output=True, text=True)
    assert done.returncode and "AssertionError" in done.stderr


def test_no_command_needs_the_network_for_local_files(workplace, blocked):
    # One process, for the imports take longer than the work.
    code = (
        "import sys\nfrom lape_fast.cli import main\n"
        "for command in sys.argv[1:]:\n    sys.argv[1:] = command.split()\n"
        "    try: main()\n    except SystemExit as end: assert not end.code, command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS], cwd=workplace, env=blocked, capture_output=True, text=True
    )
    assert done.returncode == 0 and "AssertionError" not in done.stderr, done.stderr
    assert (workplace / "ablation.json").is_file() and (workplace / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("model_type", ["llama", "stranger"])
def test_code_of_a_checkpoint_is_not_run(tmp_path, model_type):
    """Of a known architecture the table's own class is used; a checkpoint that needs its own is refused."""
    folder = save_tiny(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n")
    if model_type == "llama":
        model, _ = load_model(folder)
        assert type(model).__module__.startswith("transformers.")
    else:
        with pytest.raises((ConfigError, ArchitectureError)):
            load_model(folder)
    assert not (tmp_path / "canary").exists()


def test_weights_in_a_pickle_are_refused_with_the_way_out(tmp_path):
    folder = save_tiny(tmp_path / "base")
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*only safetensors are read.*save_pretrained"):
        load_model(folder)


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("content", ["pickle", "archive", "half"])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_training_runs_no_code(tmp_path, name, content):
    target = make_targets(tmp_path, ["tuning optimizer"])["tuning optimizer"]
    path = target.place / name
    if content == "pickle":
        path.write_bytes(pickle.dumps([Touch(tmp_path / "canary")], protocol=2))
    elif content == "archive":
        torch.save({"state": Touch(tmp_path / "canary")}, path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if name != "training_args.bin" and content == "archive":
        with pytest.raises(LapeFastError, match="checkpoint-1"):
            target.read(path)
    else:
        # Neither read, nor taken for a whole checkpoint: the run starts from the one before, or from its beginning.
        target.read(path)
        assert (target.place.parent / "checkpoint-2").is_dir()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("save_steps", {}),
        ("logging_steps", 0),
        ("log_history", [{}]),
        ("log_history", [{"step": 1, "epoch": 1, "loss": None}]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_whose_state_makes_no_sense_is_not_resumed(tmp_path, name, value):
    """The run starts again, as from a checkpoint that was not written to its end."""
    target = make_targets(tmp_path, ["tuning state"])["tuning state"]
    path = target.place / target.name
    path.write_text(json.dumps({**json.loads(target.seeds[0]), name: value}))
    target.read(path)
    assert json.loads((target.place.parent / "checkpoint-2" / target.name).read_text())["global_step"] == 2
