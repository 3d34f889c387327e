"""The memory plan against memory: what a real model holds, keeps for backward and reaches at its peak on the CPU."""

from __future__ import annotations

import contextlib
import copy
import json
import re

import pytest
import torch
from peft import get_peft_model

from benchmarks.measure import peak_bytes, saved_bytes
from lape_fast.errors import ArchitectureError, ConfigError, LanguageError, TrainingError
from lape_fast.identify import NeuronSet
from lape_fast.models import decoder, find_ffns, layout_of, quantise_layers, without_logits
from lape_fast.models.layouts import LAYOUTS
from lape_fast.terminal import print_plan
from lape_fast.tune import SubnetworkConfig, attach_subnetwork, measured_peak, plan
from lape_fast.tune.planning import GIB, GPUS, HELD_BACK
from lape_fast.tune.policies import free_bytes
from lape_fast.tune.subnetwork import installed_layers
from lape_fast.tune.tracing import build_on_meta, trace_calls, trace_step
from tests.tiny_models import DENSE_TYPES, VOCABULARY, quantised_tiny_model, save_tiny, tiny_model
from tests.tune.test_subnetwork import batch, neurons_of

ROWS, LENGTH = 2, 48
SIZES = [0, 5, 7]


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def planned(model, sizes=SIZES, **options):
    options = {"rows_per_step": ROWS, "context_length": LENGTH, "device": "cpu", "packed": False, **options}
    return plan(model, sizes, **options)


def policies_of(model):
    return [layer.policy for layer in installed_layers(model)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "phi3"])
def test_what_stays_is_what_a_real_model_holds_after_a_step(model_type, dtype):
    model = tiny_model(model_type, layers=3, dtype=dtype)
    plan_of_it = planned(model)
    base = nbytes([*model.parameters(), *model.buffers()])
    subnetwork = attach_subnetwork(model, [torch.arange(size) for size in SIZES])
    optimizer = torch.optim.AdamW(subnetwork.parameters())
    model(**batch()).loss.backward()
    optimizer.step()
    buffers = [pair for layer in subnetwork.layers for pair in layer.selections.named_buffers()]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan_of_it.resident == {
        "weights": base,
        "masters": nbytes(subnetwork.parameters()),
        "originals": nbytes(value for name, value in buffers if "original" in name),
        "indices": nbytes(value for name, value in buffers if "original" not in name),
        "moments": nbytes(moments),
    }
    assert plan_of_it.gradients == nbytes(parameter.grad for parameter in subnetwork.parameters())
    assert plan_of_it.training["trained_weights"] == subnetwork.trainable()
    # Master, gradient and two moments in fp32, and the original value.
    per_weight = sum(plan_of_it.resident[name] for name in ("masters", "originals", "moments")) + plan_of_it.gradients
    assert per_weight == subnetwork.trainable() * (16 + dtype.itemsize)


def inputs_of(model, packed):
    positions = torch.arange(LENGTH)[None].expand(ROWS, LENGTH)
    given = {"position_ids": positions % 20 if packed else positions} if layout_of(model).position_ids else {}
    return {"input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH)), **given}


# Those that pack in both ways, and those that do not in one.
LAYOUTS_AND_PACKING = [
    (model_type, packed)
    for model_type in DENSE_TYPES
    for packed in ([False, True] if LAYOUTS[model_type].packing else [False])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "packed"), LAYOUTS_AND_PACKING)
def test_a_traced_step_takes_the_bytes_of_a_real_one(model_type, packed, dtype):
    model = tiny_model(model_type, layers=3, dtype=dtype).train()
    meta = build_on_meta(model.config, dtype)
    subnetworks = [attach_subnetwork(each, [torch.arange(size) for size in SIZES]) for each in (model, meta)]
    inputs = inputs_of(model, packed)
    for policy in ("save", "recompute", "checkpoint"):
        for subnetwork in subnetworks:
            subnetwork.set_policy(policy)
        model.zero_grad()
        traced = trace_step(meta, ROWS, LENGTH, packed=packed, device="cpu")
        with without_logits(model):
            real = trace_calls(model, {**inputs, "labels": inputs["input_ids"]}, contextlib.nullcontext())
        # In 16 bits torch's LayerNorm keeps mean and deviation of a row in 16 bits on the CPU, in 32 on CUDA and on
        # meta tensors: 2 x 2 bytes, of two norms a layer, the last norm and one that BLOOM has behind its embeddings.
        norms = any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
        allowed = 2 * 2 * ROWS * LENGTH * (2 * 3 + 2) if norms and dtype == torch.bfloat16 else 0
        for predicted, measured in zip(vars(traced).values(), vars(real).values(), strict=True):
            assert 0 <= predicted - measured <= allowed


@pytest.mark.parametrize("policy", ["save", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3"])
def test_activations_are_what_autograd_saves_and_the_hidden_states(model_type, policy):
    model = tiny_model(model_type, layers=3).train()
    expected = planned(model).policies[policy].activations
    attach_subnetwork(model, [torch.arange(size) for size in SIZES], policy)
    inputs = inputs_of(model, packed=False)
    saved = saved_bytes(lambda: decoder(model)(**inputs, use_cache=False)[0], [decoder(model)], model.parameters())
    assert expected == saved + ROWS * LENGTH * 32 * 4


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
def test_the_peak_is_that_of_a_real_step(policy):
    model = tiny_model("llama", hidden=256, neurons=896, layers=6).train()
    sizes = [9, 0, 12, 20, 0, 30]
    expected = planned(model, sizes, rows_per_step=2, context_length=256)
    subnetwork = attach_subnetwork(model, [torch.arange(size) for size in sizes], policy)
    optimizer = torch.optim.AdamW(subnetwork.parameters(), fused=True)
    ids, positions = torch.randint(3, VOCABULARY, (2, 256)), torch.arange(256).expand(2, 256)

    def step():
        with without_logits(model):
            model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    measured = peak_bytes(step, [*model.parameters(), *model.buffers(), *states], torch.device("cpu"))
    # The optimizer's states beside the moments are a step counter per parameter.
    assert measured - len(states) * 4 <= expected.policies[policy].peak <= measured


def test_more_rows_are_never_planned_with_less_than_they_take():
    model = tiny_model("llama", layers=3)
    budget = planned(model, rows_per_step=4, gpu=0.002)
    for policy, rows in budget.largest_rows[budget.gpu].items():
        assert rows > 4
        fitting = planned(model, rows_per_step=rows).policies[policy].peak
        assert fitting <= budget.usable
        # A chord between distant batches lies a little above the figures between them.
        too_many = rows + 1 + rows // 20
        assert planned(model, rows_per_step=too_many).policies[policy].peak > budget.usable
    assert list(budget.largest_rows[budget.gpu].values()) == sorted(budget.largest_rows[budget.gpu].values())


def test_fewer_rows_at_once_are_recommended_where_all_of_a_step_do_not_fit():
    model = tiny_model("llama", layers=3)
    step = 6
    # As large as 4 rows take, of which no step of 6 can be made.
    usable = planned(model, rows_per_step=4).policies["checkpoint"].peak + 1
    tight = planned(model, rows_per_step=step, gpu=usable / GIB)
    assert tight.policy is None
    advised = re.search(r"Policy (\w+) fits with rows_per_pass=(\d+)", tight.summary())
    policy, rows = advised[1], int(advised[2])
    assert step % rows == 0
    assert planned(model, rows_per_step=step, rows_per_pass=rows, gpu=usable / GIB).fits(policy)
    asked = planned(model, rows_per_step=step, gpu=usable / GIB, policy="checkpoint")
    assert "does not fit" in asked.summary()
    assert "Policy checkpoint fits with rows_per_pass=3" in asked.summary()


def test_the_fastest_policy_that_fits_is_recommended():
    model = tiny_model("llama", layers=4)
    sizes = [5, 0, 7, 7]
    free = planned(model, sizes)
    peaks = {name: free.policies[name].peak for name in free.policies}
    assert free.policy == "save"
    assert free.fits("save") is None
    assert peaks["save"] > peaks["recompute"] > peaks["checkpoint"]
    for name, peak in peaks.items():
        tight = planned(model, sizes, gpu=(peak + 1) / GIB)
        assert tight.policy == name
        assert tight.peak == peak
        assert "fits into" in str(tight)
    none = planned(model, sizes, gpu=peaks["checkpoint"] / 2 / GIB)
    assert none.policy is None
    assert none.peak is None
    assert "No policy fits" in str(none)
    assert "rows_per_pass" not in none.summary()
    asked = planned(model, sizes, gpu=(peaks["recompute"] + 1) / GIB, policy="save")
    assert asked.policy == "save"
    assert "does not fit" in str(asked)


def test_gpus_are_found_by_name_and_hold_more_the_larger_they_are():
    model = tiny_model("llama", layers=3)
    named = planned(model, gpu="rtx-4090")
    assert named.usable == int((1 - HELD_BACK) * 24 * GIB)
    rows = [named.largest_rows[f"{name} ({size} GB)"]["save"] for name, size in GPUS.items()]
    assert rows == sorted(rows)
    assert planned(model, device="cuda").resident["CUDA context"] > 0


def test_an_8b_model_is_planned_from_its_config_alone():
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, num_hidden_layers=32, head_dim=128, vocab_size=128256)
    made = plan(config, [98] * 32, rows_per_step=1, context_length=4096, dtype="bfloat16", packed=False)
    # 8,030,261,248 weights in bf16, and 64 fp32 frequencies, twice, of the rotary embedding.
    assert made.resident["weights"] == 2 * 8_030_261_248 + 2 * 64 * 4
    # The layers above the lowest keep two residuals, queries, keys, values, the attention's output with a number per
    # head, gate and up, and a number of the fused norm in front of the attention.
    per_layer = 2 * (2 * 4096 + 4096 + 1024 + 1024 + 4096 + 2 * 14336) + 4 * 32 + 4
    # The lowest keeps its input and 98 columns of gate and up; then come cosines and sines, the last norm's input in
    # fp32 with a number per row, and the hidden states.
    once = 2 * (4096 + 2 * 98) + 2 * 2 * 128 + 4 * 4096 + 4 + 2 * 4096
    # The flash kernel keeps a generator's state, three 8-byte numbers.
    assert made.policies["save"].activations == 4096 * (31 * per_layer + once) + 31 * 3 * 8
    assert made.policies["save"].peak > made.policies["recompute"].peak > made.policies["checkpoint"].peak


def test_forms_of_model_and_neurons_agree(tmp_path):
    folder = save_tiny(tmp_path / "model", layers=3)
    model = tiny_model("llama", layers=3)
    lists = [torch.arange(size) for size in SIZES]
    neurons = NeuronSet.from_lists({"mlt_Latn": lists, "cym_Latn": [[1], [2], [3]]}, 48)
    neurons.save(tmp_path / "neurons.safetensors")
    expected = planned(model).to_dict()
    for form in (model.config, str(folder)):
        for chosen in (lists, neurons, tmp_path / "neurons.safetensors"):
            found = planned(form, chosen, language="mt" if chosen is not lists else None).to_dict()
            assert {**found, "training": None} == {**expected, "training": None}
    with pytest.raises(ConfigError, match="of 2 languages"):
        planned(model, neurons)
    with pytest.raises(LanguageError):
        planned(model, neurons, language="deu_Latn")


def stored_bytes(value):
    """Of a tensor with all that belongs to it: torchao's consist of several, bitsandbytes' have scales beside them."""
    if hasattr(value, "qdata"):
        return sum(stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    scales = [getattr(getattr(value, "quant_state", None), "absmax", None), getattr(value, "SCB", None)]
    return value.nbytes + sum(scale.nbytes for scale in scales if scale is not None)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_quantised_model_is_planned_as_it_was_loaded_and_decides_for_itself(monkeypatch, kind):
    model = quantised_tiny_model(kind, layers=3).train()
    made = planned(model)
    assert made.training["quantise"] == kind
    assert made.resident["weights"] == sum(map(stored_bytes, [*model.parameters(), *model.buffers()]))
    plain = tiny_model("llama", hidden=64, neurons=128, layers=3, dtype=torch.bfloat16)
    assert made.resident == planned(plain, quantise=kind).resident
    # The base is never written, so its values need not be kept beside it.
    assert made.resident["originals"] == 0 < planned(plain).resident["originals"]
    attach_subnetwork(model, [torch.arange(size) for size in SIZES], "auto")
    monkeypatch.setattr("lape_fast.tune.policies.free_bytes", lambda device: 0)
    model(**batch()).loss.backward()
    assert policies_of(model) == ["save", "checkpoint"]


def test_a_model_in_fp8_is_planned_with_the_copies_that_its_gradients_need(monkeypatch):
    model = quantised_tiny_model("fp8", layers=3).train()
    made = planned(model)
    plain = tiny_model("llama", hidden=64, neurons=128, layers=3, dtype=torch.bfloat16)
    assert made.training["quantise"] == "fp8"
    assert made.resident == planned(plain, quantise="fp8").resident
    subnetwork = attach_subnetwork(model, [torch.arange(size) for size in SIZES], "auto")
    monkeypatch.setattr("lape_fast.tune.policies.free_bytes", lambda device: 0)
    model(**batch()).loss.backward()
    assert policies_of(model) == ["save", "checkpoint"]
    # By now there are no gradients in the lowest layer, which trains nothing.
    trained = set(map(id, subnetwork.parameters()))
    base = [value for value in model.parameters() if id(value) not in trained]
    selections = {id(value) for layer in subnetwork.layers for value in layer.selections.buffers()}
    base += [value for value in model.buffers() if id(value) not in selections]
    assert made.resident["weights"] == nbytes(base)


@pytest.mark.parametrize("policy", ["save", "recompute", "checkpoint"])
def test_the_trace_in_fp8_is_that_of_a_real_step(policy):
    model = quantised_tiny_model("fp8", layers=3).train()
    meta = quantise_layers(build_on_meta(model.config, torch.bfloat16))
    for each in (model, meta):
        attach_subnetwork(each, [torch.arange(size) for size in SIZES], policy)
    inputs = inputs_of(model, packed=False)
    with without_logits(model):
        # The first step also makes the copies.
        for _ in range(2):
            real = trace_calls(model, {**inputs, "labels": inputs["input_ids"]}, contextlib.nullcontext())
            model.zero_grad()
    for _ in range(2):
        traced = trace_step(meta, ROWS, LENGTH, packed=False, device="cpu")
    assert traced == real


@pytest.mark.parametrize(("implementation", "mask"), [("sdpa", True), ("flash_attention_2", False)])
def test_a_mask_is_planned_for_where_attention_needs_one(implementation, mask):
    config = tiny_model("llama", layers=3).config
    config._attn_implementation = implementation
    plans = [planned(config, packed=packed, device="cuda", dtype="bfloat16") for packed in (None, True, False)]
    kept = [made.policies["save"].activations for made in plans]
    assert [made.training["packed"] for made in plans] == [mask, mask, False]
    assert kept[0] == kept[1]
    assert (kept[1] > kept[2]) is mask


def test_planning_leaves_model_random_numbers_and_torch_as_they_were():
    model = tiny_model("llama", layers=3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attention, norm = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm
    planned(model, device="cuda")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.nn.functional.rms_norm is norm
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(ffn.decoder_layer.mlp).__name__ == "LlamaMLP" for ffn in find_ffns(model))


def test_a_plan_is_printed_whole_for_people_and_as_json_for_machines(capsys):
    made = planned(tiny_model("llama", layers=3), gpu="H200")
    print_plan(made, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(made.to_dict()))
    print_plan(made, as_json=False)
    shown = capsys.readouterr().out
    for word in ("masters", "moments", "checkpoint", "H200", f"{made.training['trained_weights']:,}"):
        assert word in shown
        assert word in str(made)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gpu": "H2000"}, ConfigError, "'H2000' is unknown; give how many GiB it has"),
        ({"gpu": 0}, ConfigError, "0 GiB"),
        ({"policy": "offload"}, ConfigError, "policy 'offload' is unknown"),
        ({"quantise": "nf5"}, ConfigError, "quantisation 'nf5' is unknown"),
        ({"device": "tpu"}, ConfigError, "device 'tpu' is unknown"),
        ({"dtype": "float7"}, ConfigError, "float7"),
        ({"rows_per_step": 0}, ConfigError, "rows_per_step is 0"),
        ({"sizes": [0, 0, 0]}, TrainingError, "No layer has a neuron"),
        ({"sizes": [1, 1]}, ArchitectureError, "2 layers"),
        ({"sizes": [1, 1, 49]}, ArchitectureError, "48 neurons"),
        ({"sizes": [1, 1, -1]}, ConfigError, "-1 neurons"),
        ({"model_type": "mixtral"}, ArchitectureError, "mixture of experts"),
    ],
)
def test_what_makes_no_sense_is_refused(options, error, match):
    model = tiny_model(options.pop("model_type", "llama"), layers=3)
    with pytest.raises(error, match=match):
        planned(model, options.pop("sizes", SIZES), **options)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        planned(str(tmp_path))


@pytest.mark.parametrize("through_peft", [False, True])
@pytest.mark.parametrize("expected", ["save", "recompute", "checkpoint"])
def test_auto_takes_the_fastest_policy_that_fits_at_the_first_training_step(monkeypatch, expected, through_peft):
    model = tiny_model("llama", layers=6).train()
    neurons = neurons_of(model, [0, 3, 0, 7, 7, 7])
    inputs = batch(rows=4, length=64)
    # Of two passes, as gradients may accumulate.
    sizes = [len(chosen) for chosen in neurons]
    made = planned(model, sizes, rows_per_step=8, rows_per_pass=4, context_length=64)
    # The step and the moments that its optimizer will make, and a tenth that is left alone.
    still_to_come = made.policies[expected].peak - sum(made.resident.values()) + made.resident["moments"]
    monkeypatch.setattr("lape_fast.tune.policies.free_bytes", lambda device: still_to_come / 0.9 + 1)
    reference = copy.deepcopy(model)
    expected_gradients = attach_subnetwork(reference, neurons)
    reference(**inputs).loss.backward()
    if through_peft:
        trained = get_peft_model(model, SubnetworkConfig(neurons=neurons, neurons_per_layer=48, policy="auto"))
    else:
        attach_subnetwork(model, neurons, "auto")
        trained = model
    with torch.no_grad():
        trained(**inputs)
    trained.eval()(**inputs)
    assert policies_of(model) == ["auto"] * 5
    trained.train()(**inputs).loss.backward()
    assert policies_of(model) == ["save" if expected == "checkpoint" else expected, *[expected] * 4]
    assert not decoder(model)._forward_pre_hooks
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(expected_gradients.parameters())
    for gradient, wanted in zip(
        sorted(gradients, key=lambda value: value.abs().sum()),
        sorted((parameter.grad for parameter in expected_gradients.parameters()), key=lambda value: value.abs().sum()),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_auto_can_be_asked_for_again_and_a_copy_decides_for_itself(monkeypatch):
    model = tiny_model("llama", layers=3).train()
    subnetwork = attach_subnetwork(model, neurons_of(model), "auto")
    copied = copy.deepcopy(model)
    monkeypatch.setattr("lape_fast.tune.policies.free_bytes", lambda device: 0)
    copied(**batch())
    assert policies_of(copied) == ["save", "checkpoint", "checkpoint"]
    assert policies_of(model) == ["auto"] * 3
    model(**batch())
    assert policies_of(model) == ["save", "checkpoint", "checkpoint"]
    subnetwork.set_policy("auto")
    monkeypatch.setattr("lape_fast.tune.policies.free_bytes", lambda device: 1 << 40)
    model(**batch())
    assert policies_of(model) == ["save"] * 3


def test_the_memory_of_this_machine_and_of_a_block_of_work_is_measured():
    cpu = torch.device("cpu")
    assert 0 < free_bytes(cpu) < 1 << 50
    with measured_peak(cpu) as peak:
        values = torch.ones(50 << 20, dtype=torch.uint8)
        del values
    assert peak["kind"] == "resident growth"
    # Where the system does not tell there is no figure; pages of other sizes make it a little more or less.
    assert peak["bytes"] is None or 45 << 20 < peak["bytes"] < 70 << 20
