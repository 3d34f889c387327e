"""What watches a training run of the transformers Trainer: a progress bar, and a guard against what is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lape_fast.errors import TrainingError
from lape_fast.progress import Advance

if TYPE_CHECKING:
    from lape_fast.tune.training import Rows


class Progress(TrainerCallback):
    """Moves a progress bar by a step."""

    def __init__(self, advance: Advance, tokens_per_step: int):
        self._advance, self._tokens_per_step = advance, tokens_per_step

    def on_step_end(self, args, state, control, **kwargs):
        self._advance(1, self._tokens_per_step)


class FiniteGradients(TrainerCallback):
    """Stops before an optimizer step whose gradient is not finite, so that the values of the last step are kept.

    Args:
        model: what is trained.
        rows: the training rows, among which the fault is looked for.

    Raises:
        TrainingError: names the step and the rows, and says where the rows hold nothing but padding.
    """

    def __init__(self, model: nn.Module, rows: Rows):
        self._model, self._rows = model, rows
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
        if gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            raise TrainingError(self._describe(state.global_step + 1))
        self._batches.clear()

    def _describe(self, step: int) -> str:
        numbers = sorted({row for batch in self._batches for row in self._rows.find(batch["input_ids"])})
        where = f"The gradient of step {step} (rows {', '.join(map(str, numbers))} of the packed text) is not finite"
        if all((batch["labels"] == -100).all() for batch in self._batches):
            return f"{where}, for these rows hold no token to predict; leave out documents that are empty."
        return (
            f"{where}. The last checkpoint before it is kept, and the same command resumes from it; lower the learning "
            "rate, or load the base in bfloat16 or float32 if it is float16."
        )
