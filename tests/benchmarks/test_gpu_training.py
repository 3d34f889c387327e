"""The stages of training and of memory at toy size on the CPU: their rows, and what becomes of wrong or large peers."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import peers
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import memory, steps, training
from benchmarks.gpu.losses import round_stochastically
from benchmarks.gpu.shapes import LLAMA_8B, TOY_LLAMA
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.steps import Case, Workbench, check_gradients, run_case
from lape_fast.files import read_json

CPU = torch.device("cpu")
OPTIONS = argparse.Namespace(size="toy", masks=[])
FACTS = {"code": "0", "device": "cpu"}
SELECTED = sum(TOY_LLAMA.selected["mlt_Latn"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of both stages."""
    folder, found = tmp_path_factory.mktemp("suite"), {}
    for stage in ("training", "memory"):
        arguments = ["--stage", stage, "--size", "toy", "--device", "cpu", "--output", str(folder)]
        assert suite.main(arguments) == 0
        found[stage] = read_json(folder / f"{stage}.json")["rows"]
    return found


@pytest.fixture
def bench(tmp_path) -> Workbench:
    return Workbench(Stage("training", tmp_path / "training.json", 1000, CPU, FACTS), OPTIONS)


def by_peer(rows: list[dict], policy: str, model: str = TOY_LLAMA.name) -> dict[str, dict]:
    """The rows that sum up the rounds of one long row."""
    length = training.BATCHES["toy"][0][1]
    wanted = {"model": model, "policy": policy, "length": length, "language": "mlt_Latn"}
    return {row["peer"]: row for row in rows if wanted.items() <= row.items() and "round" not in row and "peer" in row}


@pytest.mark.parametrize("policy", training.POLICIES)
def test_every_peer_has_a_row(rows, policy):
    found = by_peer(rows["training"], policy)
    assert list(found) == list(training.POLICIES[policy])
    for name, row in found.items():
        assert row["status"] == "measured"
        assert row["tokens_per_s"] == pytest.approx(row["rows"] * row["length"] / row["step_ms"] * 1000)
        assert row["neurons_per_layer"] == list(TOY_LLAMA.selected["mlt_Latn"]) and row["mask"] == "synthetic"
        assert row["ratio"] == pytest.approx(row["step_ms"] / found[row["baseline"]]["step_ms"])
        assert row["mfu_of_product"] > 0 and row["dtype"] == "bfloat16"
        assert row["allocated_gib"] or name == "shira"


def test_the_rows_say_what_is_trained_and_what_it_takes(rows):
    found = by_peer(rows["training"], "default")
    for name in ("ours-save", "ours-recompute", "ours-checkpoint", "masked", "clone-scatter"):
        assert found[name]["trainable"] == 3 * SELECTED * TOY_LLAMA.hidden
    assert found["floor-fused"]["trainable"] == 0
    # SHiRA's number of values is a multiple of a projection's inputs and outputs, here more than were asked for.
    assert found["shira"]["trainable"] == 3 * TOY_LLAMA.layers * (TOY_LLAMA.hidden + TOY_LLAMA.neurons)
    peak = {name: row["allocated_gib"] for name, row in found.items()}
    assert peak["ours-save"] < peak["masked"] < peak["full"]
    # Gradients and two moments in bf16 of all FFN weights.
    dense = 3 * 2 * 3 * TOY_LLAMA.layers * TOY_LLAMA.hidden * TOY_LLAMA.neurons / 2**30
    assert peak["masked"] - peak["ours-save"] > 0.8 * dense


def test_the_goals_are_in_the_rows(rows):
    found = {}
    for row in [*rows["training"], *rows["memory"]]:
        found |= row.get("goals", {})
    assert found.keys() == {
        "step-over-floor", "faster-than-masked", "faster-than-clone-scatter", "faster-than-full", "faster-than-lora",
        "peak-12b-8x2048", "peak-12b-save", "peak-12b-checkpoint", "peak-12b-nf4", "fp8-step",
    }  # fmt: skip


def test_profile_losses_and_optimizers(rows):
    found = {row["key"]: row for row in rows["training"]}
    kernels = found["toy-llama profile"]["kernels"]
    assert 1 < len(kernels) <= training.TOP
    assert [row["share"] for row in kernels] == sorted((row["share"] for row in kernels), reverse=True)
    assert sum(row["share"] for row in kernels) <= 1 + 1e-9
    for vocabulary in (300, 340):
        assert {"plain", "transformers", "ours-1024"} <= found[f"loss 64 x {vocabulary}"]["peers"].keys()
    ways = found["updates that arrive at lr 1e-05"]["ways"]
    # Most updates are less than half of bf16's step, so they are lost without masters; masters keep all of them.
    assert ways["bf16 after 20"]["arrived"] < 0.5 < ways["stochastic after 20"]["arrived"]
    assert ways["fp32 master after 20"]["moved"] > 2 * ways["bf16 after 20"]["moved"]
    assert found["toy-llama optimizer"]["peers"].keys() == {"ours", "torch", "torch and write"}


def test_memory_stands_beside_what_was_predicted(rows):
    found = {row["key"]: row for row in rows["memory"]}
    length = memory.LENGTH["toy"]
    for weights in ("bfloat16", "nf4", "int8"):
        small, large = (found[f"toy-llama {weights} in {cap:g} GiB"] for cap in memory.CAPS["toy"])
        assert 0 < small["rows"] * small["length"] < large["rows"] * large["length"] and large["length"] == length
        assert large["allocated_gib"] <= large["gib"]
        # The search ends between a batch that fits and one that does not.
        sizes = {fits: [int(batch.partition("x")[0]) for batch in large["tried"] if large["tried"][batch] is fits]
                 for fits in (True, False)}  # fmt: skip
        assert max(sizes[True]) == large["rows"] < min(sizes[False])
        # At this size tensors that no formula counts are a visible part.
        assert large["predicted_rows"] == pytest.approx(large["rows"], abs=2)
        assert large["predicted_gib"] == pytest.approx(large["allocated_gib"], rel=0.1)
    peaks = [row for row in rows["memory"] if "peak" in row["key"]]
    assert peaks[0]["allocated_gib"] > peaks[1]["allocated_gib"] > peaks[2]["allocated_gib"]


def test_rounds_go_back_and_forth_and_leave_the_base_as_it_was(bench):
    names = ("ours-save", "masked", "full", "lora")
    base = bench.base(TOY_LLAMA)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    run_case(bench, toy_case({name: (name, {}) for name in names}, rounds=2))
    measured = [row["peer"] for row in bench.stage.rows if "round" in row]
    assert measured == [*names, *reversed(names)]
    for name, weight in base.named_parameters():
        assert weight.equal(before[name]) and not weight.requires_grad and weight.grad is None
    row = next(row for row in bench.stage.rows if row["key"].endswith("masked"))
    rounds = {(row["peer"], row["round"]): row["step_ms"] for row in bench.stage.rows if "round" in row}
    ratios = [rounds["masked", number] / rounds["ours-save", number] for number in (0, 1)]
    assert row["ratio"] == pytest.approx(sum(ratios) / 2)


def toy_case(table: dict, rounds: int = 1, rows: int = 4) -> Case:
    return Case(TOY_LLAMA, rows, 16, "mlt_Latn", table, next(iter(table)), rounds)


def test_a_peer_that_trains_other_neurons_is_not_timed(bench):
    def prepare_other(model, neurons):
        return peers.prepare_ours(model, [(chosen + 1) % TOY_LLAMA.neurons for chosen in neurons])

    table = {"ours": ("ours-save", {}), "other": (peers.Method(prepare_other, peers.ffn_weights), {})}
    found = check_gradients(bench, TOY_LLAMA, "mlt_Latn", table)
    assert found["wrong"] == ["other"]
    assert found["errors"]["ours"] <= steps.ERROR_BUDGET * found["dense_error"] < found["errors"]["other"]
    run_case(bench, toy_case(table), found["wrong"])
    status = {row["key"].split()[-1]: row["status"] for row in bench.stage.rows if "round" not in row}
    assert status == {"ours": "measured", "other": "failed"}
    assert len(bench.stage.failed) == 2


def test_a_peer_out_of_memory_is_rerun_at_its_largest_batch(bench):
    def prepare_large(model, neurons):
        peer = peers.prepare_masked(model, neurons)
        backward = peer.backward

        def limited(input_ids):
            loss = backward(input_ids)
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("more than 2 rows")
            return loss

        peer.backward = limited
        return peer

    table = {"ours": ("ours-save", {}), "large": (peers.Method(prepare_large, peers.ffn_weights), {})}
    before = bench.base(TOY_LLAMA).lm_head.weight.clone()
    run_case(bench, toy_case(table, rounds=2, rows=8))
    found = {row["key"].removeprefix("toy-llama 8x16 mlt_Latn "): row for row in bench.stage.rows}
    assert "large round 1" not in found and found["ours round 1"]["status"] == "measured"
    for key in ("large round 0", "large", "large at 4x16"):
        assert found[key]["status"] == "out of memory"
    assert found["large at 2x16"]["status"] == "measured" and found["large at 2x16"]["largest_batch"] == [2, 16]
    assert "large at 1x16" not in found and not bench.stage.failed
    assert bench.base(TOY_LLAMA).lm_head.weight.equal(before)
    assert not any(weight.requires_grad for weight in bench.base(TOY_LLAMA).parameters())


def test_a_missing_library_is_not_measured(bench):
    def prepare_missing(model, neurons):
        raise ImportError("No module named 'peft'", name="peft")

    table = {"ours": ("ours-save", {}), "lora": (peers.Method(prepare_missing), {})}
    assert check_gradients(bench, TOY_LLAMA, "mlt_Latn", table)["wrong"] == []
    run_case(bench, toy_case(table))
    lora = [row for row in bench.stage.rows if row["peer"] == "lora"]
    assert {(row["status"], row["why"]) for row in lora} == {("not measured", "peft is not installed")}
    assert not bench.stage.failed


def test_useful_operations_are_those_of_the_weights_that_are_trained():
    multiplied = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128_256
    attention = 3.5 * 32 * 2 * 2048 * 4096
    full = steps.useful_flops(LLAMA_8B, "full", 8_030_261_248, 2048)
    assert full == 6 * multiplied + attention
    assert steps.useful_flops(LLAMA_8B, "masked", 1000, 2048) == 4 * multiplied + 2000 + attention
    assert steps.useful_flops(LLAMA_8B, "lora", 1000, 2048) == 4 * multiplied + 6000 + attention


@pytest.mark.parametrize("largest", [0, 1, 2, 9, 15, 16, 300])
@pytest.mark.parametrize("guess", [0, 1, 14, 1000])
def test_the_search_finds_the_largest_that_fits(largest, guess):
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= largest

    found = memory.find_largest(fits, guess)
    assert largest - largest // 16 <= found <= largest
    assert len(tried) < 25 and min(tried) >= 1


def test_stochastic_rounding_keeps_the_mean():
    values = torch.full((100_000,), 1 + 2**-9)  # a quarter of bf16's step above 1
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    # Five standard deviations of the mean of so many coins.
    assert rounded.mean().item() == pytest.approx(1 + 2**-9, abs=5 * 2**-7 * (3 / 16 / 100_000) ** 0.5)
