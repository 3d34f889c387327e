"""What a study will take, without running any of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape_fast.errors import ConfigError
from lape_fast.models import load_config
from lape_fast.study.measuring import open_corpora
from lape_fast.study.recipe import Recipe
from lape_fast.study.runs import count_runs
from lape_fast.text.corpora import known_corpus
from lape_fast.tune import plan

if TYPE_CHECKING:
    from lape_fast.tune import Plan

# Of every layer: the most that the paper reports for a language. What is found is known only after counting.
NEURON_SHARE = 0.01


def plan_study(recipe: Recipe, gpu: str | float | None = None) -> tuple[dict[str, Any], Plan | None]:
    """The runs of a study, and the memory that its subnetwork runs take.

    Args:
        recipe: the study; no weight of its model is loaded.
        gpu: as for ``lape_fast.plan``.

    Returns:
        Facts in the order in which they are told, and the memory plan for 1 % of the neurons of every layer; None where
        the study trains its own base, or where the model's config cannot be had.

    Raises:
        CorpusError: text on this machine lacks a language of the recipe.

    Example:
        >>> facts, memory = plan_study(read_recipe("recipes/paper-llama-3.1-8b.yaml"))
        >>> facts["runs"]
    """
    training, runs = recipe.training, count_runs(recipe)
    tokens = training.total_steps * training.tokens_per_step
    facts = {
        "preset": recipe.preset,
        "base": recipe.model or f"trained here, {recipe.base.steps:,} steps",
        "methods": len(recipe.methods),
        "languages": len(recipe.targets),
        "learning rates": {method: len(recipe.rates(method)) for method in recipe.methods},
        "seeds at the best": len(recipe.seeds),
        "runs": runs,
        "steps per run": training.total_steps,
        "tokens per run": tokens,
        "tokens in all": runs * tokens,
        "text": _check_text(recipe),
    }
    config, why = _config(recipe)
    if config is None:
        return {**facts, "memory": why}, None
    return facts, _memory(recipe, config, gpu)


def _check_text(recipe: Recipe) -> str:
    """Looks for the languages of the recipe, unless that would need the network."""
    names = {recipe.text.corpus, recipe.text.evaluation_corpus or recipe.text.corpus}
    remote = sorted(name for name in names if not recipe.text.aligned and _is_remote(name))
    if remote:
        return f"{', '.join(remote)}: on the hub, looked at when the study starts"
    with tempfile.TemporaryDirectory() as folder:
        corpora = open_corpora(recipe, Path(folder))
        others = corpora.others()
    return f"{recipe.text.corpus}: every target is there, and change is measured in {len(others)} languages"


def _is_remote(name: str) -> bool:
    """Whether a corpus is named by a short name or an id of the hub."""
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return not Path(name).exists() and (hub_id or known_corpus(name) is not None)


def _config(recipe: Recipe) -> tuple[Any, str]:
    """The config of the model, or None and why there is none."""
    from transformers import AutoConfig

    if recipe.base:
        return None, "not planned: the base is small and trained here"
    if recipe.architecture:
        fields = dict(recipe.architecture)
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"`architecture` describes no model that transformers knows ({error}); give `model_type` and fields of "
                "its config."
            ) from error
        config.name_or_path = recipe.model
        return config, ""
    try:
        return load_config(recipe.model), ""
    except ConfigError as error:
        return None, f"not planned: {error}"


def _memory(recipe: Recipe, config: Any, gpu: str | float | None) -> Plan:
    text = config.get_text_config()
    per_layer = max(1, round(NEURON_SHARE * text.intermediate_size))
    training = recipe.training
    return plan(
        config,
        [per_layer] * text.num_hidden_layers,
        rows_per_step=training.rows_per_step,
        rows_per_pass=training.rows_per_pass,
        context_length=training.context_length,
        # A config without weights, as that of an ``architecture``, names none.
        dtype=(getattr(config, "dtype", None) or "bfloat16") if recipe.dtype == "auto" else recipe.dtype,
        gpu=gpu,
    )
