"""Files from strangers: each way to mislead a reader that the fuzzer or a review found, and properties of all files."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from benchmarks.fuzz_targets import make_targets
from lape_fast.errors import LONGEST_MESSAGE, FileFormatError, LanguageError, LapeFastError
from lape_fast.files import fits, parse_json, read_json, read_metadata, write_tensors
from lape_fast.identify import ActivationCounts, NeuronSet, export_masks, import_masks
from lape_fast.information import describe_file
from lape_fast.study import AblationMatrix
from lape_fast.tune.adapter import decode_neurons, encode_neurons

# A property looks at many files in one folder: what one example leaves there the next one overwrites.
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def file_of(path, tensors, **metadata):
    """A safetensors file with any metadata."""
    path.write_bytes(save(tensors, metadata={name: json.dumps(value) for name, value in metadata.items()}))
    return path


def counts_file(path, **changed):
    tensors = {"positive": torch.tensor([[[1, 2]]]), "tokens": torch.tensor([5])}
    fields = {"kind": "counts", "schema_version": 1, "languages": ["mlt_Latn"]}
    return file_of(path, tensors, **{**fields, **changed})


def neurons_file(path, indices=(1,), offsets=(0, 1), dtype=torch.int64, **changed):
    tensors = {"indices": torch.tensor(indices, dtype=dtype), "offsets": torch.tensor(offsets, dtype=dtype)}
    fields = {"kind": "neurons", "schema_version": 1, "languages": ["mlt_Latn"], "layers": 1, "neurons_per_layer": 4}
    return file_of(path, tensors, **{**fields, **changed})


# Messages


def test_a_message_is_one_printable_line_of_bounded_length():
    error = FileFormatError(f"\x1b[2Jred\r\n\u202e {'x' * 10_000} ends.")
    assert str(error).isprintable() and str(error).startswith(r"\x1b[2Jred \u202e xxx") and str(error).endswith("ends.")
    assert len(str(error)) <= LONGEST_MESSAGE + 5
    assert str(LanguageError("no 'quotes' around.")) == "no 'quotes' around."
    assert str(pickle.loads(pickle.dumps(LanguageError("It is whole.")))) == "It is whole."


# JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("9" * 5000, "limit"),
        ("[" * 200_000, "recursion"),
        ('{"a": ' * 50_000, "recursion"),
        ("{half", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_that_readers_trip_over_is_refused(tmp_path, text, reason):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(FileFormatError, match=rf"f\.json is not valid JSON.*{reason}"):
        read_json(tmp_path / "f.json")


def test_a_json_file_of_any_size_is_not_read_whole(tmp_path):
    with (tmp_path / "f.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileFormatError, match="is longer than 67,108,864 bytes"):
        read_json(tmp_path / "f.json")
    for no_file in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(FileFormatError):
            read_json(no_file)


@many
@given(JSON)
def test_json_survives(value):
    assert parse_json(json.dumps(value), "it") == value


@pytest.mark.parametrize(
    ("value", "shape", "result"),
    [
        (True, int, False),
        (1, (int, float), True),
        ({"a": [1, None]}, {str: [(int, None)]}, True),
        ({"a": 1}, {"a": int, "b": int}, False),
        ({"a": 1, "c": []}, {"a": int}, True),
        ([1, "x"], [int], False),
        ("x", [str], False),
        (3, lambda value: value > 2, True),
    ],
)
def test_shapes_of_json(value, shape, result):
    assert fits(value, shape) is result


# Safetensors


def test_a_header_that_says_a_name_twice_is_refused(tmp_path):
    path = counts_file(tmp_path / "c.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"tokens":', b'"positive":')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(FileFormatError, match=r"'positive' stands twice"):
        read_metadata(path)


@pytest.mark.parametrize("length", [1 << 27, 1 << 33, (1 << 64) - 1])
def test_a_header_of_any_length_is_not_read(tmp_path, length):
    path = tmp_path / "c.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(FileFormatError, match="at most 67,108,864 are read"):
        read_metadata(path)


@pytest.mark.parametrize("version", [True, -1.5, "1", None, [1]])
def test_a_schema_version_is_a_whole_number(tmp_path, version):
    with pytest.raises(FileFormatError, match="has no schema_version"):
        read_metadata(counts_file(tmp_path / "c.safetensors", schema_version=version))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("corpus", "texts"),
        ("corpus", {"spec": ["texts"]}),
        ("model", None),
        ("shards", {"mlt_Latn": [1]}),
        ("shards", {"mlt_Latn": [{"parts": ["ab"], "lines": "../x", "shard": [0], "shards": 1}]}),
        ("shards", {"mlt_Latn": [{"parts": ["ab"], "lines": "9" * 5000, "shard": [0], "shards": 1}]}),
        ("stability", {"mlt_Latn": {"jaccard": "high", "interval": None}}),
        ("stability", {"mlt_Latn": {"jaccard": 0.5, "interval": [0.5]}}),
        # As many names would be made up for the parts that are missing.
        ("merged_parts", [[1, 10**12]]),
        ("parts", 10**12),
        ("skipped_files", "all"),
        ("config_hash", ["c"]),
    ],
)
def test_metadata_that_others_rely_on_are_checked(tmp_path, name, value):
    with pytest.raises(FileFormatError, match=f"says '{name}' is"):
        ActivationCounts.load(counts_file(tmp_path / "c.safetensors", **{name: value}))


def test_what_is_only_shown_may_be_anything(tmp_path):
    counts = ActivationCounts.load(counts_file(tmp_path / "c.safetensors", note=[float("nan"), {}]))
    assert counts.metadata["note"][1] == {}


# Neurons


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"neurons_per_layer": 1 << 40}, "`neurons_per_layer` is 1099511627776"),
        ({"layers": 1 << 40}, "`layers` is 1099511627776"),
        ({"layers": int("1" * 4000)}, "`layers` is 1111"),
        ({"layers": True}, "`layers` is True"),
        ({"layers": 4096, "neurons_per_layer": 1 << 24}, "more than the 268,435,456 of any model"),
        ({"layers": float("nan")}, "`layers` is nan"),
        ({"offsets": (0, 2)}, "must run from 0 to the 1 indices"),
        ({"offsets": (0, 1, 1)}, "must hold 2 whole numbers"),
        ({"indices": (-1,)}, "neuron index -1 is out of range"),
        ({"indices": (1 << 40,)}, "is out of range"),
        ({"languages": ["mlt_Latn", "mt"], "offsets": (0, 1, 1)}, "are the same"),
        ({"languages": {"mlt_Latn": 1}}, "must be a list of codes"),
    ],
)
def test_neurons_that_lie_about_themselves_are_refused(tmp_path, changed, message):
    with pytest.raises(FileFormatError, match=message):
        NeuronSet.load(neurons_file(tmp_path / "n.safetensors", **changed))


def test_the_union_takes_memory_for_the_neurons_that_are_there(tmp_path):
    """A set that claims to be of the largest model there can be: 2 GB, if there were a number for each neuron."""
    path = neurons_file(tmp_path / "n.safetensors", layers=16, neurons_per_layer=1 << 24, offsets=[0] + 16 * [1])
    assert describe_file(path)["union"] == 1


WHOLE = st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64])


@many
@given(data=st.data(), dtype=WHOLE, layers=st.integers(-1, 3), width=st.integers(-1, 6))
def test_any_neurons_are_refused_or_sorted_and_in_range(tmp_path, data, dtype, layers, width):
    numbers = st.lists(st.integers(0, 6), max_size=5)
    path = neurons_file(
        tmp_path / "n.safetensors",
        data.draw(numbers),
        data.draw(numbers.map(sorted)),
        dtype,
        layers=layers,
        neurons_per_layer=width,
    )
    try:
        neurons = NeuronSet.load(path)
    except FileFormatError:
        return
    chosen = neurons["mlt_Latn"]
    assert len(chosen) == layers
    for layer in chosen:
        assert layer.tolist() == sorted(set(layer.tolist())) and all(0 <= neuron < width for neuron in layer.tolist())


@many
@given(st.lists(st.text(max_size=30) | st.integers() | st.none(), max_size=4))
def test_the_neurons_of_an_adapter_are_numbers_or_refused(lines):
    try:
        neurons = decode_neurons(lines)
    except FileFormatError:
        return
    assert [layer.tolist() for layer in decode_neurons(encode_neurons(neurons))] == [
        layer.tolist() for layer in neurons
    ]


# Masks


def masked(tmp_path, content=None, **options):
    torch.save([[torch.tensor([0, 3])]] if content is None else content, tmp_path / "mask.pth", **options)
    return tmp_path / "mask.pth"


def test_a_compressed_mask_is_refused_before_it_is_unpacked(tmp_path):
    """A kilobyte that names a tensor of 64 MB of zeros."""
    plain = masked(tmp_path, [[torch.zeros(1 << 23, dtype=torch.int64)]])
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert bomb.stat().st_size < 1 << 18
    with pytest.raises(FileFormatError, match=r"bomb\.pth cannot be read.*nothing in it was run"):
        import_masks(bomb, ["mt"], 1 << 24)


@pytest.mark.parametrize("zipped", [True, False])
def test_one_tensor_named_a_thousand_times_is_refused(tmp_path, zipped):
    layer = torch.arange(1000)
    path = masked(tmp_path, [[layer] * 4000], _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="not stored each for itself"):
        import_masks(path, ["mt"], 1000)


def test_more_layers_than_any_model_has_are_refused(tmp_path):
    nothing = torch.tensor([], dtype=torch.int64)
    with pytest.raises(FileFormatError, match="has 5,000 layers"):
        import_masks(masked(tmp_path, [[nothing] * 5000]), ["mt"], 4)


class Buffer:
    """Pickled, it makes a buffer of a length that the file does not have, by a call that torch takes to be safe."""

    def __init__(self, made_by, length):
        self.made_by, self.length = made_by, length

    def __reduce__(self):
        return self.made_by, (self.length,)


@pytest.mark.parametrize("made_by", [bytearray, torch.UntypedStorage, torch.LongTensor])
@pytest.mark.parametrize("zipped", [True, False])
def test_calls_that_take_memory_are_not_made(tmp_path, zipped, made_by):
    path = masked(tmp_path, [[Buffer(made_by, 1 << 40)]], _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"\(ValueError\), and nothing in it was run"):
        import_masks(path, ["mt"], 4)


@many
@given(st.lists(st.sets(st.integers(0, 7)), min_size=2, max_size=2))
def test_masks_survive(tmp_path, layers):
    neurons = NeuronSet.from_lists({"mlt_Latn": [sorted(layer) for layer in layers]}, 8)
    export_masks(neurons, tmp_path / "mask.pth")
    assert import_masks(tmp_path / "mask.pth", ["mlt_Latn"], 8).fingerprint() == neurons.fingerprint()


# Releases


@pytest.fixture
def release(tmp_path):
    return make_targets(tmp_path, ["release index"])["release index"].place


def repoint(release, path):
    index = json.loads((release / "release.json").read_text())
    index["sets"][0]["path"] = path
    (release / "release.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "neurons/../../secret", "neurons/a\0", "release.json", "", "neurons\\..\\x"]
)
def test_a_release_leads_to_nothing_outside_itself(release, path):
    repoint(release, path)
    with pytest.raises(FileFormatError):
        NeuronSet.from_pretrained(release)


@pytest.mark.parametrize("linked", ["neurons/lape-20/neurons.safetensors", "neurons", "release.json"])
def test_a_link_out_of_a_release_is_not_followed(release, tmp_path, linked):
    outside = tmp_path / "outside"
    (release / linked).rename(outside)
    (release / linked).symlink_to(outside)
    with pytest.raises(FileFormatError, match="outside the release"):
        NeuronSet.from_pretrained(release)


def test_a_release_in_the_cache_of_the_hub_is_read_through_its_links(release, tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(release.rglob("*"))):
        if path.is_file():
            target = snapshot / path.relative_to(release)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(blobs / str(number))
            target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    assert NeuronSet.from_pretrained(snapshot).languages == NeuronSet.load(tmp_path / "neurons.safetensors").languages


def test_metadata_of_any_depth_can_be_published(tmp_path):
    target = make_targets(tmp_path, ["published counts"])["published counts"]
    path = target.place / target.name
    target.place.mkdir(exist_ok=True)
    path.write_bytes(target.seeds[0])
    neurons = NeuronSet.load(tmp_path / "neurons.safetensors")
    neurons.metadata["deep"] = json.loads("[" * 400 + "]" * 400)
    neurons.save(tmp_path / "neurons.safetensors")
    target.read(path)


# Ablations


# A whole number that no float can hold.
HUGE = {"mlt_Latn": dict.fromkeys(("own", "over_next_worst", "over_mean_of_others"), 10**400)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("schema_version", None, "has schema version None"),
        ("nats", [[1.0], [1.0, 2.0], [3.0]], "rows and columns of several lengths"),
        ("nats", "many", "lacks nats"),
        ("tokens", [2**64] * 3, "nothing measured can have"),
        ("base_nats", [10**400] * 3, "lacks base_nats"),
        ("ablated", ["mlt_Latn"], "rows and columns of several lengths"),
        ("base_nats", ["1"] * 3, "lacks base_nats"),
    ],
)
def test_ablations_that_do_not_add_up_are_refused(tmp_path, name, value, message):
    target = make_targets(tmp_path, ["ablation"])["ablation"]
    values = {**json.loads(target.seeds[0]), name: value}
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(FileFormatError, match=message):
        AblationMatrix.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("corpus", ["texts"]), ("selectivity", {"mlt_Latn": 1}), ("config_hash", 1), ("selectivity", HUGE)],
)
def test_an_ablation_that_cannot_be_shown_is_not_published(tmp_path, name, value):
    target = make_targets(tmp_path, ["published ablation"])["published ablation"]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(target.seeds[0]), name: value}))
    with pytest.raises(FileFormatError, match=r"a\.json"):
        target.read(path)


# Adapters


def test_an_adapter_whose_values_are_no_numbers_is_refused(tmp_path):
    """NaN in one value would make every logit NaN, and integers are no values of a weight."""
    from safetensors.torch import load

    target = make_targets(tmp_path, ["adapter tensors"])["adapter tensors"]
    path = target.place / target.name
    tensors = load(target.seeds[0])
    for spoil in (lambda each: each.index_fill(0, torch.tensor([0]), float("nan")), lambda each: each.to(torch.int64)):
        write_tensors(path, "adapter", {name: spoil(each) for name, each in tensors.items()}, {"language": "mlt_Latn"})
        with pytest.raises(FileFormatError, match="not all finite numbers"):
            target.read(path)
    path.write_bytes(target.seeds[0])
    target.read(path)


@pytest.mark.parametrize("lines", [["0 1", "x"], ["1 0", ""], ["0"], ["48", "0"], [[0], [1]]])
def test_neurons_that_the_model_has_not_are_refused_by_the_name_of_the_adapter(tmp_path, lines):
    target = make_targets(tmp_path, ["adapter config"])["adapter config"]
    path = target.place / target.name
    path.write_text(json.dumps({**json.loads(target.seeds[0]), "neurons": lines}))
    with pytest.raises(LapeFastError, match=f"The adapter {target.place} does not fit the model: "):
        target.read(path)
    path.write_bytes(target.seeds[0])
    target.read(path)


# Checkpoints of counting


@pytest.mark.parametrize("value", [-1, 1 << 40])
def test_counts_of_a_checkpoint_that_cannot_be_are_refused(tmp_path, value):
    from safetensors import safe_open
    from safetensors.torch import load

    target = make_targets(tmp_path, ["counting checkpoint"])["counting checkpoint"]
    path = target.place / target.name
    tensors = load(target.seeds[0])
    tensors["counts"][0, 0, 0] = value
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(FileFormatError, match="its counts are negative, or above its tokens"):
        target.read(path)
