from __future__ import annotations

import os
import pickle

import pytest
import torch

from lape_fast.errors import FileFormatError, LanguageError
from lape_fast.identify.masks import export_masks, import_masks
from lape_fast.identify.neurons import NeuronSet

PUBLISHED_LANGUAGES = ["mt", "af", "is", "cy", "mk", "lv", "lt", "sl", "sk", "et", "ka", "ne"]
MASKS = [[torch.tensor([0, 3]), torch.tensor([], dtype=torch.int64)], [torch.tensor([3]), torch.tensor([1, 2])]]


class Touch:
    """Pickled, it would create a file on whoever loads it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "layers", "neurons_per_layer", "union", "welsh"),
    [
        ("llama-3.1-8b.top5.12languages.pth", 32, 14336, 22_938, 6_020),
        ("mistral-nemo-12b.top5.12languages.pth", 40, 14336, 28_672, 8_239),
    ],
)
def test_the_published_masks_survive_a_round_trip(
    shared_masks, tmp_path, name, layers, neurons_per_layer, union, welsh
):
    neurons = import_masks(shared_masks / name, PUBLISHED_LANGUAGES, neurons_per_layer)
    assert (neurons.layers, neurons.union_count(), neurons.count("cym_Latn")) == (layers, union, welsh)
    neurons.save(tmp_path / "neurons.safetensors")
    export_masks(NeuronSet.load(tmp_path / "neurons.safetensors"), tmp_path / "back.pth")
    published = torch.load(shared_masks / name, weights_only=True)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert type(back) is list and [type(layers) for layers in back] == [list] * 12
    for before, after in zip(published, back, strict=True):
        for layer_before, layer_after in zip(before, after, strict=True):
            assert layer_after.dtype == torch.int64 and torch.equal(layer_before, layer_after)


def test_import_says_where_the_neurons_come_from(tmp_path):
    neurons = import_masks(saved(tmp_path / "mask.pth", MASKS), ["mt", "cy"], 4)
    assert [chosen.tolist() for chosen in neurons["cym_Latn"]] == [[3], [1, 2]]
    assert neurons.metadata["rule"] == "imported" and neurons.metadata["source"] == "mask.pth"


def test_the_old_format_of_torch_save_is_read_too(tmp_path):
    path = saved(tmp_path / "mask.pth", MASKS, _use_new_zipfile_serialization=False)
    assert import_masks(path, ["mt", "cy"], 4).union_count() == 4


def test_export_is_the_same_bytes_under_any_name(tmp_path):
    neurons = NeuronSet.from_lists({"mlt_Latn": [[0], [2]]}, 4)
    export_masks(neurons, tmp_path / "one.pth")
    export_masks(neurons, tmp_path / "two.pth")
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pth", "two.pth"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path = saved(tmp_path / "mask.pth", [[Touch(tmp_path / "hit")]], _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match="nothing in it was run") as error:
        import_masks(path, ["mt"], 4)
    assert not (tmp_path / "hit").exists()
    # torch's own message proposes to load the file unsafely.
    assert "weights_only" not in str(error.value)


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
    (tmp_path / "mask.pth").write_bytes(pickle.dumps([[Touch(tmp_path / "hit")]], protocol=2))
    with pytest.raises(FileFormatError, match="nothing in it was run"):
        import_masks(tmp_path / "mask.pth", ["mt"], 4)
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no pickle at all", b"\x80\x02]q\x00", bytes(1000)])
def test_files_that_are_no_tensors_are_refused(tmp_path, content):
    (tmp_path / "mask.pth").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"mask\.pth"):
        import_masks(tmp_path / "mask.pth", ["mt"], 4)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.98])
def test_a_truncated_file_is_refused(tmp_path, kept, zipped):
    path = saved(tmp_path / "mask.pth", MASKS, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(FileFormatError, match=r"mask\.pth"):
        import_masks(path, ["mt", "cy"], 4)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match="absent.pth does not exist"):
        import_masks(tmp_path / "absent.pth", ["mt"], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mt": MASKS[0]}, "holds a dict for the file"),
        (torch.tensor([1]), "holds a Tensor for the file"),
        ((MASKS[0], MASKS[1]), "holds a tuple for the file"),
        ([torch.tensor([0]), torch.tensor([1])], "holds a Tensor for a language"),
        ([[[0, 3], [1]], [[1], [2]]], "holds a list for a layer"),
        ([[None], [None]], "holds a NoneType for a layer"),
        ([[torch.tensor([0.0])], [torch.tensor([1.0])]], "'mt', layer 0: the indices have dtype torch.float32"),
        ([[torch.tensor([[0]])], [torch.tensor([[1]])]], "shape"),
        ([[torch.eye(2).to_sparse()], [torch.tensor([1])]], "sparse_coo"),
        ([[torch.empty(3, dtype=torch.int64, device="meta")], [torch.tensor([1])]], "meta"),
        ([[torch.tensor([0])], [torch.tensor([4])]], "'cy', layer 0: neuron index 4 is out of range"),
        ([[torch.tensor([0])], [torch.tensor([-1])]], "neuron index -1 is out of range"),
        ([[torch.tensor([2, 2])], [torch.tensor([1])]], "'mt', layer 0: neuron index 2 appears twice"),
        ([[torch.zeros(1, dtype=torch.int64).expand(2**50)], [torch.tensor([1])]], "only 4 neurons"),
        ([MASKS[0], MASKS[1][:1]], "'cy' has 1 layers, but 'mt' has 2"),
        ([MASKS[0]], "holds 1 languages, but 2 codes were given"),
        ([MASKS[0]] * 3, "holds 3 languages, but 2 codes were given"),
    ],
)
def test_contents_that_are_no_mask_are_refused(tmp_path, content, message):
    with pytest.raises(FileFormatError, match=message):
        import_masks(saved(tmp_path / "mask.pth", content), ["mt", "cy"], 4)


def test_one_language_named_twice_is_refused(tmp_path):
    path = saved(tmp_path / "mask.pth", MASKS)
    for languages in (["mt", "mlt_Latn"], ["mt", "mt"]):
        with pytest.raises(LanguageError, match="the same"):
            import_masks(path, languages, 4)
