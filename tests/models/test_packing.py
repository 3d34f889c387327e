"""Whether documents that share a row stay apart, measured for every architecture."""

from __future__ import annotations

import pytest
import torch

from lape_fast.errors import ShapeError
from lape_fast.models import decoder, forward_hidden, supports_packing
from lape_fast.models.layouts import LAYOUTS
from tests.tiny_models import SLIDING_WINDOW, TINY_TYPES, VOCABULARY, tiny_model

# Two rows of three and two documents, longer than the sliding window, with padding behind them.
ROWS = ((20, 25, 3), (30, 12))
COLUMNS = 50
PAD = 2

# What transformers does not offer.
MISSING = {("gemma2", "sdpa"), ("bloom", "sdpa"), ("gpt_oss", "sdpa")}


def packed():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.full((len(ROWS), COLUMNS), PAD)
    position_ids = torch.zeros_like(input_ids)
    places = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            place = (row, slice(start, start + length))
            input_ids[place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
            position_ids[place] = torch.arange(length)
            places.append(place)
            start += length
    return input_ids, position_ids, places


def hidden_per_document(model, input_ids, places):
    return [decoder(model)(input_ids=input_ids[place][None], use_cache=False)[0][0] for place in places]


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, attention) for name in TINY_TYPES for attention in ("sdpa", "eager") if (name, attention) not in MISSING],
)
@torch.no_grad()
def test_the_packing_column_is_what_the_models_do(model_type, attention):
    model = tiny_model(model_type, dtype=torch.float64, attn_implementation=attention)
    assert decoder(model).config._attn_implementation == attention
    input_ids, position_ids, places = packed()
    arguments = {"position_ids": position_ids} if LAYOUTS[model_type].position_ids else {}
    hidden = decoder(model)(input_ids=input_ids, use_cache=False, **arguments)[0]
    separate = hidden_per_document(model, input_ids, places)
    apart = all((hidden[place] - alone).abs().max() < 1e-5 for place, alone in zip(places, separate, strict=True))
    assert apart == LAYOUTS[model_type].packing == supports_packing(model)
    if apart:
        assert torch.equal(forward_hidden(model, input_ids, position_ids), hidden)
    else:
        with pytest.raises(ShapeError, match=f"{model_type} under {attention} attention"):
            forward_hidden(model, input_ids, position_ids)


@pytest.mark.parametrize("model_type", TINY_TYPES)
@torch.no_grad()
def test_one_padded_document_a_row_works_for_all(model_type):
    model = tiny_model(model_type, dtype=torch.float64)
    input_ids, position_ids, places = packed()
    lengths = [place[1].stop - place[1].start for place in places]
    rows = torch.full((len(places), max(lengths)), PAD)
    positions = torch.zeros_like(rows)
    for row, (place, length) in enumerate(zip(places, lengths, strict=True)):
        rows[row, :length] = input_ids[place]
        positions[row, :length] = position_ids[place]
    hidden = forward_hidden(model, rows, positions)
    assert hidden.shape == (*rows.shape, 32)
    for row, alone in enumerate(hidden_per_document(model, input_ids, places)):
        torch.testing.assert_close(hidden[row, : lengths[row]], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_sliding_window_matters_in_these_tests():
    assert min(max(row) for row in ROWS) > SLIDING_WINDOW
    input_ids, position_ids, _ = packed()
    narrow = forward_hidden(tiny_model("mistral"), input_ids, position_ids)
    wide = forward_hidden(tiny_model("mistral", sliding_window=None), input_ids, position_ids)
    assert (narrow - wide).abs().max() > 1e-2


def test_flash_attention_does_not_pack_several_rows():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not supports_packing(model)


@torch.no_grad()
def test_hidden_states_give_the_logits():
    model = tiny_model("llama")
    input_ids, position_ids, _ = packed()
    expected = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    assert torch.equal(model.lm_head(forward_hidden(model, input_ids, position_ids)), expected)
