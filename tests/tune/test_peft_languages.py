"""Several languages as adapters of one PEFT model: switching, merging, deleting, combining."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from lape_fast.errors import AdapterError, ArchitectureError
from lape_fast.models import find_ffns
from lape_fast.tune.subnetwork import installed_layers
from tests.tune.peft_models import (
    DEPRECATED,
    LANGUAGES,
    NEURONS,
    base_model,
    both_storages,
    config,
    every_kind,
    every_layout,
    logits,
    masters,
    modules,
    move,
    rows,
    same_state,
    state,
    tuned,
    tuned_in_several,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings(DEPRECATED)]


MALTESE, ICELANDIC, ENGLISH = LANGUAGES


@both_storages
@every_layout
def test_switching_gives_each_languages_own_logits_bit_for_bit(model_type, storage):
    base = base_model(model_type)
    expected = {language: logits(tuned(model_type, language, storage=storage)) for language in LANGUAGES}
    assert not torch.allclose(expected[MALTESE], expected[ENGLISH])
    model = tuned_in_several(model_type, storage=storage)
    for language in [*LANGUAGES, *reversed(LANGUAGES)] * 3:
        model.set_adapter(language)
        assert model.active_adapters == [language]
        assert torch.equal(logits(model), expected[language])
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in masters(model, language)}
    with model.disable_adapter():
        model.set_adapter(ICELANDIC)
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), expected[ICELANDIC])
    assert same_state(model.unload(), base.state_dict())


def test_a_switch_writes_no_more_than_the_two_languages_rows():
    model = tuned_in_several()
    base = base_model()
    for language in LANGUAGES:
        model.set_adapter(language)
        for ffn, original, chosen in zip(
            find_ffns(model.get_base_model()), find_ffns(base), NEURONS[language], strict=True
        ):
            for mine, others in ((ffn.gate_weight, original.gate_weight), (ffn.down_weight.T, original.down_weight.T)):
                changed = (mine != others).any(1).nonzero()[:, 0]
                assert changed.tolist() == chosen


def test_values_written_without_a_trace_before_the_first_switch_count():
    model = tuned(name=MALTESE)
    model.add_adapter(ENGLISH, config(language=ENGLISH))
    values = masters(tuned(language=ENGLISH))
    for master, value in zip(masters(model, ENGLISH), values, strict=True):
        master.data.copy_(value)
    model.set_adapter(ENGLISH)
    assert torch.equal(logits(model), logits(tuned(language=ENGLISH)))


@every_kind
def test_each_language_trains_alone(model_type):
    model = tuned_in_several(model_type).train()
    for language in LANGUAGES:
        model.set_adapter(language)
        others = {
            other: [p.detach().clone() for p in masters(model, other)] for other in LANGUAGES if other != language
        }
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        first = model(**rows()).loss
        first.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert model(**rows()).loss < first
        for other, values in others.items():
            assert all(torch.equal(left, right) for left, right in zip(masters(model, other), values, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_adapters_are_saved_and_loaded_by_name(model_type, tmp_path):
    model = tuned_in_several(model_type)
    model.save_pretrained(tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"README.md", *LANGUAGES}
    model.save_pretrained(tmp_path / "one", selected_adapters=[ICELANDIC])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", ICELANDIC}
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["deu_Latn"])
    loaded = PeftModel.from_pretrained(base_model(model_type), tmp_path / "all" / MALTESE, MALTESE)
    for language in (ICELANDIC, ENGLISH):
        result = loaded.load_adapter(tmp_path / "all" / language, language, is_trainable=language == ENGLISH)
        assert not result.missing_keys
        assert not result.unexpected_keys
    assert loaded.active_adapters == [MALTESE]
    assert {id(p) for p in loaded.parameters() if p.requires_grad} == {id(p) for p in masters(loaded, ENGLISH)}
    for language in LANGUAGES:
        model.set_adapter(language)
        loaded.set_adapter(language)
        assert torch.equal(logits(loaded), logits(model))
    # The values of an adapter that is there already are exchanged.
    move(loaded, ENGLISH, ENGLISH)
    assert not torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path / "all" / ENGLISH, ENGLISH)
    assert torch.equal(logits(loaded), logits(model))


@both_storages
@every_kind
def test_merging_an_inactive_language(model_type, storage):
    model = tuned_in_several(model_type, storage=storage)
    expected = logits(tuned(model_type, ICELANDIC, storage=storage))
    other = copy.deepcopy(model)
    merged = other.merge_and_unload(adapter_names=[ICELANDIC])
    assert modules(merged) == modules(base_model(model_type))
    tolerance = {"rtol": 0, "atol": 0} if storage == "resident" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(merged), expected, **tolerance)
    model.merge_adapter([ICELANDIC])
    assert model.active_adapters == [MALTESE]
    torch.testing.assert_close(logits(model), expected, **tolerance)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_model(model_type)))
    torch.testing.assert_close(logits(model), expected, **tolerance)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="isl_Latn' is merged, so 'mlt_Latn' cannot be merged too"):
            merge()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(tuned(model_type, MALTESE, storage=storage)), **tolerance)


def test_a_switch_while_one_is_merged_unmerges_it_as_peft_says():
    model = tuned_in_several()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter(ENGLISH)
    assert model.get_model_status().merged_adapters == []
    assert torch.equal(logits(model), logits(tuned(language=ENGLISH)))


@both_storages
@every_layout
def test_deleting_languages(model_type, storage):
    base = base_model(model_type)
    expected, before = logits(base), state(base)
    model = tuned_in_several(model_type, storage=storage)
    icelandic = logits(tuned(model_type, ICELANDIC, storage=storage))
    model.delete_adapter(ENGLISH)
    assert model.active_adapters == [MALTESE]
    with pytest.warns(UserWarning, match="Setting active adapter to isl_Latn"):
        model.delete_adapter(MALTESE)
    assert model.active_adapters == [ICELANDIC]
    assert torch.equal(logits(model), icelandic)
    with pytest.raises(ValueError, match="mlt_Latn does not exist"):
        model.delete_adapter(MALTESE)
    model.delete_adapter(ICELANDIC)
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model), expected)
    assert not any(".trained_" in name for name in model.state_dict())
    # The names are free again.
    model.add_adapter(MALTESE, config(model_type, storage=storage))
    model.set_adapter(MALTESE)
    move(model, MALTESE)
    assert torch.equal(logits(model), logits(tuned(model_type, storage=storage)))
    assert same_state(model.unload(), before)


def test_deleting_while_disabled_or_merged():
    model = tuned_in_several(languages=(MALTESE, ICELANDIC))
    expected = logits(base_model())
    with model.disable_adapter():
        model.delete_adapter(ICELANDIC)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), logits(tuned()))
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter(MALTESE)


def test_unknown_names_and_several_at_once_are_refused_and_change_nothing():
    model = tuned_in_several()
    expected = logits(model)
    with pytest.raises(ValueError, match="deu_Latn not found"):
        model.set_adapter("deu_Latn")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            AdapterError, match=r"no adapter 'deu_Latn' to merge; the model has mlt_Latn, isl_Latn, eng"
        ):
            merge(adapter_names=["deu_Latn"])
        with pytest.raises(AdapterError, match="mlt_Latn, isl_Latn were asked for; combine them"):
            merge(adapter_names=[MALTESE, ICELANDIC])
    with pytest.raises(AdapterError, match="one language at a time"):
        model.base_model.set_adapter([MALTESE, ENGLISH])
    assert model.active_adapters == [MALTESE]
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="'mlt_Latn' already exists"):
        model.add_adapter(MALTESE, config())


@pytest.mark.parametrize("kind", ["seed", "architecture"])
def test_an_adapter_of_another_base_is_refused_beside_one_that_fits(kind, tmp_path):
    other = base_model(seed=1) if kind == "seed" else base_model("opt")
    foreign = get_peft_model(other, config(other.config.model_type, ICELANDIC))
    foreign.save_pretrained(tmp_path)
    model = tuned(name=MALTESE)
    expected, before, made_of = logits(model), state(model), modules(model)
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ArchitectureError, match="made for"):
        model.load_adapter(tmp_path, ICELANDIC)
    assert torch.equal(logits(model), expected)
    assert same_state(model, before)
    assert modules(model) == made_of
    assert [p.requires_grad for p in model.parameters()] == grads
    assert list(model.peft_config) == [MALTESE]
    model.add_adapter(ICELANDIC, config(language=ICELANDIC))
    model.set_adapter(ICELANDIC)
    assert torch.equal(logits(model), logits(base_model()))


@both_storages
@every_layout
def test_a_weighted_sum_of_languages(model_type, storage, tmp_path):
    model = tuned_in_several(model_type, storage=storage)
    weights = {MALTESE: 0.5, ICELANDIC: -1.0, ENGLISH: 2.0}
    active = logits(model)
    report = model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert report == {"neurons": 2 + 4 + 3, "shared": 2}
    assert torch.equal(logits(model), active)
    assert model.active_adapters == [MALTESE]
    assert not any(master.requires_grad for master in masters(model, "sum"))
    base = find_ffns(base_model(model_type))
    expected = {
        layer.ffn.layer: base[layer.ffn.layer].gate_weight.detach().clone() for layer in installed_layers(model)
    }
    for layer in installed_layers(model):
        original = base[layer.ffn.layer].gate_weight
        for language, weight in weights.items():
            chosen = layer.neurons(language)
            if len(chosen):
                change = layer.masters(language)["trained_gate_rows"] - original[chosen]
                expected[layer.ffn.layer][chosen] += weight * change.detach()
    for layer in installed_layers(model):
        chosen = layer.neurons("sum")
        assert chosen.tolist() == sorted({n for language in LANGUAGES for n in NEURONS[language][layer.ffn.layer]})
        if len(chosen):
            # The same sum of up to four terms in another order.
            values = layer.masters("sum")["trained_gate_rows"]
            torch.testing.assert_close(values, expected[layer.ffn.layer][chosen], rtol=1e-6, atol=1e-6)
    model.set_adapter("sum")
    summed = logits(model)
    assert not torch.allclose(summed, active)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base_model(model_type), tmp_path / "sum", is_trainable=True)
    assert torch.equal(logits(loaded), summed)
    assert loaded.peft_config["default"].language == "mlt_Latn+isl_Latn+eng_Latn"
    loaded.train()(**rows()).loss.backward()
    assert all(master.grad.abs().sum() > 0 for master in masters(loaded))


def test_a_sum_of_one_language_is_that_language_and_of_none_the_base():
    model = tuned_in_several()
    model.add_weighted_adapter([ICELANDIC], [1.0], "same")
    model.add_weighted_adapter([ICELANDIC, MALTESE], [0.0, 0.0], "nothing")
    for left, right in zip(masters(model, "same"), masters(model, ICELANDIC), strict=True):
        # original + (value - original)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
    model.set_adapter("nothing")
    assert torch.equal(logits(model), logits(base_model()))


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        ([MALTESE, "deu_Latn"], [1, 1], "sum", "adapters mlt_Latn, deu_Latn with 2 weights have no sum"),
        ([MALTESE, ICELANDIC], [1], "sum", "with 1 weights have no sum"),
        ([MALTESE, MALTESE], [1, 1], "sum", "each once"),
        ([], [], "sum", r"given \(none\)"),
        ([MALTESE, ICELANDIC], [1, 1], ENGLISH, "named 'eng_Latn' already"),
        ([MALTESE, ICELANDIC], [1, 1], "a.b", "cannot be named 'a.b'"),
    ],
)
def test_sums_that_cannot_be_are_refused(adapters, weights, name, message):
    model = tuned_in_several()
    before = state(model)
    with pytest.raises(AdapterError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == list(LANGUAGES)
    assert same_state(model, before)
