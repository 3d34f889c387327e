"""The FFNs that count: what they compute, what they leave out, and how they leave the model."""

from __future__ import annotations

import pytest
import torch

from lape_fast.errors import ArchitectureError
from lape_fast.identify import counting_ffns
from lape_fast.identify.counting_ffn import by_language, count_batch, set_by_language, zero_counts
from lape_fast.models import decoder, find_ffns, forward_hidden, layout_of
from lape_fast.text import Packed
from tests.tiny_models import EXPERT_TYPES, EXPERTS, TINY_TYPES, VOCABULARY, quantised_tiny_model, tiny_model

LANGUAGES = 3

# The decoder's output projection keeps OPT's norm away from its head; without do_layer_norm_before it has no norm.
VARIANTS = [(model_type, {}) for model_type in TINY_TYPES] + [
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", {"word_embed_proj_dim": 16}),
]


def one_document_a_row() -> Packed:
    """Two rows of the languages 0 and 2, the first token of each not counted."""
    input_ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    language_ids = torch.tensor([[-1] + [0] * 15, [-1] + [2] * 15], dtype=torch.int32)
    return Packed(input_ids, torch.arange(16).repeat(2, 1), language_ids)


def final_norm(model):
    return getattr(decoder(model), layout_of(model).norm)


@pytest.mark.parametrize(("model_type", "fields"), VARIANTS)
def test_leaving_out_what_the_head_needs_changes_no_count(model_type, fields):
    model, packed = tiny_model(model_type, **fields), one_document_a_row()
    norm, norm_calls, counted = final_norm(model), [], []
    if norm is not None:
        norm.register_forward_hook(lambda *arguments: norm_calls.append(1))
    for skip_last in (True, False):
        counts = zero_counts(model, LANGUAGES)
        with counting_ffns(model, counts, skip_last=skip_last) as modules:
            count_batch(model, modules, packed)
        assert final_norm(model) is norm
        counted.append(by_language(counts))
    assert len(norm_calls) == (norm is not None)
    assert torch.equal(*counted)
    assert counted[0][0].sum() > 0 and counted[0][2].sum() > 0 and counted[0][1].sum() == 0


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
def test_a_quantised_model_is_counted_by_its_own_gates(model_type, kind):
    model, packed = quantised_tiny_model(kind, model_type), one_document_a_row()
    ffns, fired = find_ffns(model), []
    for ffn in ffns:
        name = "gate_up" if "gate_up" in ffn.projections else "gate"
        ffn.projections[name].register_forward_hook(lambda module, inputs, gate: fired.append(gate[..., :128] > 0))
    counts = zero_counts(model, LANGUAGES)
    with counting_ffns(model, counts) as modules:
        count_batch(model, modules, packed)
    # The rows are of the languages 0 and 2; the first token of each is not counted.
    expected = torch.stack([gate.view(2, 16, 128)[:, 1:].sum(1) for gate in fired])
    assert len(fired) == len(ffns)
    assert torch.equal(counts[:, 0, ::2], expected) and counts[:, 0, 1].sum() == 0
    # What inference has left behind must not be in the way of tuning.
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    model(packed.input_ids).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("model_type", TINY_TYPES)
@torch.inference_mode()
def test_the_hidden_states_of_a_model_that_counts_are_its_own(model_type):
    model, packed = tiny_model(model_type, dtype=torch.float64), one_document_a_row()
    expected = forward_hidden(model, packed.input_ids, packed.position_ids)
    counts = zero_counts(model, LANGUAGES)
    with counting_ffns(model, counts, skip_last=False) as modules:
        for module in modules:
            module.language_ids = packed.language_ids
        hidden = forward_hidden(model, packed.input_ids, packed.position_ids)
    # The op's fp64 activations, and sums over experts in another order, differ from torch's in the last bits, which
    # norms that compute in fp32 may round apart.
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "fields"), VARIANTS)
def test_the_model_is_restored_whatever_happens(model_type, fields):
    model = tiny_model(model_type, **fields)
    modules, norm = dict(model.named_modules()), final_norm(model)
    with pytest.raises(ZeroDivisionError), counting_ffns(model, zero_counts(model, LANGUAGES)):
        assert norm is None or final_norm(model) is not norm
        raise ZeroDivisionError
    restored = dict(model.named_modules())
    assert restored.keys() == modules.keys()
    assert all(restored[name] is module for name, module in modules.items())
    assert final_norm(model) is norm


def test_a_buffer_and_its_values_by_language_are_each_others_inverse():
    counts = torch.randint(1000, (4, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    values = by_language(counts)
    for language, layer, expert, neuron in [(0, 0, 0, 0), (4, 1, 2, 6), (2, 3, 1, 5)]:
        assert values[language, layer, expert * 7 + neuron] == counts[layer, expert, language, neuron]
    other = torch.zeros_like(counts)
    set_by_language(other, values)
    assert torch.equal(other, counts)


def test_values_by_language_do_not_share_the_buffer():
    counts = zero_counts(tiny_model(), 1)
    values = by_language(counts)
    counts += 1
    assert values.sum() == 0


def test_a_buffer_has_a_place_for_every_neuron_and_language():
    model = tiny_model(layers=3)
    assert zero_counts(model, 5).shape == (3, 1, 5, find_ffns(model)[0].neurons)
    assert zero_counts(tiny_model("mixtral"), 5).shape == (2, EXPERTS, 5, 48)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_experts_that_count_compute_as_transformers_does_to_the_bit(model_type, dtype):
    model, packed = tiny_model(model_type, dtype=dtype, experts_implementation="grouped_mm"), one_document_a_row()
    expected = forward_hidden(model, packed.input_ids, packed.position_ids)
    with counting_ffns(model, zero_counts(model, LANGUAGES), skip_last=False) as modules:
        for module in modules:
            module.language_ids = packed.language_ids
        assert torch.equal(forward_hidden(model, packed.input_ids, packed.position_ids), expected)


@torch.inference_mode()
def test_the_down_projection_of_the_last_experts_is_not_computed():
    model, packed = tiny_model("qwen3_moe"), one_document_a_row()
    model.model.layers[1].mlp.experts.down_proj.fill_(torch.nan)
    finite = []
    for skip_last in (True, False):
        with counting_ffns(model, zero_counts(model, LANGUAGES), skip_last=skip_last) as modules:
            for module in modules:
                module.language_ids = packed.language_ids
            finite.append(bool(forward_hidden(model, packed.input_ids, packed.position_ids).isfinite().all()))
    assert finite == [True, False]


def test_an_ffn_that_other_code_computes_is_an_error():
    model = tiny_model("gpt_oss")
    # As a library does that brings its own kernels.
    model.model.layers[1].mlp.forward = lambda hidden: (hidden, None)
    with (
        counting_ffns(model, zero_counts(model, LANGUAGES)) as modules,
        pytest.raises(ArchitectureError, match="FFN of layer 1 by other code"),
    ):
        count_batch(model, modules, one_document_a_row())
