"""The layout table against transformers' own modelling code, one tiny random model per architecture."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lape_fast.errors import ArchitectureError
from lape_fast.models import check_unshared, decoder, dense_ffns, find_ffns, replaced
from lape_fast.models.layouts import ACTIVATION_NAMES, LAYOUTS
from lape_fast.ops import ACTIVATIONS
from tests.identify.processes import run_together
from tests.tiny_models import DENSE_TYPES, TINY_TYPES, VOCABULARY, quantised_tiny_model, save_tiny, tiny_model

TORCH_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Most architectures agree bit for bit. BLOOM writes sqrt(2 / pi) with eight digits, and norms and softmaxes compute
# in float32 whatever the model's dtype, so a last-bit difference may become one of theirs. The nearest wrong
# activation, one GELU for the other, is off by 6e-4 and more.
TOLERANCE = 1e-6

# The config's field for the dropout nearest to the FFN, where the architecture has any.
FFN_DROPOUT = {
    "phi3": "resid_pdrop",
    "gpt2": "resid_pdrop",
    "gpt_neox": "hidden_dropout",
    "opt": "dropout",
    "bloom": "hidden_dropout",
}

UNGATED = ("gpt2", "gpt_neox", "opt", "bloom")

# Variants of an architecture that take another path through its code.
VARIANTS = [(model_type, {}) for model_type in DENSE_TYPES] + [
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("gpt_neox", {"hidden_act": "gelu_fast"}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"n_inner": None}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", {"activation_function": "gelu_accurate", "enable_bias": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
]


class HandWritten(nn.Module):
    """The FFN written out from what an ``FFN`` offers, owning the original projections as a tuner would."""

    def __init__(self, ffn, activation=None):
        super().__init__()
        self.ffn = ffn
        self.activation = TORCH_ACTIVATIONS[activation or ffn.activation]
        self.projections = nn.ModuleDict(ffn.projections)

    def forward(self, x):
        gate, up = self.ffn.project(x)
        h = self.activation(gate)
        return self.ffn.project_down(h if up is None else h * up)


class FromWeights(nn.Module):
    """The FFN computed from the weight and bias views alone."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        ffn = self.ffn
        h = TORCH_ACTIVATIONS[ffn.activation](F.linear(x, ffn.gate_weight, ffn.gate_bias))
        if ffn.gated:
            h = h * F.linear(x, ffn.up_weight, ffn.up_bias)
        return F.linear(h, ffn.down_weight, ffn.down_bias)


def logits(model):
    token_ids = torch.arange(3, 3 + 2 * 11).reshape(2, 11)
    with torch.no_grad():
        return model(input_ids=token_ids, use_cache=False).logits


def build(model_type, **config_fields):
    return tiny_model(model_type, dtype=torch.float64, **config_fields)


def case_name(value):
    return "-".join(f"{name}={field}" for name, field in value.items()) if isinstance(value, dict) else value


def test_every_architecture_of_the_table_has_a_tiny_model():
    assert set(TINY_TYPES) == set(LAYOUTS)


@pytest.mark.parametrize(("model_type", "fields"), VARIANTS, ids=case_name)
@pytest.mark.parametrize("module_class", [HandWritten, FromWeights])
def test_hand_written_ffn_reproduces_the_logits(model_type, fields, module_class):
    model = build(model_type, **fields)
    expected = logits(model)
    ffns = find_ffns(model)
    for ffn in ffns:
        ffn.replace(module_class(ffn))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_wrong_activation_would_be_noticed(model_type):
    model = build(model_type)
    expected = logits(model)
    for ffn in find_ffns(model):
        nearest = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}.get(ffn.activation, "gelu")
        ffn.replace(HandWritten(ffn, nearest))
    assert (logits(model) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_sizes_and_shapes(model_type):
    model = tiny_model(model_type, layers=3, neurons=80)
    ffns = find_ffns(model)
    neurons = 128 if model_type == "bloom" else 80
    assert [ffn.layer for ffn in ffns] == [0, 1, 2]
    for ffn in ffns:
        assert (ffn.neurons, ffn.hidden_size, ffn.gated) == (neurons, 32, model_type not in UNGATED)
        assert ffn.activation in ACTIVATIONS
        assert ffn.gate_weight.shape == (neurons, 32)
        assert ffn.down_weight.shape == (32, neurons)
        gate, up = ffn.project(torch.randn(2, 5, 32))
        assert gate.shape == (2, 5, neurons)
        if ffn.gated:
            assert ffn.up_weight.shape == up.shape[-1:] + (32,)
        else:
            assert up is None and ffn.up_weight is None and ffn.up_bias is None
            assert ffn.gate_bias.shape == (neurons,) and ffn.down_bias.shape == (32,)


def silence_in_activation(ffn, neuron):
    """Computes the FFN without one neuron, whatever the weights say."""

    class Silenced(nn.Module):
        def forward(self, x):
            gate, up = ffn.project(x)
            h = TORCH_ACTIVATIONS[ffn.activation](gate)
            h = h if up is None else h * up
            h[..., neuron] = 0
            return ffn.project_down(h)

    return Silenced()


@pytest.mark.parametrize(
    ("model_type", "part"),
    [(name, part) for name in DENSE_TYPES for part in ("gate", "up", "down") if part != "up" or name not in UNGATED],
)
def test_writing_through_a_view_changes_the_model(model_type, part):
    model = build(model_type)
    before = logits(model)
    ffns = find_ffns(model)
    neuron = 7
    # The activations all map 0 to 0, so each of the three silences the neuron and nothing else.
    with replaced(ffns, [silence_in_activation(ffn, neuron) for ffn in ffns]):
        expected = logits(model)
    with torch.no_grad():
        for ffn in ffns:
            if part == "down":
                ffn.down_weight[:, neuron] = 0
            else:
                getattr(ffn, f"{part}_weight")[neuron] = 0
                bias = getattr(ffn, f"{part}_bias")
                if bias is not None:
                    bias[neuron] = 0
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE)
    assert (expected - before).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_gradients_reach_the_parameters_through_the_views(model_type):
    model = tiny_model(model_type)
    ffn = find_ffns(model)[0]
    ffn.gate_weight[3].sum().backward()
    projection = ffn.projections["gate_up" if "gate_up" in ffn.projections else "gate"]
    grad = projection.weight.grad.t() if model_type == "gpt2" else projection.weight.grad
    assert grad[3].eq(1).all()
    assert grad.sum() == ffn.hidden_size


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_restore_puts_the_same_modules_back(model_type):
    model = tiny_model(model_type)
    expected, keys, modules = logits(model), list(model.state_dict()), list(model.modules())
    ffns = find_ffns(model)
    for ffn in ffns:
        ffn.replace(nn.Identity())
    assert not torch.equal(logits(model), expected)
    for ffn in ffns:
        ffn.restore()
        ffn.restore()
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == keys
    assert all(now is before for now, before in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_an_owning_module_keeps_every_weight_in_the_model(model_type):
    model = tiny_model(model_type)
    before = {id(parameter) for parameter in model.parameters()}
    expected = logits(model)
    for ffn in find_ffns(model):
        ffn.replace(HandWritten(ffn))
    assert {id(parameter) for parameter in model.parameters()} == before
    # A copy and a conversion take the FFN along.
    converted = copy.deepcopy(model).double()
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(converted).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_nothing_is_dropped_inside_the_replaced_part(model_type):
    field = FFN_DROPOUT.get(model_type)
    model = tiny_model(model_type, **({field: 0.5} if field else {})).train()
    token_ids = torch.arange(3, 25).reshape(2, 11)
    # Gemma 3 wants to know in training which tokens belong to an image.
    images = {"token_type_ids": torch.zeros_like(token_ids)} if model_type == "gemma3" else {}

    def seeded_logits():
        torch.manual_seed(0)
        return model(input_ids=token_ids, use_cache=False, **images).logits

    expected = seeded_logits()
    for ffn in find_ffns(model):
        ffn.replace(HandWritten(ffn))
    # Dropout elsewhere draws the same random numbers only if there was none in here.
    torch.testing.assert_close(seeded_logits(), expected, rtol=1e-4, atol=1e-4)


def test_replacing_twice_is_refused_and_changes_nothing():
    model = tiny_model("gpt2")
    ffn = find_ffns(model)[0]
    second = find_ffns(model)[0]
    module = HandWritten(ffn)
    ffn.replace(module)
    for late in (ffn, second):
        with pytest.raises(ArchitectureError, match="already replaced"):
            late.replace(nn.Identity())
    assert model.transformer.h[0].mlp.c_fc is module
    second.restore()
    assert model.transformer.h[0].mlp.c_fc is module


def test_restoring_what_something_else_replaced_is_refused():
    model = tiny_model("llama")
    ffn = find_ffns(model)[1]
    ffn.replace(nn.Identity())
    model.model.layers[1].mlp = foreign = nn.Linear(32, 32)
    with pytest.raises(ArchitectureError, match="layer 1 cannot be restored: mlp now holds Linear"):
        ffn.restore()
    assert model.model.layers[1].mlp is foreign


def test_finding_ffns_of_a_replaced_model_is_refused():
    model = tiny_model("llama")
    find_ffns(model)[0].replace(nn.Identity())
    with pytest.raises(ArchitectureError, match="restore the original FFN"):
        find_ffns(model)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_replaced_restores_after_an_exception(model_type):
    model = tiny_model(model_type)
    expected = logits(model)
    ffns = find_ffns(model)
    with pytest.raises(ZeroDivisionError), replaced(ffns, [nn.Identity() for _ in ffns]):
        assert not torch.equal(logits(model), expected)
        raise ZeroDivisionError
    assert torch.equal(logits(model), expected)


def test_replaced_restores_when_the_last_ffn_cannot_be_replaced():
    model = tiny_model("llama")
    ffns = find_ffns(model)
    expected = logits(model)
    with pytest.raises(ArchitectureError, match="already replaced"), replaced([*ffns, ffns[0]], [nn.Identity()] * 3):
        pytest.fail("the block must not run")
    assert torch.equal(logits(model), expected)


def test_replaced_needs_one_module_per_ffn():
    ffns = find_ffns(tiny_model("llama"))
    with pytest.raises(ArchitectureError, match="2 FFNs but 1 modules"), replaced(ffns, [nn.Identity()]):
        pytest.fail("the block must not run")


def test_activation_names_are_those_of_transformers_and_of_the_ops():
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for name, activation in ACTIVATION_NAMES.items():
        # gelu_tanh is our own name, used by BLOOM's row.
        if name in ACT2FN:
            torch.testing.assert_close(ACT2FN[name](x), TORCH_ACTIVATIONS[activation](x), rtol=0, atol=1e-9)
    assert set(ACTIVATION_NAMES.values()) == set(ACTIVATIONS)


def test_an_unsupported_activation_is_named():
    with pytest.raises(ArchitectureError, match="'relu2' is not supported.*gelu_pytorch_tanh"):
        find_ffns(tiny_model("llama", hidden_act="relu2"))


def test_an_unknown_architecture_says_how_to_add_it():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    config = AutoConfig.for_model("gptj", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match=r"'gptj'.*llama, mistral.*lape_fast/models/layouts\.py"):
        find_ffns(model)


def test_what_wraps_a_model_is_refused():
    with pytest.raises(ArchitectureError, match="A Sequential is not a model of transformers"):
        find_ffns(nn.Sequential(tiny_model("llama")))


def test_bloom_that_slices_its_output_projection_is_refused():
    with pytest.raises(ArchitectureError, match="slow_but_exact"):
        find_ffns(tiny_model("bloom", slow_but_exact=True, pretraining_tp=2))


def test_quantised_and_wrapped_projections_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"mlp\.up_proj of layer 1 .* torch\.int8"):
        find_ffns(model)
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate_proj = nn.Sequential(model.model.layers[0].mlp.gate_proj)
    with pytest.raises(ArchitectureError, match="Sequential where a plain projection is needed"):
        find_ffns(model)


def share_module(layers):
    layers[1].mlp.down_proj = layers[0].mlp.down_proj


def share_weight(layers):
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight


def share_layer(layers):
    layers[1] = layers[0]


@pytest.mark.parametrize("share", [share_module, share_weight, share_layer])
@pytest.mark.parametrize("build", [tiny_model, lambda: quantised_tiny_model("nf4")], ids=["plain", "nf4"])
def test_shared_projections_can_be_counted_but_not_tuned(share, build):
    model = build()
    check_unshared(model, dense_ffns(model))
    share(model.model.layers)
    ffns = find_ffns(model)
    names = r"model\.layers\.0\.mlp\.\w+\.weight and model\.layers\.1\.mlp\.\w+\.weight are one weight"
    for check in (lambda: check_unshared(model, ffns), lambda: dense_ffns(model)):
        with pytest.raises(ArchitectureError, match=names):
            check()


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_tied_embeddings_are_no_shared_projection(model_type):
    model = tiny_model(model_type, tie_word_embeddings=True)
    assert len(dense_ffns(model)) == 2


def test_tensor_parallelism_is_refused_and_sharding_is_not(tmp_path):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    base = save_tiny(tmp_path)

    def find(**sizes):
        model = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(**sizes))
        try:
            return tuple(find_ffns(model)[0].gate_weight.shape)
        except ArchitectureError as error:
            return str(error)

    for answer in run_together(lambda: find(tp_size=2), 2):
        assert "tensor parallelism, which is not supported; load it without tp_plan" in answer
    assert run_together(lambda: find(fsdp_size=2), 2) == [(48, 32)] * 2


@pytest.mark.parametrize("model_type", TINY_TYPES)
def test_decoder_is_the_model_without_its_head(model_type):
    model = tiny_model(model_type)
    inner = decoder(model)
    shared = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in shared for parameter in inner.parameters())
    assert model.get_output_embeddings() not in list(inner.modules())
    assert inner.config.hidden_size == 32
