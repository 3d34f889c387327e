"""The benchmarks of the training engine at a small size: what they count is what the arithmetic says."""

from __future__ import annotations

import pytest

from benchmarks import adapter, flops, saved_bytes
from lape_fast.files import read_json

TOKENS = 16


def rows_of(benchmark, path, *arguments):
    benchmark.main([*map(str, arguments), "--json", str(path)])
    return {row["name"]: row for row in read_json(path)}


def test_a_block_keeps_its_input_and_under_save_gate_and_up(monkeypatch, tmp_path):
    hidden, neurons = 64, 160
    monkeypatch.setitem(saved_bytes.WIDTHS, "Llama-3.1-8B", (hidden, neurons, 4, 2, 16))
    rows = rows_of(saved_bytes, tmp_path / "saved.json", "--tokens", TOKENS)
    block = {name: row["block_bytes_per_token"] for name, row in rows.items()}
    # Two bytes a value: stock keeps gate, up and silu(gate); with trained weights also the input and h.
    assert block["frozen"] == 2 * 3 * neurons
    assert block["ffn"] == 2 * (4 * neurons + hidden)
    assert block["ours-save"] == 2 * (2 * neurons + hidden)
    assert block["ours-recompute"] == 2 * hidden
    layer = {name: row["layer_bytes_per_token"] for name, row in rows.items()}
    assert layer["ours-checkpoint"] == 2 * hidden
    assert layer["ours-save"] - layer["ours-recompute"] == 2 * 2 * neurons
    assert layer["ours-save"] < layer["frozen"] < layer["ffn"]


def test_operations_are_those_of_the_formula_less_the_lowest_layers_input(monkeypatch, tmp_path):
    layers, hidden, neurons, heads, kv_heads, head, vocabulary = 3, 64, 160, 4, 2, 16, 96
    sizes = (layers, hidden, neurons, heads, kv_heads, head, vocabulary)
    monkeypatch.setitem(flops.MODELS, "Llama-3.1-8B", sizes)
    rows = rows_of(flops, tmp_path / "flops.json", "--tokens", TOKENS)
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head
    layer, head_size, chosen = attention + 3 * hidden * neurons, hidden * vocabulary, 98
    formula = 4 * (layers * layer + head_size) + 2 * layers * 3 * chosen * hidden
    # The lowest trained layer forms dL/dh of its k neurons alone, and no gradient of its input.
    lowest = 2 * layer - 2 * chosen * hidden
    assert rows["ours-save"]["flops_per_token"] == formula - lowest
    assert rows["ours-recompute"]["flops_per_token"] == formula - lowest + (layers - 1) * 2 * 2 * hidden * neurons
    again = (layers - 1) * 2 * (attention + 2 * hidden * neurons)
    assert rows["ours-checkpoint"]["flops_per_token"] == formula - lowest + again
    assert rows["full"]["flops_per_token"] == 6 * (layers * layer + head_size)
    assert rows["floor"]["flops_per_token"] == pytest.approx(4 * (layers * layer + head_size))


def test_an_adapter_is_its_values_and_little_else(monkeypatch, tmp_path):
    for name, value in {"LAYERS": 2, "HIDDEN": 256, "NEURONS": 512, "SELECTED": 128}.items():
        monkeypatch.setattr(adapter, name, value)
    rows = rows_of(adapter, tmp_path / "adapter.json", "--rounds", 2)
    assert set(rows) == {"write", "peft-save", "set-adapter", "load", "peft-load"}
    values = 2 * 128 * 3 * 256 * 2
    # The configuration and the header: a few kilobytes at this size, nothing that grows with D.
    assert values < rows["write"]["bytes"] < values + 8192
    assert rows["peft-save"]["bytes"] > 2 * values
