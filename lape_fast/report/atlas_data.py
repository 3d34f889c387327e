"""What the atlas shows, packed small: a header of JSON, and blocks of numbers deflated into one text."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np

from lape_fast.errors import LanguageError, SelectionError
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.identify.probabilities import Probabilities
from lape_fast.report.clustering import average_linkage
from lape_fast.text.languages import canonical, language_name

# Probabilities are rounded to this many levels of their square root: they are finest where they are small, and six
# bits a cell keep the page small whatever the counts are.
LEVELS = 64

# So many probabilities are in the page: 5.4 million of six bits are 5.4 MB in base64 even if nothing compresses.
MOST_PROBABILITIES = 5_400_000

# Steps of the entropy between 0 and ln G, in 16 bits.
ENTROPY_STEPS = 65_535


def pack_atlas(neurons: NeuronSet, counts: ActivationCounts | None) -> tuple[dict[str, Any], str]:
    """The header and the blocks of an atlas.

    Args:
        neurons: G languages; U of the L x F neurons belong to at least one of them.
        counts: what they were selected from, or None for an atlas without probabilities.

    Returns:
        The header as JSON values; and, in base64, the deflated blocks that its ``blocks`` lists by name, each as
        (type, number of entries).

    Raises:
        LanguageError: the counts lack a language of the neurons.
        ArchitectureError: counts and neurons are of models of different sizes.
        SelectionError: no language has a neuron.
    """
    if neurons.union_count() == 0:
        raise SelectionError("No language has a neuron, so there is nothing to show; select with a higher top_rate.")
    similarity = neurons.jaccard().numpy()  # [G, G]
    merges, order = average_linkage(similarity)
    place = {language: number for number, language in enumerate(order)}
    languages = [neurons.languages[number] for number in order]
    positions, members = _members(neurons, languages)  # [U], bool [G, U]
    blocks: dict[str, np.ndarray] = {"similarity": _in_order(similarity, order)}
    probabilities = None
    if counts is not None:
        counts = _of_languages(counts, neurons, languages)
        found = Probabilities(counts, range(counts.layers))
        entropy = found.entropies(positions)
        # The most specific first: if there are too many neurons, it is the last that have no probabilities.
        ranking = np.lexsort((positions, entropy))
        positions, members, entropy = positions[ranking], members[:, ranking], entropy[ranking]
        probabilities = min(len(positions), MOST_PROBABILITIES // len(languages))
        largest = math.log(max(2, len(languages)))
        blocks["entropy"] = np.rint(entropy / largest * ENTROPY_STEPS).astype("<u2")
        blocks["probability"] = _levels(found, positions[:probabilities])
    blocks["positions"] = positions.astype("<u4")
    blocks["members"] = np.packbits(members, axis=1, bitorder="little")
    owners = members.sum(0)
    stability = _stability(counts)
    per_layer = neurons.per_layer().numpy()[order]
    header = {
        "layers": neurons.layers,
        "width": neurons.neurons_per_layer,
        "union": len(positions),
        "languages": [
            {
                "code": language,
                "name": _name(language),
                "neurons": int(members[number].sum()),
                "exclusive": int((members[number] & (owners == 1)).sum()),
                "per_layer": per_layer[number].tolist(),
                "tokens": None if counts is None else int(counts.tokens[number]),
                "stability": stability.get(language),
            }
            for number, language in enumerate(languages)
        ],
        # The leaves of the tree are numbered in their order on the page.
        "merges": [
            [place[a] if a < len(order) else a, place[b] if b < len(order) else b, value] for a, b, value in merges
        ],
        "probabilities": probabilities,
        "levels": LEVELS,
        "metadata": {name: value for name, value in neurons.metadata.items() if isinstance(value, (str, int, float))},
        "blocks": {name: [block.dtype.str[1:], block.size] for name, block in blocks.items()},
    }
    raw = b"".join(np.ascontiguousarray(block).tobytes() for block in blocks.values())
    return header, base64.b64encode(zlib.compress(raw, 9)).decode()


def _members(neurons: NeuronSet, languages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    flat = [neurons.flat(language).numpy() for language in languages]
    positions = np.unique(np.concatenate(flat))
    members = np.zeros((len(languages), len(positions)), dtype=bool)
    for row, chosen in zip(members, flat, strict=True):
        row[positions.searchsorted(chosen)] = True
    return positions, members


def _in_order(similarity: np.ndarray, order: list[int]) -> np.ndarray:
    return np.rint(similarity[np.ix_(order, order)] * 65_535).astype("<u2")


def _of_languages(counts: ActivationCounts, neurons: NeuronSet, languages: list[str]) -> ActivationCounts:
    neurons.check_model(counts.layers, counts.neurons_per_layer)
    counts = counts.restrict(languages)
    counts.check_tokens()
    return counts


def _levels(found: Probabilities, positions: np.ndarray) -> np.ndarray:
    """uint8 ``[n, G]``: a neuron's probabilities stand together, those of similar languages side by side."""
    rows = found.each_language(lambda p: np.rint(np.sqrt(p) * (LEVELS - 1)).astype("u1"), positions)
    return np.stack(list(rows), axis=1)


def _stability(counts: ActivationCounts | None) -> dict[str, float]:
    """The Jaccard index of the two halves' neurons per language, as the counting run measured it."""
    measured = {} if counts is None else counts.metadata.get("stability")
    found = {}
    for language, values in measured.items() if isinstance(measured, dict) else ():
        jaccard = values.get("jaccard") if isinstance(values, dict) else None
        if isinstance(jaccard, (int, float)):
            found[language] = float(jaccard)
    return found


def _name(language: str) -> str:
    try:
        return language_name(canonical(language))
    except LanguageError:
        return language
