"""Chains of faults: a command is started, disturbed at a random moment and started again, until it is let finish."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.processes import GRACE, PATIENCE, Start, draw_worker, end_all, run_to_end, start
from benchmarks.faults.scenarios import SCENARIOS, Scenario, broken_files, contents, differences, make_inputs
from benchmarks.faults.scenarios import run_command as run

# Faults in a row before a run is left in peace.
LONGEST_CHAIN = 6

# Of the file system that is filled to its last byte.
DISK_BYTES = 32 * 2**20

# With no right to mount one: files of the disturbed process may not grow beyond this.
FILE_BYTES = 1000

# How a process may end, by fault: the code of an interruption, of an error in one sentence, of none at all.
STOPPED, ERROR, FINISHED = 130, 1, 0
CODES = {
    "kill": {-signal.SIGKILL, FINISHED},
    "terminate": {-signal.SIGTERM, STOPPED, FINISHED},
    "interrupt": {STOPPED, FINISHED},
    "disk": {ERROR, FINISHED},
    "worker": {ERROR, FINISHED},
    "rank": {-signal.SIGKILL, -signal.SIGTERM, STOPPED, ERROR, FINISHED},
}
EXISTS = "exists already"


class Disk:
    """A folder that can be filled: a file system of its own, where the user may mount one.

    Args:
        folder: made, and gone again behind the ``with`` block.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / ".filler"

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.folder)]
        try:
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        except FileNotFoundError:
            self.mounted = False
        return self

    def __exit__(self, *exception: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, started: Start) -> None:
        """Leaves no room for another byte to the processes of a start."""
        if not self.mounted:
            for pid in started.pids.values():
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FILE_BYTES, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        """Gives the room back."""
        self._filler.unlink(missing_ok=True)

    def files(self) -> set[tuple[str, int]]:
        """What is there, with sizes; files may vanish meanwhile."""
        found = set()
        for folder, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):
                    found.add((os.path.join(folder, name), os.lstat(os.path.join(folder, name)).st_size))
        return found

    def clear(self) -> None:
        """Removes everything."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _kill(started: Start, disk: Disk, draw: random.Random) -> bool:
    started.signal(signal.SIGKILL)
    return True


def _terminate(started: Start, disk: Disk, draw: random.Random) -> bool:
    # Schedulers signal every process of a job.
    started.signal(signal.SIGTERM, with_workers=True)
    return True


def _interrupt(started: Start, disk: Disk, draw: random.Random) -> bool:
    started.signal(signal.SIGINT, with_workers=True)
    return True


def _fill_disk(started: Start, disk: Disk, draw: random.Random) -> bool:
    disk.fill(started)
    return True


def _kill_worker(started: Start, disk: Disk, draw: random.Random) -> bool:
    worker = draw_worker(started, draw)
    if worker is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        return True
    return False


def _kill_rank(started: Start, disk: Disk, draw: random.Random) -> bool:
    started.signal(signal.SIGKILL, [draw.choice(list(started.pids))])
    return True


FAULTS: dict[str, Callable[[Start, Disk, random.Random], bool]] = {
    "kill": _kill,
    "terminate": _terminate,
    "interrupt": _interrupt,
    "disk": _fill_disk,
    "worker": _kill_worker,
    "rank": _kill_rank,
}


@dataclass
class Campaign:
    """Faults in the commands of ``SCENARIOS``, and what they broke.

    Args:
        folder: where everything is made; gone again when the campaign is closed.
        seed: of all moments and choices. (Where a process is at a moment still depends on the machine.)

    Attributes:
        injected: how many faults of each kind, by scenario and fault.
        defects: what should not have happened, in words.
        finished: runs that were let finish, and compared.
        ended_by_launcher: runs of several processes in which one waited for another that had ended, in a call that
            sees no signal, until it was ended as torchrun does it.
    """

    folder: Path
    seed: int = 0
    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    finished: int = 0
    ended_by_launcher: int = 0

    def __enter__(self) -> Campaign:
        self._draw = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._inputs = self.folder / "inputs"
        self._inputs.mkdir()
        self._disk = Disk(self.folder / "outputs").__enter__()
        made, _ = run_to_end(lambda: make_inputs(self._inputs), self.folder / "logs")
        assert made.codes == {0: 0}, made.errors()
        self._expected: dict[str, tuple[dict, float]] = {}
        return self

    def __exit__(self, *exception: object) -> None:
        end_all()
        self._disk.__exit__()
        shutil.rmtree(self.folder)

    @property
    def disk(self) -> str:
        """What "out of disk" means here."""
        return "a full tmpfs" if self._disk.mounted else "a limit on file sizes"

    def chain(self, name: str, faults: list[str] | None = None) -> None:
        """Disturbs a run a few times in a row, lets it finish, and compares it with an undisturbed one.

        Args:
            name: of the scenario.
            faults: one for each start; by default up to ``LONGEST_CHAIN`` are drawn.
        """
        scenario = SCENARIOS[name]
        expected, seconds = self._undisturbed(name)
        self._disk.clear()
        if faults is None:
            faults = self._draw.choices(scenario.faults, k=self._draw.randint(1, LONGEST_CHAIN))
        history = []
        for fault in faults:
            # Most of a short run is its beginning: of three moments two count from its first write.
            writes, delay = self._draw.random() < 2 / 3, self._draw.uniform(0, seconds)
            history.append(f"{fault} {delay:.3f} s after {'its first write' if writes else 'its start'}")
            if not self._disturb(name, fault, writes, delay, ", ".join(history)):
                # It came to its end first; what faults are left meet a new run.
                self._finish(name, expected, ", ".join(history))
                self._disk.clear()
                history.clear()
        self._finish(name, expected, ", ".join(history))

    def _undisturbed(self, name: str) -> tuple[dict, float]:
        """The results of a scenario without a fault, and its seconds."""
        if name not in self._expected:
            scenario = SCENARIOS[name]
            for _ in range(2):
                self._disk.clear()
                ended, seconds = run_to_end(self._command(scenario), self.folder / "logs", scenario.processes)
                assert set(ended.codes.values()) == {FINISHED}, ended.errors()
                found = contents(self._disk.folder)
                expected, _ = self._expected.setdefault(name, (found, seconds))
                unequal = differences(found, expected)
                # Otherwise nothing could be said of disturbed runs.
                assert not unequal, f"two undisturbed runs of {name} differ: {unequal}"
        return self._expected[name]

    def _command(self, scenario: Scenario) -> Callable[[], None]:
        arguments = scenario.command(self._inputs, self._disk.folder)
        return lambda: run(arguments)

    def _disturb(self, name: str, fault: str, writes: bool, delay: float, history: str) -> bool:
        """Starts a scenario and disturbs it after a while; False if it ended before that."""
        scenario = SCENARIOS[name]
        started = start(self._command(scenario), self.folder / "logs", scenario.processes)
        if writes:
            before = self._disk.files()
            started.wait(PATIENCE, until=lambda: self._disk.files() != before)
        injected = started.wait(delay) and FAULTS[fault](started, self._disk, self._draw)
        if injected:
            self.injected[name, fault] += 1
        if scenario.processes > 1:
            self.ended_by_launcher += started.end_with_the_first()
        if started.wait(PATIENCE):
            self._note(name, history, f"still running {PATIENCE:.0f} s later", started)
            started.signal(signal.SIGKILL)
            started.wait(GRACE)
        if started.leftovers():
            self._note(name, history, f"a worker outlives its run by {GRACE:.0f} s", started)
        self._disk.free()
        if not injected:
            return False
        # Of several processes that are signalled, the first to end may be what another one, or the launcher, notices.
        codes = CODES[fault] | ({ERROR, -signal.SIGTERM, -signal.SIGKILL} if scenario.processes > 1 else set())
        if not set(started.codes.values()) <= codes:
            self._note(name, history, f"exit codes {started.codes}", started)
        elif "Traceback" in started.errors():
            self._note(name, history, "a traceback", started)
        for broken in broken_files(self._disk.folder):
            self._note(name, history, broken, started)
        return True

    def _finish(self, name: str, expected: dict, history: str) -> None:
        scenario = SCENARIOS[name]
        ended, _ = run_to_end(self._command(scenario), self.folder / "logs", scenario.processes)
        ended.leftovers()
        # A run that was killed behind its last step has nothing left to do.
        complete = all(code == FINISHED for code in ended.codes.values()) or EXISTS in ended.errors()
        if not complete or len(ended.codes) < scenario.processes:
            self._note(name, history, f"the next start ends with {ended.codes}", ended)
        for unequal in differences(contents(self._disk.folder), expected):
            self._note(name, history, unequal, ended)
        self.finished += 1

    def _note(self, name: str, history: str, what: str, started: Start) -> None:
        self.defects.append(f"{name}: {history}: {what}; it said: {started.errors()[-2000:]}")


def run_campaign(campaign: Campaign, faults: int, advance: Callable[[str], None] = lambda line: None) -> float:
    """Chains over all scenarios in turn until so many faults were injected; returns the seconds."""
    begun = time.monotonic()
    while campaign.injected.total() < faults:
        for name in SCENARIOS:
            before = len(campaign.defects)
            campaign.chain(name)
            advance(f"{campaign.injected.total()} faults, {campaign.finished} runs finished, {name}")
            for defect in campaign.defects[before:]:
                advance(f"DEFECT {defect}")
            if campaign.injected.total() >= faults:
                break
    return time.monotonic() - begun


def run_each(campaign: Campaign, advance: Callable[[str], None] = lambda line: None) -> float:
    """Every kind of fault at least once, in the two commands that take them all; returns the seconds."""
    begun = time.monotonic()
    for name in ("count on 2 processes", "tune"):
        campaign.chain(name, list(SCENARIOS[name].faults))
        advance(f"{campaign.injected.total()} faults, {campaign.finished} runs finished, {name}")
    return time.monotonic() - begun
