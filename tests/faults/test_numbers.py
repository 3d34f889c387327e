"""Counts and selections at the ends of their ranges: large counters, gates that are not finite, all neurons or none."""

from __future__ import annotations

import pytest
import torch

from lape_fast.identify import (
    ActivationCounts,
    Budget,
    CountingSettings,
    NeuronSet,
    count_activations,
    counting_ffns,
    merge_files,
    select_neurons,
)
from lape_fast.identify.counting_ffn import count_batch, zero_counts
from lape_fast.models import find_ffns
from lape_fast.ops import gated_activation
from lape_fast.text import Packed, open_corpus
from tests.ops.oracles import BACKENDS
from tests.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Past these a 32-bit counter wraps around, and a float no longer holds every whole number.
@pytest.mark.parametrize("start", [2**31 - 2, 2**32 - 2, 2**53 - 2])
def test_counters_go_on_past_the_widths_of_other_types(backend, dtype, start):
    counts = torch.full((2, 33), start, dtype=torch.int64)
    gate = torch.ones(5, 33, dtype=dtype)
    gate[:, 1] = -1
    gated_activation(gate, None, "silu", torch.tensor([1, 1, 0, 1, 1], dtype=torch.int32), counts, backend=backend)
    assert counts[:, 0].tolist() == [start + 1, start + 4]
    assert counts[:, 1].tolist() == [start, start]


def test_languages_of_one_and_of_ten_thousand_million_tokens_add_up(tmp_path):
    large, once = 10**10 + 1, torch.tensor([1])
    small = ActivationCounts(torch.tensor([[[1, 0]]]), once, ["mlt_Latn"])
    big = ActivationCounts(torch.tensor([[[large, 3]]]), torch.tensor([large]), ["eng_Latn"])
    more = ActivationCounts(torch.tensor([[[2**53, 2**53 - 1]]]), torch.tensor([2**53]), ["eng_Latn"])
    merged = ActivationCounts.merge([small, big, more])
    # In fp64 the sum would be even.
    assert merged.positive.tolist() == [[[1, 0]], [[2**53 + large, 2**53 + 2]]]
    assert merged.tokens.tolist() == [1, 2**53 + large]
    assert merged.probability()[0].tolist() == [[1.0, 0.0]]
    merged.save(tmp_path / "counts.safetensors")
    assert ActivationCounts.load(tmp_path / "counts.safetensors").fingerprint() == merged.fingerprint()


@pytest.mark.parametrize("fires", [True, False])
def test_neurons_that_always_or_never_fire_select_nothing_that_is_no_number(fires):
    tokens = torch.tensor([1, 10**10])
    positive = (tokens if fires else torch.zeros(2, dtype=torch.int64))[:, None, None].expand(2, 3, 8)
    counts = ActivationCounts(positive.clone(), tokens, ["mlt_Latn", "eng_Latn"])
    # No language uses any of them more than another, and a neuron that never fires has no entropy.
    every = select_neurons(counts, Budget(neurons=24, floor=0.0))
    assert all(0 <= each <= 24 for each in every.per_language().values())
    assert every.jaccard().isfinite().all()


def test_a_set_of_all_neurons_and_one_of_none():
    every = [list(range(8)) for _ in range(3)]
    neurons = NeuronSet.from_lists({"mlt_Latn": every, "eng_Latn": [[], [], []]}, neurons_per_layer=8)
    assert neurons.per_language() == {"mlt_Latn": 24, "eng_Latn": 0}
    assert neurons.union_count() == 24
    assert [len(layer) for layer in neurons.shared()] == [0, 0, 0]
    assert neurons.jaccard().tolist() == [[1.0, 0.0], [0.0, 0.0]]


def spoilt(model_type, layer, value, dtype=torch.float32):
    """A model whose first neuron of a layer has a gate of ``value`` for the token 5, and finite ones for all others."""
    model = tiny_model(model_type, dtype=dtype)
    ffn = find_ffns(model)[layer]

    def spoil(module, inputs, gate):
        gate = gate.clone()
        gate[..., 0][spoil.tokens.view(gate.shape[:-1])] = value
        return gate

    ffn.projections["gate"].register_forward_hook(spoil)
    return model, spoil


def rows(language_ids):
    """Two documents of 6 tokens, each in its row."""
    input_ids = torch.randint(6, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    return Packed(input_ids, torch.arange(6).repeat(2, 1), torch.tensor(language_ids, dtype=torch.int32))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gates_that_are_not_finite_are_found_with_language_and_layer(model_type, layer, value):
    packed = rows([[0] * 6, [1] * 6])
    model, spoil = spoilt(model_type, layer, value)
    spoil.tokens = torch.zeros(2, 6, dtype=torch.bool)
    spoil.tokens[1, 5] = True
    counts = zero_counts(model, 2)
    with counting_ffns(model, counts) as modules:
        found = count_batch(model, modules, packed)
        languages, layers = found.tolist()
        # Attention carries it to the other tokens of the row, in the next layer: 0 times NaN is NaN.
        assert set(languages) == {1} and layers.count(layer) == 1 and min(layers) == layer
        fired = int(counts[layer, 0, 1, 0])
        spoil.tokens[:] = False
        before = counts.clone()
        assert count_batch(model, modules, packed) is None
        # NaN never fires, infinity does, and what was searched twice was counted once.
        clean = int((counts - before)[layer, 0, 1, 0])
        assert fired - clean in ((0, 1) if value > 0 else (0, -1))
        # Nobody asks about a token that is not counted, but about others that its gates have spoilt.
        spoil.tokens[1, 5] = True
        packed.language_ids[1, 5] = -1
        found = count_batch(model, modules, packed)
        assert found is None if layer == 1 else set(found[1].tolist()) == {1}


def test_experts_whose_gates_are_not_finite_are_found():
    model, packed = tiny_model("mixtral"), rows([[0] * 6, [1] * 6])
    find_ffns(model)[1]._module.gate_up_proj.data[:, 0] = torch.nan
    counts = zero_counts(model, 2)
    with counting_ffns(model, counts) as modules:
        found = count_batch(model, modules, packed)
    assert found.tolist() == [[0] * 6 + [1] * 6, [1] * 12]
    assert counts[1, :, :, 0].sum() == 0


def test_an_overflow_in_fp16_is_in_the_counts_of_the_run_and_of_its_parts(tmp_path, capfd):
    (tmp_path / "texts").mkdir()
    for language in ("mlt_Latn", "eng_Latn"):
        (tmp_path / "texts" / f"{language}.txt").write_text("\n".join(f"{language} {number}" for number in range(30)))
    corpus = open_corpus(tmp_path / "texts")
    settings = CountingSettings(context_length=32, batch_tokens=64)

    def counted(scale, **changes):
        model = tiny_model("llama", dtype=torch.float16)
        find_ffns(model)[1].projections["gate"].weight.data[0] *= scale
        chosen = CountingSettings(**{**vars(settings), **changes})
        return count_activations(model, tiny_tokenizer(), corpus, chosen, workers=0)

    clean = counted(1.0)
    assert clean.metadata["non_finite"] == {}
    capfd.readouterr()
    counts = counted(60000.0)
    said = capfd.readouterr().err
    for language, tokens in zip(counts.languages, counts.tokens.tolist(), strict=True):
        found = counts.metadata["non_finite"][language]
        assert 0 < found["tokens"] <= tokens
        assert list(found["layers"]) == ["1"] and sum(found["layers"].values()) == found["tokens"]
        assert said.count(f"Language {language}: gates of layer 1 are NaN or infinite") == 1
    # Infinity fires, so the neuron fires as it does with gates that fit.
    assert torch.equal(counts.positive, clean.positive)
    for part in (1, 2):
        counted(60000.0, part=part, parts=2).save(tmp_path / f"{part}.safetensors")
    merged = merge_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert merged.metadata["non_finite"] == counts.metadata["non_finite"]
