from __future__ import annotations

import numpy as np
import pytest
import torch

from lape_fast.errors import ArchitectureError, FileFormatError, LanguageError, SelectionError, ShapeError
from lape_fast.files import write_tensors
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet

LANGUAGES = ["mlt_Latn", "cym_Latn"]
POSITIVE = torch.tensor([[[1, 2, 3], [4, 0, 5]], [[10, 0, 7], [8, 9, 2]]])
TOKENS = torch.tensor([5, 10])


def small(**metadata) -> ActivationCounts:
    return ActivationCounts(POSITIVE.clone(), TOKENS.clone(), LANGUAGES, metadata)


def write(path, positive=POSITIVE, tokens=TOKENS, **metadata):
    tensors = {name: value for name, value in (("positive", positive), ("tokens", tokens)) if value is not None}
    write_tensors(path, "counts", tensors, metadata)
    return path


def test_probability_is_the_share_of_tokens_in_float64():
    probability = small().probability()
    assert probability.dtype == torch.float64
    assert probability[0, 1].tolist() == [4 / 5, 0.0, 5 / 5]
    assert probability[1, 0].tolist() == [10 / 10, 0.0, 7 / 10]


def test_probability_names_the_languages_without_tokens():
    counts = ActivationCounts(torch.zeros(3, 1, 2, dtype=torch.int64), [0, 4, 0], ["mlt_Latn", "cym_Latn", "isl_Latn"])
    with pytest.raises(SelectionError, match="mlt_Latn, isl_Latn") as error:
        counts.probability()
    assert "cym_Latn" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint32])
def test_any_integer_dtype_becomes_int64(dtype):
    counts = ActivationCounts(POSITIVE.to(dtype), TOKENS.to(dtype), LANGUAGES)
    assert counts.positive.dtype == counts.tokens.dtype == torch.int64
    assert torch.equal(counts.positive, POSITIVE)
    assert (counts.layers, counts.neurons_per_layer) == (2, 3)


def test_arrays_and_views_are_accepted():
    counts = ActivationCounts(np.asarray(POSITIVE), [5, 10], tuple(LANGUAGES))
    flipped = ActivationCounts(POSITIVE.transpose(1, 2), TOKENS, LANGUAGES)
    assert counts.fingerprint() == small().fingerprint()
    assert flipped.positive.is_contiguous() and flipped.layers == 3


@pytest.mark.parametrize(
    ("positive", "tokens", "languages", "error", "message"),
    [
        (POSITIVE.float(), TOKENS, LANGUAGES, ShapeError, "float32"),
        (POSITIVE > 0, TOKENS, LANGUAGES, ShapeError, "bool"),
        (POSITIVE, TOKENS.double(), LANGUAGES, ShapeError, "`tokens` has dtype torch.float64"),
        (POSITIVE[0], TOKENS, LANGUAGES, ShapeError, r"\[2, 3\]"),
        (POSITIVE[:, :, :0], TOKENS, LANGUAGES, ShapeError, "not empty"),
        (POSITIVE, TOKENS[None], LANGUAGES, ShapeError, "`tokens` has shape"),
        (POSITIVE, TOKENS[:1], LANGUAGES, ShapeError, "must agree"),
        (POSITIVE, TOKENS, ["mlt_Latn"], ShapeError, "1 codes are given"),
        (POSITIVE - 1, TOKENS, LANGUAGES, ShapeError, "'mlt_Latn' has a count of -1"),
        (POSITIVE, -TOKENS, LANGUAGES, ShapeError, "count of -5"),
        (POSITIVE, torch.tensor([5, 9]), LANGUAGES, ShapeError, "'cym_Latn' has a neuron that fired 10 times in 9"),
        (POSITIVE, TOKENS, ["mlt_Latn", "mlt_Latn"], LanguageError, "the same"),
        (POSITIVE, TOKENS, ["mlt_Latn", "mt"], LanguageError, "'mlt_Latn' and 'mt' are the same"),
        (POSITIVE, TOKENS, "mt", LanguageError, "list of codes"),
        (POSITIVE, TOKENS, [1, 2], LanguageError, "list of codes"),
        (POSITIVE, TOKENS, [], LanguageError, "No language"),
    ],
)
def test_counts_that_make_no_sense_are_refused(positive, tokens, languages, error, message):
    with pytest.raises(error, match=message):
        ActivationCounts(positive, tokens, languages)


def test_a_file_holds_everything(tmp_path):
    counts = small(model="tiny", config_hash="abc", corpus={"lines": [1, 2]})
    counts.save(tmp_path / "counts.safetensors")
    loaded = ActivationCounts.load(tmp_path / "counts.safetensors")
    assert torch.equal(loaded.positive, POSITIVE) and torch.equal(loaded.tokens, TOKENS)
    assert loaded.languages == LANGUAGES
    assert loaded.metadata == {"model": "tiny", "config_hash": "abc", "corpus": {"lines": [1, 2]}}
    assert loaded.fingerprint() == counts.fingerprint()


def test_the_order_of_languages_in_a_file_is_that_of_the_counts_whatever_the_metadata_say(tmp_path):
    small(languages=["wrong"]).save(tmp_path / "counts.safetensors")
    assert ActivationCounts.load(tmp_path / "counts.safetensors").languages == LANGUAGES


def test_optional_tensors_in_a_file_are_no_obstacle(tmp_path):
    tensors = {"positive": POSITIVE, "tokens": TOKENS, "sums": torch.ones(3)}
    write_tensors(tmp_path / "counts.safetensors", "counts", tensors, {"languages": LANGUAGES})
    assert torch.equal(ActivationCounts.load(tmp_path / "counts.safetensors").positive, POSITIVE)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"positive": None, "languages": LANGUAGES}, "lacks positive"),
        ({"tokens": None, "languages": LANGUAGES}, "lacks tokens"),
        ({}, "lacks its language codes"),
        ({"languages": 3}, "list of codes"),
        ({"languages": ["mlt_Latn"]}, "must agree"),
        ({"languages": LANGUAGES, "positive": POSITIVE[0]}, r"\[2, 3\]"),
        ({"languages": LANGUAGES, "positive": POSITIVE.float()}, "float32"),
        ({"languages": LANGUAGES, "positive": POSITIVE - 5}, "-5"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name(tmp_path, contents, message):
    path = write(tmp_path / "counts.safetensors", **contents)
    with pytest.raises(FileFormatError, match=message) as error:
        ActivationCounts.load(path)
    assert str(path) in str(error.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "counts.safetensors", languages=LANGUAGES)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        ActivationCounts.load(path)


def test_a_neuron_file_is_no_counts_file(tmp_path):
    path = tmp_path / "neurons.safetensors"
    NeuronSet.from_lists({"mlt_Latn": [[0]]}, neurons_per_layer=3).save(path)
    with pytest.raises(FileFormatError, match="'neurons'"):
        ActivationCounts.load(path)


def test_restrict_takes_any_spelling_and_keeps_the_order_given():
    restricted = small(model="tiny").restrict(["cy", "mlt-Latn"])
    assert restricted.languages == ["cym_Latn", "mlt_Latn"]
    assert torch.equal(restricted.positive, POSITIVE.flip(0)) and restricted.tokens.tolist() == [10, 5]
    assert restricted.metadata == {"model": "tiny"}


def test_an_absent_language_is_answered_with_the_near_ones():
    counts = ActivationCounts(POSITIVE, TOKENS, ["srp_Cyrl", "mlt_Latn"])
    with pytest.raises(LanguageError, match=r"'srp_Latn' is not among the 2 .*near it: srp_Cyrl"):
        counts.restrict(["srp_Latn"])


def test_languages_outside_every_table_are_found_by_their_exact_name():
    counts = ActivationCounts(POSITIVE, TOKENS, ["dialect one", "dialect two"])
    assert counts.restrict(["dialect two"]).tokens.tolist() == [10]
    with pytest.raises(LanguageError, match="near it: dialect one, dialect two"):
        counts.restrict(["dialect three"])


def test_merge_adds_by_language_over_the_union():
    first = small(model="tiny", config_hash="abc", part=1)
    second = ActivationCounts(POSITIVE + 1, TOKENS + 1, ["isl_Latn", "mt"], {"config_hash": "abc", "part": 2})
    merged = ActivationCounts.merge([first, second])
    assert merged.languages == ["mlt_Latn", "cym_Latn", "isl_Latn"]
    assert merged.tokens.tolist() == [5 + 11, 10, 6]
    assert torch.equal(merged.positive[0], POSITIVE[0] + POSITIVE[1] + 1)
    assert torch.equal(merged.positive[1], POSITIVE[1])
    assert torch.equal(merged.positive[2], POSITIVE[0] + 1)
    assert merged.metadata == {"config_hash": "abc"}


def test_merge_leaves_its_parts_alone_and_does_not_depend_on_their_order():
    first, second, third = (ActivationCounts(POSITIVE * n, TOKENS * n, LANGUAGES) for n in (1, 2, 3))
    merged = ActivationCounts.merge([first, second, third])
    assert merged.fingerprint() == ActivationCounts.merge([third, first, second]).fingerprint()
    assert torch.equal(merged.positive, 6 * POSITIVE) and torch.equal(first.positive, POSITIVE)


def test_merge_refuses_counts_of_different_models():
    with pytest.raises(ArchitectureError, match="2 layers x 2 neurons"):
        ActivationCounts.merge([small(), ActivationCounts(POSITIVE[..., :2], TOKENS, LANGUAGES)])
    with pytest.raises(ArchitectureError, match=r"\(one and two: config_hash a and b\)"):
        ActivationCounts.merge([small(model="one", config_hash="a"), small(model="two", config_hash="b")])
    with pytest.raises(ShapeError, match="no counts"):
        ActivationCounts.merge([])


def test_merge_accepts_parts_that_do_not_name_their_model():
    assert ActivationCounts.merge([small(config_hash="a"), small()]).metadata == {}


def test_the_fingerprint_changes_with_every_part_of_the_counts():
    changed = POSITIVE.clone()
    changed[1, 1, 2] += 1
    prints = {
        small().fingerprint(),
        ActivationCounts(changed, TOKENS, LANGUAGES).fingerprint(),
        ActivationCounts(POSITIVE, TOKENS + 1, LANGUAGES).fingerprint(),
        ActivationCounts(POSITIVE, TOKENS, ["mlt_Latn", "isl_Latn"]).fingerprint(),
        ActivationCounts(POSITIVE.view(2, 3, 2), TOKENS, LANGUAGES).fingerprint(),
    }
    assert len(prints) == 5
    assert small(model="metadata does not count").fingerprint() in prints


def test_languages_with_few_tokens_are_left_out_and_named():
    codes = ["mlt_Latn", "cym_Latn", "isl_Latn"]
    counts = ActivationCounts(torch.ones(3, 1, 2, dtype=torch.int64), torch.tensor([5, 100, 20]), codes)
    kept, left_out = counts.with_tokens(20)
    assert kept.languages == ["cym_Latn", "isl_Latn"] and left_out == {"mlt_Latn": 5}
    assert counts.with_tokens(0) == (counts, {})
    with pytest.raises(SelectionError, match="the most is 100"):
        counts.with_tokens(101)
