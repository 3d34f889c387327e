"""Tuning one language by any method: put it into the model, train it on the language's text, save the adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lape_fast.errors import CorpusError
from lape_fast.files import atomic_folder, read_json, refuse_existing, remove_unfinished, write_json
from lape_fast.identify import joined_world
from lape_fast.models import dense_ffns
from lape_fast.text import Corpus, canonical
from lape_fast.tune.flops import count_flops
from lape_fast.tune.methods import TuningConfig
from lape_fast.tune.planning import Plan, plan
from lape_fast.tune.policies import measured_peak
from lape_fast.tune.runs import Run, prepare
from lape_fast.tune.subnetwork import Subnetwork, installed_layers
from lape_fast.tune.training import SETTINGS_NAME, Rows, TrainingSettings, pack_documents, train

if TYPE_CHECKING:
    from lape_fast.tune.dense import DenseWeights
    from lape_fast.tune.dynamics import Measure
    from lape_fast.tune.peft_adapter import PeftAdapter
    from lape_fast.tune.peft_tuner import SubnetworkConfig

LOG_NAME = "training.json"


def tune_language(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    config: TuningConfig | SubnetworkConfig,
    output: str | os.PathLike,
    settings: TrainingSettings | None = None,
    validation: Corpus | None = None,
    *,
    measure: Measure | None = None,
    present: Callable[[Path], None] | None = None,
) -> tuple[Subnetwork | DenseWeights | PeftAdapter, dict[str, Any]]:
    """Tunes one language by any method and writes the adapter folder.

    The same call resumes an interrupted run from ``OUTPUT.checkpoints``, which is removed when the adapter is written.
    Under ``torchrun`` every process trains on its share of the rows, and the first one writes.

    Args:
        model: the base; it computes with the tuned values afterwards.
        tokenizer: its tokenizer.
        corpus: holds the language's training text.
        config: the method and what it trains; a ``SubnetworkConfig`` for chosen neurons.
        output: folder of the adapter, with the report ``training.json`` and the records ``dynamics.jsonl``.
        settings: how to train.
        validation: holds text of the language on which the best values are chosen.
        measure: is given the model at step 0 and every ``evaluate_every`` steps, and returns numbers by name for
            ``dynamics.jsonl``, such as the bits per byte of other languages.
        present: is given the written folder before it gets its name, to add what is made of its files, such as a page.

    Returns:
        The adapter, as ``load_adapter`` returns it, and the training report. Where training fails or is stopped, the
        model is the base again.

    Raises:
        CorpusError: the corpus lacks the language.
        FileExistsAlreadyError: the output is there already.
        StoppedError: a signal came; the checkpoint of the step it came in is saved.

    Example:
        >>> config = TuningConfig(method="lora:rank=8", language="mlt_Latn")
        >>> adapter, report = tune_language(model, tokenizer, open_corpus("texts/"), config, "adapters/mlt_Latn-lora")
        >>> adapter.detach(keep=False)  # the base again, for the next method
    """
    settings = settings or TrainingSettings()
    output = Path(output)
    refuse_tuned(output)
    language = canonical(config.language)
    rows = pack_documents(model, tokenizer, _documents(corpus, language), settings.context_length)
    held_out = validation and pack_documents(
        model, tokenizer, _documents(validation, language), settings.context_length
    )
    # Code that is loaded later would count as memory of the training.
    from transformers import Trainer  # noqa: F401

    from lape_fast.tune.dynamics import COPIES, DYNAMICS_NAME, Watched, read_dynamics

    workspace = _workspace(output)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    try:
        with joined_world() as world:
            with measured_peak(model.device) as peak:
                quantised = dense_ffns(model)[0].quantised
                run = prepare(model, config)
                undo = run.undo
                with run.cheap_loss():
                    predicted = run.subnetwork and _predicted_memory(model, run, settings)
                    report = train(
                        run.module.train(),
                        rows,
                        workspace,
                        settings,
                        identity=run.identity,
                        validation=held_out,
                        optimizer=run.optimizer(lr=settings.learning_rate, weight_decay=settings.weight_decay),
                        description=f"tuning {language}",
                        watched=Watched(model, run.parts, run.held, measure),
                    )
            with run.cheap_loss():
                # Kernels of quantised weights hide theirs.
                flops = None if quantised else _flops_per_token(run.module, rows)
            model.eval()
            memory = _memory_report(model, predicted, peak, COPIES * sum(map(_bytes, run.parts.values())))
            adapter = run.finish()
            undo = lambda: adapter.detach(keep=False)  # noqa: E731
            if world.is_main:
                last = read_dynamics(workspace)[-1]
                report |= {"training_seconds": last["seconds"], "tokens_per_second": last["tokens"] / last["seconds"]}
            report = {
                "method": str(config.method),
                **({} if run.neurons is None else {"neurons": run.neurons}),
                "trainable": run.trainable,
                **report,
                "flops_per_token": flops,
                "memory": memory,
            }
            if world.is_main:
                with atomic_folder(output) as folder:
                    run.write(adapter, folder)
                    shutil.copyfile(workspace / DYNAMICS_NAME, folder / DYNAMICS_NAME)
                    write_json(folder / LOG_NAME, {"settings": asdict(settings), **report})
                    if present:
                        present(folder)
                shutil.rmtree(workspace)
            # So that no process goes on to read what is not written yet.
            world.wait()
    except BaseException:
        undo()
        raise
    return adapter, report


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


def _flops_per_token(module: nn.Module, rows: Rows) -> float:
    """Of a forward and a backward pass over a real row."""
    device = next(module.parameters()).device
    row = {name: value[None].to(device) for name, value in rows[0].items()}

    def step() -> None:
        module.train()(**row).loss.backward()

    # The first pass chooses the policy by a trace, which would count too where a resumed run had no step left.
    step()
    flops = count_flops(step)
    module.zero_grad()
    return flops / row["input_ids"].numel()


def _predicted_memory(model: nn.Module, run: Run, settings: TrainingSettings) -> Plan:
    """Planned before the run, so that a model that cannot be planned costs nothing."""
    return plan(
        model,
        run.subnetwork,
        rows_per_step=settings.rows_per_step,
        rows_per_pass=settings.rows_and_passes(int(os.environ.get("WORLD_SIZE", "1")))[0],
        context_length=settings.context_length,
        device=model.device.type,
    )


def _memory_report(model: nn.Module, predicted: Plan | None, peak: dict[str, Any], copies: int) -> dict[str, Any]:
    """Measured bytes, and beside them those predicted for a subnetwork with the policy that ran.

    Args:
        copies: bytes that the records of the run took on the CPU.
    """
    on_cpu = peak["kind"] != "allocated" and peak["bytes"] is not None
    measured = {"measured": peak["kind"], "measured_bytes": max(0, peak["bytes"] - copies) if on_cpu else peak["bytes"]}
    if predicted is None:
        return measured
    policy = installed_layers(model)[-1].policy
    expected = predicted.policies[policy].allocated
    if peak["kind"] != "allocated":
        # The growth began when the model was there.
        expected -= predicted.resident["weights"]
    return {"policy": policy, "predicted_bytes": expected, **measured}


def _bytes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _documents(corpus: Corpus, language: str) -> list[str]:
    if language not in corpus.languages:
        raise CorpusError(
            f"{corpus.name} has no text in {language}; it has {', '.join(corpus.languages[:8])}"
            f"{' ...' if len(corpus.languages) > 8 else ''}."
        )
    return list(corpus.documents(language))
