"""The counting loop: one pass over the text of all languages, which may be stopped, resumed and shared at any time."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lape_fast.errors import ConfigError, CorpusError, FileFormatError, StoppedError, WorkerError
from lape_fast.files import alone_in
from lape_fast.identify.checkpoints import Checkpoints
from lape_fast.identify.chunks import CountingSettings, Group, Position, Shard, queues, read_groups
from lape_fast.identify.counting_ffn import by_language, count_batch, counting_ffns, set_by_language, zero_counts
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.distributed import World
from lape_fast.identify.merging import counted_shards
from lape_fast.identify.prefetch import prefetch
from lape_fast.identify.stability import UNKNOWN, is_stable, measure_stability
from lape_fast.models import decoder, is_fp8, model_identity, tokenizer_hash, weights_hash
from lape_fast.progress import log, progress_bar
from lape_fast.text import Corpus, Packed, pack_for_model

# What a process without text of its own runs while a sharded model's others need it: one token, not counted.
NOTHING = Packed(
    torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), -torch.ones(1, 1, dtype=torch.int32)
)


def count_activations(
    model: nn.Module,
    tokenizer,
    corpus: Corpus,
    settings: CountingSettings | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 300.0,
    workers: int | None = None,
    world: World | None = None,
) -> ActivationCounts:
    """Counts, for every language of a corpus, the tokens on which each FFN neuron of a model fires.

    The counts depend on the model, its tokenizer, the corpus and the settings: neither on how many processes share the
    work nor on how often they were stopped. (How a sum is rounded depends on the hardware and the number of threads,
    and a gate that is zero but for rounding may fire on one machine and not on another.)

    Args:
        model: a causal language model of a known architecture, in eval mode.
        tokenizer: its tokenizer.
        corpus: what ``open_corpus`` returned; all its languages are counted.
        settings: see ``CountingSettings``.
        checkpoint: a folder that the run is saved to now and then, and resumed from when it exists.
        checkpoint_seconds: how often.
        workers: processes that read and tokenise ahead; None takes as many as the machine has to spare, 0 none.
        world: the processes that share the work, from ``joined_world``; each returns all counts.

    Returns:
        The counts with their halves. The metadata say what they were made from, how stable each language is (see
        ``measure_stability``) and why it ended, what was skipped, and how fast it went.

    Raises:
        ConfigError: the checkpoint belongs to another run, or there are fewer shards than parts.
        CorpusError: text that cannot be read, or no text at all.
        StoppedError: SIGINT or SIGTERM arrived; the checkpoint is written.

    Example:
        >>> model, tokenizer = load_model("meta-llama/Llama-3.1-8B")
        >>> counts = count_activations(model, tokenizer, open_corpus("texts/"))
        >>> counts.save("counts.safetensors")
    """
    settings, world = fit_settings(model, settings or CountingSettings()), world or World()
    with contextlib.ExitStack() as stack:
        if checkpoint is not None and world.is_main:
            stack.enter_context(alone_in(checkpoint))
        return _count(_Run(model, tokenizer, corpus, settings, checkpoint, workers, world), model, checkpoint_seconds)


def _count(run: _Run, model: nn.Module, checkpoint_seconds: float) -> ActivationCounts:
    with (
        counting_ffns(model, run.counts) as modules,
        progress_bar("counting", run.shards) as advance,
        _stop_signals(catch=run.checkpoints.folder is not None) as stop,
    ):
        try:
            while True:
                run.count_round(modules, advance, stop, checkpoint_seconds)
                if not run.begin_round():
                    break
        except WorkerError as error:
            # All were asked, and this one was waiting for another, which was faster.
            if not stop.asked:
                raise
            raise run.stopped() from error
    return run.result()


def run_identity(model: nn.Module, tokenizer, corpus: Corpus, settings: CountingSettings) -> dict[str, Any]:
    """Everything that decides the counts, as JSON values: two runs with the same identity count the same."""
    chosen = asdict(settings)
    # A run that a damaged file has stopped goes on behind it; what was skipped is in its report.
    del chosen["skip_bad_files"]
    return {
        **model_identity(model),
        "weights_hash": weights_hash(model),
        "dtype": "fp8" if is_fp8(model) else str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "corpus": corpus.describe(),
        **chosen,
        # Where it stops no language the rule decides nothing.
        "rule": settings.rule if settings.until_stable else None,
    }


def fit_settings(model: nn.Module, settings: CountingSettings) -> CountingSettings:
    """The settings with rows no longer than the model's positions reach."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return replace(settings, context_length=min(settings.context_length, positions or settings.context_length))


class _Run:
    """One process's part of a counting run, from wherever it stands."""

    def __init__(self, model, tokenizer, corpus, settings, checkpoint, workers, world) -> None:
        self.corpus, self.settings, self.world = corpus, settings, world
        self.identity = run_identity(model, tokenizer, corpus, settings)
        self.model = model
        self.sharded = isinstance(next(decoder(model).parameters()), DTensor)
        self.dealt = queues(corpus.languages, settings.shards_per_language)[settings.part - 1 :: settings.parts]
        self.queues = [queue for queue in self.dealt[world.rank :: world.size] if queue]
        self.shards = sum(map(len, self.queues))
        if not any(self.dealt):
            raise ConfigError(
                f"Part {settings.part} of {settings.parts} has nothing to count: there are only "
                f"{len(corpus.languages) * settings.shards_per_language} shards; make fewer parts, or more "
                "--shards-per-language."
            )
        self.workers = _spare_processes() if workers is None else workers
        pack = functools.partial(pack_for_model, model, tokenizer, context_length=settings.context_length)
        self.read = functools.partial(read_groups, pack, tokenizer, corpus, settings)
        self.checkpoints = Checkpoints(checkpoint, self.identity, world)
        self.progress, saved = self.checkpoints.load()
        # Language h * G + g is half h of language g.
        self.counts = zero_counts(model, 2 * len(corpus.languages))
        self.tokens = torch.zeros(2 * len(corpus.languages), dtype=torch.int64)
        # The last column is of those whose layer is not known.
        self.non_finite = torch.zeros(len(self.tokens), len(self.counts) + 1, dtype=torch.int64)
        if saved:
            self._check_saved(saved)
            set_by_language(self.counts, saved["counts"])
            self.tokens, self.non_finite = saved["tokens"], saved["non_finite"]
            self._log("Going on from")
        self.counted = 0
        self.seconds = self.waited = 0.0
        self.shown, self.tokens_shown = 0.0, 0

    def _check_saved(self, saved: dict[str, torch.Tensor]) -> None:
        layers, experts, languages, neurons = self.counts.shape
        shapes = {
            "counts": (languages, layers, experts * neurons),
            "tokens": tuple(self.tokens.shape),
            "non_finite": tuple(self.non_finite.shape),
        }
        found = {name: (tuple(values.shape), values.dtype) for name, values in saved.items()}
        if found != {name: (shape, torch.int64) for name, shape in shapes.items()}:
            raise FileFormatError(
                f"A checkpoint in {self.checkpoints.folder} holds {found} where {shapes} of int64 are needed; remove "
                "the folder to start the run again."
            )
        least, most = saved["counts"].flatten(1).aminmax(dim=1)
        if (least < 0).any() or (most > saved["tokens"]).any() or (saved["non_finite"] < 0).any():
            raise FileFormatError(
                f"A checkpoint in {self.checkpoints.folder} is damaged: its counts are negative, or above its tokens; "
                "remove the folder to start the run again."
            )

    def count_round(self, modules: list, advance: Callable, stop: _Stop, checkpoint_seconds: float) -> None:
        """Counts this process's queues up to the target of the round."""
        targets = self._targets(self.settings.round_target(self.progress.round))
        busy = [queue for queue in self.queues if any(str(shard) in targets for shard in queue)]
        workers = min(self.workers, len(busy))

        def produce(worker: int) -> Iterator[Group]:
            for queue in busy[worker :: max(1, workers)]:
                yield from self.read(queue, self.progress.positions, targets)

        self._show(advance)
        begun = saved = time.monotonic()
        with contextlib.closing(prefetch(produce, workers, lambda: stop.asked)) as groups:
            for packed, finished in self._steps(groups, stop):
                if packed is not None:
                    self._note(count_batch(self.model, modules, packed))
                    counted = packed.language_ids[packed.language_ids >= 0]
                    self.tokens += torch.bincount(counted, minlength=len(self.tokens))
                    self.counted += len(counted)
                self.seconds += time.monotonic() - begun
                begun = time.monotonic()
                if finished is None:
                    continue
                self.progress.positions.update(finished.positions)
                self._show(advance)
                if time.monotonic() - saved >= checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        # Others may take hours yet.
        self._save()
        if stop.asked:
            raise self.stopped()

    def stopped(self) -> StoppedError:
        """What a run that was asked to stop ends with; it saves before it waits for others."""
        return StoppedError(
            f"The run was asked to stop, and is saved in {self.checkpoints.folder}; the same command goes on from "
            "there."
        )

    def begin_round(self) -> bool:
        """Decides which languages have had enough text, and whether any other has more; all processes alike."""
        threshold = self.settings.until_stable
        if threshold is None:
            return False
        # Every process has saved the whole round before any saves the next one, and the next one before any goes on:
        # processes that are killed in between agree on the round that they resume.
        self.world.wait()
        measured = measure_stability(self._total(), self.settings.selection_rule())
        stable = [code for code, values in measured.items() if is_stable(values, threshold)]
        # The first process decides: another machine may round an entropy otherwise.
        self.progress.stopped = self.world.gather(stable)[0]
        goes_on = self._any_below(self.settings.tokens_per_language or math.inf)
        self.progress.round += 1
        # A long document may reach past the targets of several rounds.
        while goes_on and not self._any_below(self.settings.round_target(self.progress.round)):
            self.progress.round += 1
        self._save()
        self.world.wait()
        return goes_on

    def result(self) -> ActivationCounts:
        """The counts of all processes, with everything that is known about them."""
        counts = self._total()
        if not counts.tokens.any():
            raise CorpusError(f"There is not one token to count in {self.corpus.name}; give it text.")
        positions = {name: each for known in self.world.gather(self._own_positions()) for name, each in known.items()}
        speed = [sum(values) for values in zip(*self.world.gather((self.counted, self.waited)), strict=True)]
        seconds = max(self.world.gather(self.seconds))
        counts.metadata |= {
            "stability": self._stability(counts, positions),
            "shards": counted_shards(self.corpus, self.settings),
            "non_finite": self._non_finite(),
            "skipped_files": sorted({bad for position in positions.values() for bad in position.bad_files}),
            "speed": {
                "seconds": round(seconds, 3),
                "tokens_per_s": round(speed[0] / seconds, 1) if seconds else None,
                "waited_share": round(speed[1] / (seconds * self.world.size), 4) if seconds else None,
            },
        }
        return counts

    def _note(self, found: torch.Tensor | None) -> None:
        """Adds up where gates are not finite, and says so when it happens to a language for the first time."""
        if found is None:
            return
        languages = self.corpus.languages
        known = self.non_finite.sum(1)
        self.non_finite.index_put_(tuple(found), torch.ones_like(found[0]), accumulate=True)
        for number in found[0].unique().tolist():
            if not known[number % len(languages)] and not known[(number + len(languages)) % len(known)]:
                layer = int(found[1][found[0] == number].min())
                place = "a layer" if layer < 0 else f"layer {layer}"
                log(
                    f"Language {languages[number % len(languages)]}: gates of {place} are NaN or infinite on some "
                    "tokens. NaN never fires; load the model in bfloat16 or float32 if it is float16."
                )

    def _non_finite(self) -> dict[str, dict[str, Any]]:
        """For each language with gates that are not finite: on how many tokens, and where they begin."""
        halves = self.world.sum(self.non_finite.to(self.counts.device, copy=True)).cpu()
        total = halves.view(2, len(self.corpus.languages), -1).sum(0)
        return {
            language: {
                "tokens": int(tokens.sum()),
                "layers": {str(layer): int(tokens[layer]) for layer in range(len(tokens) - 1) if tokens[layer]},
            }
            for language, tokens in zip(self.corpus.languages, total, strict=True)
            if tokens.any()
        }

    def _any_below(self, tokens: float) -> bool:
        """Whether any process has a shard that goes on to this many tokens per language."""
        return any(self.world.gather(bool(self._targets(tokens))))

    def _targets(self, tokens: float) -> dict[str, float]:
        """The tokens at which each of this process's shards stops, for those that go on to these per language."""
        target = self.settings.target(tokens)
        return {
            str(shard): target
            for queue in self.queues
            for shard in queue
            if shard.language not in self.progress.stopped and not self._is_over(shard, target)
        }

    def _is_over(self, shard: Shard, target: float) -> bool:
        position = self.progress.positions.get(str(shard), Position())
        return position.ended or position.tokens >= target

    def _steps(self, groups: Iterator[Group], stop: _Stop) -> Iterator[tuple[Packed | None, Group | None]]:
        """Batches in order, each with the group that it ends; a sharded model's processes take the same number."""
        steps = self._own_steps(groups, stop)
        if not self.sharded:
            yield from steps
            return
        while True:
            step = next(steps, None)
            others = self.world.gather((step is not None, stop.asked))
            # One that stops stops all, each at the end of a group.
            stop.asked = any(asked for _, asked in others)
            if not any(busy for busy, _ in others):
                return
            packed, finished = step or (None, None)
            yield packed or NOTHING, finished

    def _own_steps(self, groups: Iterator[Group], stop: _Stop) -> Iterator[tuple[Packed | None, Group | None]]:
        while not stop.asked:
            begun = time.monotonic()
            group = next(groups, None)
            self.waited += time.monotonic() - begun
            if group is None:
                return
            *first, last = list(group.packed.batches(self.settings.batch_tokens)) or [None]
            for packed in first:
                yield packed, None
            yield last, group

    def _show(self, advance: Callable) -> None:
        """Moves the bar: a shard counts by its share of the budget, or once it has ended."""
        target = self.settings.target(self.settings.tokens_per_language or math.inf)
        done, over = 0.0, 0
        for queue in self.queues:
            for shard in queue:
                position = self.progress.positions.get(str(shard), Position())
                share = min(1.0, position.tokens / target)
                if position.ended or shard.language in self.progress.stopped:
                    share = 1.0
                done, over = done + share, over + (share == 1.0)
        note = f"{over} of {self.shards} done"
        if self.seconds:
            note += f", waited for text {self.waited / self.seconds:.0%} of the time"
        # A language that is no longer stable goes on, and the bar does not go back.
        advance(max(0.0, done - self.shown), self.counted - self.tokens_shown, note)
        self.shown, self.tokens_shown = max(done, self.shown), self.counted

    def _save(self) -> None:
        if self.checkpoints.folder is not None:
            tensors = {"counts": by_language(self.counts), "tokens": self.tokens, "non_finite": self.non_finite}
            self.checkpoints.save(self.progress, tensors)
            self._log("Saved at")

    def _log(self, event: str) -> None:
        """One line for those who read a log, where no bar is shown."""
        if self.world.is_main:
            # After a restart this process knows of the others' texts, too.
            begun = sum(str(shard) in self.progress.positions for queue in self.queues for shard in queue)
            log(f"{event} {int(self.tokens.sum()):,} tokens; {begun} of {self.shards} texts begun.")

    def _total(self) -> ActivationCounts:
        """The counts of all processes."""
        halves = by_language(self.world.sum(self.counts.clone()) if self.world.size > 1 else self.counts)
        tokens = self.world.sum(self.tokens.to(self.counts.device, copy=True)).cpu()
        languages = len(self.corpus.languages)
        first, second = halves[:languages], halves[languages:]
        first_tokens, second_tokens = tokens[:languages], tokens[languages:]
        # In place: there are gigabytes of them for large models.
        counts = ActivationCounts(
            second.add_(first),
            first_tokens + second_tokens,
            self.corpus.languages,
            self.identity,
            first,
            first_tokens,
        )
        mine = {shard.language for queue in self.dealt for shard in queue}
        return counts if len(mine) == len(counts.languages) else counts.restrict(sorted(mine))

    def _own_positions(self) -> dict[str, Position]:
        names = [str(shard) for queue in self.queues for shard in queue]
        return {name: self.progress.positions.get(name, Position()) for name in names}

    def _stability(self, counts: ActivationCounts, positions: dict[str, Position]) -> dict[str, dict[str, Any]]:
        """What ``measure_stability`` says of each language, whether that is enough, and why its counting ended."""
        threshold = self.settings.until_stable
        target = self.settings.target(self.settings.tokens_per_language or math.inf)
        if self.settings.parts > 1:
            # Rules compare languages, and a part has only some.
            tokens = zip(counts.languages, counts.tokens.tolist(), strict=True)
            measured = {code: {**UNKNOWN, "tokens": total} for code, total in tokens}
        else:
            measured = measure_stability(counts, self.settings.selection_rule())
        for language, values in measured.items():
            shards = [position for name, position in positions.items() if name.rpartition("/")[0] == language]
            if all(position.ended for position in shards):
                values["ended"] = "text"
            elif all(position.ended or position.tokens >= target for position in shards):
                values["ended"] = "budget"
            else:
                values["ended"] = "stable"
            if threshold is not None:
                values["stable"] = is_stable(values, threshold)
        return measured


class _Stop:
    """Whether the run was asked to stop."""

    asked = False


@contextlib.contextmanager
def _stop_signals(catch: bool) -> Iterator[_Stop]:
    """Within the context the first SIGINT or SIGTERM only asks to stop; a second one does what it always does."""
    stop = _Stop()
    # Python lets only the main thread set handlers.
    if not catch or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame) -> None:
        stop.asked = True
        signal.signal(number, earlier[number])

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _spare_processes() -> int:
    """Processes that may prepare text: a few, among those that share the machine."""
    if not hasattr(os, "fork"):
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(4, (os.cpu_count() or 1) // (2 * here)))
