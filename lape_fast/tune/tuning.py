"""Tuning one language: attach its subnetwork, train it on the language's text, save the adapter."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from lape_fast.errors import ConfigError, CorpusError
from lape_fast.files import atomic_folder, refuse_existing, write_json
from lape_fast.identify import NeuronSet, random_like
from lape_fast.models import model_identity
from lape_fast.text import Corpus, canonical
from lape_fast.tune.adapter import write_adapter_files
from lape_fast.tune.subnetwork import Subnetwork, attach_subnetwork
from lape_fast.tune.subnetwork_ffn import Policy
from lape_fast.tune.training import TrainingSettings, pack_documents, train

# `subnetwork` tunes the language's own neurons; `random` is the control: as many neurons, drawn from all the others.
Method = Literal["subnetwork", "random"]

LOG_NAME = "training.json"


@dataclass(frozen=True)
class SubnetworkConfig:
    """Which neurons to tune, and how.

    Attributes:
        neurons: a neuron file, or the neurons themselves.
        language: whose neurons.
        method: the language's own neurons, or an equally large random set that shares none with them.
        policy: what the subnetwork FFN keeps for its backward pass.
        seed: of the random set.

    Example:
        >>> subnetwork = SubnetworkConfig(neurons="out/neurons.safetensors", language="mlt_Latn").attach(model)
    """

    neurons: str | os.PathLike | NeuronSet
    language: str
    method: Method = "subnetwork"
    policy: Policy = "save"
    seed: int = 0

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ConfigError(f"The method {self.method!r} is unknown; choose one of {', '.join(get_args(Method))}.")

    def attach(self, model: nn.Module) -> Subnetwork:
        """Attaches the subnetwork to a model.

        Raises:
            LanguageError: the neuron file lacks the language.
            ArchitectureError: the neurons do not fit the model.
        """
        neurons = self.neurons if isinstance(self.neurons, NeuronSet) else NeuronSet.load(self.neurons)
        identity = model_identity(model)
        neurons.check_model(identity["layers"], identity["neurons_per_layer"])
        if self.method == "random":
            neurons = random_like(neurons, self.language, self.seed)
        return attach_subnetwork(model, neurons[self.language], self.policy)


def tune_language(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    config: SubnetworkConfig,
    output: str | os.PathLike,
    settings: TrainingSettings | None = None,
    validation: Corpus | None = None,
) -> tuple[Subnetwork, dict[str, Any]]:
    """Tunes one language's subnetwork and writes the adapter folder.

    The same call resumes an interrupted run from ``OUTPUT.checkpoints``, which is removed when the adapter is written.

    Args:
        model: the base; its weights hold the tuned values afterwards.
        tokenizer: its tokenizer.
        corpus: holds the language's training text.
        config: which neurons.
        output: folder of the adapter.
        settings: how to train.
        validation: holds text of the language on which the best values are chosen.

    Returns:
        The attached subnetwork and the training report.

    Raises:
        CorpusError: the corpus lacks the language.
        FileExistsAlreadyError: the output is there already.

    Example:
        >>> config = SubnetworkConfig("out/neurons.safetensors", language="mlt_Latn")
        >>> tune_language(model, tokenizer, open_corpus("texts/"), config, "adapters/mlt_Latn")
    """
    settings = settings or TrainingSettings()
    output = Path(output)
    refuse_existing(output)
    language = canonical(config.language)
    rows = pack_documents(model, tokenizer, _documents(corpus, language), settings.context_length)
    held_out = validation and pack_documents(
        model, tokenizer, _documents(validation, language), settings.context_length
    )
    subnetwork = config.attach(model)
    workspace = output.with_name(f"{output.name}.checkpoints")
    report = train(
        model.train(),
        rows,
        workspace,
        settings,
        subnetwork=subnetwork,
        language=language,
        validation=held_out,
        description=f"tuning {language}",
    )
    model.eval()
    details = {"method": config.method, "seed": config.seed, "settings": asdict(settings)}
    with atomic_folder(output) as folder:
        write_adapter_files(subnetwork, folder, language=language, **details)
        write_json(folder / LOG_NAME, report)
    shutil.rmtree(workspace)
    return subnetwork, report


def _documents(corpus: Corpus, language: str) -> list[str]:
    if language not in corpus.languages:
        raise CorpusError(
            f"{corpus.name} has no text in {language}; it has {', '.join(corpus.languages[:8])}"
            f"{' ...' if len(corpus.languages) > 8 else ''}."
        )
    return list(corpus.documents(language))
