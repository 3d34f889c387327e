"""Counting a mixture of experts against a plain loop over separate documents, tokens and experts."""

from __future__ import annotations

import pytest
import torch

from lape_fast.identify import ActivationCounts, CountingSettings, NeuronSet, count_activations, identify_neurons
from lape_fast.identify.counting_ffn import CountingExperts
from lape_fast.models import find_ffns, forward_hidden, load_model
from lape_fast.text import open_corpus, tokenize
from tests.tiny_models import EXPERT_TYPES, EXPERTS, save_tiny, tiny_model, tiny_tokenizer

WIDTH = 48

TEXTS = {
    "mlt_Latn": ["Il-qattus qagħad fuq it-tapit.", "Bonġu!", "Il-ktieb huwa fuq il-mejda u l-bieb magħluq."],
    "eng_Latn": ["The cat sat on the mat.", "Good morning, everybody.", "x"],
}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for language, lines in TEXTS.items():
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(str(folder))


def gates_by_hand(experts, expert, x):
    """Gates of one expert straight from the stored parameters: [D] -> [F]."""
    if experts.gate_up_proj.shape[1] == len(x):  # gpt-oss: [E, D, 2F], gate and up in turns
        return (x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert])[::2]
    return experts.gate_up_proj[expert, :WIDTH] @ x


@torch.no_grad()
def counts_by_hand(model, corpus):
    """One document at a time, one token at a time, one of its experts at a time."""
    layers = [layer.mlp.experts for layer in model.model.layers]
    positive = torch.zeros(len(corpus.languages), len(layers), EXPERTS * WIDTH, dtype=torch.int64)
    tokens = torch.zeros(len(corpus.languages), dtype=torch.int64)
    for number, language in enumerate(corpus.languages):
        for ids in tokenize(tiny_tokenizer(), list(corpus.documents(language))):
            seen = {}
            handles = [experts.register_forward_pre_hook(seen.__setitem__) for experts in layers]
            forward_hidden(model, torch.tensor(ids)[None], torch.arange(len(ids))[None])
            for handle in handles:
                handle.remove()
            for layer, experts in enumerate(layers):
                x, chosen, _ = seen[experts]
                # The document's prefix is no text.
                for token in range(1, len(ids)):
                    for expert in chosen[token].tolist():
                        fires = gates_by_hand(experts, expert, x[token]) > 0
                        positive[number, layer, expert * WIDTH : (expert + 1) * WIDTH] += fires
            tokens[number] += len(ids) - 1
    return positive, tokens


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_counts_equal_a_plain_loop_over_documents_tokens_and_experts(model_type, corpus):
    # fp64, so that rounding in another order moves no gate across zero.
    model = tiny_model(model_type, dtype=torch.float64)
    counts = count_activations(model, tiny_tokenizer(), corpus, CountingSettings(context_length=96, batch_tokens=64))
    positive, tokens = counts_by_hand(model, corpus)
    assert torch.equal(counts.tokens, tokens)
    assert torch.equal(counts.positive, positive)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@torch.no_grad()
def test_both_implementations_of_transformers_count_exactly(model_type, implementation):
    model = tiny_model(model_type, experts_implementation=implementation)
    experts, ffn = model.model.layers[0].mlp.experts, find_ffns(model)[0]
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: no product rounds, and many gates are exactly zero.
    for parameter in experts.parameters():
        parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    x = torch.randint(-1, 2, (40, 32), generator=generator).float()
    # The last expert is nobody's.
    chosen = torch.rand(40, EXPERTS - 1, generator=generator).argsort(1)[:, :2]
    language_ids = torch.randint(-1, 3, (40,), generator=generator, dtype=torch.int32)
    expected = torch.zeros(EXPERTS, 3, WIDTH, dtype=torch.int64)
    for token, language in enumerate(language_ids.tolist()):
        for expert in chosen[token].tolist() if language >= 0 else ():
            expected[expert, language] += gates_by_hand(experts, expert, x[token]) > 0
    counts = torch.zeros_like(expected)
    module = CountingExperts(ffn, counts)
    module.language_ids = language_ids.view(2, 20)
    module(x, chosen, torch.full((40, 2), 0.5))
    assert torch.equal(counts, expected)


@torch.no_grad()
def test_a_neuron_fires_only_where_its_expert_is_chosen(corpus):
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        # Every gate is 1, and every token goes to the experts 0, 2 and 4.
        layer.mlp.experts.gate_up_proj.zero_()
        layer.mlp.experts.gate_up_proj_bias.fill_(1)
        layer.mlp.router.weight.zero_()
        layer.mlp.router.bias.copy_(torch.tensor([1, 0, 1, 0, 1]))
    counts = count_activations(model, tiny_tokenizer(), corpus)
    by_expert = counts.positive.view(len(TEXTS), 2, EXPERTS, WIDTH)
    assert (by_expert[:, :, [0, 2, 4]] == counts.tokens[:, None, None, None]).all()
    assert not by_expert[:, :, [1, 3]].any()


def test_a_saved_mixture_of_experts_is_identified(corpus, tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path / "base", "qwen3_moe"))
    settings = CountingSettings(rule="lape:top_rate=0.2,filter_rate=0.8,activation_bar=0.8")
    counts, _ = identify_neurons(model, tokenizer, corpus, tmp_path / "out", settings)
    assert counts.neurons_per_layer == EXPERTS * WIDTH
    assert ActivationCounts.load(tmp_path / "out" / "counts.safetensors").metadata["experts"] == EXPERTS
    neurons = NeuronSet.load(tmp_path / "out" / "neurons.safetensors")
    assert neurons.neurons_per_layer == EXPERTS * WIDTH
    # Units of several experts, not only of the first.
    chosen = torch.cat([layer for language in neurons.languages for layer in neurons[language]])
    assert len((chosen // WIDTH).unique()) > 1
