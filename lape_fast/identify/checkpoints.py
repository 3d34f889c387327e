"""What a counting run keeps while it goes on: a folder with one file per process, each whole at any moment."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import UNFINISHED, fits, read_metadata, read_tensors, write_tensors
from lape_fast.identify.chunks import Position
from lape_fast.identify.distributed import World


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


# Of the metadata of a file; the state is checked by the stream that it goes to.
SHAPE = {
    "run": dict,
    "processes": _is_count,
    "generation": _is_count,
    "round": _is_count,
    "stopped": [str],
    "positions": {
        str: {
            "tokens": _is_count,
            "chunks": _is_count,
            "documents": _is_count,
            "ended": bool,
            "bad_files": [str],
            "state": (None, dict),
        }
    },
}
POSITION_FIELDS = {each.name for each in fields(Position)}


@dataclass
class Progress:
    """How far a process is.

    Attributes:
        positions: of every shard that was begun, by name.
        round: how often the languages have been checked for stability.
        stopped: languages that need no more text.
    """

    positions: dict[str, Position] = field(default_factory=dict)
    round: int = 0
    stopped: list[str] = field(default_factory=list)


class Checkpoints:
    """The saved state of one run in a folder.

    A run may go on with another number of processes: what the earlier ones had is then added up by the first. Files of
    a lower generation are what such an addition has left behind.

    Args:
        folder: made when it is needed; None saves nothing.
        run: the run's identity; files of another run are refused.
        world: this process among those of the run.

    Raises:
        ConfigError: the folder holds another run; the message names what differs.
    """

    def __init__(self, folder: str | os.PathLike | None, run: Mapping[str, Any], world: World):
        self.folder = None if folder is None else Path(folder)
        self.run = dict(run)
        self.world = world
        self.generation = 0

    def load(self) -> tuple[Progress, dict[str, Tensor]]:
        """Where this process stands, and the tensors that it saved; none at the very start."""
        if self.folder is None:
            return Progress(), {}
        if self.world.is_main:
            self._settle()
        self.world.wait()
        files = self._files()
        if not files:
            return Progress(), {}
        self.generation = files[0][1]["generation"]
        # The first process knows of all shards that other numbers of processes began.
        known = [_progress(metadata) for _, metadata in files]
        progress = Progress(
            _latest(known), min(each.round for each in known), min(known, key=lambda each: each.round).stopped
        )
        own = self._own()
        return progress, read_tensors(own, "checkpoint")[0] if own.exists() else {}

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Writes this process's file, atomically. Tensors of several processes add up."""
        if self.folder is None:
            return
        state = {
            "run": self.run,
            "processes": self.world.size,
            "generation": self.generation,
            "positions": {name: asdict(position) for name, position in progress.positions.items()},
            "round": progress.round,
            "stopped": progress.stopped,
        }
        write_tensors(self._own(), "checkpoint", tensors, state)

    def _settle(self) -> None:
        """Leaves files of this number of processes only, all of one generation."""
        files = self._files()
        for path, metadata in files:
            changed = differences(self.run, metadata["run"])
            if changed:
                raise ConfigError(
                    f"{path.parent} holds an interrupted run of another kind ({changed}); resume it with its own "
                    "settings, choose another output, or remove the folder."
                )
        newest = max((metadata["generation"] for _, metadata in files), default=0)
        current = [(path, metadata) for path, metadata in files if metadata["generation"] == newest]
        self.generation = newest
        if any(metadata["processes"] != self.world.size for _, metadata in current):
            self.generation = newest + 1
            known = [_progress(metadata) for _, metadata in current]
            earliest = min(known, key=lambda each: each.round)
            total = functools.reduce(_add, (read_tensors(path, "checkpoint")[0] for path, _ in current))
            self.save(Progress(_latest(known), earliest.round, earliest.stopped), total)
            current = [(self._own(), {})]
        # What a killed process was writing is as large as a checkpoint.
        for path in self.folder.glob(f".*{UNFINISHED}"):
            path.unlink()
        for path, _ in files:
            if path not in [kept for kept, _ in current]:
                path.unlink()

    def _files(self) -> list[tuple[Path, dict[str, Any]]]:
        files = [(path, read_metadata(path)) for path in sorted(self.folder.glob("*.safetensors"))]
        for path, metadata in files:
            if metadata.get("kind") != "checkpoint":
                raise FileFormatError(
                    f"{path} is no checkpoint ({metadata.get('kind')!r}); move it out of the folder of the run."
                )
            if not fits(metadata, SHAPE):
                raise FileFormatError(f"{path} is a damaged checkpoint; remove its folder to start the run again.")
        return files

    def _own(self) -> Path:
        return self.folder / f"{self.world.rank}-of-{self.world.size}.safetensors"


def differences(run: Mapping[str, Any], earlier: Mapping[str, Any]) -> str:
    """What differs between a run's identity and an earlier one's, in words; empty if nothing does."""
    return "; ".join(
        f"{name} was {_in_words(earlier.get(name))} and is {_in_words(value)}"
        for name, value in run.items()
        if _compared(earlier.get(name)) != _compared(value)
    )


def _compared(value: Any) -> Any:
    # A corpus is the same under another path: its fingerprint covers files, sizes, lines and languages.
    return value.get("fingerprint") if isinstance(value, dict) else value


def _in_words(value: Any) -> str:
    described = str(value)
    if isinstance(value, dict):
        described = (
            f"{value.get('spec')}, {len(value.get('languages') or ())} languages, lines {value.get('lines') or 'all'} "
            f"({str(value.get('fingerprint'))[:12]})"
        )
    return described if len(described) <= 100 else described[:97] + "..."


def _add(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    if {name: tensor.shape for name, tensor in first.items()} != {name: each.shape for name, each in second.items()}:
        raise FileFormatError("The checkpoints of the run do not add up; remove their folder to start it again.")
    return {name: tensor + second[name] for name, tensor in first.items()}


def _progress(metadata: Mapping[str, Any]) -> Progress:
    positions = {
        name: Position(**{each: position[each] for each in POSITION_FIELDS})
        for name, position in metadata["positions"].items()
    }
    return Progress(positions, metadata["round"], metadata["stopped"])


def _latest(known: list[Progress]) -> dict[str, Position]:
    """The position of each shard that has come furthest: one process counts it, others may know of its past."""
    latest: dict[str, Position] = {}
    for progress in known:
        for name, position in progress.positions.items():
            if name not in latest or _order(position) > _order(latest[name]):
                latest[name] = position
    return latest


def _order(position: Position) -> tuple[int, int, bool]:
    return position.chunks, position.tokens, position.ended
