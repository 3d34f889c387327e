"""How often each neuron fired for each language: whole numbers that add up over shards, nodes and resumed runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from lape_fast.errors import ArchitectureError, FileFormatError, LanguageError, SelectionError, ShapeError
from lape_fast.files import json_hash, read_tensors, write_tensors
from lape_fast.identify.metadata import check_metadata
from lape_fast.text.languages import canonical, is_language, nearest

# Metadata that the file itself needs; everything else is the caller's.
FILE_FIELDS = ("kind", "schema_version", "languages")

# What a file holds, the last two where the halves were kept.
TENSORS = ("positive", "tokens", "first_half_positive", "first_half_tokens")

INTEGER_DTYPES = frozenset(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def canonical_or_same(code: str) -> str:
    """The canonical form of a language code, or the code itself where no table knows it."""
    # Asked first: the error would look for near ones among all languages.
    return canonical(code) if is_language(code) else code


def find_language(languages: Sequence[str], wanted: str) -> int:
    """The position of a language under any of its spellings.

    Raises:
        LanguageError: it is not among ``languages``; the message lists the near ones.
    """
    if wanted in languages:
        return languages.index(wanted)
    same = [canonical_or_same(language) for language in languages]
    code = canonical_or_same(wanted)
    if code in same:
        return same.index(code)
    near = nearest(wanted, [known for known in same if is_language(known)]) or list(languages[:5])
    raise LanguageError(
        f"Language {wanted!r} is not among the {len(languages)} languages held here; near it: {', '.join(near)}."
    )


def check_languages(languages: Sequence[str]) -> list[str]:
    """Returns the codes as a list.

    Raises:
        LanguageError: no code at all, one that is not a string, or two that name the same language.
    """
    if not isinstance(languages, (list, tuple)) or not all(isinstance(code, str) and code for code in languages):
        raise LanguageError(f"Languages must be a list of codes such as 'mlt_Latn', not {languages!r}.")
    if not languages:
        raise LanguageError("No language was given; name at least one.")
    first: dict[str, str] = {}
    for code in languages:
        same = canonical_or_same(code)
        if same in first:
            raise LanguageError(f"Languages {first[same]!r} and {code!r} are the same; keep one of them.")
        first[same] = code
    return list(languages)


def _as_counts(name: str, values: Any, dimensions: int) -> torch.Tensor:
    values = torch.as_tensor(values)
    if values.dtype not in INTEGER_DTYPES:
        raise ShapeError(f"`{name}` has dtype {values.dtype}, but counts are whole numbers; pass an integer tensor.")
    if values.dim() != dimensions or values.numel() == 0:
        shape = "[languages, layers, neurons]" if dimensions == 3 else "[languages]"
        raise ShapeError(f"`{name}` has shape {list(values.shape)}; it must be {shape} and not empty.")
    return values.to("cpu", torch.int64).contiguous()


def _checked(languages: list[str], positive: Any, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 on the CPU, after every check of their shapes and values."""
    positive, tokens = _as_counts("positive", positive, 3), _as_counts("tokens", tokens, 1)
    if not len(languages) == len(positive) == len(tokens):
        raise ShapeError(
            f"`positive` holds {len(positive)} languages and `tokens` {len(tokens)}, but {len(languages)} codes are "
            "given; all three must agree."
        )
    least, most = positive.flatten(1).aminmax(dim=1)
    for language, low, high, total in zip(languages, least.tolist(), most.tolist(), tokens.tolist(), strict=True):
        if min(low, total) < 0:
            raise ShapeError(f"Language {language!r} has a count of {min(low, total)}; counts cannot be negative.")
        if high > total:
            raise ShapeError(
                f"Language {language!r} has a neuron that fired {high} times in {total} tokens; "
                "`positive` and `tokens` must come from the same run."
            )
    return positive, tokens


def _check_same_model(first: ActivationCounts, other: ActivationCounts) -> None:
    if other.positive.shape[1:] != first.positive.shape[1:]:
        raise ArchitectureError(
            f"Counts of {other.layers} layers x {other.neurons_per_layer} neurons cannot be added to counts of "
            f"{first.layers} x {first.neurons_per_layer}; merge only counts of one model."
        )
    for name, what in (("config_hash", "configurations"), ("weights_hash", "weights or dtypes")):
        hashes = {part.metadata[name] for part in (first, other) if name in part.metadata}
        if len(hashes) > 1:
            names = " and ".join(str(part.metadata.get("model", "an unnamed model")) for part in (first, other))
            raise ArchitectureError(
                f"The counts come from models with different {what} ({names}: {name} "
                f"{' and '.join(sorted(hashes))}); merge only counts of one model."
            )


@dataclass(eq=False)
class ActivationCounts:
    """Counts of positive gate activations.

    Args:
        positive: [G, L, F], of any integer dtype: tokens of a language for which a neuron's gate was positive.
        tokens: [G], of any integer dtype: counted tokens of a language.
        languages: G codes.
        metadata: JSON values that say where the counts come from (model, config hash, corpus ...).
        first_half_positive: [G, L, F], the part of ``positive`` from every other chunk of a language's text; None
            where the halves were not kept.
        first_half_tokens: [G], the part of ``tokens``.

    Raises:
        ShapeError: shapes that do not agree, dtypes other than integers, negative counts, more positives than tokens.
        LanguageError: two codes of the same language.

    Example:
        >>> positive = torch.tensor([[[90, 10]], [[10, 90]]])
        >>> counts = ActivationCounts(positive, torch.tensor([100, 100]), ["mlt_Latn", "cym_Latn"])
        >>> counts.save("counts.safetensors")
    """

    positive: torch.Tensor
    tokens: torch.Tensor
    languages: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    first_half_positive: torch.Tensor | None = None
    first_half_tokens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.languages = check_languages(self.languages)
        self.metadata = dict(self.metadata)
        self.positive, self.tokens = _checked(self.languages, self.positive, self.tokens)
        if (self.first_half_positive is None) != (self.first_half_tokens is None):
            raise ShapeError("The first half's `positive` and `tokens` belong together; give both or neither.")
        if self.first_half_positive is not None:
            self.first_half_positive, self.first_half_tokens = _checked(
                self.languages, self.first_half_positive, self.first_half_tokens
            )
            # What is left for the second half must make sense as well; by language, since all of it is large.
            for row, language in enumerate(self.languages):
                one = slice(row, row + 1)
                _checked(
                    [language],
                    self.positive[one] - self.first_half_positive[one],
                    self.tokens[one] - self.first_half_tokens[one],
                )

    @property
    def layers(self) -> int:
        return self.positive.shape[1]

    @property
    def neurons_per_layer(self) -> int:
        return self.positive.shape[2]

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationCounts:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: not a counts file, incomplete, or with tensors that do not agree.
        """
        tensors, metadata = read_tensors(path, "counts")
        missing = [name for name in ("positive", "tokens") if name not in tensors]
        if missing or "languages" not in metadata:
            raise FileFormatError(f"{path} lacks {', '.join(missing) or 'its language codes'}; count again.")
        check_metadata(path, metadata)
        kept = {name: value for name, value in metadata.items() if name not in FILE_FIELDS}
        halves = (tensors.get("first_half_positive"), tensors.get("first_half_tokens"))
        try:
            return cls(tensors["positive"], tensors["tokens"], metadata["languages"], kept, *halves)
        except (ShapeError, LanguageError) as error:
            raise FileFormatError(f"{path} holds counts that make no sense: {error}") from error

    @classmethod
    def merge(cls, parts: Sequence[ActivationCounts]) -> ActivationCounts:
        """Adds counts of the same model by language.

        Args:
            parts: counts of shards, nodes or runs; each may hold other languages.

        Returns:
            The sums over the union of the languages, in order of first appearance, with the metadata that every
            part shares.

        Raises:
            ArchitectureError: parts that come from different models.
            ShapeError: no part at all.
        """
        if not parts:
            raise ShapeError("There are no counts to merge; pass at least one.")
        first = parts[0]
        for part in parts:
            _check_same_model(first, part)
        spellings: dict[str, str] = {}
        for part in parts:
            for code in part.languages:
                spellings.setdefault(canonical_or_same(code), code)
        order = list(spellings)
        positions = [torch.tensor([order.index(canonical_or_same(code)) for code in part.languages]) for part in parts]

        def total(name: str) -> torch.Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if any(tensor is None for tensor in tensors):
                return None
            summed = torch.zeros(len(order), *tensors[0].shape[1:], dtype=torch.int64)
            for rows, tensor in zip(positions, tensors, strict=True):
                summed.index_add_(0, rows, tensor)
            return summed

        shared = {
            name: value
            for name, value in first.metadata.items()
            if all(name in part.metadata and part.metadata[name] == value for part in parts)
        }
        positive, tokens, *halves = map(total, TENSORS)
        return cls(positive, tokens, list(spellings.values()), shared, *halves)

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``counts.safetensors``, atomically."""
        tensors = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        write_tensors(path, "counts", tensors, {**self.metadata, "languages": self.languages})

    def restrict(self, languages: Sequence[str]) -> ActivationCounts:
        """The counts of some languages, in the order given.

        Raises:
            LanguageError: a language that is not held here.
        """
        positions = [find_language(self.languages, language) for language in languages]
        codes = [self.languages[position] for position in positions]
        positive, tokens, *halves = (
            None if tensor is None else tensor[positions] for tensor in (getattr(self, name) for name in TENSORS)
        )
        return ActivationCounts(positive, tokens, codes, self.metadata, *halves)

    def with_tokens(self, least: int) -> tuple[ActivationCounts, dict[str, int]]:
        """The counts of the languages with at least so many tokens, and the tokens of those that are left out.

        A language of a few tokens has extreme probabilities by chance: it takes neurons from all others.

        Raises:
            SelectionError: none has as many.
        """
        tokens = dict(zip(self.languages, self.tokens.tolist(), strict=True))
        kept = [language for language, total in tokens.items() if total >= least]
        if not kept:
            raise SelectionError(f"No language has {least} tokens, the most is {max(tokens.values())}; ask for fewer.")
        left_out = {language: total for language, total in tokens.items() if total < least}
        return (self.restrict(kept) if left_out else self), left_out

    def halves(self) -> tuple[ActivationCounts, ActivationCounts]:
        """The counts of the two interleaved halves of every language's text.

        Raises:
            SelectionError: the halves were not kept.
        """
        if self.first_half_positive is None:
            raise SelectionError("These counts do not hold their two halves; count again to measure stability.")
        first = (self.first_half_positive, self.first_half_tokens)
        second = (self.positive - first[0], self.tokens - first[1])
        return tuple(ActivationCounts(*half, self.languages, self.metadata) for half in (first, second))

    def check_tokens(self) -> None:
        """Makes sure that every language has a probability.

        Raises:
            SelectionError: languages without a token, by name.
        """
        silent = [code for code, tokens in zip(self.languages, self.tokens.tolist(), strict=True) if tokens == 0]
        if silent:
            raise SelectionError(
                f"No token was counted for {', '.join(silent)}, so nothing is known of its neurons; "
                "give them text, or leave them out."
            )

    def probability(self) -> torch.Tensor:
        """How likely each neuron fires for a token of each language.

        Returns:
            float64 [G, L, F].

        Raises:
            SelectionError: a language has no tokens.
        """
        self.check_tokens()
        return self.positive.double().div_(self.tokens.double()[:, None, None])

    def summary(self) -> dict[str, Any]:
        """What a person or a tool wants to know about the counts, as JSON values."""
        return {
            "languages": self.languages,
            "layers": self.layers,
            "neurons_per_layer": self.neurons_per_layer,
            "tokens": dict(zip(self.languages, self.tokens.tolist(), strict=True)),
            "metadata": self.metadata,
        }

    def fingerprint(self) -> str:
        """SHA-256 over languages, shape, tokens and all counts, as hex; the same on every machine."""

        def digest(counts: torch.Tensor) -> str:
            return hashlib.sha256(counts.numpy()).hexdigest()

        # hashlib leaves the interpreter lock while it works.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            digests = list(pool.map(digest, self.positive))
        return json_hash([self.languages, list(self.positive.shape), self.tokens.tolist(), digests])
