"""Work done ahead in other processes, so that the model never waits for text."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import TypeVar

from lape_fast.errors import LapeFastError, WorkerError

Item = TypeVar("Item")

# Seconds between looks whether to stop: a signal does not end the wait for a worker.
PATIENCE = 0.2


def prefetch(
    produce: Callable[[int], Iterator[Item]], workers: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Item]:
    """Yields what ``produce(0)`` to ``produce(workers - 1)`` yield, each in its own order, as soon as it is ready.

    Every worker is one item ahead at most: it waits until that is taken. With no workers, ``produce(0)`` runs here.

    Args:
        produce: run in a forked process; its items and errors are sent through a pipe.
        workers: how many processes.
        stopped: asked while the workers have nothing ready; once it is true, nothing more is yielded.

    Raises:
        WorkerError: a worker was killed.
    """
    if workers == 0:
        yield from produce(0)
        return
    # Forked, the workers share the model's memory and need not import anything; they never touch the GPU.
    context = multiprocessing.get_context("fork")
    running: dict[connection.Connection, multiprocessing.Process] = {}
    try:
        for worker in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(produce, worker, receiver, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process
        while running and not stopped():
            for receiver in connection.wait(list(running), PATIENCE):
                try:
                    kind, value = pickle.loads(receiver.recv_bytes())
                # Between two items and in the middle of one.
                except (EOFError, OSError) as error:
                    raise WorkerError(
                        f"A process that reads and tokenises text died (exit code {_exit_code(running[receiver])}), "
                        "perhaps for want of memory; run again with fewer --workers."
                    ) from error
                if kind == "item":
                    yield value
                elif kind == "error":
                    raise value
                else:
                    running.pop(receiver).join()
                    receiver.close()
    finally:
        for receiver, process in running.items():
            process.kill()
            process.join()
            receiver.close()


def _exit_code(process: multiprocessing.Process) -> int | None:
    process.join(timeout=5)
    return process.exitcode


def _work(produce: Callable[[int], Iterator], worker: int, receiver: connection.Connection, sender) -> None:
    # The pipe must break when the parent dies, so nobody else may hold its reading end.
    receiver.close()
    # Terminals and schedulers signal all processes of a job at once. The parent decides what that means, and it ends
    # its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # The tokenizer's own threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for item in produce(worker):
            _send(sender, "item", item)
        _send(sender, "end", None)
    except BrokenPipeError:
        pass
    except Exception as error:
        if not isinstance(error, LapeFastError):
            error.add_note(traceback.format_exc())
        _send(sender, "error", error)


def _send(sender: connection.Connection, kind: str, value) -> None:
    # Pickled here: the pipe's own pickler would pass tensors by shared memory, which dies with the worker.
    sender.send_bytes(pickle.dumps((kind, value)))
