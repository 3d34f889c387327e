"""A small neuron set with counts, of any languages, for the atlas."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lape_fast.identify import ActivationCounts, Lape, NeuronSet, select_neurons
from lape_fast.study import Alignment
from lape_fast.study.alignment import MEASURES
from tests.report.samples import codes

LAYERS, WIDTH, TOKENS = 6, 256, 10_000


def counts_of(languages: list[str], layers: int = LAYERS, width: int = WIDTH) -> ActivationCounts:
    """Neighbours in the list share neurons; each language also has some of its own."""
    generator = torch.Generator().manual_seed(0)
    total = layers * width
    common = torch.rand(total, generator=generator) * 0.3
    positive = torch.empty(len(languages), total, dtype=torch.int64)
    family = torch.randperm(total, generator=generator)
    for number in range(len(languages)):
        p = common * (0.8 + 0.4 * torch.rand(total, generator=generator))
        # Every fourth language starts another family.
        start = (number // 4) * total // 40 % total
        p[family[start : start + total // 40]] = 0.6
        own = torch.randperm(total, generator=generator)[: total // 50]
        p[own] = 0.5 + 0.5 * torch.rand(len(own), generator=generator)
        positive[number] = (p * TOKENS).long()
    tokens = torch.full((len(languages),), TOKENS)
    stability = {language: {"jaccard": 0.9, "interval": [0.85, 0.95]} for language in languages[:1]}
    return ActivationCounts(
        positive.view(len(languages), layers, width), tokens, languages, {"model": "tiny", "stability": stability}
    )


def sample(number: int = 12) -> tuple[NeuronSet, ActivationCounts]:
    """So many languages of the built-in corpus, with neurons and the counts they were selected from."""
    counts = counts_of(codes(number))
    return select_neurons(counts, Lape(top_rate=0.1, filter_rate=0.9, activation_bar=0.9)), counts


def alignment_of(languages: list[str], stages: tuple[str, ...], layers: int) -> Alignment:
    """Maltese against the first language given, English, and the others; every value differs."""
    languages = ["eng_Latn", *languages[1:]]
    shape = (len(stages), len(languages), layers, len(MEASURES))
    values = torch.linspace(0.1, 0.9, math.prod(shape), dtype=torch.float64).view(shape)
    return Alignment("mlt_Latn", "eng_Latn", stages, tuple(languages), 200, values)


def read_atlas(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the blocks of a page."""
    page = path.read_text(encoding="utf-8")
    header = json.loads(re.search(r'id="header">(.*?)</script>', page, re.DOTALL)[1])
    raw = zlib.decompress(base64.b64decode(re.search(r'id="blocks">(.*?)</script>', page, re.DOTALL)[1]))
    blocks, offset = {}, 0
    for name, (kind, size) in header["blocks"].items():
        blocks[name] = np.frombuffer(raw, f"<{kind}", size, offset)
        offset += blocks[name].nbytes
    assert offset == len(raw)
    return header, blocks
