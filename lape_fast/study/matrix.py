"""What switching off each language's neurons does to every language: the figures, what follows from them, the files."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lape_fast.errors import FileFormatError
from lape_fast.files import SCHEMA_VERSION, is_number, write_json, write_text
from lape_fast.study.results import read_result

KIND = "ablation"

# What the file needs itself, each in the shape it has; everything else in it was measured or is metadata.
STORED = {
    "ablated": [str],
    "evaluated": [str],
    "neurons": [int],
    "tokens": [int],
    "bytes": [int],
    "base_nats": [is_number],
    "nats": [[is_number]],
}
DERIVED = (
    "base_bits_per_byte",
    "base_perplexity",
    "bits_per_byte",
    "cost_bits_per_byte",
    "perplexity",
    "selectivity",
    "mean_selectivity",
    "hits_own_hardest",
)


@dataclass(frozen=True, eq=False)
class AblationMatrix:
    """The likelihood of every language's text, with each language's neurons switched off in turn.

    Attributes:
        ablated: whose neurons were switched off, one per row.
        evaluated: whose text was measured, one per column.
        neurons: how many neurons were switched off, ``[rows]``.
        tokens: how many tokens were predicted, ``[columns]``.
        bytes: UTF-8 bytes of the text, ``[columns]``.
        base_nats: summed negative log-likelihood under the intact model, float64 ``[columns]``.
        nats: the same without the neurons of each row, float64 ``[rows, columns]``.
        metadata: JSON values that say what was measured (model, neurons' fingerprint, corpus ...).
    """

    ablated: tuple[str, ...]
    evaluated: tuple[str, ...]
    neurons: tuple[int, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    base_nats: Tensor
    nats: Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Tensor:
        """Bits per byte of the intact model, ``[columns]``."""
        return self._bits(self.base_nats)

    @property
    def bits_per_byte(self) -> Tensor:
        """Bits per byte without the neurons of each row, ``[rows, columns]``."""
        return self._bits(self.nats)

    @property
    def cost(self) -> Tensor:
        """Bits per byte that switching off a row's neurons adds, ``[rows, columns]``."""
        return self.bits_per_byte - self.base

    @property
    def base_perplexity(self) -> Tensor:
        """exp of the intact model's nats per token, ``[columns]``."""
        return self._perplexity(self.base_nats)

    @property
    def perplexity(self) -> Tensor:
        """exp of the nats per token without the neurons of each row, ``[rows, columns]``."""
        return self._perplexity(self.nats)

    def selectivity(self) -> dict[str, dict[str, float | None]]:
        """What a language's neurons are worth to it beyond what they are worth to the others, in bits per byte.

        Differences, because the others' cost may be zero or below.

        Returns:
            For every language that was switched off and measured: ``own``, the cost for the language itself;
            ``over_next_worst``, what that is above the cost for the other language that suffers most; and
            ``over_mean_of_others``, what it is above the mean cost for the others. The last two are None where no
            other language was measured.

        Example:
            >>> ablate_neurons(model, neurons, text).selectivity()["mlt_Latn"]["over_next_worst"]
        """
        found = {}
        for language, costs in zip(self.ablated, self.cost.tolist(), strict=True):
            if language not in self.evaluated:
                continue
            own = costs.pop(self.evaluated.index(language))
            found[language] = {
                "own": own,
                "over_next_worst": own - max(costs) if costs else None,
                "over_mean_of_others": own - fmean(costs) if costs else None,
            }
        return found

    def mean_selectivity(self) -> dict[str, float | None]:
        """``selectivity`` averaged over the languages, those without any neuron included; None where it is unknown."""
        found = list(self.selectivity().values())
        known = {
            name: [each[name] for each in found if each[name] is not None]
            for name in ("own", "over_next_worst", "over_mean_of_others")
        }
        return {name: fmean(values) if values else None for name, values in known.items()}

    def hits_own_hardest(self) -> list[str]:
        """The languages that suffer more than every other from the loss of their own neurons."""
        return [language for language, found in self.selectivity().items() if (found["over_next_worst"] or 0) > 0]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            **self.metadata,
            "ablated": list(self.ablated),
            "evaluated": list(self.evaluated),
            "neurons": list(self.neurons),
            "tokens": list(self.tokens),
            "bytes": list(self.bytes),
            "base_nats": self.base_nats.tolist(),
            "nats": self.nats.tolist(),
            "base_bits_per_byte": self.base.tolist(),
            "base_perplexity": self.base_perplexity.tolist(),
            "bits_per_byte": self.bits_per_byte.tolist(),
            "cost_bits_per_byte": self.cost.tolist(),
            "perplexity": self.perplexity.tolist(),
            "selectivity": self.selectivity(),
            "mean_selectivity": self.mean_selectivity(),
            "hits_own_hardest": self.hits_own_hardest(),
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_json`` to a file, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> AblationMatrix:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: not an ablation, of a newer schema, or incomplete.
        """
        values = read_result(path, KIND, "ablate", STORED)
        metadata = {name: value for name, value in values.items() if name not in {*STORED, *DERIVED}}
        ablated, evaluated, neurons, tokens, sizes, base, nats = (values[name] for name in STORED)
        columns = {len(evaluated), len(tokens), len(sizes), len(base), *map(len, nats)}
        if len(columns) > 1 or not len(ablated) == len(neurons) == len(nats):
            raise FileFormatError(f"{path} holds rows and columns of several lengths; ablate again.")
        # What a tensor can hold: no length of a text is beyond it.
        whole = [*neurons, *tokens, *sizes]
        base, nats = torch.tensor(base, dtype=torch.float64), torch.tensor(nats, dtype=torch.float64)
        if base.isinf().any() or (nats < 0).any() or not all(0 <= number < 2**63 for number in whole):
            raise FileFormatError(f"{path} holds numbers that nothing measured can have; ablate again.")
        return cls(
            *map(tuple, (ablated, evaluated, neurons, tokens, sizes)),
            base,
            nats.view(len(ablated), len(evaluated)),
            metadata,
        )

    def save_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per pair of languages, atomically; every number is written in full.

        ``pandas.read_csv(path).pivot(index="ablated", columns="evaluated", values="cost_bits_per_byte")`` is the
        matrix again.
        """
        columns = {
            "bits_per_byte": self.bits_per_byte,
            "base_bits_per_byte": self.base.expand_as(self.nats),
            "cost_bits_per_byte": self.cost,
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity.expand_as(self.nats),
        }
        values = torch.stack(list(columns.values()), dim=-1).tolist()  # [rows, columns, metrics]
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["ablated", "evaluated", "neurons", *columns])
        for language, count, row in zip(self.ablated, self.neurons, values, strict=True):
            lines.writerows([language, other, count, *cell] for other, cell in zip(self.evaluated, row, strict=True))
        write_text(path, text.getvalue())

    def _bits(self, nats: Tensor) -> Tensor:
        return nats / math.log(2) / torch.tensor(self.bytes, dtype=torch.float64)

    def _perplexity(self, nats: Tensor) -> Tensor:
        return (nats / torch.tensor(self.tokens, dtype=torch.float64)).exp()
