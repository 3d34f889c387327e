"""Weight changes, read from files, against the models they are changes of, and against formulas."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError
from lape_fast.identify import NeuronSet
from lape_fast.models import find_ffns, load_model
from lape_fast.models.checkpoint import Checkpoint
from lape_fast.study import WeightChange, effective_rank, measure_weight_change
from lape_fast.study.adapter_changes import Change
from lape_fast.study.weight_change import QUANTILES, compare_changes, describe_change
from lape_fast.text import open_corpus
from lape_fast.tune import (
    SubnetworkConfig,
    TrainingSettings,
    TuningConfig,
    attach_subnetwork,
    load_adapter,
    merge_adapter,
    tune_language,
    write_adapter,
)
from tests.tiny_models import DENSE_TYPES, save_tiny, tiny_model

PROJECTIONS = {"gate": "gate_weight", "up": "up_weight", "down": "down_weight"}


def rows(ffn, projection) -> torch.Tensor:
    """A projection of a live model with neurons as rows, ``[F, D]``."""
    weight = getattr(ffn, PROJECTIONS[projection]).detach()
    return weight.T if projection == "down" else weight


def tuned(base, folder, lists, *, seed=0, dtype="auto"):
    """An adapter of a saved model with random changes, some of which are zero."""
    model, _ = load_model(base, device="cpu", dtype=dtype)
    neurons = NeuronSet.from_lists({"mlt_Latn": lists}, neurons_per_layer=find_ffns(model)[0].neurons)
    config = SubnetworkConfig(neurons=neurons, language="mlt_Latn")
    subnetwork = attach_subnetwork(model, neurons["mlt_Latn"])
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in subnetwork.parameters():
            change = 0.1 * torch.randn(parameter.shape, generator=draw)
            parameter.add_(change * (torch.rand(parameter.shape, generator=draw) < 0.75))
    folder.mkdir(parents=True)
    write_adapter(subnetwork, folder, config.to_dict())
    return folder


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_checkpoint_is_read_as_the_model_has_it(tmp_path, model_type):
    ffns = find_ffns(load_model(save_tiny(tmp_path, model_type), device="cpu")[0])
    checkpoint = Checkpoint(tmp_path)
    for ffn in ffns:
        for projection in PROJECTIONS if ffn.gated else ("gate", "down"):
            expected = rows(ffn, projection)
            assert torch.equal(checkpoint.read(ffn.layer, projection), expected)
            assert torch.equal(checkpoint.read(ffn.layer, projection, [0, 5, 47]), expected[[0, 5, 47]])
            assert checkpoint.read(ffn.layer, projection, []).shape == (0, 32)


def test_a_checkpoint_in_several_files(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = Checkpoint(tmp_path)
    for ffn in find_ffns(model):
        for projection in PROJECTIONS:
            assert torch.equal(checkpoint.read(ffn.layer, projection, [1, 2]), rows(ffn, projection)[[1, 2]])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_the_change_of_a_subnetwork_is_that_of_the_model(tmp_path, model_type):
    base = save_tiny(tmp_path / "base", model_type)
    adapter = tuned(base, tmp_path / "mlt", [[1, 5, 40], [0, 2]])
    before, _ = load_model(base, device="cpu")
    after = copy.deepcopy(before)
    load_adapter(after, adapter)
    result = measure_weight_change([adapter])
    places = [
        (ffn.layer, name) for ffn in find_ffns(before) for name in (PROJECTIONS if ffn.gated else ("gate", "down"))
    ]
    assert [(each.layer, each.projection) for each in result.changes] == places
    for each in result.changes:
        old, new = (rows(find_ffns(model)[each.layer], each.projection).double() for model in (before, after))
        moved = (new - old).abs().amax(1) > 0
        assert each.neurons == [3, 2][each.layer] == int(moved.sum())
        old, new = old[moved], new[moved]
        assert each.norm == pytest.approx(float((new - old).norm()), rel=1e-9)
        assert each.relative_norm == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-9)
        assert each.moved == float((new != old).double().mean()) < 1
        cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(old, new, strict=True)]
        assert each.cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)
        assert each.cosine_quantiles[0] == pytest.approx(min(cosines), rel=1e-9)
        assert each.quantiles[-1] == float((new - old).abs().max())
        shares = torch.linalg.svdvals(new - old)
        shares = shares / shares.sum()
        assert each.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)


def test_an_adapter_in_another_dtype_than_the_file(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = tuned(base, tmp_path / "mlt", [[1, 5], [2]], dtype="bfloat16")
    before, _ = load_model(base, device="cpu", dtype="bfloat16")
    after = copy.deepcopy(before)
    load_adapter(after, adapter)
    change = measure_weight_change([adapter]).changes[0]
    delta = rows(find_ffns(after)[0], "gate").double() - rows(find_ffns(before)[0], "gate").double()
    assert change.norm == pytest.approx(float(delta.norm()), rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_the_change_of_a_lora_is_that_of_the_merged_model(tmp_path, model_type, options):
    from peft import LoraConfig, get_peft_model

    names = {
        "llama": ["gate_proj", "down_proj", "q_proj"],
        "phi3": ["gate_up_proj", "down_proj"],
        "gpt2": ["c_fc", "mlp.c_proj"],
    }
    base = save_tiny(tmp_path / "base", model_type)
    before, _ = load_model(base, device="cpu")
    config = LoraConfig(r=3, lora_alpha=8, target_modules=names[model_type], task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(copy.deepcopy(before), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "lora")
    after = tuned.merge_and_unload()
    result = measure_weight_change([tmp_path / "lora"])
    expected = {"llama": 4, "phi3": 6, "gpt2": 4}[model_type]
    assert len(result.changes) == expected
    for each in result.changes:
        old, new = (rows(find_ffns(model)[each.layer], each.projection).double() for model in (before, after))
        # The merged weight was rounded to fp32.
        assert each.norm == pytest.approx(float((new - old).norm()), rel=1e-4)
        assert each.cosine == pytest.approx(float(torch.cosine_similarity(old, new, dim=1).mean()), rel=1e-6)
        assert each.neurons == 48 and 1 < each.effective_rank <= 3 + 1e-9


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("method", ["full", "ia3:targets=gate+down", "lora:rank=2"])
def test_the_change_of_every_method_is_that_of_the_tuned_model(tmp_path, method, model_type):
    base = save_tiny(tmp_path / "base", model_type)
    before, tokenizer = load_model(base, device="cpu")
    (tmp_path / "mlt_Latn.txt").write_text("Il-qattus qagħad fuq it-tapit.\n" * 8, encoding="utf-8")
    config = TuningConfig(method=method, language="mlt_Latn")
    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=2, learning_rate=1e-2)
    adapter = tmp_path / "adapter"
    tune_language(copy.deepcopy(before), tokenizer, open_corpus(tmp_path / "mlt_Latn.txt"), config, adapter, settings)
    after = merge_adapter(load_model(base, device="cpu")[0], adapter)
    result = measure_weight_change([adapter])
    assert {"gate", "down"} <= {each.projection for each in result.changes}
    for each in result.changes:
        old, new = (rows(find_ffns(model)[each.layer], each.projection).double() for model in (before, after))
        # A merged weight was rounded to fp32.
        assert each.norm == pytest.approx(float((new - old).norm()), rel=1e-3)
        assert each.norm > 0 and each.neurons == 48


def test_a_dense_adapter_of_another_base_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    model, tokenizer = load_model(base, device="cpu")
    (tmp_path / "mlt_Latn.txt").write_text("Il-qattus qagħad fuq it-tapit.\n" * 8, encoding="utf-8")
    config = TuningConfig(method="full", language="mlt_Latn")
    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=1)
    tune_language(model, tokenizer, open_corpus(tmp_path / "mlt_Latn.txt"), config, tmp_path / "full", settings)
    with pytest.raises(ArchitectureError, match="made for another base"):
        measure_weight_change([tmp_path / "full"], save_tiny(tmp_path / "other", seed=1))
    with pytest.raises(ArchitectureError, match="0 weights named"):
        measure_weight_change([tmp_path / "full"], save_tiny(tmp_path / "shallow", layers=1))
    path = tmp_path / "full" / "dense_config.json"
    facts = json.loads(path.read_text())
    del facts["replaced_values_sha256"]
    path.write_text(json.dumps(facts))
    with pytest.raises(FileFormatError, match="does not say what was replaced"):
        measure_weight_change([tmp_path / "full"])


@pytest.mark.parametrize("method", ["lora:rank=2", "ia3"])
def test_an_adapter_of_peft_of_another_size_is_refused(tmp_path, method):
    model, tokenizer = load_model(save_tiny(tmp_path / "base"), device="cpu")
    (tmp_path / "mlt_Latn.txt").write_text("Il-qattus qagħad fuq it-tapit.\n" * 8, encoding="utf-8")
    config = TuningConfig(method=method, language="mlt_Latn")
    settings = TrainingSettings(context_length=32, rows_per_step=2, steps=1)
    tune_language(model, tokenizer, open_corpus(tmp_path / "mlt_Latn.txt"), config, tmp_path / "adapter", settings)
    with pytest.raises(ArchitectureError, match="do not fit"):
        measure_weight_change([tmp_path / "adapter"], save_tiny(tmp_path / "other", neurons=64))


def test_dora_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(save_tiny(tmp_path / "base"), device="cpu")
    config = LoraConfig(r=2, target_modules=["gate_proj"], use_dora=True)
    get_peft_model(model, config).save_pretrained(tmp_path / "dora")
    with pytest.raises(FileFormatError, match="use_dora"):
        measure_weight_change([tmp_path / "dora"])


def test_effective_rank_in_closed_form():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 9))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 5)) == 0
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    wide = torch.diag(torch.tensor([3.0, 1.0])) @ torch.linalg.qr(torch.randn(6, 2)).Q.T
    # The orthogonal matrix is one of fp32.
    assert effective_rank(wide) == effective_rank(wide.T) == pytest.approx(expected, rel=1e-6)


def test_quantiles_are_those_of_numpy():
    import numpy

    draw = torch.Generator().manual_seed(0)
    change = Change(torch.arange(4), torch.ones(4, 101), torch.randn(4, 101, generator=draw))
    found = describe_change("a", (0, "gate"), change)
    expected = numpy.quantile(change.delta.abs().double().numpy(), QUANTILES, method="nearest")
    assert found.quantiles == pytest.approx(expected.tolist(), rel=1e-9)


def test_nothing_changed_is_no_direction():
    still = Change(torch.tensor([1, 4]), torch.ones(2, 3), torch.zeros(2, 3))
    found = describe_change("a", (0, "up"), still)
    assert (found.norm, found.relative_norm, found.effective_rank, found.moved) == (0, 0, 0, 0)
    assert found.cosine == pytest.approx(1)
    shared = compare_changes((0, "up"), ("a", still), ("b", still))
    assert (shared.shared, shared.cosine, shared.cosine_of_rows) == (2, None, None)


def test_two_adapters_are_compared_on_the_neurons_they_share():
    first = Change(torch.tensor([1, 4, 7]), torch.ones(3, 2), torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]))
    second = Change(torch.tensor([4, 7, 8]), torch.ones(3, 2), torch.tensor([[2.0, 0.0], [0.0, -1.0], [5.0, 5.0]]))
    found = compare_changes((3, "down"), ("a", first), ("b", second))
    assert (found.first, found.second, found.layer, found.projection, found.shared) == ("a", "b", 3, "down", 2)
    # Neuron 4 moves alike, neuron 7 against: (2 - 2) over both, and (1 - 1) / 2 by row.
    assert (found.cosine, found.cosine_of_rows) == (0, 0)
    same = compare_changes((3, "down"), ("a", first), ("c", first))
    assert same.cosine == pytest.approx(1) and same.cosine_of_rows == pytest.approx(1) and same.shared == 3


def test_several_adapters_and_their_file(tmp_path):
    base = save_tiny(tmp_path / "base")
    folders = [
        tuned(base, tmp_path / "mlt", [[1, 5, 40], []]),
        tuned(base, tmp_path / "isl", [[5], [7]], seed=1),
    ]
    result = measure_weight_change(folders)
    assert list(result.adapters) == ["mlt", "isl"]
    assert [(each.adapter, each.layer, each.neurons) for each in result.changes] == [
        *[("mlt", 0, 3)] * 3,
        *[("isl", 0, 1)] * 3,
        *[("isl", 1, 1)] * 3,
    ]
    assert [(each.layer, each.projection, each.shared) for each in result.shared] == [
        (0, "gate", 1),
        (0, "up", 1),
        (0, "down", 1),
    ]
    (total,) = [row for row in result.totals() if (row["adapter"], row["projection"]) == ("isl", "down")]
    parts = [each for each in result.changes if (each.adapter, each.projection) == ("isl", "down")]
    assert total["norm"] == pytest.approx(math.hypot(*(each.norm for each in parts)))
    assert total["relative_norm"] == pytest.approx(total["norm"] / math.hypot(*(each.old_norm for each in parts)))
    result.save(tmp_path / "weights.json")
    assert WeightChange.load(tmp_path / "weights.json") == result
    assert json.loads((tmp_path / "weights.json").read_text())["totals"] == result.totals()


def test_what_cannot_be_measured_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter = tuned(base, tmp_path / "mlt", [[1, 5, 40], [0, 2]])
    with pytest.raises(ArchitectureError, match="made for another base"):
        measure_weight_change([adapter], save_tiny(tmp_path / "other", seed=1))
    with pytest.raises(ArchitectureError, match="has 16 neurons, but 40"):
        measure_weight_change([adapter], save_tiny(tmp_path / "small", neurons=16))
    with pytest.raises(ArchitectureError, match="mixture of experts"):
        measure_weight_change([adapter], save_tiny(tmp_path / "experts", "mixtral"))
    with pytest.raises(ConfigError, match="neither a folder nor a model in the local cache"):
        measure_weight_change([adapter], "nobody/has-this")
    with pytest.raises(ConfigError, match="not all different"):
        measure_weight_change([adapter, adapter])
    with pytest.raises(ConfigError, match="No adapter"):
        measure_weight_change([])
    with pytest.raises(FileFormatError, match="no adapter_config.json"):
        measure_weight_change([base])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value[:1] for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(FileFormatError, match="does not fit"):
        measure_weight_change([adapter])
    (adapter / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    with pytest.raises(FileFormatError, match="the kind 'vera'"):
        measure_weight_change([adapter])
    (adapter / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match="does not name the model"):
        measure_weight_change([adapter])
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds neither"):
        Checkpoint(base)
