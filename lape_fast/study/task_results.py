"""The results of tasks: a row for each task, metric and model, in files."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lape_fast.errors import FileFormatError
from lape_fast.files import SCHEMA_VERSION, read_json, write_json, write_text

KIND = "tasks"
# What stands in the column ``model`` for the model without an adapter.
BASE = "base"


@dataclass(frozen=True)
class TaskRow:
    """One score of one model, or the reason why there is none.

    Attributes:
        task: its name in lm-evaluation-harness.
        language: canonical code, where it is known.
        adapter: the adapter's folder, or "base".
        metric: such as acc; None where the task failed.
        value: the score, in the metric's own unit: acc from 0 to 1, bleu and chrf from 0 to 100.
        stderr: its standard error over documents; None where it is not known.
        n: documents behind it.
        difference: the score minus that of the base on the same documents; None for the base itself.
        difference_stderr: the standard error of the difference, paired by document.
        why: the reason why the task failed.
    """

    task: str
    language: str | None
    adapter: str
    metric: str | None = None
    value: float | None = None
    stderr: float | None = None
    n: int | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    why: str | None = None

    @property
    def status(self) -> str:
        """ "measured" or "failed"."""
        return "measured" if self.why is None else "failed"


COLUMNS = tuple(each.name for each in fields(TaskRow))


@dataclass(frozen=True)
class TaskResults:
    """All rows of one evaluation.

    Attributes:
        rows: the base's first, then those of each adapter.
        metadata: JSON values that say what was measured (model, versions, limit).
    """

    rows: tuple[TaskRow, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[TaskRow]:
        """The tasks that could not be measured."""
        return [row for row in self.rows if row.why is not None]

    def find(self, task: str, metric: str, adapter: str | os.PathLike = BASE) -> TaskRow:
        """The row of a task, a metric and an adapter.

        Raises:
            KeyError: there is none.

        Example:
            >>> results.find("belebele_mlt_Latn", "acc", "adapters/mlt_Latn").difference
        """
        wanted = (task, metric, str(adapter))
        rows = {(row.task, row.metric, row.adapter): row for row in self.rows}
        return rows[wanted]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        rows = [{"status": row.status, **asdict(row)} for row in self.rows]
        return {"kind": KIND, "schema_version": SCHEMA_VERSION, **self.metadata, "rows": rows}

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_json`` to a file, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskResults:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: no results of tasks, of a newer schema, or incomplete.
        """
        values = read_json(path)
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise FileFormatError(
                f"{path} holds no results of tasks; name the JSON file that `lape-fast evaluate` wrote."
            )
        if values["schema_version"] > SCHEMA_VERSION:
            raise FileFormatError(
                f"{path} has schema version {values['schema_version']}, but this lape_fast reads up to "
                f"{SCHEMA_VERSION}; upgrade lape_fast."
            )
        try:
            rows = tuple(TaskRow(**{name: row[name] for name in COLUMNS}) for row in values["rows"])
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks {error} in its rows; evaluate again.") from error
        metadata = {name: each for name, each in values.items() if name not in ("kind", "schema_version", "rows")}
        return cls(rows, metadata)

    def save_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per row, atomically; every number is written in full and what is not known is empty."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["status", *COLUMNS])
        lines.writerows([row.status, *asdict(row).values()] for row in self.rows)
        write_text(path, text.getvalue())
