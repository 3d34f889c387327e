from __future__ import annotations

import doctest
import json

import pytest
import torch

from lape_fast.errors import ArchitectureError, FileFormatError, LanguageError, SelectionError, ShapeError
from lape_fast.files import write_tensors
from lape_fast.identify.counts import ActivationCounts
from lape_fast.identify.neurons import NeuronSet, random_like
from lape_fast.text import canonical

LISTS = {"mlt_Latn": [[4, 0, 2], [], [1]], "cym_Latn": [[2], [3], [0, 1]]}


def small(**metadata) -> NeuronSet:
    return NeuronSet.from_lists(LISTS, neurons_per_layer=5, metadata=metadata)


def as_lists(neurons: NeuronSet) -> dict[str, list[list[int]]]:
    return {language: [chosen.tolist() for chosen in neurons[language]] for language in neurons.languages}


def write(path, **changes):
    """A sound neuron file but for ``changes``: tensors or metadata to replace, or to leave out where None."""
    neurons = small()
    contents = {
        "indices": neurons.indices,
        "offsets": neurons.offsets,
        "languages": neurons.languages,
        "layers": 3,
        "neurons_per_layer": 5,
        **changes,
    }
    tensors = {name: value for name, value in contents.items() if isinstance(value, torch.Tensor)}
    metadata = {name: value for name, value in contents.items() if name not in tensors and value is not None}
    write_tensors(path, "neurons", tensors, metadata)
    return path


def test_lists_come_back_sorted_as_int64_tensors():
    neurons = small()
    assert as_lists(neurons) == {"mlt_Latn": [[0, 2, 4], [], [1]], "cym_Latn": [[2], [3], [0, 1]]}
    assert all(chosen.dtype == torch.int64 for language in LISTS for chosen in neurons[language])
    assert (neurons.languages, neurons.layers, neurons.neurons_per_layer) == (list(LISTS), 3, 5)


def test_tensors_of_any_integer_dtype_do_as_well_as_lists():
    tensors = {
        language: [torch.tensor(layer, dtype=torch.int16) for layer in layers] for language, layers in LISTS.items()
    }
    assert as_lists(NeuronSet.from_lists(tensors, neurons_per_layer=5)) == as_lists(small())


def test_flat_positions_and_lists_are_the_same_set():
    neurons = small()
    assert neurons.flat("mlt_Latn").tolist() == [0, 2, 4, 11]
    flat = {language: neurons.flat(language) for language in neurons.languages}
    assert as_lists(NeuronSet.from_flat(flat, layers=3, neurons_per_layer=5)) == as_lists(neurons)


def test_sizes_and_union():
    neurons = small()
    assert neurons.count("cym_Latn") == 4 and neurons.per_language() == {"mlt_Latn": 4, "cym_Latn": 4}
    assert [chosen.tolist() for chosen in neurons.union()] == [[0, 2, 4], [3], [0, 1]]
    assert neurons.union_count() == 6


def drawn_sets(seed: int, languages: list[str], layers: int, neurons: int) -> dict[str, list[set[int]]]:
    """Sets that overlap; the second language has none, and the third all that the first has."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(languages), layers, neurons, generator=generator) < 0.4
    draws[1] = False
    draws[2] |= draws[0]
    return {
        language: [set(layer.nonzero().squeeze(1).tolist()) for layer in draw]
        for language, draw in zip(languages, draws, strict=True)
    }


@pytest.mark.parametrize(("layers", "width"), [(1, 7), (4, 33)])
def test_set_algebra_is_that_of_python_sets(layers, width):
    languages = ["mlt_Latn", "cym_Latn", "fra_Latn", "rus_Cyrl"]
    sets = drawn_sets(layers, languages, layers, width)
    lists = {language: [sorted(layer) for layer in each] for language, each in sets.items()}
    neurons = NeuronSet.from_lists(lists, width)

    def as_sets(found):
        assert all(layer.dtype == torch.int64 and torch.equal(layer, layer.sort().values) for layer in found)
        return [set(layer.tolist()) for layer in found]

    for some in (["mlt_Latn"], ["cym_Latn"], ["rus_Cyrl", "mt"], ["fr", "mlt_Latn", "rus_Cyrl"], languages):
        named = [sets[canonical(language)] for language in some]
        assert as_sets(neurons.union(some)) == [set.union(*each) for each in zip(*named, strict=True)]
        assert as_sets(neurons.shared(some)) == [set.intersection(*each) for each in zip(*named, strict=True)]
    assert as_sets(neurons.union()) == as_sets(neurons.union(languages))
    assert as_sets(neurons.shared()) == as_sets(neurons.shared(languages))
    assert neurons.union_count() == sum(len(layer) for layer in as_sets(neurons.union()))
    for language in languages:
        others = [set.union(*each) for each in zip(*(sets[o] for o in languages if o != language), strict=True)]
        own = [layer - other for layer, other in zip(sets[language], others, strict=True)]
        assert as_sets(neurons.exclusive(language)) == own
    assert neurons.per_layer().tolist() == [[len(layer) for layer in sets[language]] for language in languages]
    flat = [set(neurons.flat(language).tolist()) for language in languages]
    expected = [[len(one & two) / max(1, len(one | two)) for two in flat] for one in flat]
    assert neurons.jaccard().tolist() == expected


@pytest.mark.parametrize("operation", ["union", "shared", "exclusive", "jaccard"])
def test_the_examples_of_the_set_algebra_run(operation):
    text = getattr(NeuronSet, operation).__doc__
    example = doctest.DocTestParser().get_doctest(text, {"NeuronSet": NeuronSet}, operation, None, 0)
    assert doctest.DocTestRunner().run(example) == (0, 2)


@pytest.mark.parametrize("operation", ["union", "shared"])
def test_set_algebra_names_the_language_it_does_not_know(operation):
    with pytest.raises(LanguageError, match="'fra_Latn' is not among the 2 languages"):
        getattr(small(), operation)(["mlt_Latn", "fra_Latn"])
    with pytest.raises(LanguageError, match="'mt' and 'mlt_Latn' are the same"):
        getattr(small(), operation)(["mt", "mlt_Latn"])
    with pytest.raises(LanguageError, match="No language was given"):
        getattr(small(), operation)([])
    with pytest.raises(LanguageError, match="list of codes"):
        getattr(small(), operation)("mlt_Latn")


def test_the_fingerprint_is_that_of_the_selection_alone(tmp_path):
    neurons = small(rule="lape")
    neurons.save(tmp_path / "neurons.safetensors")
    assert neurons.fingerprint() == NeuronSet.load(tmp_path / "neurons.safetensors").fingerprint()
    assert neurons.fingerprint() == small(rule="budget").fingerprint()
    others = [
        NeuronSet.from_lists(LISTS, neurons_per_layer=6),
        NeuronSet.from_lists({"mlt_Latn": LISTS["mlt_Latn"], "fra_Latn": LISTS["cym_Latn"]}, 5),
        NeuronSet.from_lists({**LISTS, "cym_Latn": [[2], [4], [0, 1]]}, 5),
        NeuronSet.from_lists({"mlt_Latn": [[4, 0, 2], [1], []], "cym_Latn": LISTS["cym_Latn"]}, 5),
    ]
    assert len({each.fingerprint() for each in [neurons, *others]}) == 5


def test_a_language_is_found_in_any_spelling_and_an_absent_one_answered_with_the_near_ones():
    neurons = small()
    assert neurons.count("mt") == 4 and neurons["20231101.cy"][1].tolist() == [3]
    for look in (neurons.__getitem__, neurons.count, neurons.flat):
        with pytest.raises(LanguageError, match=r"'mlt_Arab' is not among the 2 .*near it: mlt_Latn"):
            look("mlt_Arab")


def test_a_set_without_any_neuron_is_whole(tmp_path):
    empty = NeuronSet.from_lists({"mlt_Latn": [[], []]}, neurons_per_layer=4)
    empty.save(tmp_path / "neurons.safetensors")
    loaded = NeuronSet.load(tmp_path / "neurons.safetensors")
    assert as_lists(loaded) == {"mlt_Latn": [[], []]} and loaded.union_count() == loaded.count("mlt_Latn") == 0


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"mlt_Latn": [[0], [1, 5]]}, "'mlt_Latn', layer 1: neuron index 5 is out of range.*5 neurons"),
        ({"mlt_Latn": [[], [2**40]]}, f"layer 1: neuron index {2**40} is out of range"),
        ({"cym_Latn": [[0], [1]], "mlt_Latn": [[], [-1]]}, "'mlt_Latn', layer 1: neuron index -1 is out of range"),
        ({"cym_Latn": [[3], [1]], "mlt_Latn": [[3, 0, 3], [1]]}, "'mlt_Latn', layer 0: neuron index 3 appears twice"),
        ({"mlt_Latn": [[1.0]]}, "'mlt_Latn', layer 0: the indices have dtype torch.float32"),
        ({"mlt_Latn": [[True]]}, "torch.bool"),
        ({"mlt_Latn": [["a"]]}, "'mlt_Latn', layer 0"),
        ({"mlt_Latn": [[[1]]]}, r"shape \[1, 1\]"),
        ({"mlt_Latn": [[0]], "cym_Latn": [[0], [1]]}, "'cym_Latn' has 2 layers, but 'mlt_Latn' has 1"),
        ({"mlt_Latn": []}, "`layers` is 0"),
    ],
)
def test_lists_that_make_no_sense_are_refused(lists, message):
    with pytest.raises(ShapeError, match=message):
        NeuronSet.from_lists(lists, neurons_per_layer=5)


def test_a_neuron_may_close_one_layer_and_open_the_next():
    neurons = NeuronSet.from_lists({"mlt_Latn": [[1, 3], [3], [], [3, 4], [0]]}, neurons_per_layer=5)
    assert as_lists(neurons)["mlt_Latn"] == [[1, 3], [3], [], [3, 4], [0]]


def test_languages_must_be_given_and_differ():
    with pytest.raises(LanguageError, match="No language"):
        NeuronSet.from_lists({}, neurons_per_layer=5)
    with pytest.raises(LanguageError, match="'mt' and 'mlt_Latn' are the same"):
        NeuronSet.from_lists({"mt": [[0]], "mlt_Latn": [[1]]}, neurons_per_layer=5)


def test_a_file_holds_everything_in_the_promised_dtypes(tmp_path):
    path = tmp_path / "neurons.safetensors"
    neurons = small(rule="lape", top_rate=0.05, filter_threshold=0.1 + 0.2, counts_hash="abc")
    neurons.save(path)
    loaded = NeuronSet.load(path)
    assert as_lists(loaded) == as_lists(neurons)
    assert loaded.metadata == {"rule": "lape", "top_rate": 0.05, "filter_threshold": 0.1 + 0.2, "counts_hash": "abc"}
    assert loaded.indices.dtype == torch.int32 and loaded.offsets.dtype == torch.int64
    assert loaded.offsets.tolist() == [0, 3, 3, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": None}, "lacks indices"),
        ({"offsets": None}, "lacks offsets"),
        ({"layers": None}, "lacks layers"),
        ({"neurons_per_layer": 4}, "'mlt_Latn', layer 0: neuron index 4 is out of range"),
        ({"neurons_per_layer": "5"}, "'5'"),
        ({"layers": -3}, "-3"),
        ({"layers": 2}, "must hold 5 whole numbers"),
        ({"languages": ["mlt_Latn"]}, "must hold 4 whole numbers"),
        ({"languages": ["mlt_Latn", "mt"]}, "are the same"),
        ({"languages": "mlt_Latn"}, "list of codes"),
        ({"offsets": torch.tensor([0, 3, 3, 4, 5, 6, 9])}, "from 0 to 9"),
        ({"offsets": torch.tensor([1, 3, 3, 4, 5, 6, 8])}, "from 1 to 8"),
        ({"offsets": torch.tensor([0, 3, 2, 4, 5, 6, 8])}, "falls after position 1"),
        ({"offsets": torch.tensor([0, 3, 3, 4, 5, 6, 8.0])}, "float32"),
        ({"offsets": torch.tensor([[0, 3, 3, 4, 5, 6, 8]])}, r"\[1, 7\]"),
        ({"indices": torch.tensor([2, 0, 4, 1, 2, 3, 0, 1])}, "layer 0: neuron index 0 follows 2"),
        ({"indices": torch.tensor([0, 2, 2, 1, 2, 3, 0, 1])}, "layer 0: neuron index 2 appears twice"),
        ({"indices": torch.tensor([0, 2, 4, 1, 2, 3, -1, 1])}, "'cym_Latn', layer 2: neuron index -1"),
        ({"indices": torch.tensor([0, 2, 4, 1, 2, 3, 0, 1.0])}, "float32"),
        ({"indices": torch.tensor([[0, 2, 4, 1, 2, 3, 0, 1]])}, r"\[1, 8\]"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path / "neurons.safetensors", **changes)
    with pytest.raises(FileFormatError, match=message) as error:
        NeuronSet.load(path)
    assert str(path) in str(error.value)


def test_broken_and_foreign_files_are_refused(tmp_path):
    path = write(tmp_path / "neurons.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="not a complete safetensors file"):
        NeuronSet.load(path)
    ActivationCounts(torch.ones(1, 1, 2, dtype=torch.int64), [1], ["mlt_Latn"]).save(tmp_path / "counts.safetensors")
    with pytest.raises(FileFormatError, match="'counts'"):
        NeuronSet.load(tmp_path / "counts.safetensors")
    with pytest.raises(FileFormatError, match="does not exist"):
        NeuronSet.load(tmp_path / "absent.safetensors")


def test_the_summary_is_json_with_what_tools_rely_on():
    summary = json.loads(json.dumps(small(rule="lape").summary()))
    assert summary["languages"] == ["mlt_Latn", "cym_Latn"]
    assert (summary["layers"], summary["neurons_per_layer"], summary["union"]) == (3, 5, 6)
    assert summary["per_language"] == {"mlt_Latn": 4, "cym_Latn": 4}
    assert summary["metadata"] == {"rule": "lape"}


def test_check_model_accepts_its_own_size_only():
    small().check_model(3, 5)
    with pytest.raises(ArchitectureError, match="3 layers x 5 neurons.*4 x 5"):
        small().check_model(4, 5)
    with pytest.raises(ArchitectureError, match="3 x 6"):
        small().check_model(3, 6)


def test_random_neurons_match_in_number_and_avoid_the_language():
    neurons = NeuronSet.from_lists({"mlt_Latn": [range(0, 400, 2), [], [7]], "cym_Latn": [[1], [], []]}, 400)
    random = random_like(neurons, "mt", seed=1)
    assert random.languages == ["mlt_Latn"] and random.count("mlt_Latn") == 201
    assert (random.layers, random.neurons_per_layer) == (3, 400)
    own, drawn = set(neurons.flat("mlt_Latn").tolist()), set(random.flat("mlt_Latn").tolist())
    assert not own & drawn
    assert (random.metadata["rule"], random.metadata["seed"]) == ("random", 1)


def test_random_neurons_depend_on_the_seed_alone():
    neurons = NeuronSet.from_lists({"mlt_Latn": [range(50), range(10)]}, 1000)
    torch.manual_seed(0)
    first = random_like(neurons, "mlt_Latn", seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    again = random_like(neurons, "mlt_Latn", seed=3)
    assert as_lists(first) == as_lists(again) != as_lists(random_like(neurons, "mlt_Latn", seed=4))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_random_neurons_spread_over_all_free_neurons_alike():
    neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 1], []]}, 4)
    hits = torch.zeros(8)
    for seed in range(600):
        hits[random_like(neurons, "mlt_Latn", seed).flat("mlt_Latn")] += 1
    # 600 draws of 2 from 6 neurons: 200 each, with a standard deviation of 11.5.
    assert hits[:2].sum() == 0 and (hits[2:] - 200).abs().max() < 60


def test_random_neurons_need_enough_others():
    most = NeuronSet.from_lists({"mlt_Latn": [[0, 1, 2]]}, 5)
    with pytest.raises(SelectionError, match="has 3 neurons and only 2 are not its own"):
        random_like(most, "mlt_Latn", seed=0)
    half = NeuronSet.from_lists({"mlt_Latn": [[0, 1, 2]]}, 6)
    assert random_like(half, "mlt_Latn", seed=0)["mlt_Latn"][0].tolist() == [3, 4, 5]


def test_a_set_shows_itself_in_one_line():
    neurons = NeuronSet.from_lists({"mlt_Latn": [[0, 5], [3]], "cym_Latn": [[5], []]}, 2000, {"name": "lape-top0.05"})
    assert repr(neurons) == "NeuronSet(2 languages, 2 layers x 2000, 3 neurons, lape-top0.05)"
    neurons.metadata.clear()
    assert repr(neurons) == "NeuronSet(2 languages, 2 layers x 2000, 3 neurons)"
