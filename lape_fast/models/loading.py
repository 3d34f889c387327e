"""Models and tokenizers from a folder or the hub, and what identifies them in the metadata of a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from lape_fast.errors import ArchitectureError, ConfigError
from lape_fast.files import json_hash
from lape_fast.models.ffn import find_ffns
from lape_fast.models.hidden_states import decoder
from lape_fast.models.layouts import check_known
from lape_fast.models.quantised import Quantise, keep_as_stored, loading_options

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Config fields that leave the hidden states of a forward pass as they are; every dropout joins them. Quantisation is
# how a model is loaded and not which model it is: its neurons and adapters are those of its base.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "init_std",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

# Of each parameter.
WEIGHTS_SAMPLED = 256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantise: Quantise | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, ready to be evaluated.

    A folder that exists is read without any network access. Code that comes with a checkpoint is never run, and
    weights are read from safetensors only.

    Args:
        name_or_path: a folder written by ``save_pretrained``, or a hub id.
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's.
        device: where the model goes; None means cuda where there is one, else cpu.
        quantise: how to store the projections: "nf4" or "int8" of bitsandbytes, or "torchao-int8"; all compute in
            ``dtype`` and need the extra ``lape-fast[quantise]``. A checkpoint that was saved quantised stays so.
            "fp8" also computes in 8 bits, forward and backward, and wants a GPU with compute capability 8.9 or more
            (the CPU computes the same, slowly).

    Returns:
        The ``AutoModelForCausalLM`` in eval mode, and its tokenizer.

    Raises:
        ConfigError: the model, its weights or its tokenizer cannot be found or read; dtype, device or quantise is
            unknown; what quantise needs is not installed, or the device does not have it.
        ArchitectureError: the table of FFN layouts lacks the architecture, its FFNs cannot be quantised so, or weights
            are missing from the checkpoint.

    Example:
        >>> model, tokenizer = load_model("meta-llama/Llama-3.1-8B", dtype="bfloat16")
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name_or_path)
    torch_dtype, torch_device = named_dtype(dtype), _device(device)
    options = {"local_files_only": _is_folder(name), "trust_remote_code": False}
    # The config first: an unknown architecture is refused before gigabytes of weights are read.
    config = load_config(name)
    _refuse_pickles(name)
    quantisation = loading_options(name, config, quantise, torch_dtype, torch_device)
    tokenizer = _attempt("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, **options))
    # transformers makes an empty tokenizer of some classes when there is no file to read.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{name} has no tokenizer, or one without any piece of text; save the model's tokenizer beside it with "
            "tokenizer.save_pretrained."
        )
    model, report = _attempt(
        "weights",
        name,
        lambda: AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch_dtype,
            output_loading_info=True,
            use_safetensors=True,
            **options,
            **quantisation,
        ),
    )
    if missing := sorted(report["missing_keys"]):
        raise ArchitectureError(
            f"The checkpoint {name} lacks {len(missing)} weights that its config.json calls for, such as {missing[0]}, "
            "and they would be random; use a complete checkpoint of a causal language model."
        )
    if model.dtype == torch.float64:
        # The grouped products that transformers computes experts by know no float64.
        model.set_experts_implementation("eager")
    keep_as_stored(model.modules())
    return model.to(torch_device).eval(), tokenizer


def load_config(name_or_path: str | os.PathLike) -> Any:
    """The config of a model, without its weights.

    Raises:
        ConfigError: it cannot be found or read.
        ArchitectureError: the table of FFN layouts lacks the architecture.
    """
    from transformers import AutoConfig

    name = os.fspath(name_or_path)
    options = {"local_files_only": _is_folder(name), "trust_remote_code": False}
    config = _attempt("config", name, lambda: AutoConfig.from_pretrained(name, **options))
    check_known(config.model_type)
    return config


def model_identity(model) -> dict[str, Any]:
    """What the metadata of a file says about the model that it was made with; taken while no FFN is replaced.

    Returns:
        "model" (the name or path it was loaded from), "config_hash" (of the fields that change the computation),
        "model_type", "layers", "experts" (1 where the FFN is dense), "neurons_per_layer" (of all experts) and
        "hidden_size".
    """
    ffns = find_ffns(model)
    return {
        "model": model.name_or_path,
        "config_hash": json_hash(_computing_fields(json.loads(model.config.to_json_string(use_diff=False)))),
        "model_type": model.config.model_type,
        "layers": len(ffns),
        "experts": ffns[0].experts,
        "neurons_per_layer": ffns[0].neurons,
        "hidden_size": decoder(model).config.hidden_size,
    }


def weights_hash(model) -> str:
    """SHA-256 of a sample of each of the decoder's parameters, in the dtype they were loaded in; hex.

    Training changes all of them, so that a sample tells models of one configuration apart in no time. All processes
    of a sharded model must ask for it together.
    """
    digest = hashlib.sha256()
    for name, parameter in decoder(model).named_parameters():
        values = parameter.detach()
        if type(values).dequantize is not torch.Tensor.dequantize:
            # torchao's tensors cannot be sliced as they are stored.
            values = values.dequantize()
        values = (values.full_tensor() if isinstance(values, DTensor) else values).flatten()
        sample = values[:: max(1, len(values) // WEIGHTS_SAMPLED)][:WEIGHTS_SAMPLED]
        digest.update(name.encode())
        digest.update(sample.double().cpu().contiguous().numpy())
    return digest.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what decides the token ids of a text: pieces, rules and special tokens; hex."""
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    if not tokenizer.is_fast:
        return json_hash({"class": type(tokenizer).__name__, "pieces": tokenizer.get_vocab(), "special": special})
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two are the arguments of the last call, not the tokenizer's own.
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return json_hash({"rules": rules, "special": special})


def named_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The torch dtype of a name; "auto" stays.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"The device {device!r} is unknown; use cpu, cuda or cuda:N.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"The device {str(found)!r} does not exist: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "use cpu, or a torch and a driver that see the GPU."
        )
    return found


def _is_folder(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"The folder {name} holds no config.json, so it is no Hugging Face model; name the folder that "
                "model.save_pretrained wrote."
            )
        return True
    if path.exists():
        raise ConfigError(f"{name} is a file where a model's folder is needed; name the folder that holds config.json.")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(f"There is no folder {name}; check the path, or name a hub id such as owner/model.")
    return False


def _refuse_pickles(name: str) -> None:
    folder = Path(name)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"The weights of {name} are a pickle ({pickles[0]}), which can hold code, and only safetensors are read; "
            "where you trust it, load it with transformers and write it again with model.save_pretrained."
        )


def _attempt(part: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        # transformers explains itself over many lines; the first ones say what happened.
        reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        where = "the folder" if Path(name).is_dir() else "the hub (there is no folder of this name here)"
        raise ConfigError(
            f"The {part} of {name} could not be loaded from {where}; check that the name is right and that "
            f"save_pretrained wrote the {part} in full. transformers says: {reason}"
        ) from error


def _computing_fields(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _WITHOUT_EFFECT and "drop" not in name}
    return {name: _computing_fields(value) if isinstance(value, dict) else value for name, value in kept.items()}
