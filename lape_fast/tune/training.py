"""Training on packed rows with the transformers Trainer: one path for subnetworks and for small base models."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lape_fast.errors import CorpusError, TrainingError
from lape_fast.files import read_json, write_json
from lape_fast.models import supports_packing
from lape_fast.progress import progress_bar
from lape_fast.text import pack_for_model, tokenize
from lape_fast.tune.adapter import restore_values, write_adapter_files
from lape_fast.tune.subnetwork import Subnetwork

SETTINGS_NAME = "settings.json"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults suit a subnetwork of a pretrained model.

    Args:
        context_length: tokens per row.
        rows_per_step: rows per optimizer step.
        steps: optimizer steps; None for ``epochs`` passes over the text.
        epochs: passes over the text, where ``steps`` is None.
        learning_rate: the peak; 5 % warm-up, then a cosine to zero.
        weight_decay: of AdamW.
        seed: of the order of rows.
        save_every: steps between checkpoints from which an interrupted run resumes.
        evaluate_every: steps between measurements on the validation text; the best of them is kept.

    Example:
        >>> settings = TrainingSettings(steps=500, learning_rate=3e-4)
    """

    context_length: int = 512
    rows_per_step: int = 8
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0
    save_every: int = 200
    evaluate_every: int = 50


class Rows(torch.utils.data.Dataset):
    """Packed rows as the Trainer wants them: a dict of ``[S]`` tensors per row."""

    def __init__(self, packed, with_positions: bool):
        self.columns = {"input_ids": packed.input_ids, "labels": packed.labels}
        if with_positions:
            self.columns["position_ids"] = packed.position_ids

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[row] for name, values in self.columns.items()}


def pack_documents(model: nn.Module, tokenizer, documents: Sequence[str], context_length: int) -> Rows:
    """Tokenises and packs documents to train on.

    Raises:
        CorpusError: there is no token to predict.
    """
    token_lists = tokenize(tokenizer, list(documents))
    packed = pack_for_model(model, tokenizer, token_lists, [0] * len(documents), context_length)
    if not (packed.labels != -100).any():
        raise CorpusError(f"The {len(documents)} documents hold no token to predict; give more text.")
    return Rows(packed, with_positions=supports_packing(model))


def train(
    model: nn.Module,
    rows: Rows,
    output: str | os.PathLike,
    settings: TrainingSettings,
    *,
    subnetwork: Subnetwork | None = None,
    language: str = "",
    validation: Rows | None = None,
    description: str = "training",
) -> dict[str, Any]:
    """Trains the parameters that need gradients; an interrupted run with the same settings resumes.

    Args:
        model: the model, with its subnetwork attached if there is one.
        rows: what to train on.
        output: folder for checkpoints and the log.
        settings: how to train.
        subnetwork: checkpoints then hold only its trained values.
        language: the language of the subnetwork.
        validation: measured every ``evaluate_every`` steps; at the end the best values are put back.
        description: of the progress bar.

    Returns:
        ``steps``, ``seconds``, ``tokens_per_second``, ``train_loss`` and the ``log`` (a dict per logged step).

    Raises:
        TrainingError: the folder holds a run with other settings.
    """
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(output)
    steps = settings.steps or math.ceil(settings.epochs * len(rows) / settings.rows_per_step)
    _claim(output, {**vars(settings), "steps": steps, "rows": len(rows), "language": language})
    set_seed(settings.seed)
    tokens_per_step = settings.rows_per_step * settings.context_length
    with progress_bar(description, steps) as advance:
        trainer = _trainer(model, rows, validation, output, steps, settings, subnetwork, language)
        trainer.add_callback(_progress_callback(advance, tokens_per_step))
        start = time.perf_counter()
        result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": steps * tokens_per_step / seconds,
        "train_loss": result.training_loss,
        "log": trainer.state.log_history,
    }


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Remembers the settings of a run, and refuses to resume it with others."""
    path = output / SETTINGS_NAME
    if not path.exists():
        write_json(path, settings)
        return
    earlier = read_json(path)
    changed = [name for name in settings if earlier.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{name} was {earlier.get(name)!r} and is {settings[name]!r}" for name in changed)
        raise TrainingError(
            f"{output} holds a run with other settings ({differences}); resume it with its own, or choose another "
            "output."
        )


def _trainer(model, rows, validation, output, steps, settings: TrainingSettings, subnetwork, language):
    from transformers import Trainer, TrainingArguments, default_data_collator

    class SubnetworkTrainer(Trainer):
        """A Trainer whose checkpoints hold the adapter and not the model."""

        def _save(self, output_dir=None, state_dict=None):
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_adapter_files(subnetwork, folder, language=language)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            restore_values(subnetwork, resume_from_checkpoint)

        def _load_best_model(self):
            restore_values(subnetwork, self.state.best_model_checkpoint)

    evaluate_every = min(settings.evaluate_every, steps)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=settings.rows_per_step,
        per_device_eval_batch_size=settings.rows_per_step,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        seed=settings.seed,
        save_strategy="steps",
        # The best values can only be put back if each measured one was saved.
        save_steps=evaluate_every if validation else settings.save_every,
        save_total_limit=2,
        eval_strategy="steps" if validation else "no",
        eval_steps=evaluate_every,
        load_best_model_at_end=validation is not None,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        logging_steps=max(1, min(10, steps // 20)),
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    kind = SubnetworkTrainer if subnetwork else Trainer
    trainer = kind(
        model=model, args=arguments, train_dataset=rows, eval_dataset=validation, data_collator=default_data_collator
    )
    _silence(trainer)
    return trainer


def _silence(trainer) -> None:
    """Our own bar shows the progress; the Trainer's default callback prints every log line instead."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _progress_callback(advance, tokens_per_step: int):
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            advance(1, tokens_per_step)

    return Progress()
