"""The benchmarks on a model: the rows they write, and what can be counted without a clock. No time is judged."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from benchmarks import count_overhead, identify, languages, train_step
from benchmarks.llama import build_llama, option_parser, random_tokens
from benchmarks.measure import LiveBytes, paired_ratio, saved_bytes
from benchmarks.peers import LORA_RANK
from lape_fast.errors import ConfigError
from lape_fast.files import read_json
from lape_fast.identify.neurons import NeuronSet
from tests.tiny_models import save_tiny

HIDDEN, NEURONS, LAYERS, VOCABULARY, TOKENS, ROUNDS = 256, 320, 4, 500, 24, 5
HEAD_SIZE, HEADS, KEY_HEADS = 64, 4, 1
SIZE = {
    "hidden": HIDDEN,
    "neurons": NEURONS,
    "layers": LAYERS,
    "vocabulary": VOCABULARY,
    "tokens": TOKENS,
    "rounds": ROUNDS,
    "device": "cpu",
}

QKV = HIDDEN * (HEADS + 2 * KEY_HEADS) * HEAD_SIZE
ATTENTION = QKV + HIDDEN * HIDDEN
PROJECTION = HIDDEN * NEURONS
FFN = 3 * PROJECTION
HEAD = HIDDEN * VOCABULARY
LINEAR = LAYERS * (ATTENTION + FFN) + HEAD

# Inputs and outputs of every linear layer but the head, at the adapters' rank.
WIDTHS = (4 * HIDDEN + (2 * HEADS + 2 * KEY_HEADS) * HEAD_SIZE) + 3 * (HIDDEN + NEURONS)
LORA = LORA_RANK * LAYERS * WIDTHS

# Neurons per layer; one layer has none, and the first has some.
SELECTED = (3, 0, 7, 20)


def option_words() -> list[str]:
    """The tests' size as a command line."""
    return [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]


def run(benchmark, folder, *extra: str) -> dict[str, dict]:
    """Runs a benchmark at the tests' size; its rows by name."""
    path = folder / f"{benchmark.__name__}.json"
    benchmark.main([*option_words(), "--json", str(path), *extra])
    rows = read_json(path)
    named = {row["name"]: row for row in rows}
    assert len(named) == len(rows)
    return named


@pytest.fixture(scope="module")
def count_rows(tmp_path_factory):
    return run(count_overhead, tmp_path_factory.mktemp("count"))


@pytest.fixture(scope="module")
def train_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(NEURONS, generator=generator)[:size].sort().values for size in SELECTED]
    neurons = {"mlt_Latn": [[0]] + [[]] * (LAYERS - 1), "cym_Latn": chosen}
    NeuronSet.from_lists(neurons, NEURONS).save(folder / "neurons.safetensors")
    return run(train_step, folder, "--mask", str(folder / "neurons.safetensors"), "--language", "cym_Latn")


def check_times(rows: dict[str, dict], baseline: str) -> None:
    """Ratios, medians and intervals follow from the rounds that are written beside them."""
    times = {name: row["step_ms_of_rounds"] for name, row in rows.items()}
    for name, row in rows.items():
        assert len(times[name]) == ROUNDS and min(times[name]) > 0
        assert row["step_ms"] == statistics.median(times[name])
        ratios = [mine / base for mine, base in zip(times[name], times[baseline], strict=True)]
        assert row[f"ratio_to_{baseline}"] == pytest.approx(statistics.median(ratios))
        low, high = row["ratio_ci"]
        assert min(ratios) - 1e-9 <= low <= row[f"ratio_to_{baseline}"] + 1e-9
        assert row[f"ratio_to_{baseline}"] - 1e-9 <= high <= max(ratios) + 1e-9
    assert rows[baseline]["ratio_ci"] == [1, 1]


def test_count_overhead_rows(count_rows):
    assert set(count_rows) == {"stock", "boolean-hook", "published", "ours", "ours-identify"}
    check_times(count_rows, "stock")
    for row in count_rows.values():
        assert row["tokens_per_s"] == pytest.approx(TOKENS / (row["step_ms"] / 1000))
        assert SIZE.items() <= row["settings"].items()
        assert row["machine"]["torch"] == torch.__version__ and row["machine"]["cpu"]


def test_train_step_rows(train_rows):
    assert set(train_rows) == set(train_step.PEERS)
    check_times(train_rows, "floor")
    for row in train_rows.values():
        assert SIZE.items() <= row["settings"].items()
        assert row["settings"]["language"] == "cym_Latn"
        assert row["machine"]["torch"] == torch.__version__


def test_flops_are_those_of_the_arithmetic(train_rows):
    # Every weight costs 2 operations per token forward, 2 for its input's gradient and 2 for its own.
    attention_forward = 4 * TOKENS * HIDDEN
    attention_backward = 10 * TOKENS * HIDDEN
    forward = 2 * LINEAR + LAYERS * attention_forward
    # Nothing below the first layer's FFN needs a gradient: of that layer only dL/dh is computed.
    above = 2 * (HEAD + (LAYERS - 1) * (ATTENTION + FFN)) + (LAYERS - 1) * attention_backward
    trained = [size for size in SELECTED if size]
    ours = forward + above + 2 * SELECTED[0] * HIDDEN + 2 * 3 * sum(SELECTED) * HIDDEN
    dense = forward + above + 2 * PROJECTION
    # An adapter's two factors cost 6 per weight, but nothing below the first layer's three inputs needs a gradient.
    lora = 6 * LORA - 3 * 2 * LORA_RANK * HIDDEN
    expected = {
        "floor": 4 * LINEAR + LAYERS * (attention_forward + attention_backward),
        "full": 6 * LINEAR + LAYERS * (attention_forward + attention_backward),
        "lora": 4 * LINEAR - 2 * QKV + LAYERS * (attention_forward + attention_backward) + lora,
        "ffn": dense + 2 * LAYERS * FFN,
        "masked": dense + 2 * LAYERS * FFN,
        "clone-scatter": dense + 2 * len(trained) * FFN,
        "ours": ours,
        # Gate and up again, except in the first layer, where the k columns are kept.
        "ours-recompute": ours + 2 * (LAYERS - 1) * 2 * PROJECTION,
        # All of the layers above the first again, but for their down projection.
        "ours-checkpoint": ours + (LAYERS - 1) * (2 * ATTENTION + 2 * 2 * PROJECTION + attention_forward),
        "ours-tune": ours,
    }
    assert {name: train_rows[name]["flops_per_token"] for name in expected} == expected


def test_trainable_counts_what_training_changes(train_rows):
    subnetwork = 3 * HIDDEN * sum(SELECTED)
    norms = (2 * LAYERS + 1) * HIDDEN
    expected = {
        "floor": 0,
        "ours": subnetwork,
        "ours-recompute": subnetwork,
        "masked": subnetwork,
        "clone-scatter": subnetwork,
        "lora": LORA,
        "ffn": LAYERS * FFN,
        "full": LINEAR + HEAD + norms,
    }
    assert {name: train_rows[name]["trainable"] for name in expected} == expected


def test_ours_keeps_less_for_backward(train_rows):
    saved = {name: row["saved_bytes_per_token_layer"] for name, row in train_rows.items()}
    assert saved["ours-recompute"] < saved["ours"] < saved["floor"] < saved["ffn"] < saved["full"]
    # One clone of each FFN weight per trained layer is kept beside what the FFN's training keeps.
    clones = 4 * FFN * 3 / (TOKENS * LAYERS)
    assert saved["clone-scatter"] > clones
    peak = {name: row["peak_bytes"] for name, row in train_rows.items()}
    # AdamW holds two states per weight that it updates, and the gradient is alive with them.
    assert peak["full"] - peak["ours"] > 3 * 4 * (LINEAR + HEAD) * 0.9
    assert peak["masked"] - peak["ours"] > 3 * 4 * LAYERS * FFN * 0.9


def test_a_mask_of_another_size_is_refused(tmp_path):
    NeuronSet.from_lists({"mlt_Latn": [[0]] * LAYERS}, NEURONS + 1).save(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=f"{LAYERS} layers of {NEURONS + 1} neurons"):
        run(train_step, tmp_path, "--mask", str(tmp_path / "other.safetensors"))


def test_a_peer_that_counts_something_else_stops_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(count_overhead, "install_published", lambda model, counts: None)
    with pytest.raises(SystemExit, match="counts of published are wrong"):
        run(count_overhead, tmp_path)


def test_a_peer_that_trains_other_neurons_stops_the_benchmark():
    options = option_parser("", rounds=ROUNDS).parse_args(option_words())
    base, input_ids = build_llama(options), random_tokens(options)
    neurons = [torch.tensor([1, 5])] * LAYERS
    peers = {name: train_step.PEERS[name](base, neurons) for name in ("ffn", "ours", "masked")}
    train_step.check_gradients(peers, input_ids)
    peers["ours"] = train_step.PEERS["ours"](base, [torch.tensor([1, 6])] * LAYERS)
    with pytest.raises(SystemExit, match="gradients of ours are wrong"):
        train_step.check_gradients(peers, input_ids)


@pytest.mark.parametrize(("layers", "width"), [(1, 200), (2, 300), (8, 3584), (32, 14336)])
def test_drawn_subnetwork_has_one_percent_mostly_in_the_last_quarter(layers, width):
    neurons = train_step.draw_neurons(layers, width)
    total = sum(len(chosen) for chosen in neurons)
    assert total == pytest.approx(0.01 * layers * width, rel=0.02, abs=layers)
    assert len(neurons[0]) > 0
    assert sum(len(chosen) for chosen in neurons[-max(1, layers // 4) :]) > 0.8 * total
    for chosen in neurons:
        assert chosen.equal(chosen.unique()) and (not len(chosen) or 0 <= chosen[0] <= chosen[-1] < width)


def test_ratio_pairs_the_rounds():
    # The machine doubles its speed half-way: medians over all rounds would still say 2, one bad round moves nothing.
    ratio, (low, high) = paired_ratio([20, 20, 10, 10, 90], [10, 10, 5, 5, 5])
    assert ratio == 2 and low == 2 and 2 <= high <= 18
    assert paired_ratio([3, 2, 5, 4], [2, 2, 2, 2]) == paired_ratio([3, 2, 5, 4], [2, 2, 2, 2])


def test_saved_bytes_counts_storages_once_and_no_parameters():
    layer = nn.Sequential(nn.Linear(8, 16, bias=False), nn.SiLU(), nn.Linear(16, 4, bias=False))
    other = nn.Linear(4, 4)
    x = torch.randn(5, 8)
    # The input (for the first weight's gradient), its product (for SiLU) and SiLU's (for the second weight's).
    saved = saved_bytes(lambda: other(layer(x)), [layer], [*layer.parameters(), *other.parameters()])
    assert saved == 4 * 5 * (8 + 16 + 16)


def test_live_bytes_follow_results_until_they_are_freed():
    x = torch.ones(1000)
    with LiveBytes() as live:
        y = x * 2
        y.view(10, 100).add_(1)
        del y
        z = (x + 1) * 3
    assert live.peak == 2 * 4000
    assert live.live == 4000
    del z
    assert live.live == 0


@pytest.fixture(scope="module")
def identify_rows(tmp_path_factory):
    small = ["--documents", "2", "--batch-tokens", "128", "--tokens", "64", "--vocabulary", "600"]
    return run(identify, tmp_path_factory.mktemp("identify"), *small)


def test_identify_rows(identify_rows):
    assert list(identify_rows) == list(identify.PEERS)
    check_times(identify_rows, "stock-body")
    rates = {row["tokens_per_s"] * row["step_ms"] for row in identify_rows.values()}
    assert max(rates) == pytest.approx(min(rates))
    for row in identify_rows.values():
        assert row["speed_over_stock_body"] == pytest.approx(1 / row["ratio_to_stock-body"])
        assert row["settings"]["head_share"] == pytest.approx(HIDDEN * 600 / (LAYERS * (ATTENTION + FFN)), rel=0.02)


def test_counting_needs_the_counts_and_one_activation_however_long_the_text_is(identify_rows):
    memory = identify_rows["ours"]["settings"]["memory_bytes"]
    assert memory["tokens_10x"] > 8 * memory["tokens_1x"]
    for times in (1, 10):
        added = memory[f"ours_{times}x"] - memory[f"stock_body_{times}x"]
        assert 0 < added <= memory["counts"] + memory["one_activation"]
    # The stock model's peak grows with its fullest batch, which ours must not exceed by more on a longer text.
    grown = memory["ours_10x"] - memory["ours_1x"], memory["stock_body_10x"] - memory["stock_body_1x"]
    assert grown[0] <= grown[1] + memory["one_activation"]


def test_languages_rows(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for language in ("eng_Latn", "mlt_Latn"):
        (tmp_path / "texts" / f"{language}.txt").write_text(f"{language} always says this.\n" * 120)
    (tmp_path / "texts" / "kat_Geor.txt").write_text("ერთი სიტყვა")
    arguments = ["--model", tmp_path / "base", "--corpus", tmp_path / "texts", "--workspace", tmp_path / "work"]
    arguments += ["--json", tmp_path / "rows.json", "--tokens", 2000, "--thresholds", 0.9, "--context-length", 64]
    languages.main([str(each) for each in [*arguments, "--rule", "percentile:percentile=0.5"]])
    budget, stable = read_json(tmp_path / "rows.json")
    assert budget["tokens_over_budget_run"] == 1.0
    assert (
        budget["agreement_with_budget_run"] == {"least": 1.0, "mean": 1.0, "mean_of_stable": None} or budget["stable"]
    )
    # Every language is in one of the two lists.
    for row in (budget, stable):
        assert sorted(row["stable"] + row["not_yet_stable"]) == ["eng_Latn", "kat_Geor", "mlt_Latn"]
        assert "kat_Geor" in row["not_yet_stable"]
        assert sum(row["ended_by"].values()) == 3
