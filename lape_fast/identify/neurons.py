"""The neurons of each language: sorted indices per layer, checked once and then trusted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lape_fast.errors import FileFormatError, LanguageError, SelectionError, ShapeError
from lape_fast.files import json_hash, read_tensors, write_tensors
from lape_fast.identify.counts import INTEGER_DTYPES, check_languages, find_language
from lape_fast.identify.metadata import check_metadata
from lape_fast.models import check_size

# Metadata that the file itself needs; everything else (rule, thresholds, source) is the maker's.
FILE_FIELDS = ("kind", "schema_version", "languages", "layers", "neurons_per_layer")

# Far beyond any model. What is computed from a set is as large as the model that it claims to be of.
MOST_LAYERS, MOST_NEURONS_PER_LAYER, MOST_NEURONS = 1 << 12, 1 << 24, 1 << 28


def random_like(neurons: NeuronSet, language: str, seed: int, *, per_layer: bool = False) -> NeuronSet:
    """As many neurons as a language has, drawn uniformly from those that are not the language's.

    The control for every study of a language's neurons. The draw depends on the seed alone, never on hardware.

    Args:
        neurons: where the language's neurons stand.
        language: the language to match, in any spelling.
        seed: of the draw.
        per_layer: draw as many in each layer as the language has there, instead of over all layers.

    Raises:
        LanguageError: ``neurons`` does not hold the language.
        SelectionError: the language holds more than half of all neurons (of a layer's), so too few are left to draw
            from.

    Example:
        >>> control = random_like(neurons, "mlt_Latn", seed=0)
        >>> control.count("mlt_Latn") == neurons.count("mlt_Latn")
        True
    """
    code = neurons.languages[find_language(neurons.languages, language)]
    generator = torch.Generator().manual_seed(seed)
    width = neurons.neurons_per_layer
    # The neurons are numbered through the layers; each range is drawn from by itself.
    size = width if per_layer else neurons.layers * width
    drawn = []
    for start in range(0, neurons.layers * width, size):
        own = neurons.flat(code)
        own = own[(own >= start) & (own < start + size)] - start
        drawn.append(start + _draw(own, size, generator, f"Language {code!r}"))
    rule = "random-per-layer" if per_layer else "random"
    metadata = {**neurons.metadata, "rule": rule, "name": f"{rule}-{seed}", "seed": seed, "like": code}
    return NeuronSet.from_flat({code: torch.cat(drawn)}, neurons.layers, width, metadata)


def _draw(own: torch.Tensor, size: int, generator: torch.Generator, whose: str) -> torch.Tensor:
    """As many numbers below ``size`` as ``own`` has, none of them in it, sorted."""
    free = torch.ones(size, dtype=torch.bool)
    free[own] = False
    others = free.nonzero().squeeze(1)
    if len(others) < len(own):
        raise SelectionError(
            f"{whose} has {len(own)} neurons and only {len(others)} are not its own, so no random set of that size "
            "exists beside it; select fewer neurons."
        )
    return others[torch.randperm(len(others), generator=generator)[: len(own)]].sort().values


def _integers(values: Any, language: str, layer: int) -> torch.Tensor:
    try:
        indices = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"Language {language!r}, layer {layer}: {error}; neuron indices are whole numbers.") from error
    if indices.dim() != 1:
        raise ShapeError(
            f"Language {language!r}, layer {layer}: the indices have shape {list(indices.shape)}; pass one flat list."
        )
    # An empty Python list becomes a float tensor.
    if len(indices) and indices.dtype not in INTEGER_DTYPES:
        raise ShapeError(
            f"Language {language!r}, layer {layer}: the indices have dtype {indices.dtype}; they are whole numbers."
        )
    return indices.to("cpu", torch.int64)


def _checked_offsets(offsets: torch.Tensor, segments: int, total: int) -> torch.Tensor:
    if offsets.dtype not in INTEGER_DTYPES or list(offsets.shape) != [segments + 1]:
        raise ShapeError(
            f"`offsets` has dtype {offsets.dtype} and shape {list(offsets.shape)}; "
            f"it must hold {segments + 1} whole numbers, one more than languages x layers."
        )
    offsets = offsets.to("cpu", torch.int64).contiguous()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ShapeError(
            f"`offsets` runs from {int(offsets[0])} to {int(offsets[-1])}; it must run from 0 to the {total} indices."
        )
    falls = (offsets.diff() < 0).nonzero()
    if len(falls):
        raise ShapeError(f"`offsets` falls after position {int(falls[0])}; each offset must be at least the last.")
    return offsets


def _by_layer(chosen: torch.Tensor) -> list[torch.Tensor]:
    return [layer.nonzero().squeeze(1) for layer in chosen]


@dataclass(eq=False, repr=False)
class NeuronSet:
    """Which neurons belong to which language; ``neurons["mlt_Latn"][layer]`` is a sorted int64 tensor of indices.

    Args:
        languages: G codes.
        indices: [total], of any integer dtype: neuron indices of all languages and layers, language by language and
            layer by layer, strictly increasing within a layer.
        offsets: [G * L + 1]: where each language and layer starts in ``indices``.
        layers: L.
        neurons_per_layer: F.
        metadata: JSON values that say how the neurons were found (rule, thresholds, model ...).

    Raises:
        ShapeError: offsets or indices that are out of range, out of order or repeated.
        LanguageError: two codes of the same language.

    Example:
        >>> neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5], [3]]}, neurons_per_layer=16)
        >>> neurons["mt"][0]
        tensor([0, 5])
    """

    languages: list[str]
    indices: torch.Tensor
    offsets: torch.Tensor
    layers: int
    neurons_per_layer: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.languages = check_languages(self.languages)
        self.metadata = dict(self.metadata)
        for name, most in (("layers", MOST_LAYERS), ("neurons_per_layer", MOST_NEURONS_PER_LAYER)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ShapeError(f"`{name}` is {value!r:.60}; it must be a whole number from 1 to {most:,}.")
        if self.layers * self.neurons_per_layer > MOST_NEURONS:
            raise ShapeError(
                f"{self.layers} layers of {self.neurons_per_layer} neurons are more than the {MOST_NEURONS:,} of any "
                "model; check both numbers."
            )
        if self.indices.dim() != 1 or self.indices.dtype not in INTEGER_DTYPES:
            raise ShapeError(
                f"`indices` has dtype {self.indices.dtype} and shape {list(self.indices.shape)}; "
                "it must be one flat row of whole numbers."
            )
        self.offsets = _checked_offsets(self.offsets, len(self.languages) * self.layers, len(self.indices))
        indices = self.indices.to("cpu", torch.int64)
        self._check_indices(indices)
        self.indices = indices.to(torch.int32)

    def _check_indices(self, indices: torch.Tensor) -> None:
        outside = ((indices < 0) | (indices >= self.neurons_per_layer)).nonzero()
        if len(outside):
            raise ShapeError(
                f"{self._place(int(outside[0]))}: neuron index {int(indices[outside[0]])} is out of range; "
                f"a layer has {self.neurons_per_layer} neurons, 0 to {self.neurons_per_layer - 1}."
            )
        starts = torch.zeros(len(indices) + 1, dtype=torch.bool)
        starts[self.offsets] = True
        disordered = ((indices.diff() <= 0) & ~starts[1:-1]).nonzero()
        if len(disordered):
            position = int(disordered[0]) + 1
            value, last = int(indices[position]), int(indices[position - 1])
            fault = "appears twice" if value == last else f"follows {last}, so the indices are not sorted"
            raise ShapeError(f"{self._place(position)}: neuron index {value} {fault}; list each neuron once, in order.")

    def _place(self, position: int) -> str:
        segment = int(torch.searchsorted(self.offsets, position, right=True)) - 1
        return f"Language {self.languages[segment // self.layers]!r}, layer {segment % self.layers}"

    @classmethod
    def from_lists(
        cls,
        lists: Mapping[str, Sequence[Sequence[int] | torch.Tensor]],
        neurons_per_layer: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> NeuronSet:
        """Builds a set from one list of indices per language and layer.

        Args:
            lists: language -> one list or integer tensor per layer, in any order, without repetitions.
            neurons_per_layer: F.
            metadata: JSON values to keep with the set.

        Raises:
            ShapeError: indices out of range or repeated, or languages that differ in their number of layers.
            LanguageError: no language, or two codes of the same one.
        """
        languages = check_languages(list(lists))
        layers = len(lists[languages[0]])
        if layers > MOST_LAYERS:
            raise ShapeError(f"Language {languages[0]!r} has {layers:,} layers; no model has over {MOST_LAYERS:,}.")
        for language in languages:
            if len(lists[language]) != layers:
                raise ShapeError(
                    f"Language {language!r} has {len(lists[language])} layers, but {languages[0]!r} has {layers}; "
                    "give every language one list per layer, empty where it has no neurons."
                )
        segments = [
            _integers(values, language, layer).sort().values
            for language in languages
            for layer, values in enumerate(lists[language])
        ]
        offsets = torch.tensor([0, *map(len, segments)]).cumsum(0)
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *segments])
        return cls(languages, indices, offsets, layers, neurons_per_layer, dict(metadata or {}))

    @classmethod
    def from_flat(
        cls,
        members: Mapping[str, torch.Tensor],
        layers: int,
        neurons_per_layer: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> NeuronSet:
        """Builds a set from positions in the row of all neurons.

        Args:
            members: language -> sorted int64 [n], each ``layer * neurons_per_layer + neuron``.
            layers: L.
            neurons_per_layer: F.
            metadata: JSON values to keep with the set.
        """
        sizes = [torch.bincount(flat // neurons_per_layer, minlength=layers) for flat in members.values()]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), *sizes]).cumsum(0)
        indices = torch.cat(list(members.values())) % neurons_per_layer
        return cls(list(members), indices, offsets, layers, neurons_per_layer, dict(metadata or {}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> NeuronSet:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: not a neuron file, incomplete, or with indices that make no sense.
        """
        tensors, metadata = read_tensors(path, "neurons")
        missing = [name for name in ("indices", "offsets") if name not in tensors]
        missing += [name for name in FILE_FIELDS if name not in metadata]
        if missing:
            raise FileFormatError(f"{path} lacks {', '.join(missing)}; select the neurons again.")
        check_metadata(path, metadata)
        kept = {name: value for name, value in metadata.items() if name not in FILE_FIELDS}
        try:
            return cls(
                metadata["languages"],
                tensors["indices"],
                tensors["offsets"],
                metadata["layers"],
                metadata["neurons_per_layer"],
                kept,
            )
        except (ShapeError, LanguageError) as error:
            raise FileFormatError(f"{path} holds neurons that make no sense: {error}") from error

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, rule: str | None = None, revision: str | None = None
    ) -> NeuronSet:
        """Reads a set of a neuron release, as ``lape-fast publish`` lays it out.

        Args:
            source: the folder of the release, which is read without any network, or its hub id.
            rule: the name of the set; may be left out where there is only one.
            revision: branch, tag or commit on the hub.

        Raises:
            ConfigError: no such release, or not one set that is named; the message lists them.
            FileFormatError: no release, or neurons other than its index says.

        Example:
            >>> NeuronSet.from_pretrained("owner/llama-3.1-8b-neurons", rule="lape-top0.05")["mlt_Latn"]
        """
        from lape_fast.identify.release import load_release

        return load_release(source, rule, revision)

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``neurons.safetensors``, atomically."""
        fields = {name: getattr(self, name) for name in ("languages", "layers", "neurons_per_layer")}
        write_tensors(path, "neurons", {"indices": self.indices, "offsets": self.offsets}, {**self.metadata, **fields})

    def __repr__(self) -> str:
        size = f"{len(self.languages)} languages, {self.layers} layers x {self.neurons_per_layer}"
        name = f", {self.metadata['name']}" if self.metadata.get("name") else ""
        return f"NeuronSet({size}, {self.union_count():,} neurons{name})"

    def __getitem__(self, language: str) -> list[torch.Tensor]:
        """The neurons of a language, in any spelling: one sorted int64 tensor per layer.

        Raises:
            LanguageError: the set does not hold the language; the message lists the near ones.
        """
        first = find_language(self.languages, language) * self.layers
        offsets = self.offsets[first : first + self.layers + 1].tolist()
        return [self.indices[start:end].long() for start, end in zip(offsets[:-1], offsets[1:], strict=True)]

    def flat(self, language: str) -> torch.Tensor:
        """The neurons of a language as sorted int64 positions ``layer * neurons_per_layer + neuron``."""
        return torch.cat([layer * self.neurons_per_layer + chosen for layer, chosen in enumerate(self[language])])

    def count(self, language: str) -> int:
        """How many neurons a language has, over all layers."""
        first = find_language(self.languages, language) * self.layers
        return int(self.offsets[first + self.layers] - self.offsets[first])

    def per_language(self) -> dict[str, int]:
        """How many neurons each language has."""
        sizes = self.offsets[:: self.layers].diff().tolist()
        return dict(zip(self.languages, sizes, strict=True))

    def union_count(self) -> int:
        """How many neurons belong to at least one language."""
        return len(self._positions().unique())

    def union(self, languages: Sequence[str] | None = None) -> list[torch.Tensor]:
        """The neurons that belong to at least one of some languages: one sorted int64 tensor per layer.

        Args:
            languages: in any spelling; all by default.

        Raises:
            LanguageError: no language, one that the set does not hold, or one twice.

        Example:
            >>> neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5]], "cym_Latn": [[5, 7]]}, neurons_per_layer=16)
            >>> neurons.union(["mlt_Latn", "cym_Latn"])
            [tensor([0, 5, 7])]
        """
        return _by_layer(self._owners(languages) > 0)

    def shared(self, languages: Sequence[str] | None = None) -> list[torch.Tensor]:
        """The neurons that belong to every one of some languages: one sorted int64 tensor per layer.

        Args:
            languages: in any spelling; all by default.

        Raises:
            LanguageError: no language, one that the set does not hold, or one twice.

        Example:
            >>> neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5]], "cym_Latn": [[5, 7]]}, neurons_per_layer=16)
            >>> neurons.shared(["mlt_Latn", "cym_Latn"])
            [tensor([5])]
        """
        return _by_layer(self._owners(languages) == len(languages or self.languages))

    def exclusive(self, language: str) -> list[torch.Tensor]:
        """The neurons that belong to this language and no other: one sorted int64 tensor per layer.

        Raises:
            LanguageError: the set does not hold the language.

        Example:
            >>> neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5]], "cym_Latn": [[5, 7]]}, neurons_per_layer=16)
            >>> neurons.exclusive("mlt_Latn")
            [tensor([0])]
        """
        own = self._owners([language]) == 1
        return _by_layer(own & (self._owners() == 1))

    def jaccard(self) -> torch.Tensor:
        """How alike the languages are: shared neurons over the neurons of either.

        Returns:
            float64 [G, G] in the order of ``languages``; 0 where neither has a neuron.

        Example:
            >>> neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5]], "cym_Latn": [[5, 7]]}, neurons_per_layer=16)
            >>> neurons.jaccard()[0, 1].item()  # one neuron of three
            0.3333333333333333
        """
        count = len(self.languages)
        language = torch.arange(count).repeat_interleave(self.per_layer().sum(1))
        layer, neuron = self._positions() // self.neurons_per_layer, self.indices.long()
        both = torch.zeros(count, count, dtype=torch.float64)
        for number in range(self.layers):
            here = layer == number
            used, column = neuron[here].unique(return_inverse=True)
            # A product of zeros and ones is exact in fp32: a layer has fewer than 2^24 neurons.
            members = torch.zeros(count, len(used))
            members[language[here], column] = 1
            both += members @ members.T
        sizes = both.diagonal()
        return both / (sizes[:, None] + sizes - both).clamp(min=1)

    def per_layer(self) -> torch.Tensor:
        """How many neurons each language has in each layer, int64 [G, L]."""
        return self.offsets.diff().view(len(self.languages), self.layers)

    def _positions(self) -> torch.Tensor:
        """``layer * neurons_per_layer + neuron`` of every index, int64 [total]."""
        layer = torch.arange(self.layers).repeat(len(self.languages)).repeat_interleave(self.offsets.diff())
        return layer * self.neurons_per_layer + self.indices

    def _owners(self, languages: Sequence[str] | None = None) -> torch.Tensor:
        """How many of some languages have each neuron, int64 [L, F]."""
        positions = self._positions()
        if languages is not None:
            first = [find_language(self.languages, each) * self.layers for each in check_languages(languages)]
            positions = torch.cat([positions[self.offsets[each] : self.offsets[each + self.layers]] for each in first])
        owners = torch.bincount(positions, minlength=self.layers * self.neurons_per_layer)
        return owners.view(self.layers, self.neurons_per_layer)

    def fingerprint(self) -> str:
        """SHA-256 over languages, shape and all neurons, as hex: two files with one fingerprint hold one selection."""
        digests = [hashlib.sha256(values.numpy()).hexdigest() for values in (self.indices, self.offsets)]
        return json_hash([self.languages, self.layers, self.neurons_per_layer, *digests])

    def summary(self) -> dict[str, Any]:
        """What a person or a tool wants to know about the set, as JSON values."""
        return {
            "languages": self.languages,
            "layers": self.layers,
            "neurons_per_layer": self.neurons_per_layer,
            "union": self.union_count(),
            "per_language": self.per_language(),
            "metadata": self.metadata,
        }

    def check_model(self, layers: int, neurons_per_layer: int) -> None:
        """Makes sure that the set was made for a model of this size.

        Raises:
            ArchitectureError: layers or width differ.
        """
        check_size((self.layers, self.neurons_per_layer), (layers, neurons_per_layer))
