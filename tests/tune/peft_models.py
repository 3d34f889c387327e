"""Tiny PEFT models whose adapters hold values of their own, for the tests of the PEFT method."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from lape_fast.identify import NeuronSet
from lape_fast.tune import SubnetworkConfig
from lape_fast.tune.subnetwork import installed_layers
from tests.tiny_models import DENSE_TYPES, VOCABULARY, tiny_model, tiny_neurons

# Their lowest layers differ; mlt and isl share neuron 5 of layer 1, mlt and eng neuron 2 of layer 2.
NEURONS = {
    "mlt_Latn": [[], [1, 5, 40], [0, 2]],
    "isl_Latn": [[3, 5], [5, 7], []],
    "eng_Latn": [[], [], [2, 3]],
}
LANGUAGES = tuple(NEURONS)

# An architecture of each kind: gated, fused, transposed, no mlp module, activation outside, norms behind the FFN.
KINDS = ("llama", "phi3", "gpt2", "opt", "gpt_neox", "gemma2")
STORAGES = ("resident", "overlay")

both_storages = pytest.mark.parametrize("storage", STORAGES)
every_layout = pytest.mark.parametrize("model_type", DENSE_TYPES)
every_kind = pytest.mark.parametrize("model_type", KINDS)

# transformers' own property is deprecated, and PEFT reads it for every method.
DEPRECATED = "ignore:.*(is_gradient_checkpointing|gradient_checkpointing_enable).*:FutureWarning"


def base_model(model_type="llama", **options):
    return tiny_model(model_type, layers=3, **options)


def config(model_type="llama", language="mlt_Latn", **options):
    neurons = NeuronSet.from_lists(NEURONS, neurons_per_layer=tiny_neurons(model_type))
    return SubnetworkConfig(neurons=neurons, language=language, **options)


def masters(model, name="default"):
    """All trained values of an adapter."""
    return [master for layer in installed_layers(model) for master in layer.masters(name).values()]


@torch.no_grad()
def move(model, name="default", language="mlt_Latn"):
    """Gives an adapter values of its own, the same for a language wherever it is."""
    generator = torch.Generator().manual_seed(LANGUAGES.index(language))
    for master in masters(model, name):
        master.add_(0.3 * torch.randn(master.shape, generator=generator))
    return model


def tuned(model_type="llama", language="mlt_Latn", name="default", dtype=torch.float32, **options):
    """A PEFT model with one adapter that was changed."""
    model = get_peft_model(base_model(model_type, dtype=dtype), config(model_type, language, **options), name)
    return move(model, name, language)


def tuned_in_several(model_type="llama", languages=LANGUAGES, **options):
    """A PEFT model with an adapter per language, named after it; the first is active."""
    model = tuned(model_type, languages[0], languages[0], **options)
    for language in languages[1:]:
        model.add_adapter(language, config(model_type, language, **options))
        move(model, language, language)
    return model


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 20)[None]).logits


def rows():
    ids = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def state(model):
    return copy.deepcopy(model.state_dict())


def same_state(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def modules(model):
    """What a model is made of; hooks and instance attributes that override a class's show as well."""
    return {
        path: (
            type(module),
            [name for name in ("forward", "_gradient_checkpointing_func") if name in module.__dict__],
            bool(module.__dict__.get("gradient_checkpointing")),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
        )
        for path, module in model.named_modules()
    }
