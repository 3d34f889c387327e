"""Adding up counts of separate jobs, so that no text is counted twice."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lape_fast.errors import ArchitectureError, ConfigError, CorpusError
from lape_fast.identify.chunks import CountingSettings, queues
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.stability import measure_stability
from lape_fast.text import Corpus, overlap


def counted_shards(corpus: Corpus, settings: CountingSettings) -> dict[str, list[dict[str, Any]]]:
    """Which shards of each language a run counts, each by its id: what ``merge_files`` compares."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for queue in queues(corpus.languages, settings.shards_per_language)[settings.part - 1 :: settings.parts]:
        for language, number in queue:
            shards.setdefault(language, []).append(corpus.shard_id(language, number, settings.shards_per_language))
    return shards


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
        twice = [
            language
            for language, shards in _shards(part).items()
            if any(itertools.starmap(overlap, itertools.product(shards, _shards(other).get(language, []))))
        ]
        if twice:
            raise CorpusError(
                f"{path} and {other_path} hold counts of the same text of {', '.join(twice[:8])}"
                f"{' ...' if len(twice) > 8 else ''}; leave one of them out, or count other parts or lines."
            )
    merged = ActivationCounts.merge(parts)
    merged.metadata["shards"] = {
        language: [shard for part in parts for shard in _shards(part).get(language, [])]
        for language in merged.languages
    }
    skipped = {file for part in parts for file in part.metadata.get("skipped_files", [])}
    merged.metadata["skipped_files"] = sorted(skipped)
    if merged.first_half_positive is not None:
        merged.metadata["stability"] = measure_stability(merged)
    return merged


def _shards(counts: ActivationCounts) -> dict[str, list[dict[str, Any]]]:
    return counts.metadata.get("shards", {})
