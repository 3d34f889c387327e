"""Training on packed rows with the transformers Trainer: one path for subnetworks and for small base models."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from lape_fast.errors import (
    ConfigError,
    CorpusError,
    FileFormatError,
    LapeFastError,
    StoppedError,
    TrainingError,
    WorkerError,
)
from lape_fast.files import alone_in, fits, is_number, lacks_room, read_json, write_json
from lape_fast.identify.distributed import OTHER_ENDED, World, joined_world
from lape_fast.models import supports_packing
from lape_fast.progress import progress_bar
from lape_fast.text import pack_for_model, tokenize

if TYPE_CHECKING:
    from lape_fast.tune.dynamics import Watched

SETTINGS_NAME = "settings.json"

# Entries of the training loss; up to so many steps each has its own.
LONGEST_LOG = 2000


def _is_interval(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _is_entry(value: Any) -> bool:
    return fits(value, {"step": int, "epoch": (int, float)}) and fits(value, {str: is_number})


# Of the Trainer's state, what it and we compute with.
STATE = {
    "log_history": [_is_entry],
    "logging_steps": _is_interval,
    "eval_steps": _is_interval,
    "save_steps": _is_interval,
    "best_metric": (None, int, float),
    "best_global_step": (None, int),
    "best_model_checkpoint": (None, str),
    "stateful_callbacks": dict,
}


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults suit a subnetwork of a pretrained model.

    Args:
        context_length: tokens per row.
        rows_per_step: rows per optimizer step, over all processes.
        rows_per_pass: rows that one process computes at once; gradients accumulate over passes, in fp32, up to
            ``rows_per_step``. None: all rows of the process.
        steps: optimizer steps; None for ``epochs`` passes over the text.
        epochs: passes over the text, where ``steps`` is None.
        learning_rate: the peak.
        schedule: how the learning rate falls from its peak: cosine, linear, constant, or another of transformers'.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: of AdamW.
        max_grad_norm: to which the norm of the gradient is clipped.
        seed: of the order of rows.
        save_every: steps between checkpoints from which an interrupted run resumes.
        evaluate_every: steps between measurements on the validation text; the best of them is kept.
        patience: measurements in a row without a better one after which training stops; None never stops.
        report_to: where metrics go beside the log, such as tensorboard, wandb or trackio.

    Raises:
        ConfigError: the rows of a step are no multiple of the rows of a pass.

    Example:
        >>> settings = TrainingSettings(steps=500, learning_rate=3e-4)
    """

    context_length: int = 512
    rows_per_step: int = 8
    rows_per_pass: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 200
    evaluate_every: int = 50
    patience: int | None = None
    report_to: tuple[str, ...] = ()

    def rows_and_passes(self, processes: int) -> tuple[int, int]:
        """Rows per pass of one process, and its passes per optimizer step."""
        rows = self.rows_per_pass or max(1, self.rows_per_step // processes)
        passes, rest = divmod(self.rows_per_step, rows * processes)
        if rest or not passes:
            raise ConfigError(
                f"{self.rows_per_step} rows per step cannot be cut into passes of {rows} rows in {processes} "
                f"process{'es' if processes > 1 else ''}; make rows_per_step a multiple of {rows * processes}."
            )
        return rows, passes


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

    def find(self, input_ids: torch.Tensor) -> list[int]:
        """The numbers of the rows that hold these ids, ``[R, S]``."""
        mine = self.columns["input_ids"]
        return [row for ids in input_ids.to(mine.device) for row in torch.nonzero((mine == ids).all(1))[:1, 0].tolist()]


class Steps(torch.utils.data.Dataset):
    """The rows of all steps in their order: pass after pass over the text, each in an order of its own.

    No step holds fewer rows than another, and each holds the same ones, however many processes share them.

    Args:
        rows: the text.
        number: how many rows the steps need.
        seed: of the order.
    """

    def __init__(self, rows: Rows, number: int, seed: int):
        self.rows = rows
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(number / len(rows))
        self.order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[:number]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self.rows[int(self.order[number])]


def pack_documents(model: nn.Module, tokenizer, documents: Sequence[str], context_length: int) -> Rows:
    """Tokenises and packs documents to train on; rows that are empty but for their first token are left out.

    Raises:
        CorpusError: there is no token to predict.
    """
    token_lists = tokenize(tokenizer, list(documents))
    packed = pack_for_model(model, tokenizer, token_lists, [0] * len(documents), context_length)
    rows = Rows(packed, with_positions=supports_packing(model))
    # A model never predicts the first token of a row; the mean over no token at all would be no number.
    predicts = (packed.labels[:, 1:] != -100).any(1)
    rows.columns = {name: values[predicts] for name, values in rows.columns.items()}
    if not len(rows):
        raise CorpusError(f"The {len(documents)} documents hold no token to predict; give more text.")
    return rows


def train(
    model: nn.Module,
    rows: Rows,
    output: str | os.PathLike,
    settings: TrainingSettings,
    *,
    identity: str = "",
    validation: Rows | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    description: str = "training",
    watched: Watched | None = None,
) -> dict[str, Any]:
    """Trains the parameters that need gradients; an interrupted run with the same settings resumes.

    Under ``torchrun`` each process computes its share of every step's rows; the result is that of one process, to
    rounding. SIGINT and SIGTERM end the run behind the step they come in, with a checkpoint.

    Args:
        model: what the Trainer is given: a model, or a PEFT model, whose checkpoints hold the adapter only.
        rows: what to train on.
        output: folder for checkpoints and the log.
        settings: how to train.
        identity: what is trained; a run of something else is not resumed.
        validation: measured every ``evaluate_every`` steps, as the mean over its rows; at the end the best values are
            put back.
        optimizer: None for torch's fused AdamW.
        description: of the progress bar.
        watched: what is recorded in ``dynamics.jsonl`` in the folder; nothing by default.

    Returns:
        ``steps``, ``seconds``, ``tokens_per_second``, ``train_loss`` and the ``log`` (a dict per step, or per so many
        steps that there are ``LONGEST_LOG``); with validation text also ``best_step``, whose values the model has, and
        its ``validation_loss``.

    Raises:
        TrainingError: the folder holds a run with other settings, or a gradient is not finite.
        StoppedError: a signal came.
        WorkerError: another process has ended.
    """
    from transformers import set_seed

    from lape_fast.tune.callbacks import FiniteGradients, Interruption, Progress, RowMeans
    from lape_fast.tune.dynamics import DYNAMICS_NAME, Dynamics, mean_of_log

    output = Path(output)
    steps = settings.steps or math.ceil(settings.epochs * len(rows) / settings.rows_per_step)
    claim = {**vars(settings), "steps": steps, "rows": len(rows), "identity": identity}
    tokens_per_step = settings.rows_per_step * settings.context_length
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined_world())
        if world.is_main:
            stack.enter_context(alone_in(output))
        _claim(output, claim, world)
        set_seed(settings.seed)
        trainer = _trainer(model, rows, validation, output, steps, settings, optimizer, world)
        trainer.add_callback(stack.enter_context(FiniteGradients(model, rows, world)))
        trainer.add_callback(RowMeans())
        interruption = stack.enter_context(Interruption(world))
        trainer.add_callback(interruption)
        if world.is_main:
            advance = stack.enter_context(progress_bar(description, steps))
            # In front of the measurements, which it announces.
            trainer.add_callback(Progress(advance, tokens_per_step, watched is not None and validation is not None))
        if watched is not None:
            every = min(settings.evaluate_every, steps)
            path = output / DYNAMICS_NAME
            # Behind the interruption, whose checkpoint the log has to reach.
            # Each is an entry of the log too.
            records = max(1, min(10, steps // 20), steps // LONGEST_LOG)
            trainer.add_callback(
                Dynamics(path, watched, model, validation, records, every, tokens_per_step, world.is_main)
            )
        # accelerate renames what the Trainer passes to it.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        start = time.perf_counter()
        checkpoint = last_checkpoint(output)
        with _others_there(), _room_on_disk(output), _whole(checkpoint, trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    if interruption.stopped and trainer.state.global_step < steps:
        raise StoppedError(
            f"Interrupted after step {trainer.state.global_step} of {steps}; the same command goes on from there."
        )
    state = trainer.state
    # The Trainer's own summary, the last entry, is of the steps since the run was last resumed.
    log = [
        _with_epoch(entry, settings.rows_per_step / len(rows))
        for entry in state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    best = {"best_step": state.best_global_step, "validation_loss": state.best_metric} if validation else {}
    return {
        "steps": state.global_step,
        "seconds": seconds,
        "tokens_per_second": state.global_step * tokens_per_step / seconds,
        "train_loss": mean_of_log(log),
        **best,
        "log": log,
    }


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint of a run; the Trainer writes its state last."""
    numbered = {int(path.name.removeprefix("checkpoint-")): path for path in output.glob("checkpoint-*[0-9]")}
    return next((str(numbered[step]) for step in sorted(numbered, reverse=True) if is_complete(numbered[step])), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint can be resumed from: a kill may have ended its writing, in any process, or its removal."""
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    try:
        state = read_json(checkpoint / "trainer_state.json")
        if not fits(state, {**STATE, "global_step": lambda value: value == step}):
            return False
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, FileFormatError, SafetensorError):
        return False
    # torch's files are zip archives, whose directory stands at their end. The optimizer's is written after the model's
    # files and before those of the processes' random states, and the Trainer's state behind them.
    files = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return {"optimizer.pt", "scheduler.pt"} <= {path.name for path in files} and all(map(zipfile.is_zipfile, files))


@contextlib.contextmanager
def _whole(checkpoint: str | None, trainer) -> Iterator[None]:
    """Turns what is raised before the first step of a resumed run into an error that names its checkpoint."""
    from lape_fast.tune.callbacks import Begun

    begun = Begun()
    trainer.add_callback(begun)
    try:
        yield
    except LapeFastError:
        raise
    # A damaged or hostile checkpoint makes transformers, torch and safetensors raise nearly anything.
    except Exception as error:
        if checkpoint is None or begun.a_step:
            raise
        raise TrainingError(
            f"The run cannot go on from {checkpoint} ({type(error).__name__}: {str(error)[:200]}); remove it to go on "
            "from the one before, or from the start."
        ) from error


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception of its own.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise WorkerError(OTHER_ENDED) from error
        raise


@contextlib.contextmanager
def _room_on_disk(output: Path) -> Iterator[None]:
    """One sentence for whatever is raised where a checkpoint cannot grow."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not lacks_room(error):
            raise
        # torch tells of its own place in the file.
        reason = str(error).strip().splitlines()[0] if isinstance(error, OSError) else os.strerror(errno.ENOSPC)
        raise TrainingError(
            f"A checkpoint in {output} could not be written ({reason}); make room there, and the same command goes on "
            "from the last whole one."
        ) from error


def _with_epoch(entry: dict[str, Any], epochs_per_step: float) -> dict[str, Any]:
    """An entry of the Trainer's log, which takes all steps for one epoch."""
    return {**entry, "epoch": round(entry["step"] * epochs_per_step, 4)}


def _claim(output: Path, settings: dict[str, Any], world: World) -> None:
    """Remembers the settings of a run, and refuses to resume it with others."""
    path = output / SETTINGS_NAME
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    if not path.exists():
        # Of the other processes, those that find the file already find their own settings in it.
        if world.is_main:
            write_json(path, settings)
        return
    earlier = read_json(path)
    if not isinstance(earlier, dict):
        raise FileFormatError(f"{path} holds no settings of a run; remove {output} to train again.")
    changed = [name for name in settings if earlier.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{name} was {earlier.get(name)!r} and is {settings[name]!r}" for name in changed)
        raise TrainingError(
            f"{output} holds a run with other settings ({differences}); resume it with its own, or choose another "
            "output."
        )


def _trainer(model, rows, validation, output, steps, settings: TrainingSettings, optimizer, world: World):
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator
    from transformers.trainer_callback import PrinterCallback

    evaluate_every = min(settings.evaluate_every, steps)
    stops_early = settings.patience is not None and validation is not None
    per_pass, passes = settings.rows_and_passes(world.size)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=per_pass,
        # The Trainer weighs a row's tokens by the others in its batch. One row each, a measurement does not depend on
        # the number of processes and of rows per pass.
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=passes,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        # `Steps` has the order.
        train_sampling_strategy="sequential",
        save_strategy="steps",
        # The best values can only be put back if each measured one was saved.
        save_steps=evaluate_every if validation else settings.save_every,
        save_total_limit=2,
        eval_strategy="steps" if validation else "no",
        eval_steps=evaluate_every,
        load_best_model_at_end=validation is not None,
        metric_for_best_model="loss",
        prediction_loss_only=True,
        # A mean over steps depends on where a run was interrupted; but a log of any length would fill the memory.
        logging_steps=max(1, steps // LONGEST_LOG),
        report_to=list(settings.report_to) or "none",
        # The rows hold what the model takes; of a module around it the Trainer could not tell.
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        log_level="error",
        # The patience that is left.
        restore_callback_states_from_checkpoint=stops_early,
        # Every trained parameter is used in every pass, and no buffer ever changes.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    # One process trains on one GPU; of several visible ones the Trainer would make a DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Steps(rows, steps * settings.rows_per_step, settings.seed),
        eval_dataset=validation,
        data_collator=default_data_collator,
        optimizers=(optimizer, None),
        callbacks=[EarlyStoppingCallback(settings.patience)] if stops_early else [],
    )
    # Our own bar shows the progress; the Trainer's default callback prints every log line instead.
    trainer.remove_callback(PrinterCallback)
    return trainer
