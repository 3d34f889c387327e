"""How alike the hidden states of translations are, layer by layer: cosine, linear CKA and retrieval.

On parallel lines, where line N of every language is the same sentence, a sentence is the mean of its tokens' hidden
states. With X and Y ``[N, D]`` those of two languages in one layer:

    cosine      the mean of cos(x_i, y_i); beside it that of all misaligned pairs cos(x_i, y_j), since in an anisotropic
                space any two sentences are alike
    CKA         |Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|), X and Y centred, in Frobenius norms (linear CKA of 1905.00414); beside
                it that of sentences shifted by half of the text, since with N below D no two representations have a
                CKA near 0
    retrieval   the share of sentences whose translation has the highest cosine of all N, from either side; by chance
                it is 1/N
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape_fast.errors import ConfigError, CorpusError, FileFormatError, LanguageError
from lape_fast.files import is_number
from lape_fast.identify.counts import canonical_or_same, find_language
from lape_fast.models import decoder, forward_hidden, layout_of, model_identity, tokenizer_hash
from lape_fast.progress import Advance, progress_bar
from lape_fast.study.results import read_result, write_result
from lape_fast.text import Corpus, pack_for_model, tokenize
from lape_fast.text.corpus import BUILT_IN
from lape_fast.text.records import LineRange
from lape_fast.tune import describe_adapter, load_adapter

KIND = "alignment"
BASE = "base"

# What the file needs itself, each in the shape it has; the rest of it is metadata.
STORED = {
    "target": str,
    "pivot": str,
    "sentences": int,
    "left_out": {str: str},
    "languages": [str],
    "stages": {str: {str: {"languages": {str: [is_number]}}}},
}

# What is measured between two languages in a layer.
MEASURES = (
    "cosine",
    "cosine_misaligned",
    "cka",
    "cka_misaligned",
    "retrieval_from_target",
    "retrieval_to_target",
)

# Rows of the [N, N] similarities that are held at once.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True, eq=False)
class Alignment:
    """The alignment of one language with others, in every layer, with and without adapters.

    Attributes:
        target: the language that all others are compared with.
        pivot: the one among the others that is looked at first.
        stages: "base", then the names of the adapters.
        languages: the others.
        sentences: N.
        values: float64 ``[stages, languages, layers, measures]`` in the order of ``MEASURES``; layer 0 is the
            embeddings, and the last is before the decoder's final norm.
        left_out: the languages that are not parallel to the target, with the reason.
        metadata: JSON values that say what was measured (model, corpus, adapters).
    """

    target: str
    pivot: str
    stages: tuple[str, ...]
    languages: tuple[str, ...]
    sentences: int
    values: Tensor
    left_out: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers were measured, the embeddings included."""
        return self.values.shape[2]

    def measure(self, name: str, stage: str = BASE) -> Tensor:
        """One measure of a stage, ``[languages, layers]``.

        Example:
            >>> alignment.measure("retrieval_from_target")[alignment.languages.index("eng_Latn")]
        """
        return self.values[self.stages.index(stage), ..., MEASURES.index(name)]

    def to_pivot(self, name: str, stage: str = BASE) -> Tensor:
        """One measure between target and pivot, ``[layers]``."""
        return self.measure(name, stage)[self.languages.index(self.pivot)]

    def mean(self, name: str, stage: str = BASE) -> Tensor:
        """One measure, averaged over all languages, ``[layers]``."""
        return self.measure(name, stage).mean(0)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values: per stage and measure every language's curve, the pivot's and the mean."""
        measured = {
            stage: {
                name: {
                    "pivot": self.to_pivot(name, stage).tolist(),
                    "mean": self.mean(name, stage).tolist(),
                    "languages": dict(zip(self.languages, self.measure(name, stage).tolist(), strict=True)),
                }
                for name in MEASURES
            }
            for stage in self.stages
        }
        facts = {name: getattr(self, name) for name in ("target", "pivot", "sentences", "left_out")}
        return {**self.metadata, **facts, "languages": list(self.languages), "stages": measured}

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``to_json`` to a file, atomically."""
        write_result(path, KIND, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Alignment:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: not an alignment, of a newer schema, or incomplete.
        """
        found = read_result(path, KIND, "align", STORED)
        target, pivot, sentences, left_out, languages, measured = (found.pop(name) for name in STORED)
        try:
            curves = [
                [[stage[name]["languages"][language] for name in MEASURES] for language in languages]
                for stage in measured.values()
            ]
            values = torch.tensor(curves, dtype=torch.float64).transpose(2, 3)
            measured[BASE], languages.index(pivot)
        # A measure, a language or layers of some curve are not there.
        except (KeyError, ValueError, IndexError) as error:
            raise FileFormatError(f"{path} lacks measurements ({error}); run `lape-fast align` again.") from error
        return cls(target, pivot, tuple(measured), tuple(languages), sentences, values, left_out, found)


def align_languages(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    target: str,
    *,
    pivot: str = "eng_Latn",
    languages: Sequence[str] | None = None,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    context_length: int = 512,
    batch_tokens: int = 8192,
) -> Alignment:
    """Measures how the translations of one language's sentences lie in the model, before and after adapters.

    At any time the states of two languages are held, the target's and one other's, so that the number of languages does
    not matter: 8 (L + 1) N D bytes on the model's device, 2.2 GB for 2,000 sentences in Llama-3.1-8B, and for one
    layer at a time a few matrices of 4 min(N, D)^2 bytes for the CKA.

    Args:
        model: a causal language model of a known architecture, without an adapter.
        tokenizer: its tokenizer.
        corpus: in which line N is the same sentence in every language.
        target: the language to compare with all others.
        pivot: the one among the others that is looked at first.
        languages: the others; all of the corpus by default.
        adapters: name -> adapter folder, each put into the base in turn.
        context_length: tokens per row.
        batch_tokens: tokens per forward pass.

    Raises:
        CorpusError: the target or the pivot has no parallel lines, there are fewer than two, or the corpus is the
            built-in one, which is not parallel. Any other language that has not as many lines as the target is left
            out, and named in the result with the reason.
        FileFormatError, ArchitectureError: an adapter is no adapter, or of another base.
        ConfigError: an adapter is named "base".
        LanguageError: the corpus lacks the target or the pivot, or the two are one.

    Example:
        >>> corpus = open_corpus("ntrex/", lines="1798-1997")
        >>> alignment = align_languages(model, tokenizer, corpus, "mlt_Latn", adapters={"mlt": "adapters/mlt_Latn"})
        >>> alignment.to_pivot("cka", "mlt") - alignment.to_pivot("cka")
    """
    target, pivot = (corpus.languages[find_language(corpus.languages, code)] for code in (target, pivot))
    if target == pivot:
        raise LanguageError(f"{target} is both the target and the pivot; choose another pivot.")
    if BASE in (adapters or {}):
        raise ConfigError(f"An adapter cannot be named {BASE!r}, which is the model without one; give another name.")
    # Before the base is measured for nothing.
    for folder in (adapters or {}).values():
        describe_adapter(folder)
    sentences, left_out = _parallel_lines(corpus, target, pivot, languages)
    others = tuple(language for language in sentences if language != target)
    identity = model_identity(model)
    stages = {BASE: None, **(adapters or {})}
    measured = []
    with progress_bar("aligning", len(stages) * len(sentences)) as advance:

        def states(language: str) -> Tensor:
            return sentence_states(
                model,
                tokenizer,
                sentences[language],
                context_length=context_length,
                batch_tokens=batch_tokens,
                advance=advance,
            )

        for folder in stages.values():
            with _adapted(model, folder):
                own = states(target)
                measured.append(torch.stack([compare_states(own, states(language)) for language in others]))
    metadata = {
        **identity,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "corpus": corpus.describe(),
        "adapters": {name: os.fspath(folder) for name, folder in (adapters or {}).items()},
    }
    count = len(sentences[target])
    return Alignment(target, pivot, tuple(stages), others, count, torch.stack(measured), left_out, metadata)


@torch.inference_mode()
def sentence_states(
    model: nn.Module,
    tokenizer,
    sentences: Sequence[str],
    *,
    context_length: int = 512,
    batch_tokens: int = 8192,
    advance: Advance | None = None,
) -> Tensor:
    """The mean of each sentence's hidden states in every layer, fp32 ``[L + 1, N, D]`` on the model's device.

    The mean is over the sentence's own tokens: the beginning-of-text token, on which many models pile up a state that
    would drown all others, is read and not counted. Layer 0 is the embeddings; the last is before the final norm.

    Raises:
        CorpusError: a sentence has no token of its own.
    """
    packed = pack_for_model(model, tokenizer, tokenize(tokenizer, sentences), range(len(sentences)), context_length)
    counts = torch.bincount(packed.language_ids[packed.language_ids >= 0], minlength=len(sentences))
    if not counts.all():
        text = sentences[int(counts.argmin())]
        raise CorpusError(f"The sentence {text!r:.60} has no token but special ones; leave its line out.")
    layers = decoder(model).get_submodule(layout_of(model).layers)
    device = next(model.parameters()).device
    sums = torch.zeros(
        len(layers) + 1, len(sentences), decoder(model).config.hidden_size, dtype=torch.float32, device=device
    )
    training = model.training
    model.eval()
    try:
        for batch in packed.batches(batch_tokens):
            numbers = batch.language_ids.to(device)
            counted = numbers >= 0

            def add(layer: int, states: Tensor, numbers: Tensor = numbers, counted: Tensor = counted) -> None:
                sums[layer].index_add_(0, numbers[counted], states[counted].float())

            with _watched(layers, add):
                forward_hidden(model, batch.input_ids.to(device), batch.position_ids.to(device))
            if advance is not None:
                advance(0, int(counted.sum()))
    finally:
        model.train(training)
    if advance is not None:
        advance(1)
    return sums.div_(counts.to(device)[None, :, None])


@torch.inference_mode()
def compare_states(target: Tensor, other: Tensor) -> Tensor:
    """The ``MEASURES`` between two languages' states, float64 ``[layers, measures]`` on the CPU.

    Args:
        target, other: ``[layers, N, D]``; row i of both is the same sentence, and N is at least 2.
    """
    return torch.stack([_compare_layer(x, y) for x, y in zip(target, other, strict=True)])


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of ``[N, D]`` and ``[N, E]`` (1905.00414, equation 4 with linear kernels).

    It is computed from whichever are smaller, the ``[N, N]`` Gram matrices or the ``[D, E]`` cross-covariances.
    """
    return _shifted_ckas(x, y, (0,))[0]


def _shifted_ckas(x: Tensor, y: Tensor, shifts: Sequence[int]) -> list[Tensor]:
    """``linear_cka`` with the rows of y shifted around by each of some numbers."""
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) <= min(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        norms = gram_x.norm() * gram_y.norm()
        return [(gram_x * gram_y.roll((shift, shift), (0, 1))).sum() / norms for shift in shifts]
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return [(y.roll(shift, 0).T @ x).square().sum() / norms for shift in shifts]


def _compare_layer(x: Tensor, y: Tensor) -> Tensor:
    count = len(x)
    unit_x, unit_y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    aligned = (unit_x * unit_y).sum(-1)  # [N]
    # The sum over all pairs is the product of the sums.
    total, own = (unit_x.double().sum(0) * unit_y.double().sum(0)).sum(), aligned.double().sum()
    from_target, to_target = _retrieved(unit_x, unit_y)
    values = (
        own / count,
        (total - own) / (count * (count - 1)),
        *_shifted_ckas(x, y, (0, count // 2)),
        from_target,
        to_target,
    )
    return torch.stack([value.double().cpu() for value in values])


def _retrieved(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of rows whose own partner is the nearest, alone, from x to y and from y to x; of unit rows."""
    count = len(x)
    own = x.new_empty(count)
    best_of_x, best_of_y = torch.full_like(own, -torch.inf), torch.full_like(own, -torch.inf)
    for start in range(0, count, ROWS_AT_ONCE):
        similarity = x[start : start + ROWS_AT_ONCE] @ y.T  # [rows, N]
        rows = torch.arange(len(similarity), device=x.device)
        # Read from the same product, so that a tie is one in every bit.
        own[start + rows] = similarity[rows, start + rows]
        similarity[rows, start + rows] = -torch.inf
        best_of_x[start + rows] = similarity.amax(1)
        torch.maximum(best_of_y, similarity.amax(0), out=best_of_y)
    return (own > best_of_x).double().mean(), (own > best_of_y).double().mean()


@contextlib.contextmanager
def _watched(layers: nn.ModuleList, add) -> Iterator[None]:
    """Calls ``add(number, states)`` with the input of the first layer, and with the output of every layer."""

    def watch_input(module, arguments, options):
        add(0, arguments[0] if arguments else options["hidden_states"])

    def watch_output(number):
        return lambda module, arguments, output: add(number, output if isinstance(output, Tensor) else output[0])

    handles = [layers[0].register_forward_pre_hook(watch_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(watch_output(number)) for number, layer in enumerate(layers, start=1)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _adapted(model: nn.Module, folder: str | os.PathLike | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    subnetwork = load_adapter(model, folder)
    try:
        yield
    finally:
        subnetwork.detach(keep=False)


def _parallel_lines(
    corpus: Corpus, target: str, pivot: str, languages: Sequence[str] | None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The sentences of every language that is parallel to the target, which comes first, and why others are not."""
    if BUILT_IN in corpus.name.split(" + "):
        raise CorpusError(
            "The built-in corpus is composed for every language by itself, so its lines are no translations of each "
            "other; give a corpus whose line N is the same sentence in every language, such as FLORES or NTREX."
        )
    lines = LineRange.parse(corpus.describe()["lines"])
    needed = None if lines.last is None else lines.last - lines.first + 1
    wanted = corpus.languages if languages is None else map(canonical_or_same, languages)
    sentences: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for language in {target: None, pivot: None, **dict.fromkeys(wanted)}:
        try:
            found = list(corpus.documents(language))
            # Blank lines are never read, so that one shows only in how many are left.
            fits = len(found) == (needed or len(found))
            reason = None if fits else _wrong_number(corpus, language, len(found), needed)
        except CorpusError as error:
            found, reason = [], str(error)
        if reason is None:
            needed, sentences[language] = len(found), found
        elif language in (target, pivot):
            raise CorpusError(f"{language} has no parallel lines in {corpus.name}: {reason}")
        else:
            left_out[language] = reason
    if needed < 2:
        raise CorpusError(f"{corpus.name} has one line of {target}, and an alignment needs two; choose more lines.")
    return sentences, left_out


def _wrong_number(corpus: Corpus, language: str, found: int, needed: int) -> str:
    files, lines = len(corpus.shard_id(language)["parts"]), corpus.describe()["lines"]
    counted = f"it has {found:,} lines of text where {needed:,} are needed"
    if files > 1:
        return (
            f"{counted} (lines {lines} of each of its {files} files; a folder is read with its subfolders); name the "
            f"aligned files alone, each with its own --corpus, as in --corpus FOLDER/{language}.txt."
        )
    return (
        f"{counted} (lines {lines}, none of them blank, one file a language); leave the language out, or choose lines "
        "that every language has."
    )
