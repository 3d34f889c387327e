"""Several processes count what one counts, however often they are killed and however many go on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
import torch

from lape_fast.errors import ConfigError, StoppedError, WorkerError
from lape_fast.identify import CountingSettings, count_activations, joined_world
from lape_fast.identify.counts import TENSORS
from lape_fast.identify.distributed import World
from lape_fast.models import decoder, load_model, load_sharded_model, model_identity, weights_hash
from lape_fast.text import open_corpus
from tests.identify.processes import run_together
from tests.tiny_models import quantised_tiny_model, save_tiny, tiny_model, tiny_tokenizer

LANGUAGES = ("cym_Latn", "eng_Latn", "isl_Latn", "kat_Geor", "mlt_Latn")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Languages of uneven size, one of a single sentence, in groups of a few documents."""
    monkeypatch.setattr("lape_fast.identify.chunks.CHUNK_TOKENS", 40)
    monkeypatch.setattr("lape_fast.identify.chunks.FIRST_ROUND_TOKENS", 200)
    # Imported before the forks, so that each need not.
    tiny_model("llama")
    return make_corpus(tmp_path / "texts", (40, 25, 1, 60, 33))


def make_corpus(folder, sizes):
    folder.mkdir()
    draw = random.Random(0)
    for language, size in zip(LANGUAGES, sizes, strict=True):
        lines = [f"{language} {draw.random()} {number}" for number in range(size)]
        (folder / f"{language}.txt").write_text("\n".join(lines))
    return open_corpus(folder)


def saved_at(checkpoint):
    times = {}
    for path in checkpoint.glob("[0-9]*"):
        # Files of other numbers of processes vanish at any time.
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return times


def after_progress(checkpoint, draw):
    """Returns some moments after the run under way has been saved once more."""
    before = saved_at(checkpoint)

    def wait():
        while saved_at(checkpoint) == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.05))

    return wait


def counting(corpus, settings, checkpoint=None, seconds=0.0, model_type="llama"):
    def count():
        with joined_world() as world:
            counts = count_activations(
                tiny_model(model_type),
                tiny_tokenizer(),
                corpus,
                settings,
                checkpoint=checkpoint,
                checkpoint_seconds=seconds,
                world=world,
            )
        return {name: getattr(counts, name).numpy() for name in TENSORS}, counts.metadata

    return count


def assert_same(found, expected):
    for name in TENSORS:
        assert (found[0][name] == expected[0][name]).all(), name
    assert found[1]["stability"] == expected[1]["stability"]


# The first process has nothing to count when there are more of them than queues.
@pytest.mark.parametrize("size", (2, 3, 7))
def test_several_processes_count_what_one_counts(corpus, size):
    settings = CountingSettings(context_length=48, batch_tokens=96, shards_per_language=1)
    (alone,) = run_together(counting(corpus, settings), 1)
    assert alone[0]["tokens"].all()
    for found in run_together(counting(corpus, settings), size):
        assert_same(found, alone)


def test_a_shared_run_that_stops_when_stable_is_the_run_of_one(corpus):
    settings = CountingSettings(context_length=48, batch_tokens=96, shards_per_language=2, until_stable=0.3)
    (alone,) = run_together(counting(corpus, settings), 1)
    for found in run_together(counting(corpus, settings), 2):
        assert_same(found, alone)


@pytest.mark.parametrize("until_stable", (None, 0.3))
def test_killed_processes_resume_in_any_number(corpus, tmp_path, until_stable):
    settings = CountingSettings(context_length=48, batch_tokens=48, shards_per_language=2, until_stable=until_stable)
    (undisturbed,) = run_together(counting(corpus, settings), 1)
    checkpoint = tmp_path / "partial"
    draw = random.Random(until_stable)
    for size in (2, 3, 2, 1, 2):
        run_together(counting(corpus, settings, checkpoint), size, kill=after_progress(checkpoint, draw))
    for found in run_together(counting(corpus, settings, checkpoint), 2):
        assert_same(found, undisturbed)
    # Nothing of other numbers of processes is left behind.
    left = {path.name for path in checkpoint.iterdir()}
    assert left <= {".lock", "0-of-2.safetensors", "1-of-2.safetensors"}


def test_twenty_kills_leave_the_counts_as_they_are(corpus, tmp_path):
    corpus = make_corpus(tmp_path / "more", (300, 100, 1, 400, 200))
    settings = CountingSettings(context_length=48, batch_tokens=48)
    (undisturbed,) = run_together(counting(corpus, settings), 1)
    draw = random.Random(0)
    checkpoint = tmp_path / "partial"
    for _ in range(20):
        kill = after_progress(checkpoint, draw)
        assert run_together(counting(corpus, settings, checkpoint), 1, kill) == [None]
    (found,) = run_together(counting(corpus, settings, checkpoint), 1)
    assert_same(found, undisturbed)


@pytest.mark.parametrize("model_type", ("llama", "gemma3"))
def test_a_sharded_model_counts_what_a_whole_one_counts(corpus, tmp_path, model_type):
    """The processes have unequal amounts of text, and each step needs all of them."""
    settings = CountingSettings(context_length=48, batch_tokens=96)
    base = save_tiny(tmp_path / "base", model_type, tie_word_embeddings=True)

    def counting_sharded():
        with joined_world() as world:
            model, tokenizer = load_sharded_model(base, device=world.device)
            held = sum(parameter.to_local().numel() for parameter in decoder(model).parameters())
            counts = count_activations(model, tokenizer, corpus, settings, world=world)
        return {name: getattr(counts, name).numpy() for name in TENSORS}, counts.metadata, held

    (alone,) = run_together(counting(corpus, settings, model_type=model_type), 1)
    total = sum(parameter.numel() for parameter in decoder(tiny_model(model_type)).parameters())
    for found in run_together(counting_sharded, 2):
        assert_same(found, alone)
        assert found[1]["config_hash"] == model_identity(load_model(base)[0])["config_hash"]
        assert found[1]["weights_hash"] == weights_hash(load_model(base)[0])
        assert abs(found[2] - total / 2) < total / 50


def test_a_single_process_cannot_share_a_model(tmp_path):
    with pytest.raises(ConfigError, match="torchrun"):
        load_sharded_model(save_tiny(tmp_path / "base"))


def test_a_quantised_model_is_not_shared(tmp_path):
    quantised_tiny_model("nf4").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    def load():
        with joined_world() as world:
            # Only the first process reads the model; the other finds that it has ended.
            with pytest.raises(RuntimeError if world.rank else ConfigError) as refused:
                load_sharded_model(tmp_path, device=world.device)
            return str(refused.value)

    assert "was saved quantised, and quantised weights cannot be shared" in run_together(load, 2)[0]


def test_a_process_that_ends_is_one_sentence_in_the_others():
    def meet():
        with joined_world() as world:
            world.wait()
            if world.rank == 1:
                return None
            for exchange in (world.wait, lambda: world.sum(torch.ones(1))):
                with pytest.raises(WorkerError, match="^Another process of this run has ended"):
                    exchange()
        return "told"

    assert run_together(meet, 2) == ["told", None]


def test_a_process_that_is_asked_to_stop_while_it_waits_for_another_stops(corpus, tmp_path, monkeypatch):
    """Both are signalled, and the first to end is gone before the other can ask it."""
    settings = CountingSettings(context_length=48, batch_tokens=96, until_stable=0.3)

    def count():
        rank, wait = int(os.environ["RANK"]), World.wait

        def signalled(world):
            # Saved is what a round has counted; before that the processes wait for each other once, at the start.
            if (tmp_path / "partial" / f"{rank}-of-2.safetensors").exists():
                os._exit(0) if rank else os.kill(os.getpid(), signal.SIGTERM)
            wait(world)

        monkeypatch.setattr(World, "wait", signalled)
        with pytest.raises(StoppedError, match="asked to stop, and is saved"):
            counting(corpus, settings, tmp_path / "partial")()
        return "stopped"

    assert run_together(count, 2)[0] == "stopped"
