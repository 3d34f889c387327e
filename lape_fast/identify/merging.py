"""Adding up counts of separate jobs, so that no text is counted twice."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import ArchitectureError, ConfigError, CorpusError, ShapeError
from lape_fast.identify.chunks import CountingSettings, queues
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.stability import measure_stability
from lape_fast.text import Corpus, overlap

# What counts must have in common, beside the model, to add up.
SAME = {"tokenizer_hash": "tokenizers", "context_length": "row lengths (--context-length)"}


def counted_shards(corpus: Corpus, settings: CountingSettings) -> dict[str, list[dict[str, Any]]]:
    """Which shards of each language a run counts, as JSON values: what ``merge_files`` compares."""
    numbers: dict[str, list[int]] = {}
    for queue in queues(corpus.languages, settings.shards_per_language)[settings.part - 1 :: settings.parts]:
        for language, number in queue:
            numbers.setdefault(language, []).append(number)
    # The ids differ in the number alone, and hold a hash for every file.
    return {
        language: [corpus.shard_id(language, held[0], settings.shards_per_language) | {"shard": held}]
        for language, held in numbers.items()
    }


def missing_parts(counts: ActivationCounts) -> list[str]:
    """The parts of a run that merged counts lack, in words such as ``3/16``."""
    given = {tuple(part) for part in counts.metadata.get("merged_parts", [])}
    return [
        f"{number}/{parts}"
        for parts in sorted({parts for _, parts in given})
        for number in range(1, parts + 1)
        if (number, parts) not in given
    ]


def merge_files(paths: Sequence[str | os.PathLike]) -> ActivationCounts:
    """Adds counts files of one model by language.

    Args:
        paths: files that ``count`` wrote, of different text.

    Returns:
        The sums, with the stability of all text together.

    Raises:
        ArchitectureError: counts of different models, tokenizers or row lengths.
        CorpusError: two files hold counts of the same text.
        FileFormatError: a file that cannot be read.

    Example:
        >>> merge_files(sorted(Path("parts").glob("*.safetensors"))).save("counts.safetensors")
    """
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} counts file was given; name two at least.")
    parts = [ActivationCounts.load(path) for path in paths]
    for name, what in SAME.items():
        values = [part.metadata.get(name) for part in parts]
        if any(value != values[0] for value in values):
            named = ", ".join(f"{path} ({str(value)[:12]})" for path, value in zip(paths, values, strict=True))
            raise ArchitectureError(
                f"The counts were made with different {what} ({named}), so they do not add up; count again with one."
            )
    for (path, part), (other_path, other) in itertools.combinations(zip(paths, parts, strict=True), 2):
        if Path(path).resolve() == Path(other_path).resolve():
            raise CorpusError(f"{path} was named twice; name each counts file once.")
        twice = [
            language
            for language, shards in _shards(part).items()
            if any(overlap(*pair) for pair in itertools.product(_single(shards), _single(_shards(other).get(language))))
        ]
        if twice:
            raise CorpusError(
                f"{path} and {other_path} hold counts of the same text of {', '.join(twice[:8])}"
                f"{' ...' if len(twice) > 8 else ''}; leave one of them out, or count other parts or lines."
            )
    try:
        merged = ActivationCounts.merge(parts)
    except (ArchitectureError, ShapeError) as error:
        raise type(error)(f"{', '.join(map(str, paths))} do not add up: {error}") from error
    merged = merged.restrict(sorted(merged.languages))
    names = dict.fromkeys(part.metadata.get("corpus", {}).get("spec") for part in parts)
    described = [part.metadata.get("corpus", {}) for part in parts]
    merged.metadata |= {
        # Of several corpora the names are kept; their files are told by the shards.
        "corpus": described[0] if all(each == described[0] for each in described) else {"spec": _joined(names)},
        "merged_parts": sorted({(part.metadata.get("part", 1), part.metadata.get("parts", 1)) for part in parts}),
        "shards": {code: [each for part in parts for each in _shards(part).get(code, [])] for code in merged.languages},
        "non_finite": _non_finite([part.metadata.get("non_finite", {}) for part in parts]),
        "skipped_files": sorted({file for part in parts for file in part.metadata.get("skipped_files", [])}),
    }
    merged.metadata.pop("part", None)
    if merged.first_half_positive is not None:
        ended = {code: _joined(dict.fromkeys(_endings(parts, code))) for code in merged.languages}
        measured = measure_stability(merged)
        merged.metadata["stability"] = {code: {**values, "ended": ended[code]} for code, values in measured.items()}
    return merged


def _joined(names: Iterable[str | None]) -> str:
    return " + ".join(str(name) for name in names if name)


def _endings(parts: Sequence[ActivationCounts], language: str) -> Iterator[str]:
    for part in parts:
        yield part.metadata.get("stability", {}).get(language, {}).get("ended", "")


def _shards(counts: ActivationCounts) -> dict[str, list[dict[str, Any]]]:
    return counts.metadata.get("shards", {})


def _single(shards: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """An id for each shard of those that share one."""
    return [{**shard, "shard": number} for shard in shards or [] for number in shard["shard"]]


def _non_finite(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """On how many tokens of each language gates were not finite in any part, and in which layers that began."""
    total: dict[str, dict[str, Any]] = {}
    for part in found:
        for language, tokens in part.items():
            entry = total.setdefault(language, {"tokens": 0, "layers": {}})
            entry["tokens"] += tokens["tokens"]
            for layer, number in tokens["layers"].items():
                entry["layers"][layer] = entry["layers"].get(layer, 0) + number
    return total
