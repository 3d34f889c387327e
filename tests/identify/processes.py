"""Forked processes for tests: as many as torchrun would start, without importing torch again in each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch

# What a process must not free before it ends, which it does without destructors: an error whose frames hold a DDP model
# would free it after its process group is gone, and that may wait for ever.
KEPT: list[Any] = []


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets in the environment of a process, on one thread."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Without it accelerate takes all cores again.
        "OMP_NUM_THREADS": "1",
    }


def start(function: Callable[[], Any], rank: int = 0, size: int = 1, port: int = 0):
    """Forks a process that runs ``function`` on one thread, and returns it with the pipe that its result comes by."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        # OpenMP's threads do not survive a fork.
        torch.set_num_threads(1)
        os.environ |= rank_environment(rank, size, port)
        sender.send(function())

    process = context.Process(target=run)
    process.start()
    sender.close()
    return process, receiver


def run_together(function: Callable[[], Any], size: int, kill: Callable[[], None] | None = None) -> list[Any]:
    """Runs ``function`` in ``size`` processes at once; with ``kill`` all are killed once it returns.

    Returns:
        The results in the order of ranks; None for a process that was killed before it had one.
    """
    port = free_port()
    running = [start(function, rank, size, port) for rank in range(size)]
    if kill is not None:
        kill()
        for process, _ in running:
            os.kill(process.pid, signal.SIGKILL)
    results = []
    for process, receiver in running:
        try:
            results.append(receiver.recv())
        except EOFError:
            results.append(None)
        process.join()
        if kill is None:
            assert process.exitcode == 0
    return results
