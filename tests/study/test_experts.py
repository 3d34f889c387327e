"""Switching off neurons of a mixture of experts leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from lape_fast.study import silenced
from tests.tiny_models import EXPERT_TYPES, EXPERTS, tiny_model


@pytest.mark.parametrize("model_type", EXPERT_TYPES)
@torch.no_grad()
def test_silenced_units_contribute_nothing_and_come_back_bit_for_bit(model_type):
    model, ids = tiny_model(model_type), torch.arange(3, 20)[None]
    before, intact = copy.deepcopy(model.state_dict()), model(ids).logits
    zeroed = copy.deepcopy(model)
    # Units 7 of every expert of the first layer, stored [E, F, D] by gpt-oss and [E, D, F] by the others.
    down = zeroed.model.layers[0].mlp.experts.down_proj
    (down if model_type == "gpt_oss" else down.transpose(1, 2))[:, 7] = 0
    expected = zeroed(ids).logits
    with silenced(model, [torch.arange(EXPERTS) * 48 + 7, torch.empty(0, dtype=torch.int64)]):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(expected, intact)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_silenced_units_come_back_after_an_error():
    model = tiny_model("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), silenced(model, [torch.tensor([1, 100]), torch.tensor([239])]):
        assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
