"""The benchmark of the loss: its rows, and what they need beside each other. No time is judged."""

from __future__ import annotations

import pytest
import torch

from benchmarks import loss
from lape_fast.files import read_json

TOKENS, HIDDEN, VOCABULARY = 600, 8, 700
ARGUMENTS = ["--tokens", TOKENS, "--hidden", HIDDEN, "--vocabulary", VOCABULARY, 40, "--rounds", 3, "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows(tmp_path, dtype):
    path = tmp_path / "loss.json"
    loss.main([str(each) for each in [*ARGUMENTS, "--dtype", dtype, "--json", path]])
    rows = read_json(path)
    peers = loss.losses(getattr(torch, dtype))
    assert [row["name"] for row in rows] == [f"{size} {peer}" for size in (VOCABULARY, 40) for peer in peers]
    for row in rows:
        assert len(row["step_ms_of_rounds"]) == 3 and row["settings"]["dtype"] == dtype
        assert row["machine"]["torch"] == torch.__version__
    peak = {row["peer"]: row["peak_bytes"] for row in rows if row["vocabulary"] == VOCABULARY}
    logits = TOKENS * VOCABULARY * (4 if dtype == "float32" else 2)
    assert peak["plain"] > 2 * logits
    if dtype == "bfloat16":
        assert peak["transformers"] > 5 * logits
    # A chunk of logits, in bf16 also in fp32; the gradient; and a few numbers per row.
    chunk = 256 * VOCABULARY * (4 if dtype == "float32" else 2 + 4)
    # What oneDNN reorders for its 16-bit products.
    scratch = 2**16 if dtype == "bfloat16" else 0
    assert chunk < peak["ours-256"] < chunk + TOKENS * (3 * HIDDEN + 20) * 4 + scratch
    assert peak["ours-256"] < peak["ours-512"] < peak["ours-1024"] == peak["ours-2048"]


def test_a_peer_with_another_loss_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(loss, "linear_cross_entropy", lambda *inputs: loss.plain(*inputs[:2], inputs[2].flip(0)))
    with pytest.raises(SystemExit, match="gradient of ours-256 is wrong"):
        loss.main([str(each) for each in ARGUMENTS])
