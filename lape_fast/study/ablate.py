"""Switching a language's neurons off, and seeing which languages suffer (the deactivation test of 2402.16438)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.errors import AdapterError, ConfigError, FileExistsAlreadyError, LanguageError
from lape_fast.files import read_tensors, write_tensors
from lape_fast.identify import NeuronSet
from lape_fast.identify.checkpoints import differences
from lape_fast.identify.counts import canonical_or_same, find_language
from lape_fast.models import FFN, ExpertFFN, check_neurons, find_ffns, model_identity
from lape_fast.progress import progress_bar
from lape_fast.study.evaluate import EvaluationText, score_nats
from lape_fast.study.matrix import AblationMatrix
from lape_fast.tune.subnetwork import installed_layers

PARTIAL_KIND = "ablation-rows"


@contextlib.contextmanager
def silenced(model: nn.Module, neurons: Sequence[Tensor]) -> Iterator[None]:
    """Within the context the given neurons contribute nothing; afterwards every weight is what it was, bit for bit.

    A neuron reaches the rest of the model only through its column of the down projection, so that column is zeroed.

    Args:
        model: a causal language model of a known architecture.
        neurons: one index tensor per layer.

    Raises:
        ArchitectureError: the neurons do not fit the model, or its weights are quantised.
        AdapterError: an adapter is attached in overlay storage, whose neurons do not use the base's columns.

    Example:
        >>> with silenced(model, neurons["mlt_Latn"]):
        ...     without = score(model, text)
    """
    ffns = find_ffns(model)
    check_neurons(ffns, neurons)
    refuse_overlay(model)
    with outgoing_scaled(ffns, neurons, 0.0):
        yield


def refuse_overlay(model: nn.Module) -> None:
    """Raises AdapterError if trained neurons go around the base's columns, where no change of them is seen."""
    if any(layer.overlay for layer in installed_layers(model)):
        raise AdapterError(
            "The model has an adapter in overlay storage, whose trained neurons go around the base's columns; merge "
            "the adapter first (`lape-fast merge`), or detach it."
        )


@contextlib.contextmanager
def outgoing_scaled(
    ffns: Sequence[FFN] | Sequence[ExpertFFN], neurons: Sequence[Tensor], scale: float
) -> Iterator[None]:
    """Within the context the neurons' columns of the down projections are ``scale`` times what they are."""
    kept = []
    try:
        for ffn, chosen in zip(ffns, neurons, strict=True):
            chosen = chosen.to(ffn.down_weight.device)
            values = ffn.outgoing(chosen)
            kept.append((ffn, chosen, values))
            ffn.set_outgoing(chosen, values * scale)
        yield
    finally:
        for ffn, chosen, values in kept:
            ffn.set_outgoing(chosen, values)


def ablate_neurons(
    model: nn.Module,
    neurons: NeuronSet,
    text: EvaluationText,
    languages: Sequence[str] | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
) -> AblationMatrix:
    """Measures every language with each language's neurons switched off in turn.

    Args:
        model: the model the neurons were identified on.
        neurons: whose neurons to switch off.
        text: what to measure on.
        languages: which of ``neurons`` to switch off; by default those that are also in ``text``.
        checkpoint: a file that keeps every finished row, and from which the run goes on when it exists.

    Raises:
        ArchitectureError: the neurons are of a model of another size, or the model's weights are quantised.
        LanguageError: no language to switch off, or one that ``neurons`` lacks.
        ConfigError: the checkpoint belongs to another run.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("held-out/"))
        >>> ablate_neurons(model, neurons, text).selectivity()["mlt_Latn"]
    """
    ablated = _ablated(neurons, text, languages)
    run = ablation_identity(model, neurons, text, ablated)
    neurons.check_model(run["layers"], run["neurons_per_layer"])
    # A model whose neurons cannot be switched off is refused before the intact one is measured.
    with silenced(model, [torch.empty(0, dtype=torch.int64)] * run["layers"]):
        pass
    rows = len(text.packed.input_ids)
    measured = _finished_rows(checkpoint, run)  # the intact model's, then one for each language
    with progress_bar("ablating", rows * (1 + len(ablated))) as advance:
        advance(rows * len(measured))
        for language in (None, *ablated)[len(measured) :]:
            if language is None:
                measured.append(score_nats(model, text, advance))
            elif neurons.count(language):
                with silenced(model, neurons[language]):
                    measured.append(score_nats(model, text, advance))
            else:
                measured.append(measured[0])
                advance(rows)
            if checkpoint is not None:
                write_tensors(checkpoint, PARTIAL_KIND, {"nats": torch.stack(measured)}, {"run": run})
    counts = tuple(neurons.count(language) for language in ablated)
    nats = torch.stack(measured)
    metadata = {name: value for name, value in run.items() if name != "ablated"}
    return AblationMatrix(ablated, text.languages, counts, text.tokens, text.bytes, nats[0], nats[1:], metadata)


def ablate_to_file(
    model: nn.Module,
    neurons: NeuronSet,
    text: EvaluationText,
    path: str | os.PathLike,
    languages: Sequence[str] | None = None,
) -> AblationMatrix:
    """``ablate_neurons`` into a JSON file, through ``PATH.partial``, from which an interrupted run goes on.

    The same call with the same path does nothing twice.

    Raises:
        FileExistsAlreadyError: the file holds the ablation of another run.

    Example:
        >>> ablate_to_file(model, neurons, text, "out/neurons.ablation.json").hits_own_hardest()
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    if path.exists():
        matrix = AblationMatrix.load(path)
        run = ablation_identity(model, neurons, text, _ablated(neurons, text, languages))
        changed = differences(run, {**matrix.metadata, "ablated": list(matrix.ablated)})
        if changed:
            raise FileExistsAlreadyError(
                f"{path} holds the ablation of another run ({changed}); choose another output or remove the file."
            )
    else:
        matrix = ablate_neurons(model, neurons, text, languages, checkpoint=partial)
        matrix.save(path)
    partial.unlink(missing_ok=True)
    return matrix


def ablation_identity(
    model: nn.Module, neurons: NeuronSet, text: EvaluationText, ablated: Sequence[str]
) -> dict[str, Any]:
    """Everything that decides an ablation, as JSON values: two runs with the same identity measure the same."""
    parameter = next(model.parameters())
    return {
        **model_identity(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "neurons_fingerprint": neurons.fingerprint(),
        **text.source,
        "ablated": list(ablated),
    }


def _ablated(neurons: NeuronSet, text: EvaluationText, languages: Sequence[str] | None) -> tuple[str, ...]:
    held = [canonical_or_same(language) for language in neurons.languages]
    if languages is None:
        chosen = [language for language in held if language in text.languages]
    else:
        chosen = [held[find_language(held, language)] for language in languages]
    if not chosen:
        raise LanguageError(
            f"None of the {len(held)} languages with neurons is to be switched off and measured: they are "
            f"{', '.join(held[:5])}, and the text is in {', '.join(text.languages[:5])}; give text in one of them."
        )
    return tuple(chosen)


def _finished_rows(checkpoint: str | os.PathLike | None, run: dict[str, Any]) -> list[Tensor]:
    """float64 ``[columns]`` for the intact model and each language done, in order; empty before the first."""
    if checkpoint is None or not Path(checkpoint).exists():
        return []
    tensors, metadata = read_tensors(checkpoint, PARTIAL_KIND)
    changed = differences(run, metadata["run"])
    if changed:
        raise ConfigError(
            f"{checkpoint} holds an interrupted run of another kind ({changed}); resume it with its own settings, or "
            "choose another output."
        )
    return list(tensors["nats"])
