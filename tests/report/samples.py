"""Data for the figures, of any size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lape_fast.identify.neurons import NeuronSet
from lape_fast.study import AblationMatrix, Alignment, Steering, WeightChange
from lape_fast.study.alignment import MEASURES
from lape_fast.study.weight_change import ProjectionChange
from lape_fast.text.languages import cldr_locales
from lape_fast.tune import TrainingSettings

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
    return _records(codes(number))


def write_training(
    folder: Path,
    languages: Sequence[str] = ("mlt_Latn",),
    *,
    method: str = "subnetwork",
    drop: Sequence[str] = (),
    memory: dict | None = None,
) -> Path:
    """What ``tune`` writes into its folder about a run whose best step is 40 of 80, but for what is dropped."""
    report = {
        "settings": asdict(TrainingSettings(learning_rate=1e-4)),
        "method": method,
        "neurons": 5,
        "trainable": 12_345,
        "steps": 80,
        "seconds": 50.0,
        "training_seconds": 40.0,
        "tokens_per_second": 1024.0,
        "train_loss": 3.0,
        "best_step": 40,
        "validation_loss": 3.5,
        "flops_per_token": 337_152.0,
        "memory": {
            "policy": "save",
            "predicted_bytes": 2 * 2**20,
            "measured": "allocated",
            "measured_bytes": 3 * 2**19,
            **(memory or {}),
        },
        "log": [],
    }
    held = {name: value for name, value in report.items() if name not in drop}
    (folder / "training.json").write_text(json.dumps(held), encoding="utf-8")
    records = [json.dumps(record) + "\n" for record in _records(languages)]
    (folder / "dynamics.jsonl").write_text("".join(records), encoding="utf-8")
    return folder


def _records(languages: Sequence[str]) -> list[dict]:
    records = [{"step": 0, "tokens": 0, "seconds": 0.0, "validation_loss": 4.0, "measured": _bits(languages, 0)}]
    for step in range(10, 81, 10):
        norms = {"gate": 0.3, "up": 0.4, "down": 1.2, "total": 1.3}
        record = {"step": step, "tokens": 512 * step, "seconds": step / 2, "learning_rate": 1e-3, "loss": 4 - step / 40}
        record |= {name: {part: norm * 10 / step for part, norm in norms.items()} for name in NORMS}
        records.append(record | ({} if step % 40 else {"validation_loss": 3.5, "measured": _bits(languages, step)}))
    return records


NORMS = ("gradient_norm", "update_norm", "change_norm")


def _bits(languages: Sequence[str], step: int) -> dict[str, float]:
    return {code: 2 + step * (place - 1) / 1000 for place, code in enumerate(languages)}


def alignment(number: int) -> Alignment:
    """The first language against ``number`` others, before and after one adapter, every value its own."""
    target, *others = codes(number + 1)
    values = torch.linspace(0, 1, 2 * number * (LAYERS + 1) * len(MEASURES), dtype=torch.float64)
    values = values.view(2, number, LAYERS + 1, len(MEASURES))
    return Alignment(target, others[0], ("base", "tuned"), tuple(others), 200, values)


def weight_change(number: int) -> WeightChange:
    """``number`` adapters, each of which changes two projections of every layer but its first."""
    changes = tuple(
        ProjectionChange(
            adapter=f"adapter {adapter}",
            layer=layer,
            projection=projection,
            neurons=4,
            entries=64,
            norm=(1 + adapter + layer) * (2.0 if projection == "down" else 1.0),
            old_norm=200.0,
            quantiles=(0.0,) * 8,
            cosine=1.0,
            cosine_quantiles=(1.0,) * 8,
            effective_rank=2.0,
            moved=1.0,
        )
        for adapter in range(number)
        for layer in range(1, LAYERS)
        for projection in ("gate", "down")
    )
    return WeightChange({f"adapter {adapter}": f"adapters/{adapter}" for adapter in range(number)}, changes, ())


def steering(number: int) -> Steering:
    """As many texts as there are languages: one in each without steering, and every other in the first with it."""
    languages = codes(number)
    forced = tuple(languages[0] if position % 2 else code for position, code in enumerate(languages))
    return Steering(languages[0], *((("text",) * number,) * 3), tuple(languages), forced)
