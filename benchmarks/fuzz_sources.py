"""What the fuzzer's files are made from: counts, the neurons selected from them, and an ablation of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lape_fast.identify import ActivationCounts, Lape, NeuronSet, select_neurons
from lape_fast.study import AblationMatrix

LANGUAGES, LAYERS, NEURONS = ["mlt_Latn", "cym_Latn", "srp_Cyrl"], 2, 48


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: of the file.
        structure: its format, for the changes to it.
        seeds: whole files.
        read: reads the file as lape_fast does; it has the path from the target's own folder.
        place: where the file goes.
    """

    name: str
    structure: str
    seeds: Sequence[bytes]
    read: Callable[[Path], Any]
    place: Path


@dataclass(frozen=True)
class Sources:
    """Whole files, and what is in them."""

    counts: ActivationCounts
    counts_path: Path
    neurons: NeuronSet
    neurons_path: Path
    ablation: dict[str, Any]


def make_sources(folder: Path) -> Sources:
    """Counts of random numbers, the neurons selected from them and an ablation of those, below a folder."""
    generator = torch.Generator().manual_seed(0)
    positive = torch.randint(0, 100, (len(LANGUAGES), LAYERS, NEURONS), generator=generator)
    metadata = {
        "model": "owner/tiny",
        "config_hash": "c" * 64,
        "tokenizer_hash": "t" * 64,
        "context_length": 512,
        "corpus": {"spec": "texts", "lines": "1-90", "text_column": None, "languages": LANGUAGES},
        "stability": {code: {"jaccard": 0.5, "interval": [0.4, 0.6], "ended": "text"} for code in LANGUAGES},
        "shards": {code: [{"parts": ["ab"], "lines": "1-", "shard": [0], "shards": 2}] for code in LANGUAGES},
        "merged_parts": [[1, 2]],
        "part": 1,
        "parts": 2,
        "skipped_files": ["mlt_Latn.txt is damaged."],
    }
    tokens = torch.full((len(LANGUAGES),), 100)
    counts = ActivationCounts(positive, tokens, LANGUAGES, metadata, positive // 2, tokens // 2)
    neurons = select_neurons(counts, Lape(top_rate=0.2, filter_rate=0.5, activation_bar=0.5))
    neurons.metadata["name"] = "lape-20"
    paths = folder / "counts.safetensors", folder / "neurons.safetensors"
    counts.save(paths[0])
    neurons.save(paths[1])
    count = len(LANGUAGES)
    nats = torch.rand(count, count, generator=generator, dtype=torch.float64) + 50
    facts = {"config_hash": "c" * 64, "neurons_fingerprint": neurons.fingerprint(), "corpus": metadata["corpus"]}
    matrix = AblationMatrix(
        tuple(LANGUAGES), tuple(LANGUAGES), (5,) * count, (20,) * count, (90,) * count, nats[0], nats, facts
    )
    return Sources(counts, paths[0], neurons, paths[1], matrix.to_json())
