"""The benchmark of what fp8 changes, at a toy's size: its rows, and what they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import fp8
from lape_fast.files import read_json
from lape_fast.identify import NeuronSet
from lape_fast.models import find_ffns
from lape_fast.study import prepare_text
from lape_fast.text import open_corpus
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer


def test_its_rows(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model", hidden=64, neurons=128)
    words = ["--model", str(folder), "--languages", "mlt_Latn", "deu_Latn", "--train", "1-30", "--test", "31-35"]
    words += ["--steps", "2", "--context-length", "128", "--sign-rows", "2", "--device", "cpu"]
    fp8.main([*words, "--json", str(tmp_path / "fp8.json")])
    assert "A base in fp8" in capsys.readouterr().out
    rows = {row["name"]: row for row in read_json(tmp_path / "fp8.json")}
    assert list(rows) == ["float32", "bfloat16", "fp8"]
    assert rows["bfloat16"]["signs_changed"] == rows["bfloat16"]["loss_change"] == 0
    assert rows["bfloat16"]["jaccard_mean"] == 1
    # bfloat16 keeps 8 digits and fp8 4, so that fewer gates are near enough to 0.
    assert 0 < rows["float32"]["signs_changed"] < rows["fp8"]["signs_changed"] < 0.1
    for row in rows.values():
        assert row["signs_changed"] == pytest.approx(sum(row["signs_changed_by_layer"]) / 2)
        assert set(row["jaccard"]) == {"mlt_Latn", "deu_Latn"} and set(row["losses"]) == {"all", *row["jaccard"]}
        assert 0 <= row["jaccard_least"] <= row["jaccard_mean"] <= 1
        assert all(math.isfinite(row[name]) for name in ("loss", "language_loss", "tuned_loss"))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_the_signs_are_those_of_the_gates(model_type):
    model = tiny_model(model_type)
    corpus = open_corpus("cldr", lines="1-4", languages=["deu_Latn"])
    text = prepare_text(model, tiny_tokenizer(), corpus, context_length=64)
    found = fp8.gate_signs(model, text, rows=1)
    ffn, inputs = find_ffns(model)[1], []
    handle = ffn.original.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(input_ids=text.packed.input_ids[:1])
        handle.remove()
        gate = ffn.project(inputs[0])[0]
    assert torch.equal(found[1], gate[0] > 0) and found.shape == (2, gate.shape[1], ffn.neurons)


def test_agreement_is_of_what_either_selects():
    first = NeuronSet.from_lists({"mlt_Latn": [[1, 2], [3]], "deu_Latn": [[], []]}, 8)
    second = NeuronSet.from_lists({"mlt_Latn": [[2], [3, 4]], "deu_Latn": [[], []]}, 8)
    agreement = fp8.jaccard(first, second)
    assert agreement == {"mlt_Latn": 0.5, "deu_Latn": None} and fp8.mean(agreement.values()) == 0.5
