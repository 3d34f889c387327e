"""Alignment: states against transformers' own, measures against their formulas, and lines that are not parallel."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import cosine_similarity

from lape_fast.errors import ConfigError, CorpusError, FileFormatError, LanguageError
from lape_fast.identify import NeuronSet
from lape_fast.models import decoder
from lape_fast.study import Alignment, align_languages, linear_cka
from lape_fast.study.alignment import MEASURES, compare_states, sentence_states
from lape_fast.text import open_corpus, tokenize
from lape_fast.tune import SubnetworkConfig, attach_subnetwork, load_adapter, write_adapter
from tests.tiny_models import TINY_TYPES, tiny_model, tiny_tokenizer

TEXTS = {
    "deu_Latn": ["Die Katze saß auf der Matte.", "Guten Morgen!", "Ja.", "Wir gehen nach Hause."],
    "eng_Latn": ["The cat sat on the mat.", "Good morning, everybody.", "yes", "We are going home."],
    "mlt_Latn": ["Il-qattus qagħad fuq it-tapit.", "Bonġu!", "Iva", "Sejrin id-dar."],
}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for language, lines in TEXTS.items():
        (folder / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def random_states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_a_sentence_is_the_mean_of_its_tokens_in_every_layer(model_type):
    model, tokenizer = tiny_model(model_type), tiny_tokenizer()
    # 64 places a row, in which several sentences lie, and 8, which is less than most of them have.
    states = sentence_states(model, tokenizer, TEXTS["mlt_Latn"], context_length=64, batch_tokens=128)
    for number, ids in enumerate(tokenize(tokenizer, TEXTS["mlt_Latn"])):
        with torch.no_grad():
            hidden = decoder(model)(input_ids=torch.tensor(ids)[None], output_hidden_states=True).hidden_states
        # The last of transformers' states is behind the final norm.
        for layer, state in enumerate(hidden[:-1]):
            # Rows of another length are summed in another order: some rounding of fp32.
            assert torch.allclose(states[layer, number], state[0, 1:].mean(0), rtol=1e-4, atol=1e-5)
    assert states.shape == (len(hidden), 4, 32)


def test_a_sentence_longer_than_a_row_counts_each_token_once():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    states = sentence_states(model, tokenizer, TEXTS["deu_Latn"], context_length=8)
    embeddings = model.get_input_embeddings().weight
    for number, ids in enumerate(tokenize(tokenizer, TEXTS["deu_Latn"])):
        assert torch.allclose(states[0, number], embeddings[ids[1:]].mean(0), atol=1e-6)


def test_the_last_layer_is_there_too():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    states = sentence_states(model, tokenizer, TEXTS["eng_Latn"][:1])
    ids = torch.tensor(tokenize(tokenizer, TEXTS["eng_Latn"][:1]))
    with torch.no_grad():
        inner = model.model
        normed = inner(input_ids=ids).last_hidden_state
        inner.norm = torch.nn.Identity()
        last = inner(input_ids=ids).last_hidden_state
    assert torch.allclose(states[-1, 0], last[0, 1:].mean(0), atol=1e-5)
    assert not torch.allclose(states[-1, 0], normed[0, 1:].mean(0), atol=1e-2)


# Fewer sentences than dimensions, and more: the Gram matrices and the cross-covariances.
@pytest.mark.parametrize("count", [5, 40])
def test_cka_is_the_centred_kernel_alignment(count):
    x, y = random_states(count, 12, seed=1), random_states(count, 12, seed=2)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count

    def independence(a, b):
        return torch.trace(a @ a.T @ centring @ b @ b.T @ centring)

    expected = independence(x, y) / (independence(x, x) * independence(y, y)).sqrt()
    assert float(linear_cka(x, y)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("count", [5, 40])
def test_cka_knows_no_rotation_scale_or_shift(count):
    x = random_states(count, 12, seed=1)
    rotation = torch.linalg.qr(random_states(12, 12, seed=3)).Q
    assert float(linear_cka(x, 3 * x @ rotation + 7)) == pytest.approx(1, rel=1e-10)
    # Two representations that share nothing: orthogonal, centred columns.
    columns = torch.linalg.qr(torch.cat([torch.ones(40, 1, dtype=torch.float64), random_states(40, 6, seed=4)], 1)).Q
    assert float(linear_cka(columns[:, 1:4], columns[:, 4:])) == pytest.approx(0, abs=1e-20)


# More sentences than dimensions, and fewer.
@pytest.mark.parametrize("dimensions", [6, 16])
def test_measures_equal_loops_over_sentences(monkeypatch, dimensions):
    # Similarities in several parts.
    monkeypatch.setattr("lape_fast.study.alignment.ROWS_AT_ONCE", 3)
    x = random_states(2, 10, dimensions, seed=1)
    y = x + random_states(2, 10, dimensions, seed=2) * (dimensions / 6)
    for layer, row in enumerate(compare_states(x, y)):
        values = dict(zip(MEASURES, row.tolist(), strict=True))
        cosines = torch.stack([cosine_similarity(a[None], y[layer]) for a in x[layer]])
        others = cosines[~torch.eye(10, dtype=torch.bool)]
        forward = sum(int(cosines[i].argmax()) == i for i in range(10)) / 10
        backward = sum(int(cosines[:, i].argmax()) == i for i in range(10)) / 10
        assert 0.1 < forward < 1 and 0.1 < backward < 1
        shifted = torch.cat([y[layer, 5:], y[layer, :5]])
        expected = {
            "cosine": cosines.diagonal().mean(),
            "cosine_misaligned": others.mean(),
            "cka": linear_cka(x[layer], y[layer]),
            "cka_misaligned": linear_cka(x[layer], shifted),
            "retrieval_from_target": forward,
            "retrieval_to_target": backward,
        }
        assert values == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


def test_sentences_that_cannot_be_told_apart_are_not_retrieved():
    states = torch.ones(1, 4, 8)
    values = dict(zip(MEASURES, compare_states(states, states)[0].tolist(), strict=True))
    assert values["retrieval_from_target"] == values["retrieval_to_target"] == 0


def tuned(folder, model):
    """An adapter of the tiny Llama with changed values, in a folder."""
    neurons = NeuronSet.from_lists({"mlt_Latn": [[1, 5, 40], [0, 2]]}, neurons_per_layer=48)
    config = SubnetworkConfig(neurons=neurons, language="mlt_Latn")
    subnetwork = attach_subnetwork(model, neurons["mlt_Latn"])
    with torch.no_grad():
        for parameter in subnetwork.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    folder.mkdir()
    write_adapter(subnetwork, folder, config.to_dict())
    subnetwork.detach(keep=False)
    return folder


def test_before_and_after_an_adapter(tmp_path, texts):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    adapter = tuned(tmp_path / "adapter", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alignment = align_languages(model, tokenizer, open_corpus(texts), "mt", adapters={"tuned": adapter})
    assert (alignment.target, alignment.pivot, alignment.sentences) == ("mlt_Latn", "eng_Latn", 4)
    assert alignment.languages == ("eng_Latn", "deu_Latn") and alignment.stages == ("base", "tuned")
    assert alignment.values.shape == (2, 2, 3, len(MEASURES)) and alignment.left_out == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    load_adapter(model, adapter)
    target, german = (sentence_states(model, tokenizer, TEXTS[code]) for code in ("mlt_Latn", "deu_Latn"))
    assert torch.equal(alignment.values[1, 1], compare_states(target, german))
    # The embeddings are as they were.
    assert torch.equal(alignment.values[0, :, 0], alignment.values[1, :, 0])
    assert not torch.equal(alignment.values[0, :, 1:], alignment.values[1, :, 1:])
    assert torch.equal(alignment.mean("cka", "tuned"), alignment.measure("cka", "tuned").mean(0))
    assert torch.equal(alignment.to_pivot("cosine"), alignment.values[0, 0, :, 0])


def test_the_states_of_two_languages_are_held_at_a_time(tmp_path, monkeypatch):
    for language in ("eng_Latn", "mlt_Latn", "deu_Latn", "fra_Latn", "ita_Latn", "spa_Latn"):
        (tmp_path / f"{language}.txt").write_text(f"{language}\none\ntwo\n")
    alive, most = weakref.WeakSet(), 0

    def watched(*arguments, **options):
        nonlocal most
        states = sentence_states(*arguments, **options)
        alive.add(states)
        most = max(most, len(alive))
        return states

    monkeypatch.setattr("lape_fast.study.alignment.sentence_states", watched)
    result = align_languages(tiny_model(), tiny_tokenizer(), open_corpus(tmp_path), "mlt_Latn")
    assert len(result.languages) == 5 and most == 2


def test_a_file_comes_back_as_it_was(tmp_path, texts):
    alignment = align_languages(tiny_model(), tiny_tokenizer(), open_corpus(texts, lines="2-4"), "mlt_Latn")
    alignment.save(tmp_path / "alignment.json")
    loaded = Alignment.load(tmp_path / "alignment.json")
    assert loaded.to_json() == alignment.to_json()
    assert loaded.metadata["corpus"]["lines"] == "2-4" and loaded.sentences == 3
    assert torch.equal(loaded.values, alignment.values)
    (tmp_path / "other.json").write_text('{"kind": "ablation"}')
    with pytest.raises(FileFormatError, match="holds no alignment"):
        Alignment.load(tmp_path / "other.json")


def test_languages_without_parallel_lines_are_named(texts):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (texts / "fra_Latn.txt").write_text("Bonjour.\nOui.\n")
    # A blank line: what follows it is no longer the same sentence.
    (texts / "ita_Latn.txt").write_text("Il gatto.\n\nBuongiorno.\nAndiamo.\n")
    alignment = align_languages(model, tokenizer, open_corpus(texts), "mlt_Latn")
    assert alignment.languages == ("eng_Latn", "deu_Latn")
    assert alignment.left_out.keys() == {"fra_Latn", "ita_Latn"}
    assert "2 lines of text where 4 are needed" in alignment.left_out["fra_Latn"]
    for options in ({"pivot": "fra_Latn"}, {"pivot": "ita_Latn"}):
        with pytest.raises(CorpusError, match=f"{options['pivot']} has no parallel lines"):
            align_languages(model, tokenizer, open_corpus(texts), "mlt_Latn", **options)
    # Of equally many lines, one of them blank in each.
    (texts / "spa_Latn.txt").write_text("El gato.\nBuenos días.\n\nVamos.\n")
    with pytest.raises(CorpusError, match="spa_Latn has no parallel lines.*3 lines of text where 4 are needed"):
        align_languages(model, tokenizer, open_corpus(texts, lines="1-4"), "spa_Latn", pivot="ita_Latn")


def test_a_folder_with_other_text_of_a_language_is_refused(texts):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (texts / "mono").mkdir()
    (texts / "mono" / "mlt_Latn.txt").write_text("Iva.\nLe.\n")
    with pytest.raises(CorpusError, match=r"4 lines .* 2 are needed .* each of its 2 files.*--corpus FOLDER/mlt_Latn"):
        align_languages(model, tokenizer, open_corpus(texts, lines="1-2"), "mlt_Latn")
    named = open_corpus([texts / "mlt_Latn.txt", texts / "eng_Latn.txt"], lines="1-2")
    assert align_languages(model, tokenizer, named, "mlt_Latn").languages == ("eng_Latn",)


def test_what_cannot_be_compared_is_refused(texts):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(LanguageError, match="'nld_Latn' is not among"):
        align_languages(model, tokenizer, open_corpus(texts), "nld_Latn")
    with pytest.raises(FileFormatError, match="not an adapter folder"):
        align_languages(model, tokenizer, open_corpus(texts), "mlt_Latn", adapters={"tuned": texts})
    with pytest.raises(ConfigError, match="cannot be named 'base'"):
        align_languages(model, tokenizer, open_corpus(texts), "mlt_Latn", adapters={"base": texts})
    with pytest.raises(LanguageError, match="both the target and the pivot"):
        align_languages(model, tokenizer, open_corpus(texts), "en")
    with pytest.raises(CorpusError, match="an alignment needs two"):
        align_languages(model, tokenizer, open_corpus(texts, lines="1"), "mlt_Latn")
    with pytest.raises(CorpusError, match="composed for every language by itself"):
        align_languages(model, tokenizer, open_corpus("cldr"), "mlt_Latn")
