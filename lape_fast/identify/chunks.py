"""The plan of a counting run: which documents are counted together, the same however many processes share the work.

A language's text is read in fixed shards. The shards are dealt to a fixed number of queues; each is read to its end by
one process, in order. A *chunk* is a run of documents of one shard; chunks follow each other in a queue and fill
*groups* of ``batch_tokens``, so that the end of one language shares rows with the start of the next. Chunks take turns
between the two halves of their language. Nothing here depends on the number of processes or on when they were stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lape_fast.errors import ConfigError
from lape_fast.identify.rules import Rule, parse_rules
from lape_fast.text import Corpus, Packed, tokenize

# More queues than a run has processes, and few enough that one unfilled group at the end of each costs nothing.
QUEUES = 64

# A language of a few thousand tokens still has chunks for both halves.
CHUNK_TOKENS = 1024

# Languages are checked for stability at this many tokens, and then whenever they have half as many again.
FIRST_ROUND_TOKENS, ROUND_GROWTH = 16384, 1.5

# Documents are tokenised this many at a time, or fewer when they have this many characters together: a tokenizer takes
# hundreds of bytes for each.
DOCUMENTS_PER_CALL, CHARACTERS_PER_CALL = 64, 1 << 20


@dataclass(frozen=True)
class CountingSettings:
    """What decides the counts besides the model, its tokenizer and the corpus.

    Attributes:
        context_length: S, tokens per row; no longer than the model's positions reach.
        batch_tokens: tokens that the model sees at a time.
        tokens_per_language: a language stops after the document that reaches this many tokens; None reads all.
        shards_per_language: parts of each language's text that different processes may count.
        seed: shuffles the documents; None takes them in the corpus's order.
        until_stable: a language stops once the neurons of its two halves agree to this Jaccard index; None never.
        rule: how the neurons are selected whose stability is measured, in the text form of ``parse_rules``.
        skip_bad_files: go on behind a damaged file, instead of stopping there.
        part, parts: count only one part of all text, from 1; separate jobs count the others, to be merged.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> CountingSettings(tokens_per_language=10_000_000, seed=0)
    """

    context_length: int = 4096
    batch_tokens: int = 16384
    tokens_per_language: int | None = None
    shards_per_language: int = 1
    seed: int | None = None
    until_stable: float | None = None
    rule: str = "lape"
    skip_bad_files: bool = False
    part: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("context_length", 2), ("batch_tokens", 1), ("shards_per_language", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if self.tokens_per_language is not None and self.tokens_per_language < 1:
            raise ConfigError(f"`tokens_per_language` is {self.tokens_per_language}; give at least 1, or leave it out.")
        if self.until_stable is not None and not 0 < self.until_stable <= 1:
            raise ConfigError(
                f"`until_stable` is {self.until_stable}; it is a Jaccard index above 0 and at most 1, such as 0.95."
            )

        if len(parse_rules(self.rule)) != 1:
            raise ConfigError(f"`rule` is {self.rule!r}, which is several rules; give one, and use `select` for many.")
        if not 1 <= self.part <= self.parts <= QUEUES:
            raise ConfigError(
                f"There is no part {self.part} of {self.parts}; number the parts from 1, and make at most {QUEUES}."
            )
        if self.parts > 1 and self.until_stable is not None:
            raise ConfigError(
                "Stability is judged on all languages together, and a part has only some; leave out `until_stable`, or "
                "count with one run of several processes."
            )

    def selection_rule(self) -> Rule:
        """The rule that ``rule`` names."""
        return parse_rules(self.rule)[0]

    def round_target(self, number: int) -> float:
        """The tokens per language at which a round ends, when languages are checked for stability."""
        budget = math.inf if self.tokens_per_language is None else self.tokens_per_language
        if self.until_stable is None:
            return budget
        return min(budget, math.floor(FIRST_ROUND_TOKENS * ROUND_GROWTH**number))

    def target(self, tokens: float) -> float:
        """The tokens at which each shard stops so that a language has ``tokens``."""
        return math.ceil(tokens / self.shards_per_language) if math.isfinite(tokens) else math.inf


class Shard(NamedTuple):
    """A fixed part of a language's text."""

    language: str
    number: int

    def __str__(self) -> str:
        return f"{self.language}/{self.number}"


@dataclass
class Position:
    """How far a shard has been counted, as JSON values.

    Attributes:
        tokens, chunks: counted so far.
        state: of the document stream; None is its start.
        documents: counted behind ``state``.
        ended: nothing is left to read.
        bad_files: what was skipped, with the reason.
    """

    tokens: int = 0
    chunks: int = 0
    state: Any = None
    documents: int = 0
    ended: bool = False
    bad_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """What the model sees at a time.

    Attributes:
        packed: rows, in which language ``h * G + g`` is half h of language g.
        positions: of the shards it reaches, once it is counted.
    """

    packed: Packed
    positions: dict[str, Position]


def queues(languages: Iterable[str], shards_per_language: int) -> list[list[Shard]]:
    """All shards, dealt to ``QUEUES`` queues; languages come before second shards, so that few share a queue."""
    languages = list(languages)
    shards = [Shard(language, number) for number in range(shards_per_language) for language in languages]
    return [shards[first::QUEUES] for first in range(QUEUES)]


def read_groups(
    pack: Callable[[list[list[int]], list[int]], Packed],
    tokenizer,
    corpus: Corpus,
    settings: CountingSettings,
    shards: Iterable[Shard],
    positions: Mapping[str, Position],
    targets: Mapping[str, float],
) -> Iterator[Group]:
    """Reads one queue from where it stands.

    Args:
        pack: makes rows of tokenised documents and their languages.
        tokenizer: the model's.
        corpus: what is counted.
        settings: of the run.
        shards: the queue.
        positions: of the shards that were begun, by name.
        targets: the tokens at which each shard stops, by name; shards that are missing here are left alone.
    """
    numbers = {language: number for number, language in enumerate(corpus.languages)}
    prefix = len(tokenize(tokenizer, [""])[0])
    documents: list[list[int]] = []
    languages: list[int] = []
    reached: dict[str, Position] = {}
    size = 0
    for shard in shards:
        if str(shard) not in targets:
            continue
        position = positions.get(str(shard), Position())
        chunk_size = 0
        stream = corpus.stream(
            shard.language,
            shard=shard.number,
            shards=settings.shards_per_language,
            seed=settings.seed,
            skip_bad_files=settings.skip_bad_files,
        )
        for tokens, state, number in _tokenized(tokenizer, stream, position):
            if documents and size + len(tokens) > settings.batch_tokens:
                yield Group(pack(documents, languages), reached)
                documents, languages, reached, size, chunk_size = [], [], {}, 0, 0
            if chunk_size == 0 or chunk_size + len(tokens) > CHUNK_TOKENS:
                position = replace(position, chunks=position.chunks + 1)
                chunk_size = 0
            documents.append(tokens)
            languages.append(numbers[shard.language] + len(numbers) * ((position.chunks - 1) % 2))
            size += len(tokens)
            chunk_size += len(tokens)
            counted = position.tokens + len(tokens) - prefix
            position = replace(position, tokens=counted, state=state, documents=number)
            reached[str(shard)] = position
            if position.tokens >= targets[str(shard)]:
                break
        else:
            reached[str(shard)] = replace(position, ended=True)
        if stream.bad_files:
            reached[str(shard)] = replace(reached[str(shard)], bad_files=list(stream.bad_files))
    if reached:
        yield Group(pack(documents, languages), reached)


def _tokenized(tokenizer, stream, position: Position) -> Iterator[tuple[list[int], Any, int]]:
    """The documents behind a position: tokens, and the state and the number behind it that lead past each."""
    if position.state is not None:
        stream.restore(position.state)
    texts = iter(stream)
    skipped = position.documents
    while True:
        state = stream.state()
        batch = _batch(texts)
        if not batch:
            return
        for number, tokens in enumerate(tokenize(tokenizer, batch), start=1):
            if number > skipped and tokens:
                yield tokens, state, number
        skipped = max(0, skipped - len(batch))


def _batch(texts: Iterator[str]) -> list[str]:
    batch, size = [], 0
    for text in itertools.islice(texts, DOCUMENTS_PER_CALL):
        batch.append(text)
        size += len(text)
        if size >= CHARACTERS_PER_CALL:
            break
    return batch
