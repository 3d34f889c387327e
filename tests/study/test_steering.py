"""Steering: what it computes in every architecture, that it leaves no trace, and what the model then writes."""

from __future__ import annotations

import copy

import pytest
import torch

from lape_fast.errors import AdapterError, ArchitectureError, ConfigError, CorpusError, FileFormatError, LanguageError
from lape_fast.models import find_ffns, forward_hidden
from lape_fast.study import (
    LanguageIdentifier,
    Steering,
    force_language,
    mean_activations,
    silenced,
    steered,
    train_identifier,
)
from lape_fast.study.language_identifier import ngrams_of
from lape_fast.study.steer import generate
from lape_fast.text import open_corpus, tokenize
from lape_fast.tune import attach_subnetwork
from tests.tiny_models import DENSE_TYPES, EXPERT_TYPES, EXPERTS, quantised_tiny_model, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 20)[None]
NOTHING = torch.empty(0, dtype=torch.int64)
CHOSEN = [torch.tensor([0, 7, 41]), NOTHING]


class Watched:
    """An FFN as the formula says, with its neurons' activations changed by ``change``."""

    def __init__(self, ffn, change):
        self.ffn, self.change = ffn, change

    def __call__(self, x):
        ffn = self.ffn
        act = {
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
            "relu": torch.relu,
        }[ffn.activation]
        gate, up = ffn.project(x)
        h = act(gate) if up is None else act(gate) * up
        return ffn.project_down(self.change(h))


def by_formula(model, change):
    """The logits with the first layer's FFN computed by the formula."""

    class Replacement(torch.nn.Module):
        def __init__(self, ffn):
            super().__init__()
            self.compute = Watched(ffn, change)

        def forward(self, x):
            return self.compute(x)

    ffn = find_ffns(model)[0]
    ffn.replace(Replacement(ffn))
    try:
        return model(IDS).logits
    finally:
        ffn.restore()


def doubled(h):
    return h.index_copy(-1, CHOSEN[0], 2.5 * h[..., CHOSEN[0]])


def filled(h):
    values = torch.tensor([1.0, -2.0, 0.5], dtype=h.dtype)
    return h.index_copy(-1, CHOSEN[0], values.expand(*h.shape[:-1], 3))


@pytest.mark.parametrize("model_type", DENSE_TYPES)
@torch.no_grad()
def test_scaled_and_replaced_activations_are_the_formulas(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    before, intact = copy.deepcopy(model.state_dict()), model(IDS).logits
    values = [torch.tensor([1.0, -2.0, 0.5]), torch.empty(0)]
    for options, change in (({"scale": 2.5}, doubled), ({"values": values}, filled)):
        expected = by_formula(model, change)
        with steered(model, CHOSEN, **options):
            found = model(IDS).logits
        # In fp64; BLOOM's own code has only 8 digits of the constant in its activation.
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found, intact, rtol=1e-3, atol=1e-3)
        assert torch.equal(model(IDS).logits, intact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
@torch.no_grad()
def test_scaling_by_nothing_silences_and_by_one_does_nothing(model_type):
    model = tiny_model(model_type)
    intact = model(IDS).logits
    with silenced(model, CHOSEN):
        expected = model(IDS).logits
    with steered(model, CHOSEN, scale=0):
        assert torch.equal(model(IDS).logits, expected)
    with steered(model, CHOSEN, scale=1):
        assert torch.equal(model(IDS).logits, intact)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@torch.no_grad()
def test_experts_are_scaled_and_not_replaced(model_type):
    model = tiny_model(model_type)
    scaled = copy.deepcopy(model)
    down = scaled.model.layers[0].mlp.experts.down_proj
    (down if model_type == "gpt_oss" else down.transpose(1, 2))[:, 7] *= 3
    neurons = [torch.arange(EXPERTS) * 48 + 7, NOTHING]
    with steered(model, neurons, scale=3):
        assert torch.equal(model(IDS).logits, scaled(IDS).logits)
    with (
        pytest.raises(ArchitectureError, match="scaled but not replaced"),
        steered(model, neurons, values=[torch.ones(EXPERTS), torch.empty(0)]),
    ):
        pass


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@torch.no_grad()
def test_a_quantised_model_is_steered_by_its_activations(kind):
    model = quantised_tiny_model(kind)
    intact = model(IDS).logits
    values = [torch.tensor([1.0, -2.0, 0.5]), torch.empty(0)]
    for options, change in (({"scale": 2.5}, doubled), ({"values": values}, filled)):
        expected = by_formula(model, change)
        with steered(model, CHOSEN, **options):
            found = model(IDS).logits
        assert not torch.equal(found, intact)
        # bfloat16, in which the formula's activation is rounded in another place: 8 bits.
        assert torch.allclose(found, expected, rtol=0.05, atol=0.05)
    assert torch.equal(model(IDS).logits, intact)


def test_an_error_inside_leaves_no_trace():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    for options in ({"scale": 3.0}, {"values": [torch.ones(3), torch.empty(0)]}):
        with pytest.raises(KeyboardInterrupt), steered(model, CHOSEN, **options):
            raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_model_with_an_adapter_is_steered_with_its_values():
    model = tiny_model()
    subnetwork = attach_subnetwork(model, [torch.tensor([7, 9]), torch.tensor([1])])
    for parameter in subnetwork.parameters():
        parameter.add_(0.3)
    # The forward pass writes what was added into the base.
    tuned = model(IDS).logits
    merged = tiny_model()
    merged.load_state_dict(plain_state(model))
    for options in ({"scale": 2.0}, {"values": [torch.ones(3), torch.empty(0)]}):
        with steered(merged, CHOSEN, **options):
            expected = merged(IDS).logits
        with steered(model, CHOSEN, **options):
            assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, tuned)
    overlaid = tiny_model()
    attach_subnetwork(overlaid, [torch.tensor([7]), NOTHING], storage="overlay")
    with pytest.raises(AdapterError, match="overlay storage"), silenced(overlaid, CHOSEN):
        pass
    with pytest.raises(AdapterError, match="overlay storage"), steered(overlaid, CHOSEN, scale=2.0):
        pass


def plain_state(model):
    """The weights of a tiny Llama with resident values, under the names they have without a subnetwork."""
    state = tiny_model().state_dict()
    for ffn in find_ffns(model):
        for name, weight in (("gate", ffn.gate_weight), ("up", ffn.up_weight), ("down", ffn.down_weight)):
            state[f"model.layers.{ffn.layer}.mlp.{name}_proj.weight"] = weight.detach().clone()
    return state


def test_what_makes_no_sense_is_refused():
    model = tiny_model()
    for options, words in (
        ({}, "either a scale or values"),
        ({"scale": 1.0, "values": [torch.ones(3), torch.empty(0)]}, "either a scale or values"),
        ({"scale": float("nan")}, "not finite"),
        ({"values": [torch.ones(2), torch.ones(1)]}, "one value per neuron"),
    ):
        with pytest.raises(ConfigError, match=words), steered(model, CHOSEN, **options):
            pass
    with pytest.raises(ArchitectureError, match="3 layers"), steered(model, [NOTHING] * 3, scale=2.0):
        pass
    with pytest.raises(LanguageError, match="mlt_Latn has no neurons"):
        force_language(model, tiny_tokenizer(), [NOTHING] * 2, "mlt_Latn", ["a"], lambda text: "und", scale=2.0)
    with pytest.raises(ConfigError, match="1 of them empty"):
        force_language(model, tiny_tokenizer(), CHOSEN, "mt", ["a", ""], lambda text: "und", scale=2.0)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "bloom"])
@torch.no_grad()
def test_mean_activations_are_those_of_every_token_but_the_first(tmp_path, model_type):
    lines = ["Il-qattus qagħad fuq it-tapit.", "Bonġu!", "Iva, iva."]
    (tmp_path / "mlt_Latn.txt").write_text("\n".join(lines), encoding="utf-8")
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer()
    neurons = [torch.tensor([3, 40]), torch.tensor([0])]
    means = mean_activations(
        model, tokenizer, open_corpus(tmp_path), "mlt_Latn", neurons, context_length=64, batch_tokens=64
    )
    found = {0: [], 1: []}
    for ids in tokenize(tokenizer, lines):
        ids = torch.tensor(ids)[None]
        handles = [
            ffn.projections["down"].register_forward_pre_hook(
                lambda module, arguments, layer=ffn.layer: found[layer].append(
                    arguments[0].reshape(-1, arguments[0].shape[-1])[1:]
                )
            )
            for ffn in find_ffns(model)
        ]
        forward_hidden(model, ids, torch.arange(ids.shape[1])[None])
        for handle in handles:
            handle.remove()
    for layer, chosen in enumerate(neurons):
        expected = torch.cat(found[layer])[:, chosen].mean(0)
        # Kept in fp32.
        assert torch.allclose(means[layer].double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(CorpusError, match="no language 'eng_Latn'"):
        mean_activations(model, tokenizer, open_corpus(tmp_path), "eng_Latn", neurons)
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        mean_activations(tiny_model("mixtral"), tokenizer, open_corpus(tmp_path), "mlt_Latn", CHOSEN)


def test_forcing_counts_what_was_written(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = ["The cat", "Il-qattus", "Die"]
    values = [torch.full((3,), 50.0), torch.empty(0)]
    known = {}

    def identify(text):
        known.setdefault(text, ("mlt_Latn", "eng_Latn")[len(known) % 2])
        return known[text]

    result = force_language(model, tokenizer, CHOSEN, "mt", prompts, identify, values=values, max_new_tokens=5)
    assert result.plain == generate(model, tokenizer, prompts, 5)
    with steered(model, CHOSEN, values=values):
        assert result.steered == generate(model, tokenizer, prompts, 5)
    assert result.plain != result.steered
    assert result.plain_languages == tuple(known[text] for text in result.plain)
    assert result.steered_accuracy == sum(known[text] == "mlt_Latn" for text in result.steered) / 3
    result.save(tmp_path / "steering.json")
    assert Steering.load(tmp_path / "steering.json") == result
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(FileFormatError, match="holds no steering"):
        Steering.load(tmp_path / "other.json")


def test_greedy_generation_is_the_argmax_each_time():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (ids,) = tokenize(tokenizer, ["The cat"])
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 6:
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert generate(model, tokenizer, ["The cat"], 6) == (tokenizer.decode(ids[start:], skip_special_tokens=True),)


def test_shares_put_the_language_first():
    result = Steering("mlt_Latn", ("a",) * 4, ("",) * 4, ("",) * 4, ("eng_Latn",) * 4, ("eng_Latn", "ita_Latn") * 2)
    assert result.shares() == {"mlt_Latn": (0, 0), "eng_Latn": (1, 0.5), "ita_Latn": (0, 0.5)}
    assert (result.plain_accuracy, result.steered_accuracy) == (0, 0)


def test_ngrams_of_words():
    def code(text):
        number = 0
        for character in text:
            number = number << 21 | ord(character)
        return number

    expected = ["a", "b", " a", "ab", "b ", " ab", "ab "]
    assert sorted(ngrams_of("Ab").tolist()) == sorted(map(code, expected))
    assert ngrams_of("12, ab!").tolist() == ngrams_of("AB").tolist()
    assert len(ngrams_of("... 17")) == 0


def test_the_identifier_is_naive_bayes():
    ngrams = ngrams_of("ab").unique()
    shares = torch.full((len(ngrams), 2), 1 / len(ngrams))
    identify = LanguageIdentifier(["eng_Latn", "mlt_Latn"], ngrams, shares.log())
    # A tie is the first language's.
    assert identify("ab") == "eng_Latn" and identify("xyz") == identify("") == "und"
    shares[:, 1] *= 2
    assert LanguageIdentifier(["eng_Latn", "mlt_Latn"], ngrams, shares.log())("ab") == "mlt_Latn"


def test_the_built_in_text_of_twelve_languages_is_told_apart():
    languages = ["afr_Latn", "cym_Latn", "deu_Latn", "eng_Latn", "ita_Latn", "kat_Geor", "lit_Latn", "lvs_Latn"]
    languages += ["mkd_Cyrl", "mlt_Latn", "npi_Deva", "rus_Cyrl"]
    identify = train_identifier(open_corpus("cldr", lines="1-200", languages=languages))
    held_out = open_corpus("cldr", lines="1901-1950", languages=languages)
    right = [identify(text) == language for language in languages for text in held_out.documents(language)]
    assert len(right) == 600 and sum(right) / len(right) > 0.95


def test_held_out_news_in_twelve_languages_is_told_apart(shared_corpus):
    languages = ["afr_Latn", "cym_Latn", "est_Latn", "isl_Latn", "kat_Geor", "lit_Latn", "lvs_Latn", "mkd_Cyrl"]
    languages += ["mlt_Latn", "npi_Deva", "slk_Latn", "slv_Latn", "nld_Latn", "ces_Latn", "bul_Cyrl", "hin_Deva"]
    files = [shared_corpus / f"{language}.txt" for language in languages]
    identify = train_identifier(open_corpus(files, lines="1-500"))
    held_out = open_corpus(files, lines="1798-1847")
    right = [identify(text) == language for language in languages for text in held_out.documents(language)]
    assert sum(right) / len(right) > 0.95
