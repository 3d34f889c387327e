"""Several processes that work together, as ``torchrun`` starts them; a process by itself is a world of one."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lape_fast.errors import WorkerError

OTHER_ENDED = (
    "Another process of this run has ended; see what it said, and start all of them again to go on from their last "
    "checkpoints."
)

# Processes meet at the end of long work, and the first to arrive may wait for hours. One that died is noticed by the
# launcher, which ends the others.
PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class World:
    """The processes of one run.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: where this process's model goes; None leaves it to the user.

    Raises:
        WorkerError: by its methods, when another process has ended.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; int64 stays exact."""
        if self.size > 1:
            with _others_there():
                dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with _others_there():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Waits until every process is here."""
        self.gather(None)


@contextlib.contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(OTHER_ENDED) from error


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Joins the processes that ``torchrun`` started; without it, yields a world of one.

    Inside another ``joined_world``, or where the processes were joined by other means, it yields the same world.

    Example:
        >>> with joined_world() as world:
        ...     counts = count_activations(model, tokenizer, corpus, world=world)
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield World(dist.get_rank(), size, device or "cpu")
        return
    # Objects travel by gloo, tensors by what belongs to their device.
    with _others_there():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size, device or "cpu")
    finally:
        dist.destroy_process_group()
