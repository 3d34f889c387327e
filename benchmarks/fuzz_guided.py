"""Hostile files that atheris looks for by the code they reach, beside the fixed campaign of ``benchmarks.fuzz``.

    python -m benchmarks.fuzz_guided --runs 2000 --seed 0 --json FILE

Each target runs in a process of its own, in which lape_fast is instrumented. libFuzzer keeps what reaches new code and
changes it further: half of the time by its own changes of bytes, half of the time by those of ``benchmarks.mutations``,
which get past lengths, checksums and compression. What counts as a failure is the same. Failures are kept in
``build/faults/``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import KEPT, MEMORY, SECONDS
from lape_fast.progress import log

# How libFuzzer tells of its progress.
PROGRESS = re.compile(r"^#(\d+)\s+(?:INITED|DONE).*?cov: (\d+)", re.MULTILINE)


def fuzz(name: str, runs: int, seed: int) -> None:
    """Runs one target in this process, which ends with it: status 0 if nothing failed."""
    import atheris

    with atheris.instrument_imports(include=["lape_fast"], enable_loader_override=False):
        import torch

        from benchmarks.fuzz import check
        from benchmarks.fuzz_targets import make_targets
        from benchmarks.mutations import mutate

    torch.set_num_threads(1)
    kept = KEPT.resolve()
    kept.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    target = make_targets(folder, [name])[name]
    target.place.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(content)
    longest = 4 * max(map(len, target.seeds))

    def read(data: bytes) -> None:
        outcome, message = check(target, target.place / target.name, data)
        if outcome == "FAILED":
            raise AssertionError(message)

    def change(data: bytes, most: int, number: int) -> bytes:
        draw = Random(number)
        if draw.random() < 0.5:
            return atheris.Mutate(data, most)
        return mutate([*target.seeds, data], target.structure, draw)[:most]

    megabytes = (MEMORY >> 20) + 2048
    options = [f"-runs={runs}", f"-seed={seed + 1}", f"-timeout={SECONDS}", f"-rss_limit_mb={megabytes}"]
    options += [f"-max_len={longest}", f"-artifact_prefix={kept}/{name.replace(' ', '-')}-guided-"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=change)
    atheris.Fuzz()


def run_target(name: str, runs: int, seed: int) -> dict[str, Any]:
    """Runs one target in a child process; what came of it."""
    command = [sys.executable, "-m", "benchmarks.fuzz_guided", "--target", name, "--here"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, "--runs", str(runs), "--seed", str(seed)], capture_output=True, text=True, errors="replace"
    )
    told = PROGRESS.findall(done.stderr)
    failed = done.returncode != 0
    return {
        "name": name,
        "inputs": int(told[-1][0]) if told else 0,
        "coverage": [int(covered) for _, covered in told],
        "failed": failed,
        "message": done.stderr[-2_500:] if failed else "",
        "seconds": round(time.perf_counter() - begun, 1),
    }


def campaign(runs: int, seed: int, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs all targets, one behind the other, each with its share of ``runs``; the row of each."""
    from benchmarks.fuzz_targets import MAKERS, SHARES

    rows = []
    for name in names or MAKERS:
        rows.append(run_target(name, max(10, round(runs * min(1.0, SHARES.get(name, 1.0)))), seed))
        log(f"{name}: {rows[-1]['inputs']:,} inputs in {rows[-1]['seconds']:,.0f} s.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="inputs of a target; fewer where each takes long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only this one; may be repeated")
    parser.add_argument("--here", action="store_true", help="run the one target in this process")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    options = parser.parse_args()
    if options.here:
        fuzz(options.target[0], options.runs, options.seed)
        return
    rows = campaign(options.runs, options.seed, options.target)
    import torch

    from benchmarks.measure import machine_facts, report

    columns = {
        "inputs": lambda row: f"{row['inputs']:,}",
        "places reached": lambda row: " to ".join(f"{covered:,}" for covered in row["coverage"]),
        "failed": lambda row: str(row["failed"]),
        "seconds": lambda row: f"{row['seconds']:,.0f}",
    }
    settings = {"runs": options.runs, "seed": options.seed}
    report("Files that were looked for", rows, columns, settings, machine_facts(torch.device("cpu")), options.json)
    for row in rows:
        if row["failed"]:
            print(f"{row['name']}: {row['message']}")  # noqa: T201
    raise SystemExit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
