"""Starts of a command as forked processes that can be disturbed: no import is paid for twice.

The process that forks has imported everything and never starts a thread of its own, so its children are what
``lape-fast`` is behind its imports; several of one start are joined as ``torchrun`` joins them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.identify.processes import free_port, rank_environment

# Seconds. A process that is still there after PATIENCE hangs; a launcher ends the ones that are left after GRACE.
PATIENCE, GRACE = 300.0, 30.0

# So that the workers of a killed process become children of this one, which can then see and collect them.
PR_SET_CHILD_SUBREAPER = 36


def prepare() -> None:
    """Imports what commands import, and makes this process one whose forks can be disturbed."""
    # Their first use takes seconds, which every fork would pay again.
    import peft  # noqa: F401
    import transformers
    from transformers import Trainer  # noqa: F401

    import lape_fast.cli
    import lape_fast.identify
    import lape_fast.study
    import lape_fast.tune  # noqa: F401

    # OpenMP's threads do not survive a fork.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


# Every start that was made, so that none outlives a campaign that is broken off.
STARTS: list[Start] = []


@dataclass
class Start:
    """The processes of one start of a command.

    Attributes:
        pids: of the ranks that are still running, by rank.
        logs: what each rank writes on standard error.
        codes: exit codes of those that ended, negative for a signal.
    """

    pids: dict[int, int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)

    def poll(self) -> bool:
        """Whether a process is still running."""
        for rank, pid in list(self.pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.pids[rank]
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return bool(self.pids)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all have ended, or ``until``, or for so long; whether any is still running."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline and not until():
            time.sleep(0.002)
        return bool(self.pids)

    def signal(self, number: int, ranks: Sequence[int] | None = None, with_workers: bool = False) -> None:
        """Sends a signal to the ranks that are running, all by default."""
        for rank, pid in self.pids.items():
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if with_workers else os.kill)(pid, number)

    def end_with_the_first(self) -> bool:
        """Does what torchrun does once a process has failed: asks the others to end, and ends those that do not.

        They have some time to notice by themselves, which torchrun does not give them; whether that was not enough.
        """
        self.wait(PATIENCE, until=lambda: any(self.codes.values()))
        late = self.wait(GRACE)
        for number in (signal.SIGTERM, signal.SIGKILL) if late else ():
            self.signal(number)
            self.wait(GRACE)
        return late

    def workers(self) -> list[int]:
        """The processes that the ranks have started."""
        found = []
        for pid in self.pids.values():
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, path.read_text().split())
        return found

    def leftovers(self) -> list[int]:
        """Groups of which a process outlives its rank by ``GRACE``; those are ended."""
        left = []
        for group in self.groups:
            deadline = time.monotonic() + GRACE
            while _group_lives(group):
                if time.monotonic() > deadline:
                    left.append(group)
                    os.killpg(group, signal.SIGKILL)
                    break
                time.sleep(0.002)
        return left

    def errors(self) -> str:
        """What the ranks wrote on standard error."""
        return "\n".join(path.read_text(errors="replace") for path in self.logs)


def _group_lives(group: int) -> bool:
    # Collects what has ended; a zombie would count as running.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def start(function: Callable[[], object], logs: Path, size: int = 1) -> Start:
    """Forks ``size`` processes that run ``function``, and returns once all of them are about to."""
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    begun = Start({}, [logs / f"{rank}.log" for rank in range(size)])
    STARTS.append(begun)
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(size):
        receiver, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become(function, begun.logs[rank], rank, size, port, sender)
        os.close(sender)
        os.read(receiver, 1)
        os.close(receiver)
        begun.pids[rank] = pid
        begun.groups.append(pid)
    return begun


def _become(function: Callable[[], object], log: Path, rank: int, size: int, port: int, ready: int) -> None:
    """What a forked process does; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A test runner captures what is written to the streams of its own process.
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        # gloo looks for the host's own address otherwise, which may lead nowhere.
        os.environ |= {**rank_environment(rank, size, port), "GLOO_SOCKET_IFNAME": "lo"}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(ready, b".")
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        # The forking process's own cleaning up is not this one's.
        os._exit(code)


def run_to_end(function: Callable[[], object], logs: Path, size: int = 1) -> tuple[Start, float]:
    """Runs ``function`` without any disturbance; returns the start and its seconds."""
    begun = time.monotonic()
    started = start(function, logs, size)
    if started.wait(PATIENCE):
        started.signal(signal.SIGKILL)
        started.wait(GRACE)
    return started, time.monotonic() - begun


def end_all() -> None:
    """Ends what is still running."""
    for started in STARTS:
        started.signal(signal.SIGKILL, with_workers=True)
        started.wait(GRACE)
    STARTS.clear()


def draw_worker(started: Start, draw: random.Random) -> int | None:
    """A worker of a start, waited for; None if the run ends without one."""
    started.wait(PATIENCE, until=lambda: bool(started.workers()))
    workers = started.workers()
    return draw.choice(workers) if workers else None
