"""What every benchmark measures with: interleaved timing, paired ratios, operations, bytes, and facts on the machine.

The same code measures on the CPU and on CUDA; only the peak of live bytes is the allocator's own figure on CUDA.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lape_fast
from lape_fast.files import write_json
from lape_fast.ops.backend import resolve_backend
from lape_fast.tune.tracing import LiveBytes

# The bootstrap: resamples of the rounds, and the share of them that the interval covers.
RESAMPLES, COVERAGE = 10_000, 0.95


def interleave(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, advance: Callable[[], Any]
) -> dict[str, list[float]]:
    """Times every step once a round; every other round runs in reverse, so that none always follows the same one.

    Args:
        steps: name -> what to time, warmed up already.
        rounds: how often.
        device: waited for before and after each step.
        advance: called after each step.

    Returns:
        name -> milliseconds, one per round.
    """
    times = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
            advance()
    return times


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> tuple[float, list[float]]:
    """The median over rounds of ``times / baseline`` of the same round, and its percentile bootstrap interval."""
    ratios = torch.tensor(times, dtype=torch.float64) / torch.tensor(baseline, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[draws].quantile(0.5, dim=1)
    tails = torch.tensor([1 - COVERAGE, 1 + COVERAGE], dtype=torch.float64) / 2
    return statistics.median(ratios.tolist()), medians.quantile(tails).tolist()


def timed_rows(times: Mapping[str, Sequence[float]], baseline: str) -> list[dict[str, Any]]:
    """A row per name: its median, its ratio to the baseline with the interval, and the times they come from."""
    rows = []
    for name, measured in times.items():
        ratio, interval = paired_ratio(measured, times[baseline])
        rows.append(
            {
                "name": name,
                "step_ms": statistics.median(measured),
                f"ratio_to_{baseline}": ratio,
                "ratio_ci": interval,
                "step_ms_of_rounds": list(measured),
            }
        )
    return rows


def report(
    title: str,
    rows: list[dict[str, Any]],
    columns: Mapping[str, Callable[[dict], str]],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    path: str | None,
) -> None:
    """Prints the table of a benchmark, and writes its rows with settings and machine if there is a path.

    Args:
        title: stands above the table.
        rows: one dict per name.
        columns: heading -> what the table shows of a row.
        settings: the options that were measured.
        facts: of the machine.
        path: the JSON file, or None.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("name", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *(shown(row) for shown in columns.values()))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in {**settings, **facts}.items()), highlight=False)
    if path:
        write_json(path, [{**row, "settings": dict(settings), "machine": dict(facts)} for row in rows])


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(forward: Callable[[], Any], layers: Iterable[nn.Module], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of some modules, each storage once, parameters left out.

    Args:
        forward: runs the modules with gradients enabled; what it returns keeps the graph alive.
        layers: the modules; what others save does not count.
        parameters: what is kept anyway.
    """
    kept_anyway = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept_anyway:
            saved[storage.data_ptr()] = storage.nbytes()
        # An output that is packed as itself would keep itself alive.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda *_: hooks.__enter__()))
        handles.append(layer.register_forward_hook(lambda *_: hooks.__exit__()))
    try:
        # Held until the end: the address of a storage that is freed would be given out again.
        graph = forward()  # noqa: F841
        return sum(saved.values())
    finally:
        for handle in handles:
            handle.remove()


def peak_bytes(step: Callable[[], Any], resident: Iterable[Tensor], device: torch.device) -> int:
    """The most bytes of tensors alive during a step: what is resident, and the peak of what the step adds to it.

    Args:
        step: what to run.
        resident: weights, buffers and optimizer states; each storage counts once.
        device: on CUDA the step's part is the allocator's peak, on the CPU that of the operators' results.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in resident}
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        added = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes() as live:
            step()
        added = live.peak
    return sum(storages.values()) + added


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a time: processor, versions, commit, threads, and how busy the machine was."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": resolve_backend(None, device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lape_fast": lape_fast.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` behind it if files differ; None where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
