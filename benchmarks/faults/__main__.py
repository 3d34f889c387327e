"""Injects faults into running commands, and compares what they end with.

    python -m benchmarks.faults --faults 200 --seed 0 --json FILE

Exits with 1 if a fault lost something.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.faults.campaign import Campaign, run_campaign, run_each
from benchmarks.faults.processes import prepare
from benchmarks.faults.scenarios import SCENARIOS
from benchmarks.measure import machine_facts
from lape_fast.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, help="how many to inject")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds")
    parser.add_argument("--one-each", action="store_true", help="instead one fault of each kind, in two runs")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    options = parser.parse_args()
    # The file system that is filled must not stay mounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    prepare()
    with Campaign(Path(tempfile.mkdtemp(prefix="lape-fast-faults.")), options.seed) as campaign:
        run = run_each if options.one_each else partial(run_campaign, faults=options.faults)
        seconds = run(campaign, advance=lambda line: print(line, flush=True))  # noqa: T201
        by_scenario = {
            name: {fault: campaign.injected[name, fault] for fault in scenario.faults}
            for name, scenario in SCENARIOS.items()
        }
        figures = {
            "faults": campaign.injected.total(),
            "runs_finished_and_compared": campaign.finished,
            "runs_ended_by_the_launcher": campaign.ended_by_launcher,
            "defects": campaign.defects,
            "faults_by_command": by_scenario,
            "out_of_disk": campaign.disk,
            "seconds": round(seconds, 1),
            "seed": options.seed,
            "machine": machine_facts(torch.device("cpu")),
        }
    write_json(options.json, figures)
    sys.exit(bool(campaign.defects))


if __name__ == "__main__":
    main()
