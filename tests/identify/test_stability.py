"""How far halves agree, and runs that stop where they agree enough."""

from __future__ import annotations

import random

import pytest
import torch

from lape_fast.errors import ConfigError, SelectionError
from lape_fast.identify import (
    ActivationCounts,
    Budget,
    CountingSettings,
    Percentile,
    count_activations,
    counting,
    measure_stability,
    select_neurons,
)
from lape_fast.identify.stability import is_stable
from lape_fast.text import open_corpus
from tests.tiny_models import tiny_model, tiny_tokenizer

# By this rule a language's neurons depend on its own text alone.
PLAN = {"context_length": 64, "batch_tokens": 256, "rule": "percentile:percentile=0.8"}
LANGUAGES = ["cym_Latn", "mlt_Latn", "slk_Latn"]


def counts_of(first, second, tokens=(100, 100, 100), second_tokens=(100, 100, 100)):
    first, second = torch.tensor(first)[:, None], torch.tensor(second)[:, None]
    tokens, second_tokens = torch.tensor(tokens), torch.tensor(second_tokens)
    return ActivationCounts(first + second, tokens + second_tokens, LANGUAGES, {}, first, tokens)


def test_agreement_is_the_jaccard_index_of_what_each_half_selects():
    first = [[90, 80, 1, 1, 0, 0, 0, 0], [0, 0, 90, 80, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 90, 80]]
    second = [[90, 1, 80, 1, 0, 0, 0, 0], [0, 0, 90, 80, 1, 1, 0, 0], [0, 0, 1, 0, 1, 0, 90, 80]]
    measured = measure_stability(counts_of(first, second), Budget(2))
    assert [measured[language]["jaccard"] for language in LANGUAGES] == [1 / 3, 1.0, 1.0]
    assert [measured[language]["neurons"] for language in LANGUAGES] == [3, 2, 2]
    assert {each["tokens"] for each in measured.values()} == {200}
    low, high = measured["cym_Latn"]["interval"]
    assert 0 <= low < 1 / 3 < high <= 1
    # Two neurons that agree are not much to go by.
    assert measured["mlt_Latn"]["interval"] == [0.0, 1.0] or measured["mlt_Latn"]["interval"] == [0.5, 1.0]


def test_the_interval_is_that_of_the_share_of_neurons():
    """For many neurons the bootstrap agrees with the normal interval: J +- 1.96 sqrt(J (1 - J) / n)."""
    neurons, shared = 2000, 900
    first = torch.zeros(3, neurons, dtype=torch.int64)
    second = torch.zeros(3, neurons, dtype=torch.int64)
    # Each half has a thousand neurons that fire, 900 of them in both.
    first[0, :1000], second[0, 1000 - shared : 2000 - shared] = 90, 90
    measured = measure_stability(counts_of(first.tolist(), second.tolist()), Budget(1000))["cym_Latn"]
    jaccard = shared / (2000 - shared)
    assert measured["jaccard"] == pytest.approx(jaccard)
    deviation = (jaccard * (1 - jaccard) / (2000 - shared)) ** 0.5
    # Ten thousand resamples estimate a quantile to about 2 % of the deviation, and neurons are whole.
    assert measured["interval"] == pytest.approx([jaccard - 1.96 * deviation, jaccard + 1.96 * deviation], abs=0.003)


def test_stable_is_high_and_narrow():
    assert is_stable({"jaccard": 0.96, "interval": [0.93, 0.99]}, 0.95)
    assert not is_stable({"jaccard": 0.94, "interval": [0.93, 0.95]}, 0.95)
    assert not is_stable({"jaccard": 0.96, "interval": [0.8, 1.0]}, 0.95)
    assert not is_stable({"jaccard": None, "interval": None}, 0.1)


def test_a_language_with_an_empty_half_is_unknown_and_leaves_the_others_measured():
    first = [[90, 80, 1, 1], [0, 0, 90, 80], [5, 5, 5, 5]]
    second = [[90, 80, 1, 1], [0, 0, 90, 80], [0, 0, 0, 0]]
    measured = measure_stability(counts_of(first, second, second_tokens=(100, 100, 0)), Budget(2))
    assert measured["slk_Latn"] == {"tokens": 100, "jaccard": None, "interval": None, "neurons": 0}
    assert measured["mlt_Latn"]["jaccard"] == 1.0
    without = ActivationCounts(torch.ones(1, 1, 4, dtype=torch.int64), torch.tensor([3]), ["mlt_Latn"])
    with pytest.raises(SelectionError, match="halves"):
        measure_stability(without)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A language that is always the same sentence, one that never is, and one of a single word."""
    monkeypatch.setattr("lape_fast.identify.chunks.CHUNK_TOKENS", 40)
    monkeypatch.setattr("lape_fast.identify.chunks.FIRST_ROUND_TOKENS", 400)
    monkeypatch.setattr("lape_fast.identify.stability.NARROW", 0.5)
    draw = random.Random(0)
    (tmp_path / "mlt_Latn.txt").write_text("Il-qattus qagħad fuq it-tapit.\n" * 250)
    letters = "abcdefghijklmnopqrstuvwxyzабвгдежзийклмн"
    lines = ["".join(draw.choices(letters, k=draw.randint(3, 60))) for _ in range(150)]
    (tmp_path / "rus_Cyrl.txt").write_text("\n".join(lines))
    (tmp_path / "isl_Latn.txt").write_text("köttur")
    return open_corpus(tmp_path)


def test_languages_stop_once_their_halves_agree_and_the_others_go_on(corpus):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    full = count_activations(model, tokenizer, corpus, CountingSettings(**PLAN))
    counts = count_activations(model, tokenizer, corpus, CountingSettings(**PLAN, until_stable=0.999))
    ended = {language: each["ended"] for language, each in counts.metadata["stability"].items()}
    assert ended == {"isl_Latn": "text", "mlt_Latn": "stable", "rus_Cyrl": "text"}
    tokens, budget = (dict(zip(each.languages, each.tokens.tolist(), strict=True)) for each in (counts, full))
    assert tokens["mlt_Latn"] < budget["mlt_Latn"] / 4
    assert tokens["rus_Cyrl"] == budget["rus_Cyrl"] and tokens["isl_Latn"] == budget["isl_Latn"]
    selected = [select_neurons(each, Percentile(0.8)) for each in (counts, full)]
    assert torch.equal(*(neurons.flat("mlt_Latn") for neurons in selected))
    assert counts.metadata["stability"]["isl_Latn"]["jaccard"] is None


def test_a_budget_ends_what_stability_does_not(corpus):
    settings = CountingSettings(
        context_length=64,
        batch_tokens=256,
        tokens_per_language=1000,
        until_stable=1.0,
        rule="percentile:percentile=0.8",
    )
    counts = count_activations(tiny_model("llama"), tiny_tokenizer(), corpus, settings)
    assert counts.metadata["stability"]["rus_Cyrl"]["ended"] == "budget"
    assert int(counts.restrict(["rus_Cyrl"]).tokens) < 1100


def test_documents_longer_than_several_rounds_do_not_end_the_run(corpus, tmp_path):
    draw = random.Random(0)
    (tmp_path / "long").mkdir()
    for language in ("mlt_Latn", "rus_Cyrl"):
        lines = (" ".join(str(draw.random()) for _ in range(60)) for _ in range(6))
        (tmp_path / "long" / f"{language}.txt").write_text("\n".join(lines))
    counts = count_activations(
        tiny_model("llama"),
        tiny_tokenizer(),
        open_corpus(tmp_path / "long"),
        CountingSettings(**PLAN, until_stable=1.0),
    )
    # There is no budget that could have ended one.
    assert {each["ended"] for each in counts.metadata["stability"].values()} <= {"stable", "text"}


def test_a_run_until_stable_that_is_stopped_in_any_round_ends_the_same(corpus, tmp_path, monkeypatch):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    settings = CountingSettings(
        context_length=64, batch_tokens=256, until_stable=0.999, rule="percentile:percentile=0.8"
    )
    undisturbed = count_activations(model, tokenizer, corpus, settings)
    count = counting.count_batch
    for stop in (1, 6, 15, 40):
        left = [stop]

        def counted(*arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise InterruptedError
            count(*arguments)

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(counting, "count_batch", counted)
            count_activations(
                model, tokenizer, corpus, settings, checkpoint=tmp_path / str(stop), checkpoint_seconds=0, workers=0
            )
        resumed = count_activations(model, tokenizer, corpus, settings, checkpoint=tmp_path / str(stop))
        assert torch.equal(resumed.positive, undisturbed.positive)
        assert resumed.metadata["stability"] == undisturbed.metadata["stability"]


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"until_stable": 95}, "Jaccard index"),
        ({"rule": "lape:top_rate=0.1/0.2"}, "several rules"),
        ({"part": 3, "parts": 2}, "no part 3 of 2"),
        ({"part": 1, "parts": 2, "until_stable": 0.9}, "leave out `until_stable`"),
        ({"context_length": 1}, "at least 2"),
        ({"tokens_per_language": 0}, "at least 1"),
    ),
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        CountingSettings(**settings)
