"""Counting against plain hooks on separate documents, and runs that stop and go on."""

from __future__ import annotations

import pytest
import torch

from lape_fast.errors import ConfigError, CorpusError, FileExistsAlreadyError
from lape_fast.identify import ActivationCounts, count_activations, count_to_file, identify_neurons
from lape_fast.models import find_ffns, forward_hidden
from lape_fast.text import open_corpus, tokenize
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
    counts = count_activations(model, tiny_tokenizer(), corpus, context_length=24, batch_tokens=64)
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


def interrupt_after(corpus, documents):
    """The corpus, raising after some documents, as a killed run would stop."""
    original = corpus.documents
    left = [documents]

    def stopping(language):
        for document in original(language):
            if left[0] == 0:
                raise Interrupted
            left[0] -= 1
            yield document

    return stopping


@pytest.mark.parametrize("after", range(1, 7))
def test_an_interrupted_run_resumes_to_identical_counts(corpus, tmp_path, monkeypatch, after):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {"context_length": 16, "batch_tokens": 8}
    undisturbed = count_activations(model, tokenizer, corpus, **options)
    checkpoint = tmp_path / "partial"
    monkeypatch.setattr("lape_fast.identify.counting.DOCUMENTS_PER_CALL", 1)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(corpus, "documents", interrupt_after(corpus, after), raising=False)
        count_activations(model, tokenizer, corpus, **options, checkpoint=checkpoint, checkpoint_seconds=0)
    assert after == 1 or checkpoint.exists()
    resumed = count_activations(model, tokenizer, corpus, **options, checkpoint=checkpoint)
    assert torch.equal(resumed.positive, undisturbed.positive)
    assert torch.equal(resumed.tokens, undisturbed.tokens)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference_named(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    checkpoint = tmp_path / "partial"
    count_activations(
        model, tokenizer, corpus, context_length=16, batch_tokens=8, checkpoint=checkpoint, checkpoint_seconds=0
    )
    with pytest.raises(ConfigError, match="context_length was 16 and is 32"):
        count_activations(model, tokenizer, corpus, context_length=32, batch_tokens=8, checkpoint=checkpoint)


def test_a_token_budget_stops_each_language(corpus):
    counts = count_activations(tiny_model("llama"), tiny_tokenizer(), corpus, tokens_per_language=20)
    full = count_activations(tiny_model("llama"), tiny_tokenizer(), corpus)
    longest = max(len(ids) for ids in tokenize(tiny_tokenizer(), [line for lines in TEXTS.values() for line in lines]))
    assert (counts.tokens >= torch.minimum(full.tokens, torch.tensor(20))).all()
    assert (counts.tokens <= 20 + longest).all()


def test_a_language_without_tokens_is_an_error_that_names_it(tmp_path):
    (tmp_path / "eng_Latn.txt").write_text("a\n")
    (tmp_path / "mlt_Latn.txt").write_text("\n\n")
    with pytest.raises(CorpusError, match="mlt_Latn"):
        count_activations(tiny_model("llama"), tiny_tokenizer(), open_corpus(str(tmp_path)))


def test_identify_writes_both_files_and_does_nothing_twice(corpus, tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    preset = {"top_rate": 0.2, "filter_rate": 0.8, "activation_bar": 0.8}
    counts, neurons = identify_neurons(model, tokenizer, corpus, tmp_path / "out", **preset)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert set(written) == {"counts.safetensors", "neurons.safetensors"}
    again, same = identify_neurons(model, tokenizer, corpus, tmp_path / "out", **preset)
    assert torch.equal(again.positive, counts.positive)
    assert same.summary() == neurons.summary()
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsAlreadyError, match="lape-fast select"):
        identify_neurons(model, tokenizer, corpus, tmp_path / "out", **{**preset, "top_rate": 0.5})


def test_counts_of_another_model_are_not_taken_for_these(corpus, tmp_path):
    tokenizer = tiny_tokenizer()
    count_to_file(tiny_model("llama"), tokenizer, corpus, tmp_path / "counts.safetensors")
    with pytest.raises(FileExistsAlreadyError, match="layers was 2 and is 3"):
        count_to_file(tiny_model("llama", layers=3), tokenizer, corpus, tmp_path / "counts.safetensors")
    assert ActivationCounts.load(tmp_path / "counts.safetensors").layers == 2
