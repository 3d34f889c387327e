"""What the doctor finds of a model before it is loaded, and what it says is missing."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lape_fast.cli import app
from lape_fast.doctor import examine_model
from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.models import load_model
from tests.tiny_models import TINY_TYPES, save_tiny


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


def doctor(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_it_tells_what_a_model_is_and_what_tuning_takes(base):
    found, plan = examine_model(str(base), gpu=24)
    model, _ = load_model(base, device="cpu")
    assert (found["model type"], found["layers"], found["neurons per layer"]) == ("llama", 2, 48)
    assert found["weights"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["problems"] == [] and plan.policy == "save"
    code, printed = doctor(base)
    assert code == 0 and "rows at once on" in printed


@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_every_architecture_is_examined(tmp_path, model_type):
    found, plan = examine_model(str(save_tiny(tmp_path / "base", model_type)))
    assert found["model type"] == model_type and found["problems"] == []
    # Experts are counted but not tuned.
    assert (plan is None) == (found["experts per layer"] > 1) == bool(found["notes"])


def test_it_names_what_is_missing_and_fails(base, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(base / "config.json", alone)
    code, printed = doctor(alone, "--json")
    problems = json.loads(printed)["problems"]
    assert code == 1 and len(problems) == 2
    assert "tokenizer" in problems[0] and "no weights" in problems[1]
    (alone / "pytorch_model.bin").touch()
    assert "safetensors" in examine_model(str(alone))[0]["problems"][1]


def test_what_is_no_model_is_an_error(base, tmp_path):
    with pytest.raises(ConfigError):
        examine_model(str(tmp_path / "nothing"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(ArchitectureError):
        examine_model(str(base))
