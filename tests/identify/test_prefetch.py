"""Processes that work ahead: their items, their errors, and their end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from lape_fast.errors import CorpusError, WorkerError
from lape_fast.identify.prefetch import prefetch


@pytest.mark.parametrize("workers", (0, 1, 3))
def test_every_item_comes_once_in_the_order_of_its_worker(workers):
    found = list(prefetch(lambda worker: ((worker, number) for number in range(50)), workers))
    for worker in range(max(1, workers)):
        assert [number for owner, number in found if owner == worker] == list(range(50))
    assert len(found) == 50 * max(1, workers)


def test_an_error_arrives_as_itself():
    def produce(worker):
        yield worker
        raise CorpusError("The file x is damaged; copy it again.")

    items = prefetch(produce, 2)
    with pytest.raises(CorpusError, match="^The file x is damaged; copy it again.$"):
        list(items)

    def divide(worker):
        yield 1 / worker

    with pytest.raises(ZeroDivisionError) as caught:
        list(prefetch(divide, 1))
    # Where it happened in the worker is not lost.
    assert "in divide" in "".join(caught.value.__notes__)


def test_a_worker_that_is_killed_is_an_error_and_not_silence():
    def produce(worker):
        yield os.getpid()
        os.kill(os.getpid(), signal.SIGKILL)
        yield None

    with pytest.raises(WorkerError, match="exit code -9"):
        list(prefetch(produce, 1))


def test_a_worker_that_is_killed_within_an_item_is_the_same_error():
    def produce(worker):
        yield os.getpid()
        # Far more than a pipe holds.
        yield bytes(1 << 20)

    items = prefetch(produce, 1)
    process = next(items)
    # Until the pipe is full; were it still empty, the error would be the same.
    time.sleep(0.2)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(WorkerError, match="exit code -9"):
        next(items)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_to_the_whole_job_is_left_to_the_parent(number):
    def produce(worker):
        yield os.getpid()
        yield from range(1000)

    items = prefetch(produce, 1)
    os.kill(next(items), number)
    assert list(items) == list(range(1000))


def test_a_stop_is_noticed_while_the_workers_have_nothing_ready():
    asked = []

    def produce(worker):
        yield os.getpid()
        time.sleep(600)

    items = prefetch(produce, 1, lambda: bool(asked))
    process = next(items)
    asked.append(True)
    assert list(items) == []
    assert not is_alive(process)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_whoever_stops_early_leaves_no_process_behind():
    def produce(worker):
        while True:
            yield os.getpid()

    items = prefetch(produce, 2)
    processes = set()
    # The second may start late on a busy machine.
    while len(processes) < 2:
        processes.add(next(items))
    items.close()
    assert not any(map(is_alive, processes))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    file = tmp_path / "workers"

    def produce(worker):
        with file.open("a") as written:
            written.write(f"{os.getpid()}\n")
        while True:
            yield worker

    parent = os.fork()
    if parent == 0:
        for _ in prefetch(produce, 3):
            pass
        os._exit(0)
    deadline = time.monotonic() + 20
    while not file.exists() or len(file.read_text().split()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    workers = [int(line) for line in file.read_text().split()]
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
