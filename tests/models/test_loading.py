"""Loading models from folders, every way it can go wrong, and what identifies a model and a tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lape_fast.errors import ArchitectureError, ConfigError, LapeFastError
from lape_fast.models.loading import load_model, model_identity, tokenizer_hash
from tests.tiny_models import EXPERT_TYPES, EXPERTS, TINY_TYPES, save_tiny, tiny_model, tiny_neurons, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "base")


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_a_saved_model_comes_back_with_the_same_identity(tmp_path, model_type):
    original = tiny_model(model_type)
    model, tokenizer = load_model(save_tiny(tmp_path / "base", model_type), device="cpu")
    assert not model.training
    for (name, loaded), saved in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.equal(loaded, saved), name
    assert tokenizer("The cat").input_ids == tiny_tokenizer()("The cat").input_ids
    identity = model_identity(model)
    assert identity == model_identity(original) | {"model": str(tmp_path / "base")}
    assert (identity["model_type"], identity["layers"]) == (model_type, 2)
    assert identity["neurons_per_layer"] == tiny_neurons(model_type)
    assert identity["experts"] == (EXPERTS if model_type in EXPERT_TYPES else 1)
    assert identity["hidden_size"] == 32


def test_nothing_is_fetched_for_a_folder(folder, monkeypatch):
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("a local folder must not need the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_model(folder)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
    ids=["auto", "name", "dtype"],
)
def test_dtype(tmp_path, asked, expected):
    model, _ = load_model(save_tiny(tmp_path / "base", dtype=torch.bfloat16), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_experts_in_float64(tmp_path):
    model, _ = load_model(save_tiny(tmp_path / "base", "qwen3_moe"), dtype="float64", device="cpu")
    ids = torch.arange(3, 20)[None]
    expected = tiny_model("qwen3_moe")(ids).logits
    # The norms and the router compute in float32 either way.
    torch.testing.assert_close(model(ids).logits.float(), expected, rtol=1e-4, atol=1e-4)


def test_the_default_device(folder):
    model, _ = load_model(folder)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "dtype 'float12' is unknown.*bfloat16"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"device": "cuda:99"}, "'cuda:99' does not exist"),
    ],
)
def test_unknown_dtype_and_device(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(folder, **options)


def test_a_missing_path(tmp_path):
    with pytest.raises(ConfigError, match="There is no folder .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ConfigError, match="is a file where a model's folder is needed"):
        load_model(folder / "model.safetensors")


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds no config.json"):
        load_model(folder)


def test_a_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config of .* could not be loaded .*valid JSON"):
        load_model(folder)


def test_an_unknown_hub_id(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="config of nobody/no-such-model could not be loaded from the hub"):
        load_model("nobody/no-such-model")


def test_an_architecture_outside_the_table_is_refused_before_its_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ArchitectureError, match="'mamba' has no row in the table"):
        load_model(folder)


def test_code_in_a_checkpoint_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('the checkpoint ran its own code')\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(ConfigError, match="config of .* could not be loaded"):
        load_model(folder)


# Without a file transformers makes an empty tokenizer for gpt2, opt and gemma2, and fails for llama.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma2"])
def test_a_missing_tokenizer(tmp_path, model_type):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_model(tmp_path / "base")


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights of .* could not be loaded"):
        load_model(folder)


def test_half_written_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="weights of .* could not be loaded"):
        load_model(folder)


def test_weights_that_do_not_fit_the_config(folder):
    rewrite_config(folder, num_hidden_layers=3)
    with pytest.raises(ArchitectureError, match=r"lacks 9 weights .*such as model\.layers\.2\."):
        load_model(folder)
    rewrite_config(folder, num_hidden_layers=2, intermediate_size=50)
    with pytest.raises(LapeFastError, match="could not be loaded"):
        load_model(folder)


def test_config_hash_follows_what_changes_the_computation():
    def config_hash(**fields):
        return model_identity(tiny_model(**fields))["config_hash"]

    same = config_hash()
    assert config_hash(dtype=torch.bfloat16, seed=5) == same
    assert config_hash(use_cache=False, attention_dropout=0.1, initializer_range=0.5, pad_token_id=1) == same
    for fields in ({"rms_norm_eps": 1e-5}, {"num_key_value_heads": 4}, {"hidden_act": "gelu"}):
        assert config_hash(**fields) != same, fields


def test_tokenizer_hash_follows_the_tokens_and_not_the_last_call():
    import copy

    same = tokenizer_hash(tiny_tokenizer())
    used = copy.deepcopy(tiny_tokenizer())
    used(["The cat", "The"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(used) == same
    used.add_tokens(["qagħad"])
    assert tokenizer_hash(used) != same
    other_start = copy.deepcopy(tiny_tokenizer())
    other_start.bos_token = "<eos>"
    assert tokenizer_hash(other_start) != same


def test_tokenizer_hash_survives_saving(folder):
    _, tokenizer = load_model(folder)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tiny_tokenizer())


def test_importing_the_models_folder_is_light_and_leaves_cuda_alone():
    program = (
        "import sys, torch, lape_fast.models.layouts, lape_fast.models.loading\n"
        "assert not torch.cuda.is_initialized()\n"
        "sys.exit(' '.join(name for name in ('transformers', 'datasets', 'babel') if name in sys.modules) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
