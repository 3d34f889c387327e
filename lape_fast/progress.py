"""Progress of long work: a bar with rate and time left on a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

_showing = False

# advance(steps, units, note): steps move the bar, units (tokens) give the rate, the note stands behind it.
Advance = Callable[..., None]


def log(line: str) -> None:
    """Writes a line on standard error, unless that is a terminal: there a bar says it."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)  # noqa: T201


@contextlib.contextmanager
def progress_bar(description: str, total: float, unit: str = "tok") -> Iterator[Advance]:
    """Shows a bar on standard error while it is a terminal; yields the function that moves it.

    Inside another bar nothing is shown: the outer one tells how far the work is.

    Args:
        description: what is being done, a few words.
        total: how many steps the work has.
        unit: what the rate counts.
    """
    global _showing
    if _showing or not sys.stderr.isatty():
        yield lambda steps, units=0, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn(f"{{task.fields[rate]:,.0f}} {unit}/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    _showing = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total, rate=0.0, note="")
            units_done = 0

            def advance(steps: float, units: int = 0, note: str = "") -> None:
                nonlocal units_done
                units_done += units
                elapsed = bar.tasks[0].elapsed or 0.0
                bar.update(task, advance=steps, rate=units_done / elapsed if elapsed else 0.0, note=note)

            yield advance
    finally:
        _showing = False
