"""Switching a language's neurons off, and seeing which languages suffer (the deactivation test of 2402.16438)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lape_fast.identify import NeuronSet
from lape_fast.models import check_neurons, find_ffns
from lape_fast.progress import progress_bar
from lape_fast.study.evaluate import EvaluationText, score


@dataclass(frozen=True)
class AblationMatrix:
    """What switching off one language's neurons costs every language.

    Attributes:
        ablated: whose neurons were switched off, one per row.
        evaluated: whose text was measured, one per column.
        base: bits per byte of the intact model, ``[columns]``.
        cost: bits per byte added by the ablation, ``[rows, columns]``.
        neurons: how many neurons were switched off, ``[rows]``.
    """

    ablated: tuple[str, ...]
    evaluated: tuple[str, ...]
    base: Tensor
    cost: Tensor
    neurons: tuple[int, ...]

    def own(self) -> dict[str, float]:
        """What switching off a language's neurons costs that language."""
        return {
            language: float(self.cost[row, self.evaluated.index(language)])
            for row, language in enumerate(self.ablated)
            if language in self.evaluated
        }

    def others(self) -> dict[str, float]:
        """The mean cost for all other evaluated languages."""
        means = {}
        for row, language in enumerate(self.ablated):
            rest = [column for column, other in enumerate(self.evaluated) if other != language]
            means[language] = float(self.cost[row, rest].mean()) if rest else float("nan")
        return means

    def hits_own_hardest(self) -> list[str]:
        """The languages that suffer most of all from the loss of their own neurons."""
        return [
            language
            for row, language in enumerate(self.ablated)
            if self.neurons[row] and self.evaluated[int(self.cost[row].argmax())] == language
        ]

    def to_json(self) -> dict:
        """All of it as JSON values."""
        return {
            "ablated": list(self.ablated),
            "evaluated": list(self.evaluated),
            "base_bits_per_byte": self.base.tolist(),
            "cost_bits_per_byte": self.cost.tolist(),
            "neurons": list(self.neurons),
            "own": self.own(),
            "others_mean": self.others(),
            "hits_own_hardest": self.hits_own_hardest(),
        }


@contextlib.contextmanager
def silenced(model: nn.Module, neurons: Sequence[Tensor]) -> Iterator[None]:
    """Within the context the given neurons contribute nothing; afterwards every weight is what it was, bit for bit.

    A neuron reaches the rest of the model only through its column of the down projection, so that column is zeroed.

    Args:
        model: a causal language model of a known architecture.
        neurons: one index tensor per layer.

    Raises:
        ArchitectureError: the neurons do not fit the model.

    Example:
        >>> with silenced(model, neurons["mlt_Latn"]):
        ...     without = score(model, text)
    """
    ffns = find_ffns(model)
    check_neurons(ffns, neurons)
    kept = []
    try:
        for ffn, chosen in zip(ffns, neurons, strict=True):
            chosen = chosen.to(ffn.down_weight.device)
            values = ffn.outgoing(chosen)
            kept.append((ffn, chosen, values))
            ffn.set_outgoing(chosen, torch.zeros_like(values))
        yield
    finally:
        for ffn, chosen, values in kept:
            ffn.set_outgoing(chosen, values)


def ablate_neurons(
    model: nn.Module, neurons: NeuronSet, text: EvaluationText, languages: Sequence[str] | None = None
) -> AblationMatrix:
    """Measures every language with each language's neurons switched off in turn.

    Args:
        model: the model the neurons were identified on.
        neurons: whose neurons to switch off.
        text: what to measure on.
        languages: which of ``neurons`` to switch off; by default those that are also in ``text``.

    Example:
        >>> text = prepare_text(model, tokenizer, open_corpus("held-out/"))
        >>> ablate_neurons(model, neurons, text).own()["mlt_Latn"]
    """
    ablated = tuple(languages or [language for language in neurons.languages if language in text.languages])
    base = score(model, text, "intact model")
    rows = []
    with progress_bar("ablating", len(ablated)) as advance:
        for language in ablated:
            with silenced(model, neurons[language]):
                scores = score(model, text)
            rows.append([scores[other].bits_per_byte - base[other].bits_per_byte for other in text.languages])
            advance(1, 0)
    return AblationMatrix(
        ablated,
        text.languages,
        torch.tensor([base[language].bits_per_byte for language in text.languages], dtype=torch.float64),
        torch.tensor(rows, dtype=torch.float64).view(len(ablated), len(text.languages)),
        tuple(neurons.count(language) for language in ablated),
    )
