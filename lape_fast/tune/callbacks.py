"""What watches a training run of the transformers Trainer: its progress, its measurements, what is not finite, and
signals to end it."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lape_fast.errors import TrainingError
from lape_fast.identify.distributed import World
from lape_fast.progress import Advance, log

if TYPE_CHECKING:
    from lape_fast.tune.training import Rows

# What a shell sends for Ctrl-C, and what a scheduler or torchrun sends to end a process.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Progress(TrainerCallback):
    """Moves a progress bar by a step; where there is no terminal, a line tells of every measurement and checkpoint.

    Args:
        advance: moves the bar.
        tokens_per_step: what the rate counts.
        measures_base: whether the validation lines are measured before the first step, which may take long.
    """

    def __init__(self, advance: Advance, tokens_per_step: int, measures_base: bool):
        self._advance, self._tokens_per_step, self._measures_base = advance, tokens_per_step, measures_base

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            log(f"Going on from step {state.global_step} of {state.max_steps}.")
        elif self._measures_base:
            self._advance(0, note="validating")
            log("Measuring the base on the validation lines.")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        log(f"Step {state.global_step} of {state.max_steps}: validation loss {metrics['eval_loss']:.4f}.")

    def on_save(self, args, state, control, **kwargs):
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        log(
            f"Saved at step {state.global_step} of {state.max_steps}" + (f": loss {losses[-1]:.4f}." if losses else ".")
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._advance(1, self._tokens_per_step, note="validating" if control.should_evaluate else "")


class RowMeans(TrainerCallback):
    """Measures a validation row by its own tokens; the Trainer would divide by those of all processes' rows."""

    def on_step_end(self, args, state, control, **kwargs):
        args.average_tokens_across_devices = not control.should_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        args.average_tokens_across_devices = True


class Interruption(TrainerCallback):
    """Ends training behind the step that a signal came in, with a checkpoint of it; a second signal ends at once.

    Attributes:
        stopped: whether it did.

    Args:
        world: processes that have to stop behind the same step, whichever of them got the signal.
    """

    def __init__(self, world: World):
        self._world, self._signalled, self.stopped = world, False, False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        # Python lets no other thread listen.
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, *arguments: Any) -> None:
        self._signalled = True
        self.__exit__()

    def on_step_end(self, args, state, control, **kwargs):
        if self._world.sum(torch.tensor(int(self._signalled))):
            self.stopped = control.should_save = control.should_training_stop = True


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradient is not finite, so that the values of the last step are kept.

    Args:
        model: what is trained.
        rows: the training rows, among which the fault is looked for.
        world: the processes among which the rows of a step are divided.

    Raises:
        TrainingError: names the step and the rows.
    """

    def __init__(self, model: nn.Module, rows: Rows, world: World):
        self._model, self._rows, self._world = model, rows, world
        self._batches: list[dict[str, Tensor]] = []

    def __enter__(self) -> FiniteGradients:
        self._hook = self._model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hook.remove()

    def _note(self, model: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        if model.training:
            self._batches.append(kwargs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        # The processes have one gradient, so either all of them stop or none.
        if gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            raise TrainingError(self._describe(state.global_step + 1))
        self._batches.clear()

    def _describe(self, step: int) -> str:
        mine = {row for batch in self._batches for row in self._rows.find(batch["input_ids"])}
        numbers = sorted(set().union(*self._world.gather(mine)))
        return (
            f"The gradient of step {step} (rows {', '.join(map(str, numbers))} of the packed text) is not finite. The "
            "last checkpoint before it is kept, and the same command resumes from it; lower the learning rate, or load "
            "the base in bfloat16 or float32 if it is float16."
        )


class Begun(TrainerCallback):
    """Knows whether a step was begun: what is raised before comes from the preparations.

    Attributes:
        a_step: it was.
    """

    a_step = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.a_step = True
