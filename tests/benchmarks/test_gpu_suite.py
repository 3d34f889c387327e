"""The GPU suite, rehearsed at toy size on the CPU through the code that a GPU runs. No time is judged."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import STAGES, correctness, identification, kernels
from benchmarks.gpu.__main__ import available, main
from benchmarks.gpu.goals import GOALS, worst_values
from benchmarks.gpu.shapes import (
    LANGUAGES,
    LLAMA_8B,
    MISTRAL_12B,
    PUBLISHED_LANGUAGES,
    SIZES,
    build_model,
    choose_neurons,
    load_masks,
)
from benchmarks.gpu.stage import NotMeasured, Stage
from lape_fast.files import read_json, write_json
from lape_fast.identify import NeuronSet, export_masks
from lape_fast.ops import gated_activation, gated_activation_backward, indexed_adamw_, linear_cross_entropy

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[2]
STATUSES = {"measured", "out of memory", "not measured", "failed"}

# What an installation may lack; the last two are the native extensions.
MAY_BE_MISSING = ["datasets", "babel", "typer", "rich", "peft", "bitsandbytes", "torchao", "liger_kernel", "pytest"]
MAY_BE_MISSING += ["lape_fast._C", "lape_fast._host"]
REHEARSAL = f"""
import sys
for name in {MAY_BE_MISSING!r}:
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from benchmarks.gpu.__main__ import main
code = max(main(["--stage", name, "--output", sys.argv[1]]) for name in sys.argv[2:])
from lape_fast.ops.backend import EXTENSION_LOADED
assert not EXTENSION_LOADED
sys.exit(code)
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[str, dict]:
    """Every stage, in a process that has torch, triton and transformers and nothing else."""
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-W", "ignore", "-c", REHEARSAL, str(folder), *available()]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-4000:]
    results = {path.stem: read_json(path) for path in folder.glob("*.json")}
    results["output"] = finished.stdout
    return results


def test_every_stage_writes_its_rows(rehearsal):
    assert set(available()) >= {"correctness", "kernels", "identification"}
    # A GPU machine gives few files back.
    assert len(STAGES) <= 8
    for name in available():
        stage = rehearsal[name]
        assert {"device", "torch", "triton", "transformers", "commit", "code", "backend"} <= set(stage["machine"])
        assert stage["settings"] == {"size": "toy", "masks": []}
        assert stage["rows"], name
        keys = [row["key"] for row in stage["rows"]]
        assert len(set(keys)) == len(keys)
        for row in stage["rows"]:
            assert row["status"] in STATUSES - {"failed"}, row
            assert row["status"] != "not measured" or row["why"]
            assert set(row.get("goals", {})) <= set(GOALS)
            # Rounds are in the file alone.
            assert row["key"] in rehearsal["output"] or "round" in row


def test_correctness_holds_without_the_extension(rehearsal):
    statuses = {row["key"]: row["status"] for row in rehearsal["correctness"]["rows"]}
    # Only a GPU compiles.
    assert statuses.pop("compilations") == "not measured"
    assert set(statuses.values()) == {"measured"}
    assert set(statuses) == set(correctness.CHECKS) - {"compilations"}


def test_bandwidths_follow_from_bytes_and_times(rehearsal):
    rows = {row["key"]: row for row in rehearsal["kernels"]["rows"]}
    copied = rows["copy"]["bytes_per_s"]
    neurons = SIZES["toy"][0].neurons
    for row in rows.values():
        if "bytes" not in row:
            continue
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / (row["ms"] / 1000))
        if "of_copy" in row:
            assert row["of_copy"] == pytest.approx(row["bytes_per_s"] / copied)
    tokens = kernels.TOKENS["toy"][0]
    # Two bytes an element: three tensors forward, five backward.
    assert rows[f"gated_activation, {tokens} tokens, not counting"]["bytes"] == 6 * tokens * neurons
    assert rows[f"gated_activation_backward, {tokens} tokens, 0 selected"]["bytes"] == 10 * tokens * neurons
    assert worst_values(rows.values())["forward-bandwidth"] == min(
        row["of_copy"] for key, row in rows.items() if key.startswith("gated_activation,")
    )


def test_identification_rows(rehearsal):
    rows = rehearsal["identification"]["rows"]
    overheads = [row for row in rows if row["key"].startswith("count overhead")]
    assert {(row["model"], row["tokens"], row["languages"]) for row in overheads} == {
        (shape.name, tokens, languages)
        for shape in SIZES["toy"]
        for tokens in identification.PASSES["toy"]
        for languages in (1, 16)
    }
    for row in overheads:
        peers = {peer["name"]: peer for peer in row["peers"]}
        assert set(peers) == {"stock", "boolean-hook", "published", "uncounted", "ours", "ours-identify"}
        assert row["added_by_counting"] == pytest.approx(peers["ours"]["ratio_to_uncounted"] - 1)
        assert peers["stock"]["ratio_to_stock"] == peers["uncounted"]["ratio_to_uncounted"] == 1
    for row in rows:
        if row["key"].startswith("identification"):
            ours = next(peer for peer in row["peers"] if peer["name"] == "ours")
            assert ours["of_roofline"] == pytest.approx(ours["tokens_per_s"] / row["roofline_tokens_per_s"])
            assert row["tokens"] > 0
    assert {"count-overhead", "identify-roofline", "identify-over-hooks"} <= set(worst_values(rows))


def test_the_roofline_is_the_one_of_the_formula():
    # The figures of the published configurations, by hand: 2 * (32 * 218.1 M - 117.4 M) + 2 * 4096 * 4096 * 32.
    assert identification.operations_per_token(LLAMA_8B, 4096) == pytest.approx(14.80e9, rel=1e-3)
    assert identification.operations_per_token(MISTRAL_12B, 4096) == pytest.approx(22.86e9, rel=3e-3)


def test_models_have_the_published_sizes():
    sizes = {shape.name: build_model(shape, torch.device("meta"), torch.bfloat16) for shape in (LLAMA_8B, MISTRAL_12B)}
    parameters = {name: sum(each.numel() for each in model.parameters()) for name, model in sizes.items()}
    assert parameters == {"llama-3.1-8b": 8_030_261_248, "mistral-nemo-12b": 12_247_782_400}
    for shape in (*SIZES["toy"], LLAMA_8B, MISTRAL_12B):
        assert {len(sizes) for sizes in shape.selected.values()} == {shape.layers}


def test_models_are_random_and_built_where_they_stay():
    model = build_model(SIZES["toy"][0], CPU, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
        assert "norm" in name or 0.01 < parameter.float().std() < 0.05


def test_masks_come_from_files_that_fit_and_else_are_drawn(tmp_path):
    toy, other = SIZES["toy"]
    wide = NeuronSet.from_lists({"mlt_Latn": [[1, 5], [], [3]]}, toy.neurons)
    wide.save(tmp_path / "neurons.safetensors")
    published = NeuronSet.from_lists({code: [[number]] * 32 for number, code in enumerate(PUBLISHED_LANGUAGES)}, 14336)
    export_masks(published, tmp_path / "published.pth")
    options = argparse.Namespace(masks=load_masks([tmp_path / "neurons.safetensors", tmp_path / "published.pth"]))
    neurons, source = choose_neurons(options, toy, "mlt_Latn")
    assert [chosen.tolist() for chosen in neurons] == [[1, 5], [], [3]] and source == "neurons.safetensors"
    neurons, source = choose_neurons(options, LLAMA_8B, "kat_Geor")
    assert [chosen.tolist() for chosen in neurons] == [[10]] * 32 and source == "published.pth"
    for shape in (LLAMA_8B, MISTRAL_12B, toy):
        for language in LANGUAGES:
            neurons, source = choose_neurons(argparse.Namespace(masks=[]), shape, language)
            assert source == "synthetic"
            assert tuple(map(len, neurons)) == shape.selected[language]
            for chosen in neurons:
                assert chosen.equal(chosen.unique()) and (not len(chosen) or chosen[-1] < shape.neurons)


# What stands for broken kernels: the real ones, with a fault in a single place of what they leave behind.
def wrong_h(*arguments):
    h = gated_activation(*arguments)
    h[-1, -1] += 1
    return h


def wrong_count(gate, up, activation, language_ids=None, counts=None):
    h = gated_activation(gate, up, activation, language_ids, counts)
    if counts is not None:
        counts[-1, -1] += 1
    return h


def wrong_frozen_gradient(grad_h, gate, up, activation, slots, selected):
    results = gated_activation_backward(grad_h, gate, up, activation, slots, selected)
    gate[-1, 0] += 1
    return results


def wrong_compact_gradient(*arguments):
    hidden, grads = gated_activation_backward(*arguments)
    return hidden, grads.roll(1, 1)


def wrong_compact_h(*arguments):
    hidden, grads = gated_activation_backward(*arguments)
    return hidden.roll(1, 0), grads


def wrong_frozen_weight(weights, *arguments, **options):
    indexed_adamw_(weights, *arguments, **options)
    weights[-1][1, -1] += 1


def wrong_master(weights, neurons, grads, masters, *arguments, **options):
    indexed_adamw_(weights, neurons, grads, masters, *arguments, **options)
    masters[0][0, 0] += 1e-4
    weights[0][neurons[0][0], 0] = masters[0][0, 0]


def wrong_loss(*arguments):
    return 1.1 * linear_cross_entropy(*arguments)


def wrong_gradient(model, input_ids, neurons, policy):
    gradients = correctness.subnetwork_gradients(model, input_ids, neurons, policy)
    if policy == "checkpoint":
        gradients[-1][0] *= 2
    return gradients


WRONG: dict[str, list[dict[str, Any]]] = {
    "gated_activation": [{"op": wrong_h}],
    "counts": [{"op": wrong_count}],
    "beyond 2^31 elements": [
        {"forward": wrong_count},
        {"forward": wrong_h},
        {"backward": wrong_compact_h},
        {"backward": wrong_compact_gradient},
    ],
    "gated_activation_backward": [
        {"op": wrong_frozen_gradient},
        {"op": wrong_compact_gradient},
        {"op": wrong_compact_h},
    ],
    "indexed_adamw_": [{"op": wrong_frozen_weight}, {"op": wrong_master}],
    "linear_cross_entropy": [{"op": wrong_loss}],
    "subnetwork gradients": [{"gradients": wrong_gradient}],
    "frozen weights": [{"trained": [chosen[1:] for chosen in correctness.toy_neurons(CPU)]}],
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, each in WRONG.items() for wrong in each])
def test_a_check_fails_where_one_value_is_wrong(name, wrong):
    with pytest.raises(AssertionError):
        correctness.CHECKS[name](CPU, **wrong)


def test_every_check_is_seen_failing_but_the_one_that_needs_a_gpu():
    assert set(WRONG) == set(correctness.CHECKS) - {"compilations"}


def new_stage(path: Path, seconds: float = 60, **facts: str) -> Stage:
    return Stage("some", path, seconds, CPU, {"code": "a", "device": "b", **facts}, {"size": "toy"})


def test_a_second_call_goes_on_where_the_first_ended(tmp_path):
    path = tmp_path / "some.json"
    runs = []

    def measure(stage: Stage) -> list[dict | None]:
        return [stage.measure(key, lambda key=key: runs.append(key) or {"value": key}, label=1) for key in "xyz"]

    first = new_stage(path)
    assert [row["value"] for row in measure(first)] == ["x", "y", "z"]
    # In the file at once, not at the end.
    assert [row["key"] for row in read_json(path)["rows"]] == ["x", "y", "z"]
    again = new_stage(path)
    assert [row["value"] for row in measure(again)] == ["x", "y", "z"]
    assert runs == ["x", "y", "z"]
    # Other code is another measurement.
    assert new_stage(path, code="c").rows == []
    measure(new_stage(path, code="c"))
    assert len(runs) == 6


def test_out_of_time_is_written_and_measured_by_the_next_call(tmp_path):
    path = tmp_path / "some.json"
    late = new_stage(path, seconds=0)
    assert late.measure("x", lambda: {"value": 1}, tokens=5) is None
    (row,) = read_json(path)["rows"]
    assert row == {"key": "x", "tokens": 5, "status": "not measured", "why": "out of time"}
    assert not late.failed
    later = new_stage(path)
    assert later.measure("x", lambda: {"value": 1}, tokens=5)["value"] == 1
    assert [row["status"] for row in read_json(path)["rows"]] == ["measured"]


def test_what_stops_a_measure_is_told_apart(tmp_path, capsys):
    stage = new_stage(tmp_path / "some.json")

    def raises(error: BaseException) -> Callable:
        def function() -> dict:
            raise error

        return function

    def imports_nothing_known() -> dict:
        import a_library_that_nobody_has  # noqa: F401

        return {}

    stage.measure("memory", raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")))
    stage.measure("triton", raises(RuntimeError("Triton Error [CUDA]: out of memory")))
    stage.measure("library", imports_nothing_known)
    stage.measure("here", raises(NotMeasured("there is no GPU")))
    stage.measure("own", raises(ImportError("cannot import", name="lape_fast.nothing")))
    stage.measure("wrong", raises(ValueError("The loss is 3.\nAnd more.")))
    stage.measure("stopped", raises(SystemExit("The counts are wrong.")))
    assert stage.measure("after", lambda: {"value": 1})
    rows = {row["key"]: (row["status"], row.get("why")) for row in read_json(stage.path)["rows"]}
    assert rows == {
        "memory": ("out of memory", None),
        "triton": ("out of memory", None),
        "library": ("not measured", "a_library_that_nobody_has is not installed"),
        "here": ("not measured", "there is no GPU"),
        "own": ("failed", "ImportError: cannot import"),
        "wrong": ("failed", "ValueError: The loss is 3."),
        "stopped": ("failed", "SystemExit: The counts are wrong."),
        "after": ("measured", None),
    }
    assert stage.failed == ["own", "wrong", "stopped"]
    assert "ValueError: The loss is 3." in capsys.readouterr().err


def test_out_of_memory_frees_what_the_measure_held(tmp_path):
    held = []

    class Held:
        def __init__(self):
            held.append(self)

        def __del__(self):
            freed.append(True)

    freed: list[bool] = []

    def function() -> dict:
        big = Held()
        held.clear()
        raise torch.OutOfMemoryError(f"CUDA out of memory beside {big}")

    new_stage(tmp_path / "some.json").measure("x", function)
    assert freed == [True]


def test_a_failing_measure_ends_the_command_with_one(tmp_path, monkeypatch):
    failing = {"right": lambda device: None, "wrong": lambda device: correctness.check_large(device, forward=wrong_h)}
    monkeypatch.setattr(correctness, "CHECKS", failing)
    arguments = ["--stage", "correctness", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 1
    statuses = [row["status"] for row in read_json(tmp_path / "correctness.json")["rows"]]
    assert statuses == ["measured", "failed"]
    # What failed is measured again.
    failing["wrong"] = failing["right"]
    assert main(arguments) == 0


def test_no_time_leaves_a_file_that_says_so(tmp_path):
    assert main(["--stage", "identification", "--device", "cpu", "--output", str(tmp_path), "--seconds", "0"]) == 0
    rows = read_json(tmp_path / "identification.json")["rows"]
    assert len(rows) > 10 and {row["why"] for row in rows} == {"out of time"}


def test_the_worst_value_of_a_goal_counts():
    rows = [{"goals": {"forward-bandwidth": 0.9, "count-overhead": 0.001}}, {}]
    rows.append({"goals": {"forward-bandwidth": 0.8, "count-overhead": 0.01}})
    assert worst_values(rows) == {"forward-bandwidth": 0.8, "count-overhead": 0.01}
    assert not GOALS["forward-bandwidth"].reached(0.8) and GOALS["forward-bandwidth"].reached(0.85)
    assert GOALS["count-overhead"].reached(0.005) and not GOALS["count-overhead"].reached(0.0051)


def write_gpu_result(folder: Path, size: str, share: float) -> None:
    rows = [{"key": "x", "status": "measured", "goals": {"forward-bandwidth": share}}]
    write_json(folder / "kernels.json", {"machine": {"device": "A GPU"}, "settings": {"size": size}, "rows": rows})


def test_tables_are_up_to_date():
    from benchmarks import tables

    assert tables.main(["--check"]) == 0


def test_tables_show_what_a_gpu_reached(tmp_path):
    from benchmarks import tables

    (tmp_path / "cpu").mkdir()
    assert "| not measured |" in tables.goals_table(tmp_path)
    write_gpu_result(tmp_path / "a-gpu", "toy", 0.99)
    assert "A GPU" not in tables.goals_table(tmp_path)
    write_gpu_result(tmp_path / "a-gpu", "true", 0.9)
    lines = tables.goals_table(tmp_path).splitlines()
    assert lines[0] == "| | goal | A GPU |"
    assert lines[2].endswith("| at least 85 % | **90 %** |") and lines[3].endswith("| not measured |")
    write_gpu_result(tmp_path / "a-gpu", "true", 0.8)
    assert tables.goals_table(tmp_path).splitlines()[2].endswith("| at least 85 % | 80 % |")


def test_a_table_that_is_out_of_date_or_unknown_is_noticed(tmp_path, capsys):
    from benchmarks import tables

    text = (REPOSITORY / "README.md").read_text()
    document = tmp_path / "README.md"
    document.write_text(text.replace("| stock | ", "| stock | 1"))
    arguments = ["--document", str(document)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "make tables" in capsys.readouterr().err
    assert tables.main(arguments) == 0 and document.read_text() == text
    with pytest.raises(ValueError, match="no table 'other'"):
        tables.with_tables(f"{text}\n<!-- table:other -->\n<!-- /table -->", REPOSITORY / "benchmarks" / "results")
    with pytest.raises(ValueError, match="stands 0 times"):
        tables.with_tables("", REPOSITORY / "benchmarks" / "results")
