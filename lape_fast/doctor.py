"""What `lape-fast doctor` tells of a model before any weight is loaded: what is found of it, and what it will take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lape_fast.models import find_ffns, load_config, named_dtype, supports_packing
from lape_fast.tune import Plan, plan
from lape_fast.tune.tracing import build_on_meta

# What the figures are for: the share of the neurons of a large subnetwork, one row of at most so many tokens, and
# the counts of so many languages in int64, with those of the halves.
TRAINED_SHARE, CONTEXT_LENGTH, LANGUAGES = 0.01, 4096, 100
COUNT_BYTES = 2 * 8


def examine_model(
    name: str, *, dtype: str = "auto", gpu: str | float | None = None
) -> tuple[dict[str, Any], Plan | None]:
    """Looks at a model's config, tokenizer and files, and plans its memory; loads no weight.

    Args:
        name: a folder or a hub id.
        dtype: to plan for; "auto" is the checkpoint's.
        gpu: a name that ``plan`` knows, or GiB.

    Returns:
        What was found, as JSON values by name, with ``problems`` that keep it from being loaded, a sentence each; and
        the plan of tuning 1 % of the neurons, or None where the model cannot be tuned.

    Raises:
        ConfigError: there is no such model, or its config cannot be read.
        ArchitectureError: the table of layouts lacks the architecture.

    Example:
        >>> found, memory = examine_model("meta-llama/Llama-3.1-8B", gpu="RTX 4090")
        >>> found["problems"]
        []
    """
    config = load_config(name)
    chosen = named_dtype(dtype)
    chosen = (getattr(config, "dtype", None) or torch.float32) if chosen == "auto" else chosen
    model = build_on_meta(config, chosen)
    ffns = find_ffns(model)
    ffn = ffns[0]
    weights = sum(parameter.numel() for parameter in model.parameters())
    tokenizer, problems = _find_tokenizer(name)
    problems += _problems_of_files(Path(name))
    context_length = min(CONTEXT_LENGTH, getattr(config, "max_position_embeddings", None) or CONTEXT_LENGTH)
    memory, notes = None, []
    if ffn.experts == 1:
        neurons = [max(1, round(TRAINED_SHARE * ffn.neurons))] * len(ffns)
        memory = plan(config, neurons, rows_per_step=1, context_length=context_length, dtype=chosen, gpu=gpu)
    else:
        notes.append("Its neurons can be identified and switched off, but experts cannot be tuned.")
    counts = COUNT_BYTES * LANGUAGES * len(ffns) * ffn.neurons
    return {
        "model type": config.model_type,
        "layers": len(ffns),
        "neurons per layer": ffn.neurons,
        "experts per layer": ffn.experts,
        "activation": ffn.activation,
        "weights": weights,
        "dtype": str(chosen).removeprefix("torch."),
        "documents share a row": supports_packing(model),
        "tokenizer": tokenizer,
        "weights in memory, GiB": round(weights * chosen.itemsize / 2**30, 2),
        f"counts of {LANGUAGES} languages, GiB": round(counts / 2**30, 2),
        "notes": notes,
        "problems": problems,
    }, memory


def _find_tokenizer(name: str) -> tuple[str | None, list[str]]:
    from transformers import AutoTokenizer

    options = {"local_files_only": os.path.isdir(name), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # A tokenizer fails in as many ways as there are kinds of it.
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        return None, [f"No tokenizer can be loaded ({reason}); save it beside the model with save_pretrained."]
    prefix = tokenizer.bos_token or tokenizer.eos_token
    beginning = f"documents begin with {prefix}" if prefix else "no token before a document"
    return f"{len(tokenizer):,} pieces, {beginning}", []


def _problems_of_files(folder: Path) -> list[str]:
    """What is wrong with the weights of a model that lies in a folder."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return []
    if any(folder.glob("*.bin")):
        return ["Its weights are pickled (.bin) and will not be opened; save them as safetensors."]
    return ["There are no weights beside the config."]
