"""Tuning one language: attach its subnetwork, train it on the language's text, save the adapter."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lape_fast.errors import CorpusError
from lape_fast.files import atomic_folder, read_json, refuse_existing, remove_unfinished, write_json
from lape_fast.identify import joined_world
from lape_fast.models import without_logits
from lape_fast.text import Corpus, canonical
from lape_fast.tune.adapter import write_adapter
from lape_fast.tune.planning import Plan, plan
from lape_fast.tune.policies import measured_peak
from lape_fast.tune.subnetwork import Subnetwork
from lape_fast.tune.training import SETTINGS_NAME, TrainingSettings, pack_documents, train

if TYPE_CHECKING:
    from lape_fast.tune.peft_tuner import SubnetworkConfig

LOG_NAME = "training.json"


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
    Under ``torchrun`` every process trains on its share of the rows, and the first one writes.

    Args:
        model: the base; with resident storage its weights hold the tuned values afterwards.
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
        StoppedError: a signal came; the checkpoint of the step it came in is saved.

    Example:
        >>> config = SubnetworkConfig(neurons="out/neurons.safetensors", language="mlt_Latn")
        >>> tune_language(model, tokenizer, open_corpus("texts/"), config, "adapters/mlt_Latn")
    """
    settings = settings or TrainingSettings()
    output = Path(output)
    refuse_tuned(output)
    language = canonical(config.language)
    rows = pack_documents(model, tokenizer, _documents(corpus, language), settings.context_length)
    held_out = validation and pack_documents(
        model, tokenizer, _documents(validation, language), settings.context_length
    )
    peft_model = _peft_model(model, config)
    subnetwork = Subnetwork(model, peft_model.active_adapter)
    workspace = _workspace(output)
    optimizer = subnetwork.optimizer(lr=settings.learning_rate, weight_decay=settings.weight_decay)
    memory = _predicted_memory(model, config, settings)
    with joined_world() as world, without_logits(model), measured_peak(model.device) as peak:
        report = train(
            peft_model.train(),
            rows,
            workspace,
            settings,
            identity=config.replaced_values_sha256,
            validation=held_out,
            optimizer=optimizer,
            description=f"tuning {language}",
        )
        model.eval()
        sizes = {"neurons": sum(map(len, subnetwork.neurons().values())), "trainable": subnetwork.trainable()}
        report = {**sizes, **report, "memory": _memory_report(memory, subnetwork, peak)}
        if world.is_main:
            with atomic_folder(output) as folder:
                write_adapter(subnetwork, folder, config.to_dict())
                write_json(folder / LOG_NAME, {"settings": asdict(settings), **report})
            shutil.rmtree(workspace)
        # So that no process goes on to read what is not written yet.
        world.wait()
    return subnetwork, report


def refuse_tuned(output: str | os.PathLike) -> None:
    """Makes sure that an adapter is not there yet, and removes what a run that was killed behind writing it left.

    Raises:
        FileExistsAlreadyError: it is.
    """
    output = Path(output)
    workspace, log = _workspace(output), output / LOG_NAME
    if log.is_file() and workspace.is_dir():
        settings, claim = read_json(log)["settings"], workspace / SETTINGS_NAME
        # Without a claim a kill has ended the removal itself; that of another run is for its own output.
        claimed = read_json(claim) if claim.is_file() else settings
        if all(claimed.get(name) == value for name, value in settings.items() if name != "steps"):
            # Another process of the run may be doing the same.
            shutil.rmtree(workspace, ignore_errors=True)
            remove_unfinished(output)
    refuse_existing(output)


def _workspace(output: Path) -> Path:
    return output.with_name(f"{output.name}.checkpoints")


def _predicted_memory(model: nn.Module, config: SubnetworkConfig, settings: TrainingSettings) -> Plan:
    """Planned before the run, so that a model that cannot be planned costs nothing."""
    return plan(
        model,
        config.indices(),
        rows_per_step=settings.rows_per_step,
        rows_per_pass=settings.rows_and_passes(int(os.environ.get("WORLD_SIZE", "1")))[0],
        context_length=settings.context_length,
        device=model.device.type,
    )


def _memory_report(predicted: Plan, subnetwork: Subnetwork, peak: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured bytes side by side, of what could be measured on this device, and the policy that ran."""
    policy = subnetwork.layers[-1].policy
    expected = predicted.policies[policy].allocated
    if peak["kind"] != "allocated":
        # The growth began when the model was there.
        expected -= sum(predicted.resident[name] for name in ("weights", "masters", "originals", "indices"))
    return {"policy": policy, "measured": peak["kind"], "predicted_bytes": expected, "measured_bytes": peak["bytes"]}


def _peft_model(model: nn.Module, config: SubnetworkConfig):
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks the model by the older name of activation checkpointing.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def _documents(corpus: Corpus, language: str) -> list[str]:
    if language not in corpus.languages:
        raise CorpusError(
            f"{corpus.name} has no text in {language}; it has {', '.join(corpus.languages[:8])}"
            f"{' ...' if len(corpus.languages) > 8 else ''}."
        )
    return list(corpus.documents(language))
