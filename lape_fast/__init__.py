"""lape_fast: find the feed-forward neurons of a language in a language model, and tune only those.

    import lape_fast

    model, tokenizer = lape_fast.load_model("meta-llama/Llama-3.1-8B")
    counts = lape_fast.count_activations(model, tokenizer, lape_fast.open_corpus("texts/"))
    neurons = lape_fast.select_neurons(counts)
    config = lape_fast.SubnetworkConfig(neurons=neurons, language="mlt_Latn")
    lape_fast.tune_language(model, tokenizer, lape_fast.open_corpus("texts/"), config, "adapters/mlt_Latn")

Names are imported when they are first used, so that importing the package is quick and touches no device.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> the folder it comes from.
_PUBLIC = {
    "ops": ("gated_activation", "gated_activation_backward", "linear_cross_entropy"),
    "models": ("load_model", "find_ffns"),
    "text": ("open_corpus", "canonical", "language_name"),
    "identify": (
        "ActivationCounts",
        "Budget",
        "Lape",
        "NeuronSet",
        "Percentile",
        "count_activations",
        "export_masks",
        "identify_neurons",
        "import_masks",
        "parse_rules",
        "publish_release",
        "random_like",
        "rule_name",
        "select_many",
        "select_neurons",
    ),
    "tune": (
        "IndexedAdamW",
        "Method",
        "Subnetwork",
        "SubnetworkConfig",
        "TrainingSettings",
        "TuningConfig",
        "attach_subnetwork",
        "load_adapter",
        "merge_adapter",
        "parse_method",
        "plan",
        "read_dynamics",
        "tune_language",
    ),
    "study": ("AblationMatrix", "ablate_neurons", "evaluate_languages", "prepare_text", "score", "silenced"),
}
_FOLDERS = {name: folder for folder, names in _PUBLIC.items() for name in names}

__all__ = [*sorted(_FOLDERS), "LapeFastError"]


def __getattr__(name: str):
    if name == "LapeFastError":
        from lape_fast.errors import LapeFastError

        return LapeFastError
    if name not in _FOLDERS:
        raise AttributeError(f"module 'lape_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lape_fast.{_FOLDERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
