"""How far adapters moved the weights of each layer's FFN: size, distribution, direction, rank and share moved."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lape_fast.errors import ConfigError, FileFormatError
from lape_fast.files import is_number
from lape_fast.models.checkpoint import PROJECTIONS
from lape_fast.progress import progress_bar
from lape_fast.study.adapter_changes import Change, open_changes
from lape_fast.study.results import read_result, write_result
from lape_fast.tune import name_adapters

KIND = "weight change"

# What the file needs, each in the shape it has.
_COUNT = lambda value: type(value) is int and 0 < value < 2**63  # noqa: E731
_PLACE = {"layer": lambda value: type(value) is int and 0 <= value < 2**31, "projection": str}
STORED = {
    "adapters": {str: str},
    "changes": [
        {
            **_PLACE,
            "adapter": str,
            "neurons": _COUNT,
            "entries": _COUNT,
            **dict.fromkeys(("norm", "old_norm", "cosine", "effective_rank", "moved"), is_number),
            **dict.fromkeys(("quantiles", "cosine_quantiles"), [is_number]),
        }
    ],
    "shared": [
        {
            **_PLACE,
            "first": str,
            "second": str,
            "shared": int,
            **dict.fromkeys(("cosine", "cosine_of_rows"), (None, is_number)),
        }
    ],
}

# Of the absolute changes, and of the cosines, that are reported.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class ProjectionChange:
    """What one adapter did to one projection of one layer, over the rows of the neurons that it has there.

    Attributes:
        adapter: its name.
        layer: from 0.
        projection: gate, up or down, of which columns count as rows.
        neurons: K.
        entries: how many weights that is, K D.
        norm: Frobenius norm of the change.
        old_norm: that of the same rows before.
        quantiles: of the absolute change of every entry, at ``QUANTILES``; each is the value of an entry.
        cosine: between each neuron's old and new row, averaged over the neurons.
        cosine_quantiles: of those cosines, at ``QUANTILES``.
        effective_rank: exp of the entropy of the change's singular values divided by their sum (Roy and Vetterli, The
            effective rank, EUSIPCO 2007); from 1 to min(K, D), and 0 where nothing changed.
        moved: share of the entries that are not what they were.
    """

    adapter: str
    layer: int
    projection: str
    neurons: int
    entries: int
    norm: float
    old_norm: float
    quantiles: tuple[float, ...]
    cosine: float
    cosine_quantiles: tuple[float, ...]
    effective_rank: float
    moved: float

    @property
    def relative_norm(self) -> float:
        """The norm of the change over that of the rows before."""
        return self.norm / self.old_norm if self.old_norm else 0.0


@dataclass(frozen=True)
class SharedChange:
    """Whether two adapters moved the neurons that both have in a projection into the same direction.

    Attributes:
        first, second: the adapters.
        layer, projection: where.
        shared: how many neurons both have there.
        cosine: between the two changes of all shared rows at once; None where either is zero.
        cosine_of_rows: the same for each neuron by itself, averaged over those that both moved.
    """

    first: str
    second: str
    layer: int
    projection: str
    shared: int
    cosine: float | None
    cosine_of_rows: float | None


@dataclass(frozen=True)
class WeightChange:
    """What adapters changed, per layer and projection, and how their changes agree.

    Attributes:
        adapters: name -> folder.
        changes: one for each adapter, layer and projection.
        shared: one for each pair of adapters, layer and projection in which they share neurons.
    """

    adapters: dict[str, str]
    changes: tuple[ProjectionChange, ...]
    shared: tuple[SharedChange, ...]

    def totals(self) -> list[dict[str, Any]]:
        """Per adapter and projection over all layers: neurons, entries, norm, relative norm, cosine and share moved.

        The cosine is averaged over the neurons.
        """
        found = []
        for (adapter, projection), group in itertools.groupby(
            sorted(self.changes, key=lambda each: (list(self.adapters).index(each.adapter), each.projection)),
            key=lambda each: (each.adapter, each.projection),
        ):
            rows = list(group)
            neurons, entries = sum(each.neurons for each in rows), sum(each.entries for each in rows)
            norm, old = (math.hypot(*(getattr(each, name) for each in rows)) for name in ("norm", "old_norm"))
            found.append(
                {
                    "adapter": adapter,
                    "projection": projection,
                    "neurons": neurons,
                    "entries": entries,
                    "norm": norm,
                    "relative_norm": norm / old if old else 0.0,
                    "cosine": sum(each.cosine * each.neurons for each in rows) / neurons,
                    "moved": sum(each.moved * each.entries for each in rows) / entries,
                }
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "adapters": self.adapters,
            "quantiles_at": list(QUANTILES),
            "totals": self.totals(),
            "changes": [{**asdict(each), "relative_norm": each.relative_norm} for each in self.changes],
            "shared": [asdict(each) for each in self.shared],
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_json`` to a file, atomically."""
        write_result(path, KIND, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> WeightChange:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: no weight change, of a newer schema, or incomplete.
        """
        found = read_result(path, KIND, "weights", STORED)
        changes, shared = (
            tuple(kind(**{each.name: _value(row[each.name]) for each in fields(kind)}) for row in found[name])
            for kind, name in ((ProjectionChange, "changes"), (SharedChange, "shared"))
        )
        if not {each.adapter for each in changes} <= found["adapters"].keys():
            raise FileFormatError(
                f"{path} names not all adapters whose changes it holds; run `lape-fast weights` again."
            )
        return cls(found["adapters"], changes, shared)


def measure_weight_change(adapters: Sequence[str | os.PathLike], base: str | os.PathLike | None = None) -> WeightChange:
    """Measures what adapters changed in the FFNs of their base, from their folders and the base's safetensors.

    No model is loaded: of the base, the rows that an adapter names are read, or one matrix at a time where it changes
    all of them.

    Args:
        adapters: adapter folders of one base: subnetworks, or LoRA of PEFT.
        base: the base, a folder or a hub id in the local cache; by default what each adapter names.

    Raises:
        ConfigError: no adapter, one named twice, or the base is not on this machine.
        FileFormatError: a folder is no adapter that can be read.
        ArchitectureError: the base is not the one that an adapter was made for.

    Example:
        >>> change = measure_weight_change(["adapters/mlt_Latn", "adapters/isl_Latn"])
        >>> {(each.layer, each.projection): each.effective_rank for each in change.changes}
    """
    named = name_adapters(adapters)
    if not named:
        raise ConfigError("No adapter was named; name the folder of one at least.")
    opened = {name: open_changes(folder, base) for name, folder in named.items()}
    # A dict, for the order.
    places = sorted({place: None for each in opened.values() for place in each.places}, key=_position)
    changes, shared = [], []
    with progress_bar("measuring weights", len(places)) as advance:
        for place in places:
            found = {name: each.read(place) for name, each in opened.items() if place in each.places}
            changes += [describe_change(name, place, change) for name, change in found.items()]
            pairs = itertools.combinations(found.items(), 2)
            shared += [compare_changes(place, *pair) for pair in pairs]
            advance(1)
    order = list(named)
    changes.sort(key=lambda each: order.index(each.adapter))
    return WeightChange(
        {name: os.fspath(folder) for name, folder in named.items()},
        tuple(changes),
        tuple(each for each in shared if each.shared),
    )


def describe_change(adapter: str, place: tuple[int, str], change: Change) -> ProjectionChange:
    """Measures one change, in fp64."""
    old, delta = change.old.double(), change.delta.double()
    cosines = torch.nn.functional.cosine_similarity(old, old + delta, dim=1)  # [K]
    return ProjectionChange(
        adapter=adapter,
        layer=place[0],
        projection=place[1],
        neurons=len(old),
        entries=old.numel(),
        norm=float(delta.norm()),
        old_norm=float(old.norm()),
        quantiles=_quantiles(delta.abs().flatten()),
        cosine=float(cosines.mean()),
        cosine_quantiles=_quantiles(cosines),
        effective_rank=effective_rank(delta),
        moved=float((delta != 0).double().mean()),
    )


def compare_changes(place: tuple[int, str], first: tuple[str, Change], second: tuple[str, Change]) -> SharedChange:
    """Compares the changes of two adapters in one projection, on the neurons that both have."""
    (first_name, first_change), (second_name, second_change) = first, second
    a, b = (
        one.delta.double()[torch.isin(one.neurons, other.neurons)]
        for one, other in ((first_change, second_change), (second_change, first_change))
    )  # [shared, D]
    lengths = a.norm(dim=1) * b.norm(dim=1)
    moved = lengths > 0
    rows = (a * b).sum(1)[moved] / lengths[moved]
    length = float(a.norm() * b.norm())
    return SharedChange(
        first_name,
        second_name,
        *place,
        shared=len(a),
        cosine=float((a * b).sum()) / length if length else None,
        cosine_of_rows=float(rows.mean()) if len(rows) else None,
    )


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007); 0 for a matrix of zeros.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix, ``[n, n]`` in fp64, many times as
    fast as their decomposition. Those below sqrt(n eps) of the largest, 1e-6 at n = 4,096, are rounding and left out.

    Example:
        >>> effective_rank(torch.eye(7))
        7.0
    """
    matrix = matrix.double()
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0).sqrt()
    if not values.any():
        return 0.0
    values = values[values > (len(matrix) * torch.finfo(matrix.dtype).eps) ** 0.5 * values.max()]
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def _quantiles(values: Tensor) -> tuple[float, ...]:
    # torch.quantile takes no more than 16 million values.
    ranked = values.sort().values
    return tuple(float(ranked[round(share * (len(ranked) - 1))]) for share in QUANTILES)


def _position(place: tuple[int, str]) -> tuple[int, int]:
    return place[0], PROJECTIONS.index(place[1])


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
