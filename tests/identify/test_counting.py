"""Counting against plain hooks on separate documents, and runs that stop and go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from lape_fast.errors import (
    ArchitectureError,
    ConfigError,
    CorpusError,
    FileExistsAlreadyError,
    SelectionError,
    StoppedError,
)
from lape_fast.identify import (
    ActivationCounts,
    CountingSettings,
    count_activations,
    count_batch,
    count_to_file,
    counting,
    counting_ffns,
    identify_neurons,
    merge_files,
    missing_parts,
)
from lape_fast.identify.counting_ffn import by_language, zero_counts
from lape_fast.identify.counts import TENSORS
from lape_fast.models import find_ffns, forward_hidden
from lape_fast.text import Packed, open_corpus, tokenize
from tests.tiny_models import DENSE_TYPES, tiny_model, tiny_tokenizer

TEXTS = {
    "mlt_Latn": ["Il-qattus qagħad fuq it-tapit.", "Bonġu!", "Il-ktieb huwa fuq il-mejda u l-bieb magħluq."],
    "eng_Latn": ["The cat sat on the mat.", "Good morning, everybody.", "x"],
    "kat_Geor": ["კატა ხალიჩაზე იჯდა."],
}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for language, lines in TEXTS.items():
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(str(folder))


def keep_gate(gates, layer, width):
    def hook(module, arguments, output):
        gates[layer] = output.reshape(-1, output.shape[-1])[:, :width]

    return hook


def counts_by_hooks(model, corpus, context_length):
    """One document at a time, one piece at a time, boolean hooks on the gate: what counting must equal."""
    tokenizer = tiny_tokenizer()
    ffns = find_ffns(model)
    positive = torch.zeros(len(corpus.languages), len(ffns), ffns[0].neurons, dtype=torch.int64)
    tokens = torch.zeros(len(corpus.languages), dtype=torch.int64)
    for number, language in enumerate(corpus.languages):
        for ids in tokenize(tokenizer, list(corpus.documents(language))):
            for start in range(0, max(1, len(ids) - 1), context_length - 1):
                piece = torch.tensor(ids[start : start + context_length])
                new = torch.ones(len(piece), dtype=torch.bool)
                # The token that two pieces share was counted in the first; the document's prefix is no text.
                new[0] = False
                gates = {}
                handles = [
                    ffn.projections.get("gate", ffn.projections.get("gate_up")).register_forward_hook(
                        keep_gate(gates, ffn.layer, ffn.neurons)
                    )
                    for ffn in ffns
                ]
                forward_hidden(model, piece[None], torch.arange(len(piece))[None])
                for handle in handles:
                    handle.remove()
                for layer, gate in gates.items():
                    positive[number, layer] += (gate[new] > 0).sum(0)
                tokens[number] += int(new.sum())
    return positive, tokens


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_counts_equal_plain_hooks_on_separate_documents(model_type, corpus):
    # fp64, so that rounding in another order moves no gate across zero.
    model = tiny_model(model_type, dtype=torch.float64)
    counts = count_activations(model, tiny_tokenizer(), corpus, CountingSettings(context_length=24, batch_tokens=64))
    positive, tokens = counts_by_hooks(model, corpus, context_length=24)
    assert counts.languages == sorted(TEXTS)
    assert torch.equal(counts.tokens, tokens)
    assert torch.equal(counts.positive, positive)


def test_the_model_is_left_as_it_was(corpus):
    model = tiny_model("llama")
    modules = list(model.modules())
    count_activations(model, tiny_tokenizer(), corpus)
    assert all(left is right for left, right in zip(model.modules(), modules, strict=True))


class Interrupted(Exception):
    pass


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a document or two, so that a short corpus has groups and halves."""
    monkeypatch.setattr("lape_fast.identify.chunks.CHUNK_TOKENS", 20)


def interrupt_after(patch, groups):
    """Raises when a group behind the first few was counted, before it is saved."""
    count, left = counting.count_batch, [groups]

    def counted(*arguments):
        count(*arguments)
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1

    patch.setattr("lape_fast.identify.counting.count_batch", counted)


def assert_same(found, expected):
    for name in TENSORS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("seed", (None, 0))
@pytest.mark.parametrize("after", (0, 2, 5))
def test_an_interrupted_run_resumes_to_identical_counts(corpus, tmp_path, monkeypatch, small_chunks, after, seed):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    settings = CountingSettings(context_length=16, batch_tokens=32, seed=seed)
    undisturbed = count_activations(model, tokenizer, corpus, settings, workers=0)
    checkpoint = tmp_path / "partial"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, after)
        count_activations(
            model, tokenizer, corpus, settings, checkpoint=checkpoint, checkpoint_seconds=0, workers=after % 3
        )
    assert after == 0 or checkpoint.exists()
    resumed = count_activations(model, tokenizer, corpus, settings, checkpoint=checkpoint)
    assert_same(resumed, undisturbed)


def test_a_signal_saves_the_run_and_says_how_to_go_on(corpus, tmp_path, monkeypatch, small_chunks):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    settings = CountingSettings(context_length=16, batch_tokens=32)
    undisturbed = count_activations(model, tokenizer, corpus, settings)
    count = counting.count_batch

    def counted(*arguments):
        count(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="the same command goes on"):
        patch.setattr("lape_fast.identify.counting.count_batch", counted)
        count_activations(model, tokenizer, corpus, settings, checkpoint=tmp_path / "partial")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not multiprocessing.active_children()
    assert_same(count_activations(model, tokenizer, corpus, settings, checkpoint=tmp_path / "partial"), undisturbed)


@pytest.mark.parametrize("model_type", ("llama", "opt"))
def test_the_number_of_workers_and_shared_rows_change_no_count(corpus, model_type, small_chunks):
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer()
    settings = CountingSettings(context_length=24, batch_tokens=64)
    counts = [count_activations(model, tokenizer, corpus, settings, workers=workers) for workers in (0, 1, 3)]
    assert_same(counts[1], counts[0])
    assert_same(counts[2], counts[0])


def test_languages_share_rows_and_take_turns_between_halves(monkeypatch, tmp_path, small_chunks):
    monkeypatch.setattr("lape_fast.identify.chunks.QUEUES", 1)
    for language in ("eng_Latn", "mlt_Latn"):
        (tmp_path / f"{language}.txt").write_text("\n".join(f"{language} {number}" for number in range(9)))
    seen = []
    count = counting.count_batch

    def watched(model, modules, packed):
        seen.append(packed.language_ids)
        count(model, modules, packed)

    monkeypatch.setattr("lape_fast.identify.counting.count_batch", watched)
    settings = CountingSettings(context_length=64, batch_tokens=128)
    counts = count_activations(tiny_model("llama"), tiny_tokenizer(), open_corpus(tmp_path), settings, workers=0)
    assert any(len((row[row >= 0] % 2).unique()) == 2 for rows in seen for row in rows)
    first, second = counts.halves()
    assert torch.equal(first.tokens + second.tokens, counts.tokens)
    assert ((first.tokens - second.tokens).abs() <= 20 + 12).all()
    assert (first.tokens > 0).all() and (second.tokens > 0).all()


def test_shards_parts_and_processes_add_up_to_one_run(corpus, tmp_path, small_chunks):
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer()
    whole = count_activations(model, tokenizer, corpus, CountingSettings(context_length=32))
    paths = []
    for part in (1, 2, 3):
        settings = CountingSettings(context_length=32, shards_per_language=2, part=part, parts=3)
        paths.append(tmp_path / f"{part}.safetensors")
        count_to_file(model, tokenizer, corpus, paths[-1], settings)
    merged = merge_files(paths)
    assert merged.restrict(whole.languages).tokens.tolist() == whole.tokens.tolist()
    assert torch.equal(merged.restrict(whole.languages).positive, whole.positive)
    assert set(merged.metadata["stability"]) == set(whole.languages)
    with pytest.raises(CorpusError, match="hold counts of the same text of"):
        whole.save(tmp_path / "whole.safetensors")
        merge_files([*paths, tmp_path / "whole.safetensors"])


def test_a_part_without_shards_says_so(corpus):
    settings = CountingSettings(part=4, parts=4)
    with pytest.raises(ConfigError, match="Part 4 of 4 has nothing to count: there are only 3 shards"):
        count_activations(tiny_model("llama"), tiny_tokenizer(), corpus, settings)


def test_the_same_text_is_not_merged_twice(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    folder = corpus.name
    for name, lines in {"a": "1-2", "b": "2-3", "c": "3-3"}.items():
        count_to_file(model, tokenizer, open_corpus(folder, lines=lines, languages=["mt"]), tmp_path / name)
    with pytest.raises(CorpusError, match="same text of mlt_Latn"):
        merge_files([tmp_path / "a", tmp_path / "b"])
    merged = merge_files([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(CorpusError, match="same text of mlt_Latn"):
        merged.save(tmp_path / "merged")
        merge_files([tmp_path / "merged", tmp_path / "b"])
    with pytest.raises(CorpusError, match="named twice"):
        merge_files([tmp_path / "a", tmp_path / "a"])
    count_to_file(
        tiny_model("llama", layers=3), tokenizer, open_corpus(folder, lines="3-3", languages=["mt"]), tmp_path / "other"
    )
    with pytest.raises(ArchitectureError, match="3 layers"):
        merge_files([tmp_path / "a", tmp_path / "other"])
    # One configuration, as a model and what was trained from it have.
    trained = tiny_model("llama", seed=1)
    count_to_file(trained, tokenizer, open_corpus(folder, lines="3-3", languages=["mt"]), tmp_path / "trained")
    with pytest.raises(ArchitectureError, match="different weights"):
        merge_files([tmp_path / "a", tmp_path / "trained"])


def test_a_checkpoint_of_another_run_is_refused_with_the_difference_named(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    checkpoint = tmp_path / "partial"
    settings = CountingSettings(context_length=16, batch_tokens=8)
    count_activations(model, tokenizer, corpus, settings, checkpoint=checkpoint, checkpoint_seconds=0)
    with pytest.raises(ConfigError, match="context_length was 16 and is 32"):
        count_activations(
            model, tokenizer, corpus, CountingSettings(context_length=32, batch_tokens=8), checkpoint=checkpoint
        )
    with pytest.raises(ConfigError, match="weights_hash was"):
        count_activations(tiny_model("llama", seed=1), tokenizer, corpus, settings, checkpoint=checkpoint)
    (Path(corpus.name) / "mlt_Latn.txt").write_text("Bonswa.")
    with pytest.raises(ConfigError, match="corpus was"):
        count_activations(model, tokenizer, open_corpus(corpus.name), settings, checkpoint=checkpoint)


def test_a_token_budget_stops_each_language(corpus):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    counts = count_activations(model, tokenizer, corpus, CountingSettings(tokens_per_language=20))
    full = count_activations(model, tokenizer, corpus)
    longest = max(len(ids) for ids in tokenize(tokenizer, [line for lines in TEXTS.values() for line in lines]))
    assert (counts.tokens >= torch.minimum(full.tokens, torch.tensor(20))).all()
    assert (counts.tokens <= 20 + longest).all()
    assert {each["ended"] for each in counts.metadata["stability"].values()} <= {"budget", "text"}
    assert {each["ended"] for each in full.metadata["stability"].values()} == {"text"}


def test_a_language_without_tokens_is_an_error_that_names_it_and_loses_nothing(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "eng_Latn.txt").write_text("a\n")
    (texts / "mlt_Latn.txt").write_text("\n\n")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(SelectionError, match="mlt_Latn"):
        identify_neurons(model, tokenizer, open_corpus(texts), tmp_path / "out")
    assert ActivationCounts.load(tmp_path / "out" / "counts.safetensors").tokens.tolist() == [1, 0]
    with pytest.raises(CorpusError, match="not one token"):
        count_activations(model, tokenizer, open_corpus(texts, languages=["mt"]))


def test_a_damaged_file_stops_the_run_or_is_named_in_the_report(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (Path(corpus.name) / "mlt_Latn.part2.txt").write_bytes(b"Il-kelb.\n\xff\xfe\n")
    (Path(corpus.name) / "mlt_Latn.part3.txt").write_text("Il-qamar.")
    damaged = open_corpus(corpus.name)
    for workers in (0, 1):
        with pytest.raises(CorpusError, match="mlt_Latn.part2.txt"):
            count_activations(model, tokenizer, damaged, workers=workers)
    # The run that was stopped by the file goes on behind it.
    checkpoint = tmp_path / "partial"
    settings = CountingSettings(batch_tokens=8)
    with pytest.raises(CorpusError, match="--skip-bad-files"):
        count_activations(model, tokenizer, damaged, settings, checkpoint=checkpoint, checkpoint_seconds=0)
    assert checkpoint.exists()
    settings = CountingSettings(batch_tokens=8, skip_bad_files=True)
    counts = count_activations(model, tokenizer, damaged, settings, checkpoint=checkpoint)
    assert len(counts.metadata["skipped_files"]) == 1
    assert "mlt_Latn.part2.txt" in counts.metadata["skipped_files"][0]
    texts = [*TEXTS["mlt_Latn"], "Il-kelb.", "Il-qamar."]
    expected = sum(len(ids) - 1 for ids in tokenize(tokenizer, texts))
    assert int(counts.restrict(["mt"]).tokens) == expected


def test_counts_go_on_past_two_to_the_31():
    model = tiny_model("llama")
    counts = zero_counts(model, 2)
    counts += 2**31 - 1
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    packed = Packed(ids, torch.arange(16).expand(2, 16), torch.ones(2, 16, dtype=torch.int32))
    with counting_ffns(model, counts) as modules:
        count_batch(model, modules, packed)
    added = by_language(counts) - (2**31 - 1)
    assert added[0].eq(0).all() and 0 < int(added[1].max()) <= 32


def test_identify_writes_both_files_and_does_nothing_twice(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    settings = CountingSettings(rule="lape:top_rate=0.2,filter_rate=0.8,activation_bar=0.8")
    counts, neurons = identify_neurons(model, tokenizer, corpus, tmp_path / "out", settings)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"counts.safetensors", "neurons.safetensors"}
    again, same = identify_neurons(model, tokenizer, corpus, tmp_path / "out", settings)
    assert torch.equal(again.positive, counts.positive)
    assert same.summary() == neurons.summary()
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsAlreadyError, match="lape-fast select"):
        identify_neurons(model, tokenizer, corpus, tmp_path / "out", CountingSettings(rule="budget:neurons=5"))


def test_counts_of_another_model_are_not_taken_for_these(corpus, tmp_path):
    tokenizer = tiny_tokenizer()
    count_to_file(tiny_model("llama"), tokenizer, corpus, tmp_path / "counts.safetensors")
    with pytest.raises(FileExistsAlreadyError, match="layers was 2 and is 3"):
        count_to_file(tiny_model("llama", layers=3), tokenizer, corpus, tmp_path / "counts.safetensors")
    assert ActivationCounts.load(tmp_path / "counts.safetensors").layers == 2


def test_a_text_is_not_counted_twice_in_one_run(corpus, tmp_path):
    folder = Path(corpus.name)
    with pytest.raises(CorpusError, match="the same text of mlt_Latn twice"):
        open_corpus([folder, folder / "mlt_Latn.txt"])


def test_merged_parts_say_what_they_lack_and_where_they_come_from(corpus, tmp_path, small_chunks):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for part in (1, 2, 3):
        count_to_file(model, tokenizer, corpus, tmp_path / str(part), CountingSettings(part=part, parts=3))
    whole = count_activations(model, tokenizer, corpus)
    two = merge_files([tmp_path / "3", tmp_path / "1"])
    assert missing_parts(two) == ["2/3"]
    merged = merge_files([tmp_path / "3", tmp_path / "2", tmp_path / "1"])
    assert missing_parts(merged) == []
    assert merged.languages == whole.languages
    assert merged.metadata["corpus"] == corpus.describe()
    # A part has too few languages to compare, all of them together have not.
    part = ActivationCounts.load(tmp_path / "1").metadata["stability"]["eng_Latn"]
    assert (part["jaccard"], part["ended"]) == (None, "text")
    assert merged.metadata["stability"] == whole.metadata["stability"]
    other = CountingSettings(context_length=24)
    count_to_file(model, tokenizer, open_corpus(corpus.name, languages=["kat_Geor"]), tmp_path / "short", other)
    with pytest.raises(ArchitectureError, match="--context-length"):
        merge_files([tmp_path / "1", tmp_path / "short"])
