"""A stage of the suite: a table of measured rows in one JSON file, written row by row, within a budget of time."""

from __future__ import annotations

import gc
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lape_fast.errors import FileFormatError
from lape_fast.files import read_json, write_json
from lape_fast.progress import log

ROOT = Path(__file__).resolve().parents[2]

# A file with other facts than these is of another measurement: its rows are not kept beside new ones.
IDENTITY = ("code", "device", "torch", "triton", "transformers")

# These are results; the others are measured again by the next call.
FINISHED = ("measured", "out of memory")


class NotMeasured(Exception):
    """Raised by a measure that cannot be taken here; the message says why."""


class Stage:
    """Measures row by row; a second call of the same stage goes on where the first ended.

    Attributes:
        name: of the stage.
        device: what is measured on.
        rows: what the file holds: dicts with "key", the labels, "status" and what was measured.
        failed: the keys of the measures that raised something unforeseen.

    Args:
        name: of the stage.
        path: its JSON file.
        seconds: after these no further measure is begun.
        device: what to measure on.
        facts: of the machine, the software and the code.
        settings: the options that decide what is measured, as JSON values.

    Example:
        >>> stage = Stage("kernels", Path("build/kernels.json"), 480, torch.device("cpu"), facts)
        >>> row = stage.measure("copy", lambda: {"bytes_per_s": 4.1e12, "shown": "4.1 TB/s"}, tokens=4096)
    """

    def __init__(
        self,
        name: str,
        path: Path,
        seconds: float,
        device: torch.device,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
    ):
        self.name, self.path, self.device = name, path, device
        self.facts, self.settings = dict(facts), dict(settings or {})
        self.failed: list[str] = []
        self.rows = self._kept_rows()
        self._end = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """How much of the budget is left; negative behind its end."""
        return self._end - time.monotonic()

    def measure(self, key: str, function: Callable[[], dict[str, Any]], **labels: Any) -> dict[str, Any] | None:
        """Runs a measure, unless the file has its result, and writes its row at once.

        Args:
            key: the row's name in the file, unique in the stage.
            function: returns JSON values by name. "shown" is what the table at the end says of the row; "goals" maps
                names of ``benchmarks.gpu.goals.GOALS`` to what was reached.
            labels: JSON values that say what was measured; part of the row whatever becomes of it.

        Returns:
            The measured row, also where it was in the file already; None where there is no result.
        """
        found = next((row for row in self.rows if row["key"] == key), None)
        if found and found["status"] in FINISHED:
            return found if found["status"] == "measured" else None
        if self.seconds_left() <= 0:
            self._write({"key": key, **labels, "status": "not measured", "why": "out of time"})
            return None
        start = time.monotonic()
        result = self._run(key, function)
        row = {"key": key, **labels, **result, "seconds": round(time.monotonic() - start, 2)}
        self._write(row)
        log(f"{self.name}: {key}: {describe(row)} ({row['seconds']} s)")
        return row if row["status"] == "measured" else None

    def _run(self, key: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return {"status": "measured", **function()}
        # Some benchmarks end themselves where a peer computes something wrong.
        except (Exception, SystemExit) as error:
            result = self._outcome(key, error)
        # Here, where the error and with it the frames that held the tensors are gone.
        free_memory(self.device)
        return result

    def _outcome(self, key: str, error: BaseException) -> dict[str, Any]:
        if is_out_of_memory(error):
            return {"status": "out of memory"}
        if isinstance(error, NotMeasured):
            return {"status": "not measured", "why": str(error)}
        library = missing_library(error)
        if library:
            return {"status": "not measured", "why": f"{library} is not installed"}
        traceback.print_exception(error)
        self.failed.append(key)
        reason = str(error).strip().partition("\n")[0]
        return {"status": "failed", "why": f"{type(error).__name__}: {reason}"[:300]}

    def _kept_rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            before = read_json(self.path)
            machine, settings, rows = before["machine"], before["settings"], before["rows"]
        except (FileFormatError, KeyError, TypeError):
            return []
        same = settings == self.settings and all(machine.get(name) == self.facts.get(name) for name in IDENTITY)
        return rows if same else []

    def _write(self, row: dict[str, Any]) -> None:
        places = [place for place, other in enumerate(self.rows) if other["key"] == row["key"]]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        write_json(self.path, {"machine": self.facts, "settings": self.settings, "rows": self.rows})


def describe(row: Mapping[str, Any]) -> str:
    """What a table says of a row: the result in short, or why there is none."""
    if row["status"] == "measured":
        return str(row.get("shown", "measured"))
    return f"{row['status']}: {row['why']}" if row.get("why") else row["status"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full; libraries and Triton have errors of their own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("CUDA out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")
    )


def missing_library(error: BaseException) -> str | None:
    """The library that an import did not find; None for other errors, and for modules of this repository."""
    if not isinstance(error, ImportError):
        return None
    library = (error.name or str(error).partition("\n")[0]).partition(".")[0]
    return None if library in ("lape_fast", "benchmarks") else library


def free_memory(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def code_hash() -> str:
    """A hash of the code that is measured: what tells two measurements apart where there is no git, or uncommitted."""
    digest = hashlib.sha256()
    for folder in ("lape_fast", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write_line(line: str = "") -> None:
    """Writes a line on standard output."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
