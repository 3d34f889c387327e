"""Mixtures of experts against transformers' own modelling code and against plain loops over experts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import ArchitectureError
from lape_fast.models import check_neurons, dense_ffns, find_ffns, replaced
from tests.tiny_models import EXPERT_TYPES, EXPERTS, tiny_model

IMPLEMENTATIONS = ("grouped_mm", "eager")


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.experts


def unit_by_hand(model, expert, unit, x):
    """What one unit of one expert adds, straight from the parameters: [D] -> [D]."""
    module = experts_of(model)
    if model.config.model_type == "gpt_oss":
        gate_up = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = gate_up[2 * unit].clamp(max=7), gate_up[2 * unit + 1].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate) * module.down_proj[expert, unit]
    width = module.down_proj.shape[2]
    gate, up = module.gate_up_proj[expert, unit] @ x, module.gate_up_proj[expert, width + unit] @ x
    return F.silu(gate) * up * module.down_proj[expert, :, unit]


class InSteps(nn.Module):
    """The experts computed by the steps of an ``ExpertFFN``."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x, chosen, weights):
        routes = self.ffn.route(chosen)
        return self.ffn.project_down(self.ffn.activate(self.ffn.project(x, routes)), routes, weights)


class Nothing(nn.Module):
    def forward(self, x, chosen, weights):
        return torch.zeros_like(x)


def logits(model):
    token_ids = torch.arange(3, 3 + 2 * 11).reshape(2, 11)
    with torch.no_grad():
        return model(input_ids=token_ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_steps_are_transformers_grouped_implementation_to_the_bit(model_type, dtype):
    model = tiny_model(model_type, dtype=dtype, experts_implementation="grouped_mm")
    expected, ffns = logits(model), find_ffns(model)
    with replaced(ffns, [InSteps(ffn) for ffn in ffns]):
        assert torch.equal(logits(model), expected)
    with replaced(ffns, [Nothing() for _ in ffns]):
        assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_the_steps_are_the_eager_implementation_but_for_the_order_of_sums(model_type):
    model = tiny_model(model_type, dtype=torch.float64, experts_implementation="eager")
    expected, ffns = logits(model), find_ffns(model)
    with replaced(ffns, [InSteps(ffn) for ffn in ffns]):
        # Norms and routers compute in float32 whatever the model's dtype, where a last bit may become one of theirs.
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_sizes(model_type):
    model = tiny_model(model_type, layers=3, neurons=80)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    for ffn in ffns:
        assert (ffn.experts, ffn.neurons, ffn.hidden_size) == (EXPERTS, EXPERTS * 80, 32)
        assert ffn.down_weight.shape == (EXPERTS, 32, 80)


def test_routes_are_sorted_by_expert_and_lead_back():
    ffn = find_ffns(tiny_model("mixtral"))[0]
    chosen = torch.tensor([[4, 0, 1], [1, 4, 3], [0, 1, 4]])
    routes = ffn.route(chosen)
    assert routes.experts.tolist() == [0, 0, 1, 1, 1, 3, 4, 4, 4]
    assert routes.tokens.tolist() == [0, 2, 0, 1, 2, 1, 0, 1, 2]
    assert routes.ends.tolist() == [2, 5, 5, 6, 9]
    assert torch.equal(chosen.flatten()[routes.order], routes.experts)


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_the_gate_is_the_one_that_silences_its_neuron(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    ffn = find_ffns(model)[0]
    gate_up = torch.zeros(1, 2 * 48, dtype=torch.float64)
    ffn.gate(gate_up)[0, 7] = 1.5
    if model_type != "gpt_oss":
        # gpt-oss adds 1 to up, so there its gate alone makes h.
        assert ffn.activate(gate_up).count_nonzero() == 0
        gate_up[0, 48 + 7] = 2.0
    assert ffn.activate(gate_up).nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@torch.no_grad()
def test_a_neuron_without_outgoing_weights_contributes_nothing(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    ffn, expert, unit = find_ffns(model)[0], 3, 11
    neuron = torch.tensor([expert * 48 + unit])
    x = torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen, weights = torch.tensor([[1, 3]]), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    intact = experts_of(model)(x, chosen, weights)
    expected = 0.75 * unit_by_hand(model, expert, unit, x[0])[None]
    kept = ffn.outgoing(neuron)
    ffn.set_outgoing(neuron, torch.zeros_like(kept))
    without = experts_of(model)(x, chosen, weights)
    torch.testing.assert_close(intact - without, expected)
    ffn.set_outgoing(neuron, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_restoring_leaves_no_trace(model_type):
    model = tiny_model(model_type)
    expected, names, config = logits(model), dict(model.named_modules()), model.config.to_json_string()
    configs = [experts_of(model, layer).config for layer in range(2)]
    ffns = find_ffns(model)
    with pytest.raises(ZeroDivisionError), replaced(ffns, [Nothing() for _ in ffns]):
        assert not torch.equal(logits(model), expected)
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected)
    assert all(now is before for now, before in zip(model.modules(), names.values(), strict=True))
    assert all(experts_of(model, layer).config is configs[layer] for layer in range(2))
    assert model.config.to_json_string() == config
    assert model.config._experts_implementation == "grouped_mm"


def test_one_layer_may_be_replaced_alone():
    model = tiny_model("mixtral")
    first, second = find_ffns(model)
    called = []
    experts_of(model, 1).register_forward_hook(lambda *arguments: called.append(1))
    first.replace(Nothing())
    hidden = logits(model)
    assert called and not torch.equal(hidden, logits(tiny_model("mixtral")))
    first.restore()
    first.restore()
    second.restore()
    assert torch.equal(logits(model), logits(tiny_model("mixtral")))


def test_replacing_twice_is_refused_and_changes_nothing():
    model = tiny_model("qwen3_moe")
    ffn, other = find_ffns(model)[0], find_ffns(model)[0]
    module = Nothing()
    ffn.replace(module)
    for late in (ffn, other):
        with pytest.raises(ArchitectureError, match="experts of layer 0 are already replaced"):
            late.replace(Nothing())
    other.restore()
    assert module in list(model.modules())
    with pytest.raises(ArchitectureError, match="experts of layer 0 are replaced; restore them first"):
        find_ffns(model)


def test_restoring_what_something_else_changed_is_refused():
    model = tiny_model("qwen3_moe")
    ffn = find_ffns(model)[1]
    ffn.replace(Nothing())
    experts_of(model, 1).config = model.config
    with pytest.raises(ArchitectureError, match="experts of layer 1 cannot be restored"):
        ffn.restore()


@pytest.mark.parametrize("fields", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_a_model_that_mixes_dense_and_sparse_layers_is_refused(fields):
    with pytest.raises(ArchitectureError, match=r"has no mlp\.experts.*mlp_only_layers, decoder_sparse_step"):
        find_ffns(tiny_model("qwen3_moe", **fields))


def test_quantised_experts_are_refused():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = tiny_model("gpt_oss")
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(ArchitectureError, match=r"layer 1, a Mxfp4GptOssExperts, .* torch\.uint8 .*dequantize=True"):
        find_ffns(model)
    # Loaded, its weights are objects of a kernel library and no parameters at all.
    del model.model.layers[1].mlp.experts.gate_up_proj
    with pytest.raises(ArchitectureError, match="stores gate_up_proj not as one plain parameter"):
        find_ffns(model)


def test_an_activation_whose_sign_is_not_the_gates_is_refused():
    with pytest.raises(ArchitectureError, match="'sigmoid' is not supported"):
        find_ffns(tiny_model("mixtral", hidden_act="sigmoid"))


def test_neurons_are_numbered_over_all_experts():
    ffns = find_ffns(tiny_model("mixtral"))
    check_neurons(ffns, [torch.tensor([EXPERTS * 48 - 1]), torch.tensor([0])])
    with pytest.raises(ArchitectureError, match=f"{EXPERTS * 48} neurons per layer"):
        check_neurons(ffns, [torch.tensor([EXPERTS * 48]), torch.tensor([0])])


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
def test_what_needs_dense_projections_is_refused(model_type):
    with pytest.raises(ArchitectureError, match=f"{model_type} model is a mixture of experts.*not tuned"):
        dense_ffns(tiny_model(model_type))
