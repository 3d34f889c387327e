"""Measures everything on one GPU, in stages of a few minutes that each write one JSON file as they go.

    correctness      the kernels, the gradients and training on the device, against fp64 and plain autograd
    kernels          ceilings, and each op's bytes per second against the device copy's
    identification   what counting costs, and tokens per second
    training         steps and peak memory of every way to train
    memory           the smallest GPU that trains

A second call goes on where the first ran out of time. No network is needed, and of Python packages only torch, triton,
transformers and safetensors; what another library is missing for is written as "not measured".

    PYTHONPATH=. python3 -m benchmarks.gpu --stage kernels
    PYTHONPATH=. python3 -m benchmarks.gpu --stage identification --mask llama-3.1-8b.top5.12languages.pth
    PYTHONPATH=. python3 -m benchmarks.gpu --stage all --size toy --device cpu --output build/rehearsal
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import STAGES
from benchmarks.gpu.shapes import SIZES, load_masks
from benchmarks.gpu.stage import ROOT, Stage, code_hash, describe, write_line
from benchmarks.measure import machine_facts
from lape_fast.files import file_hash

LIBRARIES = ("triton", "transformers", "peft", "bitsandbytes", "torchao", "liger-kernel", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one stage or all of them.

    Returns:
        0, or 1 if a measure failed for a reason other than time, memory or a missing library.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.stage == "all":
        # Each in a process of its own: an error that spoils the device's context ends with its stage.
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--stage"]
        return max([subprocess.run([*command, name]).returncode for name in available()])
    device = torch.device(options.device)
    stage = Stage(
        options.stage,
        options.output / f"{options.stage}.json",
        options.seconds,
        device,
        gather_facts(device, options.commit),
        {"size": options.size, "masks": [f"{path.name} {file_hash(path)[:16]}" for path in options.mask]},
    )
    importlib.import_module(f"benchmarks.gpu.{options.stage}").run(stage, options)
    print_table(stage)
    return 1 if stage.failed else 0


def available() -> list[str]:
    """The stages that this checkout has."""
    return [name for name in STAGES if (Path(__file__).parent / f"{name}.py").exists()]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with the defaults that depend on the machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=[*available(), "all"], default="all")
    parser.add_argument(
        "--size", choices=SIZES, help="8B and 12B, or toys of the same build (default: true on a GPU, toy without)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--mask", type=Path, nargs="+", default=[], metavar="FILE", help="neurons.safetensors or published .pth files"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the JSON files go (default: benchmarks/results/GPU, without a GPU build/gpu-rehearsal)",
    )
    parser.add_argument("--commit", metavar="ID", help="of this checkout, where git cannot be asked")
    parser.add_argument("--seconds", type=float, default=480, help="after these a stage begins no further measure")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU; leave --device out or choose cpu.")
    options.size = options.size or ("true" if on_gpu else "toy")
    if options.output is None:
        place = Path("benchmarks/results") / gpu_slug() if on_gpu else Path("build/gpu-rehearsal")
        options.output = ROOT / place
    options.masks = load_masks(options.mask)
    return options


def gpu_slug() -> str:
    """The name of the GPU as the name of a folder, as in ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def gather_facts(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Of the machine, the software and the code, whose commit is the given one or git's."""
    facts = {**machine_facts(device), "code": code_hash()}
    facts["commit"] = commit or facts["commit"]
    for name in LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def print_table(stage: Stage) -> None:
    """One line per row, and what was measured on; rounds, of which others are made, are left out."""
    rows = [row for row in stage.rows if "round" not in row]
    width = max([len(row["key"]) for row in rows], default=0)
    write_line(f"\n{stage.name}: {stage.path}")
    for row in rows:
        write_line(f"  {row['key']:<{width}}  {describe(row)}")
    facts = ("device", "torch", "triton", "transformers", "commit", "code")
    write_line("  " + ", ".join(f"{name} {stage.facts[name]}" for name in facts))


if __name__ == "__main__":
    sys.exit(main())
