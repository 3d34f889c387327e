"""A campaign of broken and hostile files: every input is read, or refused in one sentence, in bounded time and memory.

    python -m benchmarks.fuzz --inputs 100000 --seed 0 --json FILE

Input number i of a target is the same change in every campaign of one seed (of a file that safetensors may order
otherwise). Each target runs in processes of its own with a limit of address space and a limit of time for each input;
one that crashes or hangs is started again behind the input that it was at. An input fails if it is neither read nor
refused by a LapeFastError whose message is a sentence that names the file, if code in it was run, if it takes too long,
or if it ends the process. Failures are kept in ``build/faults/``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.mutations import CANARY, mutate
from lape_fast.progress import log

# Seconds of one input, and bytes that a process may map beyond what it has when it starts.
SECONDS, MEMORY = 20, 2 << 30

KEPT = Path("build/faults")


def check(target, path: Path, data: bytes) -> tuple[str, str]:
    """Reads one input.

    Returns:
        What became of it: ``read``, the name of the error that refused it, or ``FAILED``; and the error's message.
    """
    from lape_fast.errors import LapeFastError

    path.write_bytes(data)
    try:
        target.read(path)
        outcome = "read", ""
    except LapeFastError as error:
        message = str(error)
        sound = message.endswith((".", "?")) and message.isprintable() and len(message) < 2_100
        # Of several files that do not fit together, any one.
        named = path.name in message or os.getcwd() in message
        outcome = (type(error).__name__ if sound and named else "FAILED"), f"{type(error).__name__}: {message}"
    # Whatever else comes out of reading a file is what the campaign is looking for.
    except Exception as error:
        outcome = "FAILED", f"{type(error).__name__}: {error}"
    if os.path.exists(CANARY):
        os.rmdir(CANARY)
        outcome = "FAILED", "code in the file was run"
    return outcome


def make_input(target, name: str, seed: int, number: int) -> bytes:
    """Input ``number`` of a target."""
    return mutate(target.seeds, target.structure, Random(f"{seed} {name} {number}"))


def work(answers: Connection, name: str, seed: int, first: int, last: int) -> None:
    """Runs a range of a target's inputs in this process, and says what became of each."""
    import torch

    from benchmarks.fuzz_targets import make_targets

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # Where torch and transformers talk.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        target = make_targets(Path(folder), [name])[name]
        target.place.mkdir(parents=True, exist_ok=True)
        # Once, for what is imported when it is needed.
        check(target, target.place / target.name, target.seeds[0])
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        answers.send({"ready": _peak()})
        for number in range(first, last):
            data = make_input(target, name, seed, number)
            answers.send({"begin": number, "data": data})
            # Ends the process where it stands, in Python or below.
            signal.alarm(SECONDS)
            start = time.perf_counter()
            outcome, message = check(target, target.place / target.name, data)
            signal.alarm(0)
            answers.send((number, outcome, message, time.perf_counter() - start, _peak()))


def run_target(name: str, seed: int, inputs: int, worker: Callable = work) -> dict[str, Any]:
    """Runs a target's inputs in child processes, and adds up what became of them."""
    # Forked from one that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.fuzz_targets"])
    outcomes: collections.Counter = collections.Counter()
    failures, slowest, peak, number, starts = [], (0.0, -1), 0, 0, 0
    begun, reading = time.perf_counter(), 0.0
    while number < inputs:
        starts += 1
        answers, there = context.Pipe(duplex=False)
        child = context.Process(target=worker, args=(there, name, seed, number, inputs))
        child.start()
        there.close()
        ready = began = None
        with contextlib.suppress(EOFError):
            while True:
                said = answers.recv()
                if isinstance(said, dict):
                    ready, began = said.get("ready", ready), said.get("begin", began)
                    data = said.get("data", b"")
                    continue
                number, outcome, message, seconds, resident = said
                outcomes[outcome] += 1
                reading += seconds
                slowest = max(slowest, (seconds, number))
                peak = max(peak, resident - ready)
                if outcome == "FAILED":
                    failures.append({"input": number, "message": message[:2_500]})
                    keep(name, seed, failures[-1], data)
                number += 1
        child.join()
        if child.exitcode and began is None:
            raise SystemExit(f"The worker of {name!r} ended with status {child.exitcode} before its first input.")
        if child.exitcode:
            outcomes["FAILED"] += 1
            died = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"status {child.exitcode}"
            failures.append({"input": began, "message": f"the process ended by {died}"})
            keep(name, seed, failures[-1], data)
            number = began + 1
    return {
        "target": name,
        "inputs": inputs,
        "outcomes": dict(sorted(outcomes.items())),
        "failures": failures,
        "slowest_s": slowest[0],
        "slowest_input": slowest[1],
        "peak_growth_bytes": peak,
        "processes": starts,
        # With and without the start of the processes and the making of the inputs.
        "seconds": time.perf_counter() - begun,
        "reading_s": reading,
    }


def keep(name: str, seed: int, failure: dict[str, Any], data: bytes) -> None:
    """Writes an input that failed, and why, to ``build/faults/``."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{name.replace(' ', '-')}-{seed}-{failure['input']}"
    path.write_bytes(data)
    path.with_name(path.name + ".why").write_text(failure["message"] + "\n", encoding="utf-8")


def shares(inputs: int, names: list[str] | None = None) -> dict[str, int]:
    """How many inputs each target gets."""
    from benchmarks.fuzz_targets import MAKERS, SHARES

    weights = {name: SHARES.get(name, 1.0) for name in names or MAKERS}
    return {name: math.ceil(inputs * weight / sum(weights.values())) for name, weight in weights.items()}


def campaign(inputs: int, seed: int, processes: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs all targets, some at a time; the row of each."""
    given = shares(inputs, names)
    with ThreadPoolExecutor(processes) as pool:
        # The longest first.
        return list(pool.map(lambda name: _run_and_tell(name, seed, given[name]), sorted(given, key=given.get)[::-1]))


def _run_and_tell(name: str, seed: int, inputs: int) -> dict[str, Any]:
    row = run_target(name, seed, inputs)
    log(f"{name}: {inputs:,} inputs in {row['seconds']:,.0f} s, {len(row['failures'])} failed.")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="targets at a time")
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    rows = campaign(options.inputs, options.seed, options.processes, options.target)
    _report(rows, options)
    raise SystemExit(any(row["failures"] for row in rows))


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    import torch

    from benchmarks.measure import machine_facts, report

    columns = {
        "inputs": lambda row: f"{row['inputs']:,}",
        "read": lambda row: f"{row['outcomes'].get('read', 0):,}",
        "refused": lambda row: f"{row['inputs'] - row['outcomes'].get('read', 0) - len(row['failures']):,}",
        "failed": lambda row: f"{len(row['failures']):,}",
        "inputs/s": lambda row: f"{row['inputs'] / max(row['reading_s'], 1e-9):,.0f}",
        "slowest s": lambda row: f"{row['slowest_s']:.2f}",
        "memory MiB": lambda row: f"{row['peak_growth_bytes'] / 2**20:,.0f}",
    }
    settings = {"inputs": sum(row["inputs"] for row in rows), "seed": options.seed, "processes": options.processes}
    named = [{"name": row["target"], **row} for row in rows]
    report("Broken and hostile files", named, columns, settings, machine_facts(torch.device("cpu")), options.json)
    for row in rows:
        for failure in row["failures"][:5]:
            print(f"{row['target']} {failure['input']}: {failure['message'][:300]}")  # noqa: T201


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
