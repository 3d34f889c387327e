"""Training dynamics: a line of JSON per record of a training run, from its step 0 on.

Every record holds ``step``, ``tokens`` (padding included) and ``seconds`` (spent in optimizer steps, over all parts of
an interrupted run), and where they are known

    loss, learning_rate    the mean loss since the record before, and the rate of the last step
    gradient_norm          of the last step before it was clipped: a number per projection, and the ``total``
    update_norm            of the change of the trained values by the last step, in the same form
    change_norm            of their change since the start
    validation_loss        as the mean over the validation rows
    measured               what the caller's ``measure`` returned for the model
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lape_fast.errors import FileFormatError
from lape_fast.files import LONGEST_JSON, fits, is_number, parse_json, read_text, write_text

if TYPE_CHECKING:
    from lape_fast.tune.training import Rows

DYNAMICS_NAME = "dynamics.jsonl"

TOTAL = "total"

# The shapes of what every record has, and of what one may have.
KNOWN = {"step": int, "tokens": int, "seconds": is_number}
MORE = [
    *((name, is_number) for name in ("loss", "learning_rate", "validation_loss")),
    *((name, {str: is_number}) for name in ("gradient_norm", "update_norm", "change_norm", "measured")),
]

# How often the trained values are kept beside themselves: those of the start, and those before a recorded step.
COPIES = 2

Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Watched:
    """What is recorded while a model trains.

    Args:
        model: what ``measure`` is given, in eval mode.
        parts: the trained parameters by projection.
        held: within this context the model computes with the values trained so far.
        measure: returns numbers by name, such as the bits per byte of every language.
    """

    model: nn.Module
    parts: Mapping[str, Sequence[nn.Parameter]]
    held: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    measure: Measure | None = None


class Dynamics(TrainerCallback):
    """Writes the records of a run: every so many steps, and at every measurement.

    Norms take a copy of the trained values, which is why not every step has a record. A run that is resumed drops the
    records behind its checkpoint and writes them anew; the losses and seconds of the steps before it are in the
    Trainer's log, so that it ends with the records of a run that never stopped.

    Args:
        path: the file.
        watched: what is recorded.
        trained: what the Trainer trains, which computes the loss of validation rows.
        validation: the validation rows, if any: then what is measured is measured with them.
        record_every: steps between records.
        measure_every: steps between measurements.
        tokens_per_step: of all processes.
        writes: whether this process writes the file. All of them must measure, as they may share the model.
    """

    def __init__(
        self,
        path: Path,
        watched: Watched,
        trained: nn.Module,
        validation: Rows | None,
        record_every: int,
        measure_every: int,
        tokens_per_step: int,
        writes: bool,
    ):
        self._writes = writes
        self._path, self._watched, self._trained, self._validation = path, watched, trained, validation
        self._record_every, self._measure_every = record_every, measure_every
        self._tokens_per_step = tokens_per_step
        # On the CPU, as memory of the device may be short. `COPIES` of the trained values.
        self._start, self._before = self._copies(), self._copies()
        self._gradients: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._begun = time.perf_counter()
        self._pending: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._seconds = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        kept = []
        if state.global_step:
            lines = read_text(self._path, LONGEST_JSON).splitlines() if self._path.exists() else []
            kept = [record for record in _whole_records(lines) if record["step"] <= state.global_step]
        if self._writes:
            write_text(self._path, "".join(_line(record) for record in kept))
        self._recorded = kept[-1]["step"] if kept else state.global_step
        if kept:
            return
        record = {"step": 0, "tokens": 0, "seconds": 0.0}
        if self._validation:
            record["validation_loss"] = mean_loss(self._trained, self._validation)
        self._write({**record, **self._measured()})

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._records(state.global_step + 1, state):
            return
        self._remember()
        self._gradients = {
            name: torch.stack(torch._foreach_norm([parameter.grad for parameter in parts])).norm()
            for name, parts in self._watched.parts.items()
        }

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._begun
        # The Trainer's mean loss is that since its last entry, which is not in its checkpoints.
        control.should_log |= self._records(state.global_step, state) or control.should_save

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:
            return
        state.log_history[-1]["seconds"] = self._seconds
        if not self._records(state.global_step, state):
            return
        record = {
            "step": state.global_step,
            "tokens": state.global_step * self._tokens_per_step,
            "seconds": self._seconds,
            "learning_rate": logs["learning_rate"],
            "loss": mean_of_log(state.log_history, behind=self._recorded),
            "gradient_norm": _unclipped(self._gradients, logs["grad_norm"]),
            "update_norm": distance(self._watched.parts, self._before),
            "change_norm": distance(self._watched.parts, self._start),
        }
        self._recorded = state.global_step
        if self._measures(state.global_step, state):
            record |= self._measured()
        if control.should_evaluate:
            self._pending = record
        else:
            self._write(record)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._pending is not None:
            self._write({**self._pending, "validation_loss": metrics["eval_loss"]})
            self._pending = None

    def _records(self, step: int, state) -> bool:
        return step % self._record_every == 0 or self._measures(step, state)

    def _measures(self, step: int, state) -> bool:
        return step % self._measure_every == 0 or step == state.max_steps

    def _measured(self) -> dict[str, Any]:
        if self._watched.measure is None:
            return {}
        model = self._watched.model
        training = model.training
        model.eval()
        try:
            with self._watched.held():
                return {"measured": dict(self._watched.measure(model))}
        finally:
            model.train(training)

    def _copies(self) -> dict[str, list[Tensor]]:
        return {
            name: [parameter.detach().to("cpu", copy=True) for parameter in parts]
            for name, parts in self._watched.parts.items()
        }

    @torch.no_grad()
    def _remember(self) -> None:
        for name, parts in self._watched.parts.items():
            for parameter, before in zip(parts, self._before[name], strict=True):
                before.copy_(parameter)

    def _write(self, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def read_dynamics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps.

    Args:
        path: a ``dynamics.jsonl``, or the adapter folder that holds it.

    Raises:
        FileFormatError: there is none, or a line of it is not a record.
    """
    path = Path(path)
    path = path / DYNAMICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileFormatError(f"{path} does not exist; name the folder of an adapter that tune wrote.")
    lines = read_text(path, LONGEST_JSON).splitlines()
    records = _whole_records(lines)
    if len(records) != len(lines):
        raise FileFormatError(f"Line {len(records) + 1} of {path} is not a record of training; tune again.")
    return records


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows) -> float:
    """The mean over rows of a model's loss, each row by its own tokens, as the Trainer measures it."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        losses = [
            model(**{name: value[None].to(device) for name, value in rows[row].items()}).loss.float()
            for row in range(len(rows))
        ]
    finally:
        model.train(training)
    return float(torch.stack(losses).mean())


@torch.no_grad()
def distance(values: Mapping[str, Sequence[Tensor]], others: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The Euclidean norm of the difference of tensors, of which ``others`` are on the CPU: per name, and ``total``."""
    squares = {}
    for name, own in values.items():
        changes = (value.cpu() - other for value, other in zip(own, others[name], strict=True))
        squares[name] = sum(float(change.double().square().sum()) for change in changes)
    return {**{name: square**0.5 for name, square in squares.items()}, TOTAL: sum(squares.values()) ** 0.5}


def mean_of_log(history: Sequence[Mapping[str, Any]], behind: int = 0) -> float:
    """The mean training loss of the steps behind one, from the Trainer's log, whose entries are means themselves."""
    entries = [entry for entry in history if "loss" in entry]
    starts = [0, *(entry["step"] for entry in entries)]
    steps = [entry["step"] - max(start, behind) for entry, start in zip(entries, starts, strict=False)]
    kept = [(entry["loss"], weight) for entry, weight in zip(entries, steps, strict=True) if weight > 0]
    return sum(loss * weight for loss, weight in kept) / sum(weight for _, weight in kept)


def _unclipped(norms: Mapping[str, Tensor], total: float) -> dict[str, float]:
    """The norms before clipping, which scaled all of them alike, from those after it and the total before it."""
    clipped = {name: float(norm) for name, norm in norms.items()}
    left = sum(norm**2 for norm in clipped.values()) ** 0.5
    scale = total / left if left else 1.0
    return {**{name: norm * scale for name, norm in clipped.items()}, TOTAL: total}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _whole_records(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The records up to the first line that is cut off."""
    records = []
    for line in lines:
        try:
            record = parse_json(line, "a record")
        except FileFormatError:
            break
        if not fits(record, KNOWN) or any(name in record and not fits(record[name], shape) for name, shape in MORE):
            break
        records.append(record)
    return records
