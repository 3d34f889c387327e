"""Adding up counts of separate jobs, so that no text is counted twice."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import ArchitectureError, ConfigError, CorpusError
from lape_fast.identify.chunks import CountingSettings, queues
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.stability import measure_stability
from lape_fast.text import Corpus
from lape_fast.text.records import LineRange


def describe_source(corpus: Corpus, settings: CountingSettings) -> dict[str, Any]:
    """Which text a run counts, as JSON values: what ``merge_files`` compares."""
    shards: dict[str, list[int]] = {}
    for queue in queues(corpus.languages, settings.shards_per_language)[settings.part - 1 :: settings.parts]:
        for shard in queue:
            shards.setdefault(shard.language, []).append(shard.number)
    return {
        "corpus": corpus.name,
        "lines": corpus.describe()["lines"],
        "texts": {language: corpus.text_ids(language) for language in shards},
        "shards": shards,
        "shards_per_language": settings.shards_per_language,
    }


def merge_files(paths: Sequence[str | os.PathLike]) -> ActivationCounts:
    """Adds counts files of one model by language.

    Args:
        paths: files that ``count`` wrote, of different text.

    Returns:
        The sums, with the stability of all text together.

    Raises:
        ArchitectureError: counts of different models, or of different tokenizers.
        CorpusError: two files hold counts of the same text.
        FileFormatError: a file that cannot be read.

    Example:
        >>> merge_files(sorted(Path("parts").glob("*.safetensors"))).save("counts.safetensors")
    """
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} counts file was given; name two at least.")
    parts = [ActivationCounts.load(path) for path in paths]
    tokenizers = {part.metadata.get("tokenizer_hash") for part in parts}
    if len(tokenizers) > 1:
        hashes = [str(part.metadata.get("tokenizer_hash"))[:12] for part in parts]
        names = ", ".join(f"{path} ({tokenizer})" for path, tokenizer in zip(paths, hashes, strict=True))
        raise ArchitectureError(
            f"The counts were made with different tokenizers ({names}), so their tokens are not the same; count again "
            "with one of them."
        )
    for (path, part), (other_path, other) in itertools.combinations(zip(paths, parts, strict=True), 2):
        if Path(path).resolve() == Path(other_path).resolve():
            raise CorpusError(f"{path} was named twice; name each counts file once.")
        twice = sorted(
            {
                language
                for source, other_source in itertools.product(_sources(part), _sources(other))
                for language in _overlap(source, other_source)
            }
        )
        if twice:
            raise CorpusError(
                f"{path} and {other_path} hold counts of the same text of {', '.join(twice[:8])}"
                f"{' ...' if len(twice) > 8 else ''}; leave one of them out, or count other parts or lines."
            )
    merged = ActivationCounts.merge(parts)
    merged.metadata["sources"] = [source for part in parts for source in _sources(part)]
    merged.metadata["skipped_files"] = sorted(
        {file for part in parts for file in part.metadata.get("skipped_files", [])}
    )
    if merged.first_half_positive is not None:
        merged.metadata["stability"] = measure_stability(merged, parts[0].metadata.get("rule", "lape"))
    return merged


def _sources(counts: ActivationCounts) -> list[dict[str, Any]]:
    return counts.metadata.get("sources", [])


def _overlap(source: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The languages of which both hold the same documents."""
    lines, other_lines = LineRange.parse(source["lines"]), LineRange.parse(other["lines"])
    if max(lines.first, other_lines.first) > min(lines.last or math.inf, other_lines.last or math.inf):
        return []
    return [
        language
        for language, texts in source["texts"].items()
        if set(texts) & set(other["texts"].get(language, []))
        and _shards_meet(
            source["shards"][language],
            source["shards_per_language"],
            other["shards"][language],
            other["shards_per_language"],
        )
    ]


def _shards_meet(shards: Sequence[int], of: int, others: Sequence[int], of_others: int) -> bool:
    """Whether a document can lie in one of both: it is in shard ``number % of``."""
    common = math.gcd(of, of_others)
    return bool({shard % common for shard in shards} & {shard % common for shard in others})
