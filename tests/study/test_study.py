"""Scores against a plain computation, and neurons that are switched off without a trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lape_fast.errors import ArchitectureError, CorpusError
from lape_fast.models import find_ffns
from lape_fast.study import evaluate, evaluate_languages, prepare_text, score, silenced
from lape_fast.text import open_corpus, tokenize
from tests.tiny_models import DENSE_TYPES, TINY_TYPES, tiny_model, tiny_tokenizer

TEXTS = {
    "mlt_Latn": ["Il-qattus qagħad fuq it-tapit.", "Bonġu!"],
    "eng_Latn": ["The cat sat on the mat.", "Good morning, everybody.", "yes"],
}


@pytest.fixture
def corpus(tmp_path):
    for language, lines in TEXTS.items():
        (tmp_path / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return open_corpus(str(tmp_path))


@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_scores_equal_the_sum_over_separate_documents(model_type, corpus):
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer()
    scores = evaluate_languages(model, tokenizer, corpus, context_length=96, batch_tokens=96)
    for language, lines in TEXTS.items():
        nats, tokens = 0.0, 0
        for ids in tokenize(tokenizer, lines):
            ids = torch.tensor(ids)[None]
            with torch.no_grad():
                log_probabilities = model(ids).logits.double().log_softmax(-1)
            nats -= float(log_probabilities[0, :-1].gather(1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
        size = sum(len(line.encode()) for line in lines)
        # The loss is taken in fp32.
        assert scores[language].nats == pytest.approx(nats, rel=1e-5)
        assert scores[language].tokens == tokens
        assert scores[language].bytes == size
        assert scores[language].bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert scores[language].perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_a_document_longer_than_a_row_is_scored_on_every_token_but_the_first(corpus):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    text = prepare_text(model, tokenizer, corpus, context_length=8)
    expected = {language: sum(len(ids) - 1 for ids in tokenize(tokenizer, lines)) for language, lines in TEXTS.items()}
    assert {language: result.tokens for language, result in score(model, text).items()} == expected


def test_the_loss_of_a_few_positions_at_a_time_is_the_same(corpus, monkeypatch):
    model = tiny_model()
    text = prepare_text(model, tiny_tokenizer(), corpus, context_length=64)
    at_once = score(model, text)
    # Three positions of the tiny vocabulary.
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 900)
    assert score(model, text) == at_once


def test_the_model_keeps_its_mode(corpus):
    model = tiny_model().train()
    evaluate_languages(model, tiny_tokenizer(), corpus)
    assert model.training


def test_a_language_without_text_is_named(corpus, tmp_path):
    (tmp_path / "deu_Latn.txt").write_text("\n")
    with pytest.raises(CorpusError, match="deu_Latn"):
        prepare_text(tiny_model(), tiny_tokenizer(), open_corpus(str(tmp_path)))


def test_a_language_of_which_nothing_can_be_predicted_is_named(corpus, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = tokenizer.eos_token = None
    (tmp_path / "deu_Latn.txt").write_text("a\nb\n")
    with pytest.raises(CorpusError, match="Not one token of deu_Latn"):
        prepare_text(tiny_model(), tokenizer, open_corpus(str(tmp_path)))


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_silenced_neurons_contribute_nothing_and_come_back_bit_for_bit(model_type):
    model = tiny_model(model_type)
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(3, 20)[None]
    intact = model(ids).logits
    neurons = [torch.tensor([0, 7]), torch.empty(0, dtype=torch.int64)]
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        find_ffns(zeroed)[0].down_weight[:, [0, 7]] = 0
        expected = zeroed(ids).logits
    with silenced(model, neurons):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(expected, intact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_silenced_neurons_come_back_after_an_error():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), silenced(model, [torch.tensor([1]), torch.tensor([2])]):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neurons_of_another_model_are_refused():
    with pytest.raises(ArchitectureError, match="3 layers, but the model has 2"), silenced(tiny_model(), [[]] * 3):
        pass
