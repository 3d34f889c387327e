"""Data for the figures, of any size."""

from __future__ import annotations

import math

import torch

from lape_fast.identify.neurons import NeuronSet
from lape_fast.study import AblationMatrix
from lape_fast.text.languages import cldr_locales

LAYERS = 6
NEURONS_PER_LAYER = 64


def codes(number: int) -> list[str]:
    """So many languages of the built-in corpus."""
    found = list(cldr_locales())[:number]
    assert len(found) == number
    return found


def neuron_set(number: int) -> NeuronSet:
    """Language g has (3 g + layer) mod 7 neurons in each layer, so some cells are empty."""
    lists = {
        code: [list(range((3 * position + layer) % 7)) for layer in range(LAYERS)]
        for position, code in enumerate(codes(number))
    }
    return NeuronSet.from_lists(lists, neurons_per_layer=NEURONS_PER_LAYER)


def matrix_of(ablated: list[str], evaluated: list[str], cost: torch.Tensor, neurons: list[int]) -> AblationMatrix:
    """The matrix of these costs in bits per byte, above 2 bits per byte, in text with a token every two bytes."""
    size = 2**20
    base = torch.full((len(evaluated),), 2.0, dtype=torch.float64)
    nats = (base + cost.double()) * math.log(2) * size
    columns = len(evaluated)
    return AblationMatrix(
        tuple(ablated),
        tuple(evaluated),
        tuple(neurons),
        (size // 2,) * columns,
        (size,) * columns,
        base * math.log(2) * size,
        nats.view(len(ablated), columns),
    )


def ablation_matrix(rows: int, columns: int) -> AblationMatrix:
    """Every row costs its own language 0.2 bits per byte and helps or harms the others a little."""
    cost = torch.linspace(-0.05, 0.05, rows * columns, dtype=torch.float64).view(rows, columns)
    cost[range(rows), range(rows)] = 0.2
    languages = codes(columns)
    return matrix_of(languages[:rows], languages, cost, list(range(rows)))


def scores(number: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Bits per byte before tuning the first language, and after it by two methods."""
    before = {code: 2 + math.sin(position) / 2 for position, code in enumerate(codes(number))}
    after = {
        method: {code: value + harm * math.cos(position) for position, (code, value) in enumerate(before.items())}
        for method, harm in (("subnetwork", 0.02), ("random", 0.05))
    }
    for changed in after.values():
        changed[codes(1)[0]] -= 0.3
    return before, after


def training_log() -> list[dict]:
    """What the trainer writes: losses, validation losses, and a closing entry with neither."""
    losses = [{"step": step, "loss": 4 - step / 40, "learning_rate": 1e-3} for step in range(10, 81, 10)]
    validation = [{"step": step, "eval_loss": 3 + abs(step - 40) / 100} for step in (20, 40, 60, 80)]
    return [*losses, *validation, {"step": 80, "train_loss": 3.1}]


def dynamics_records(number: int) -> list[dict]:
    """What a training run records while ``number`` languages are measured, the first of which gains."""
    records = [{"step": 0, "tokens": 0, "seconds": 0.0, "validation_loss": 4.0, "measured": _bits(number, 0)}]
    for step in range(10, 81, 10):
        norms = {"gate": 0.3, "up": 0.4, "down": 1.2, "total": 1.3}
        record = {"step": step, "tokens": 512 * step, "seconds": step / 2, "learning_rate": 1e-3, "loss": 4 - step / 40}
        record |= {name: {part: norm * 10 / step for part, norm in norms.items()} for name in NORMS}
        records.append(record | ({} if step % 40 else {"validation_loss": 3.5, "measured": _bits(number, step)}))
    return records


NORMS = ("gradient_norm", "update_norm", "change_norm")


def _bits(number: int, step: int) -> dict[str, float]:
    return {code: 2 + step * (place - 1) / 1000 for place, code in enumerate(codes(number))}
