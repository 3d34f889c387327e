"""The command line as a person and a script use it, in one process or as `python -m lape_fast`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lape_fast.cli import app, main
from lape_fast.errors import StoppedError
from lape_fast.identify import ActivationCounts, NeuronSet
from lape_fast.terminal import print_ablation, print_facts, print_neurons
from tests.report.samples import matrix_of
from tests.tiny_models import save_tiny

TEXTS = {
    "mlt_Latn": "Il-qattus numru {} qagħad fuq it-tapit.",
    "eng_Latn": "The cat number {} sat on the mat.",
    "rus_Cyrl": "Кошка номер {} сидела на коврике.",
}
LOOSE_RULE = ["--rule", "lape:top_rate=0.5,filter_rate=0.5,activation_bar=0.5"]
COMMANDS = [
    "identify",
    "count",
    "merge-counts",
    "select",
    "tune",
    "evaluate",
    "ablate",
    "align",
    "weights",
    "steer",
    "study",
    "merge",
    "publish",
    "atlas",
    "convert",
    "corpora",
    "info",
    "doctor",
    "demo",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base, a corpus, and what `identify` makes of them."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "base")
    (folder / "texts").mkdir()
    for language, line in TEXTS.items():
        lines = "\n".join(line.format(number) for number in range(30))
        (folder / "texts" / f"{language}.txt").write_text(lines, encoding="utf-8")
    (folder / "texts" / "README.md").write_text("not a language\n")
    run(*identify(folder), *LOOSE_RULE)
    return folder


def identify(folder, output="out"):
    model, corpus = str(folder / "base"), str(folder / "texts")
    return ["identify", "--model", model, "--corpus", corpus, "--output", str(folder / output), "--lines", "1-20"]


def run(*arguments) -> str:
    """Runs a command in this process and returns what it printed on standard output."""
    import contextlib
    import io

    output = io.StringIO()
    arguments = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(output):
        try:
            app(arguments, prog_name="lape-fast")
        except SystemExit as stop:
            assert not stop.code, output.getvalue()
    return output.getvalue()


def failure(monkeypatch, capsys, *arguments) -> str:
    """Runs a command that must fail, and returns its one sentence."""
    monkeypatch.setattr(sys, "argv", ["lape-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def test_identify_writes_both_files_and_info_reads_them(workplace):
    counts = ActivationCounts.load(workplace / "out" / "counts.safetensors")
    assert counts.languages == sorted(TEXTS)
    facts = json.loads(run("info", workplace / "out" / "neurons.safetensors", "--json"))
    assert facts["languages"] == sorted(TEXTS)
    assert (facts["layers"], facts["neurons_per_layer"]) == (2, 48)
    assert set(facts["per_language"]) == set(TEXTS)
    assert max(facts["per_language"].values()) <= facts["union"] <= sum(facts["per_language"].values())
    assert json.loads(run("info", workplace / "out" / "counts.safetensors", "--json"))["languages"] == sorted(TEXTS)


def test_the_neurons_of_a_quantised_model_are_of_its_base(workplace):
    run(*identify(workplace, "out-nf4"), "--quantise", "nf4", *LOOSE_RULE)
    names = [workplace / out / "counts.safetensors" for out in ("out", "out-nf4")]
    plain, quantised = map(ActivationCounts.load, names)
    assert quantised.metadata["config_hash"] == plain.metadata["config_hash"]
    assert quantised.metadata["weights_hash"] != plain.metadata["weights_hash"]
    assert not torch.equal(quantised.positive, plain.positive)
    evaluate = ["evaluate", "--model", workplace / "base", "--corpus", workplace / "texts", "--json"]
    plain, quantised = (json.loads(run(*evaluate, *options))["base"] for options in ([], ["--quantise", "int8"]))
    for language in TEXTS:
        exact, rounded = plain[language]["bits_per_byte"], quantised[language]["bits_per_byte"]
        assert exact != rounded == pytest.approx(exact, rel=0.05)


def test_count_then_select_equals_identify(workplace):
    counts = workplace / "only-counts.safetensors"
    model, corpus = workplace / "base", workplace / "texts"
    run("count", "--model", model, "--corpus", corpus, "--output", counts, "--lines", "1-20")
    run("select", counts, "--output", workplace / "selected.safetensors", *LOOSE_RULE)
    selected = load_file(workplace / "selected.safetensors")
    identified = load_file(workplace / "out" / "neurons.safetensors")
    assert all(torch.equal(selected[name], identified[name]) for name in identified)


def test_select_can_leave_languages_out(workplace):
    counts = workplace / "out" / "counts.safetensors"
    printed = run(
        "select", counts, "--output", workplace / "two.safetensors", "--languages", "mt,en", *LOOSE_RULE, "--json"
    )
    assert set(json.loads(printed)["languages"]) == {"mlt_Latn", "eng_Latn"}


def test_select_writes_a_file_per_rule_into_a_folder(workplace):
    counts, folder = workplace / "out" / "counts.safetensors", workplace / "selections"
    rules = ["--rule", "lape:top_rate=0.1/0.5", "--rule", "budget:neurons=5,floor=0,exclusive", "--rule", "paper"]
    summaries = json.loads(run("select", counts, *rules, "--output", folder, "--json"))
    names = ["lape-top0.1", "lape-top0.5", "budget-5-floor0.0-exclusive", "lape-top0.05"]
    assert list(summaries) == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.safetensors" for name in names)
    for name in names:
        facts = json.loads(run("info", folder / f"{name}.safetensors", "--json"))
        assert facts["metadata"]["name"] == name
        assert facts["per_language"] == summaries[name]["per_language"]
    alone = workplace / "alone.safetensors"
    run("select", counts, "--rule", "lape:top_rate=0.5", "--output", alone)
    one, many = NeuronSet.load(alone), NeuronSet.load(folder / "lape-top0.5.safetensors")
    assert one.fingerprint() == many.fingerprint() and one.metadata == many.metadata


def test_a_measured_selectivity_is_printed_with_the_selection(workplace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    counts, path = workplace / "out" / "counts.safetensors", workplace / "measured.safetensors"
    command = ["select", counts, "--rule", "budget:neurons=5,floor=0"]
    assert "own cost" not in run(*command, "--output", path)
    costs = {"own": 0.75, "over_next_worst": -0.125, "over_mean_of_others": None}
    ablation = {
        "neurons_fingerprint": NeuronSet.load(path).fingerprint(),
        "selectivity": {"mlt_Latn": costs},
        "mean_selectivity": costs,
    }
    file = workplace / "elsewhere.json"
    file.write_text(json.dumps(ablation))
    assert "own cost" not in run("info", path)
    again = [*command, "--ablation", file, "--output"]
    assert re.search(r"\+0\.7500 │ +-0\.1250 │ +│", run(*again, workplace / "again.safetensors"))
    assert json.loads(run(*again, workplace / "json.safetensors", "--json"))["selectivity"] == {"mlt_Latn": costs}
    printed = run(*again, workplace / "several", "--rule", "paper")
    assert "Mean over the languages" in printed and re.search(r"\+0\.7500 +-0\.1250 ", printed)

    (workplace / "measured.ablation.json").write_text(json.dumps(ablation))
    printed = run("info", path)
    assert "Maltese" in printed and "over mean of others" in printed and "+0.7500" in printed
    assert json.loads(run("info", path, "--json"))["selectivity"] == {"mlt_Latn": costs}
    # Neurons that were not the ones measured.
    (workplace / "measured.ablation.json").write_text(json.dumps({**ablation, "neurons_fingerprint": "another"}))
    assert "own cost" not in run("info", path)


def test_several_selections_fit_a_terminal_of_80_columns_uncut(workplace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rule = "budget:neurons=10/11/12/13,floor=0.1,exclusive,layers=0-1"
    printed = run("select", workplace / "out" / "counts.safetensors", "--rule", rule, "--output", workplace / "narrow")
    lines = printed.splitlines()
    for number in (10, 11, 12, 13):
        (row,) = [line for line in lines if line.startswith(f"budget-{number}-floor0.1-exclusive-layers0-1 ")]
        neurons = NeuronSet.load(workplace / "narrow" / f"{row.split()[0]}.safetensors")
        sizes = sorted(neurons.per_language().values())
        shown = [neurons.union_count(), *sizes, sizes.count(0)]
        assert row.split()[1:] == list(map(str, shown))
    assert max(map(len, lines)) <= 80 and "…" not in printed


@pytest.mark.parametrize("columns", [20, 30, 44, 60])
def test_no_terminal_is_so_narrow_that_a_figure_is_cut(workplace, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    file = workplace / "out" / "counts.safetensors"
    counts = ActivationCounts.load(file)
    printed = run("info", file).partition("interval")[2]
    for language, tokens in zip(counts.languages, counts.tokens.tolist(), strict=True):
        assert re.search(rf"│ {language} │ \w+ +│ +{tokens:,} │ unknown │", printed)


def test_info_tells_where_a_file_comes_from_in_a_fixed_order_and_in_short(workplace):
    file = workplace / "out" / "counts.safetensors"
    printed = run("info", file)
    metadata = json.loads(run("info", file, "--json"))["metadata"]
    rows = [line.split("│")[1].strip() for line in printed.partition("ended by")[0].splitlines() if "│" in line]
    rows = [row for row in rows if row]
    assert rows == sorted(rows) and "seed" not in rows and "skipped files" not in rows
    assert metadata["config_hash"][:12] in printed and metadata["config_hash"][:13] not in printed
    assert len(metadata["config_hash"]) == 64
    flat = "".join(printed.replace("│", "").split())
    assert f"corpus{metadata['corpus']['spec']},lines1-20dtype" in flat
    assert f"{metadata['speed']['tokens_per_s']:,.0f} tokens/s in" in printed


def test_tune_evaluate_and_merge(workplace):
    base, texts = workplace / "base", workplace / "texts"
    neurons, adapter = workplace / "out" / "neurons.safetensors", workplace / "adapter"
    common = ["--model", base, "--corpus", texts]
    facts = json.loads(
        run(
            *("tune", *common, "--neurons", neurons, "--language", "mt", "--output", adapter, "--lines", "1-20"),
            *("--validation-lines", "21-25", "--steps", 8, "--learning-rate", "0.01", "--context-length", 64),
            "--json",
        )
    )
    assert facts["trainable"] == facts["neurons"] * 3 * 32
    scores = json.loads(run("evaluate", *common, "--adapter", adapter, "--lines", "26-30", "--json"))
    assert scores["adapter"]["mlt_Latn"]["bits_per_byte"] < scores["base"]["mlt_Latn"]["bits_per_byte"]
    run("merge", "--model", base, "--adapter", adapter, "--output", workplace / "merged")
    merged = json.loads(
        run("evaluate", "--model", workplace / "merged", "--corpus", texts, "--lines", "26-30", "--json")
    )
    for language in TEXTS:
        tuned = scores["adapter"][language]["bits_per_byte"]
        assert merged["base"][language]["bits_per_byte"] == pytest.approx(tuned, rel=1e-5)
    assert "Maltese" in run("info", adapter) or "mlt_Latn" in run("info", adapter)


def test_ablate_writes_three_files_beside_the_neurons_and_a_repeated_command_nothing(workplace):
    folder = workplace / "out"
    command = ["ablate", "--model", workplace / "base", "--corpus", workplace / "texts", "--lines", "26-30"]
    command += ["--neurons", folder / "neurons.safetensors"]
    matrix = json.loads(run(*command, "--json"))
    assert matrix["evaluated"] == sorted(TEXTS)
    files = [folder / f"neurons.ablation.{suffix}" for suffix in ("json", "csv", "png")]
    assert json.loads(files[0].read_text()) == matrix
    assert files[1].read_text().count("\n") == 10
    assert files[2].read_bytes().startswith(b"\x89PNG")
    before = [file.stat().st_mtime_ns for file in files]
    printed = run(*command)
    assert f"{len(matrix['hits_own_hardest'])} of 3 languages are hit hardest" in printed
    assert f"{matrix['selectivity']['mlt_Latn']['over_next_worst']:+.4f}" in printed
    assert before == [file.stat().st_mtime_ns for file in files]
    # A picture that is missing beside a finished matrix is drawn again.
    files[2].unlink()
    run(*command)
    assert files[2].exists()


def test_align_and_weights_before_and_after_an_adapter(workplace, monkeypatch, capsys):
    base, texts, adapter = workplace / "base", workplace / "texts", workplace / "mlt-tuned"
    run(
        *("tune", "--model", base, "--corpus", texts, "--neurons", workplace / "out" / "neurons.safetensors"),
        *("--language", "mt", "--output", adapter, "--lines", "1-20", "--steps", 2, "--context-length", 64),
    )
    command = ["align", "--model", base, "--corpus", texts, "--lines", "1-20", "--target", "mt", "--adapter", adapter]
    measured = json.loads(run(*command, "--output", workplace / "alignment.json", "--json"))
    stored = json.loads((workplace / "alignment.json").read_text())
    assert {name: stored[name] for name in measured} == measured
    assert list(measured["stages"]) == ["base", "mlt-tuned"] and measured["languages"] == ["eng_Latn", "rus_Cyrl"]
    assert (workplace / "alignment.png").read_bytes().startswith(b"\x89PNG")
    printed = run(*command, "--output", workplace / "again.json", "--languages", "rus_Cyrl", "--pivot", "ru")
    assert "mlt-tuned: mlt_Latn against rus_Cyrl" in printed and "20 sentences" in printed
    assert "exists already" in failure(monkeypatch, capsys, *command, "--output", workplace / "again.json")

    measured = json.loads(run("weights", adapter, "--output", workplace / "weights.json", "--json"))
    assert {row["projection"] for row in measured["totals"]} == {"gate", "up", "down"}
    assert all(row["norm"] > 0 for row in measured["totals"])
    assert (workplace / "weights.png").exists() and (workplace / "weights.svg").exists()
    printed = run("weights", adapter, "--model", base, "--output", workplace / "weights-again.json")
    assert f"{measured['totals'][0]['norm']:.4g}" in printed
    assert "a JSON file" in failure(monkeypatch, capsys, "weights", adapter, "--output", workplace / "weights.csv")


def test_steer_prints_and_counts_what_was_written(workplace, monkeypatch, capsys):
    command = ["steer", "--model", workplace / "base", "--neurons", workplace / "out" / "neurons.safetensors"]
    command += ["--language", "mt", "--corpus", workplace / "texts", "--max-new-tokens", 4]
    (workplace / "prompts.txt").write_text("The cat\n\nIl-qattus\n")
    output = workplace / "steering.json"
    options = ["--prompts", workplace / "prompts.txt", "--prompt", "It", "--replace", "--output", output]
    measured = json.loads(run(*command, *options, "--json"))
    assert measured["prompts"] == ["It", "The cat", "Il-qattus"] and measured["replaced"]
    assert len(measured["steered"]) == 3 and 0 <= measured["steered_accuracy"] <= 1
    assert (workplace / "steering.png").exists()
    printed = run(*command, "--scale", 3, "--prompt", "The cat")
    assert "with (" in printed and "In mlt_Latn: " in printed
    assert "--scale" in failure(monkeypatch, capsys, *command, "--prompt", "The cat")
    assert "0 prompts" in failure(monkeypatch, capsys, *command, "--scale", 3)
    assert "no language" in failure(
        monkeypatch, capsys, *command, "--scale", 3, "--prompt", "a", "--language", "nld_Latn", "--languages", "mt"
    )


def test_a_language_without_neurons_has_no_part_in_the_mean_of_an_ablation(capsys):
    costs = torch.tensor([[0.25, 0.125], [0.0, 0.0]])
    languages = ["mlt_Latn", "eng_Latn"]
    print_ablation(matrix_of(languages, languages, costs, [3, 0]), as_json=False)
    printed = capsys.readouterr().out
    assert re.search(r"mean +│ +3\.0 │ +\+0\.2500 │ +\+0\.1250 │ +\+0\.1250 │", printed)
    assert re.search(r"eng_Latn +│ +0 │ +│ +│ +│", printed)
    assert "1 has no neurons" in " ".join(printed.split())


def test_control_c_is_one_sentence_and_the_exit_code_of_an_interruption(workplace):
    corpus, output = workplace / "long", workplace / "interrupted.json"
    corpus.mkdir()
    for language, line in TEXTS.items():
        (corpus / f"{language}.txt").write_text("\n".join(line.format(number) for number in range(3000)))
    command = ["ablate", "--model", workplace / "base", "--corpus", corpus, "--output", output]
    command += ["--neurons", workplace / "out" / "neurons.safetensors", "--context-length", 32, "--batch-tokens", 32]
    process = subprocess.Popen(
        [sys.executable, "-m", "lape_fast", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    # The intact model's row is saved, and three languages' are to come.
    while not output.with_name("interrupted.json.partial").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.endswith("Interrupted; the same command goes on from what is saved.\n")
    assert "Traceback" not in errors and "Error" not in errors


def test_a_run_that_was_asked_to_stop_made_no_error(monkeypatch, capsys):
    def stop(*_):
        raise StoppedError("The run was asked to stop.")

    monkeypatch.setattr("lape_fast.information.describe_installation", stop)
    monkeypatch.setattr(sys, "argv", ["lape-fast", "info"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (130, "The run was asked to stop.\n")


def test_an_interrupt_before_the_command_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[main.__module__], "app", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")


def test_parts_of_a_count_merge_into_the_whole(workplace):
    command = ["count", "--model", workplace / "base", "--corpus", workplace / "texts", "--lines", "1-20"]
    for number in (1, 2):
        run(*command, "--part", f"{number}/2", "--output", workplace / "parts" / f"{number}.safetensors")
    printed = run("merge-counts", *sorted((workplace / "parts").iterdir()), "--output", workplace / "merged-counts")
    assert "3 languages" in printed and "Maltese" in printed
    whole = ActivationCounts.load(workplace / "out" / "counts.safetensors")
    merged = ActivationCounts.load(workplace / "merged-counts").restrict(whole.languages)
    assert torch.equal(merged.tokens, whole.tokens)
    assert merged.metadata["stability"].keys() == whole.metadata["stability"].keys()


def test_torchrun_counts_what_one_process_counts(workplace):
    """The same settings as the fixture's identify, in two processes that each hold a share of the model."""
    output = workplace / "shared" / "counts.safetensors"
    arguments = ["--model", workplace / "base", "--corpus", workplace / "texts", "--lines", "1-20", "--output", output]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lape_fast", "count", *arguments, "--fsdp", "--json"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    # Only one process prints and writes.
    assert json.loads(done.stdout)["languages"] == sorted(TEXTS)
    assert [path.name for path in output.parent.iterdir()] == ["counts.safetensors"]
    alone = ActivationCounts.load(workplace / "out" / "counts.safetensors")
    assert torch.equal(ActivationCounts.load(output).tokens, alone.tokens)
    assert torch.equal(ActivationCounts.load(output).positive, alone.positive)


def test_count_says_how_fast_it_was_what_it_skipped_and_how_stable_each_language_is(workplace, monkeypatch, capsys):
    texts = workplace / "damaged"
    texts.mkdir()
    (texts / "mlt_Latn.txt").write_bytes(b"Il-qattus.\n\xff\n")
    (texts / "eng_Latn.txt").write_text("The cat.\n" * 200)
    command = ["count", "--model", workplace / "base", "--corpus", texts, "--output", workplace / "damaged-counts"]
    assert "--skip-bad-files" in failure(monkeypatch, capsys, *command)
    printed = run(*command, "--skip-bad-files", "--until-stable", "0.9", "--rule", "percentile:percentile=0.5")
    assert "English" in printed and "halves agree" in printed and "unknown" in printed
    assert "not yet: " in printed and "mlt_Latn" in printed.partition("not yet: ")[2]
    errors = capsys.readouterr().err
    assert "of the time." in errors and "mlt_Latn.txt" in errors and "0xff" in errors


def test_languages_without_neurons_are_counted_and_a_way_out_is_named(capsys):
    lists = {"mlt_Latn": [[1], [2, 3]], "isl_Latn": [[], []], "eng_Latn": [[], []]}
    print_neurons(NeuronSet.from_lists(lists, neurons_per_layer=48), as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 3 languages have no neurons" in printed and "--rule budget" in printed
    print_neurons(NeuronSet.from_lists({"mlt_Latn": [[1], [2, 3]]}, neurons_per_layer=48), as_json=False)
    assert "have no neurons" not in capsys.readouterr().out


def test_publish_lays_out_a_release_that_reads_back(workplace):
    folder, release = workplace / "out", workplace / "release"
    command = ["publish", release, "--counts", folder / "counts.safetensors", "--license", "cc0-1.0"]
    command += ["--neurons", folder / "neurons.safetensors"]
    printed = run(*command)
    assert "hf upload OWNER/NAME" in printed
    index = json.loads((release / "release.json").read_text())
    assert index["license"] == "cc0-1.0"
    neurons = NeuronSet.from_pretrained(release)
    assert neurons.fingerprint() == NeuronSet.load(folder / "neurons.safetensors").fingerprint()
    assert "counts.safetensors" in {file.name for file in release.iterdir()}


def test_convert_goes_to_the_published_format_and_back(workplace):
    neurons = workplace / "out" / "neurons.safetensors"
    run("convert", neurons, "--output", workplace / "mask.pth")
    lists = torch.load(workplace / "mask.pth", weights_only=True)
    assert [len(layers) for layers in lists] == [2] * len(TEXTS)
    run(
        *("convert", workplace / "mask.pth", "--languages", ",".join(sorted(TEXTS)), "--neurons-per-layer", 48),
        *("--output", workplace / "back.safetensors"),
    )
    first, second = load_file(neurons), load_file(workplace / "back.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_configuration_file_sets_defaults_and_flags_override_it(workplace):
    config = workplace / "select.yaml"
    config.write_text("languages: mt,en\nrule: lape:top_rate=0.5,filter_rate=0.5\n")
    counts = workplace / "out" / "counts.safetensors"
    command = ["select", counts, "--config", config, "--json", "--output"]
    facts = json.loads(run(*command, workplace / "config.safetensors"))
    assert (facts["metadata"]["name"], facts["languages"]) == ("lape-top0.5-filter0.5", ["mlt_Latn", "eng_Latn"])
    facts = json.loads(run(*command, workplace / "override.safetensors", "--rule", "tang"))
    assert (facts["metadata"]["name"], facts["languages"]) == ("lape-top0.01", ["mlt_Latn", "eng_Latn"])


def test_errors_are_one_sentence_without_a_traceback(workplace, monkeypatch, capsys):
    counts, neurons = workplace / "out" / "counts.safetensors", workplace / "out" / "neurons.safetensors"
    base, texts = workplace / "base", workplace / "texts"
    bad = workplace / "bad.yaml"
    bad.write_text("top_rte: 0.5\n")
    listed = workplace / "listed.yaml"
    listed.write_text("languages: [mt, en]\n")
    bad_json, other = workplace / "bad.json", workplace / "other.json"
    bad_json.write_text("[1]")
    other.write_text(json.dumps({"neurons_fingerprint": "another", "selectivity": {}, "mean_selectivity": {}}))
    tune = ["tune", "--model", base, "--corpus", texts, "--output", workplace / "new"]
    (workplace / "taken.png").touch()
    (workplace / "drawn.svg").touch()
    ablate = ["ablate", "--model", base, "--corpus", texts, "--neurons", neurons]
    count = ["count", "--model", base, "--output", workplace / "n.safetensors"]
    for arguments, words in (
        (["info", workplace / "missing.safetensors"], "does not exist"),
        (["select", counts, "--output", neurons], "exists already"),
        (["select", counts, "--output", workplace / "n.safetensors", "--rule", "lape:top_rate=7"], "top_rate"),
        (["select", counts, "--output", workplace / "n.safetensors", "--rule", "entropy"], "'entropy'"),
        (["select", counts, "--output", workplace / "n.safetensors", "--rule", "lape:layers=0-2"], "2 layers"),
        (["select", counts, "--output", workplace / "n.safetensors", "--ablation", bad_json], "holds no ablation"),
        (["select", counts, "--output", workplace / "n.safetensors", "--ablation", other], "other neurons"),
        (["select", counts, "--output", workplace / "n.safetensors", "--config", bad], "top_rte"),
        (["select", counts, "--output", workplace / "n.safetensors", "--config", bad], "are ablation, counts, lang"),
        (["select", counts, "--output", workplace / "n.safetensors", "--config", listed], "with commas between them"),
        (["select", neurons, "--output", workplace / "n.safetensors"], "'neurons'"),
        (["convert", workplace / "x.pth", "--output", workplace / "n.safetensors"], "--languages"),
        ([*tune, "--neurons", neurons, "--language", "deu_Latn"], "deu_Latn"),
        ([*tune, "--neurons", neurons, "--language", "mlt_Latn", "--method", "magic"], "'magic'"),
        ([*tune[:-2], "--neurons", neurons, "--language", "mlt_Latn"], "--output"),
        ([*tune, "--neurons", neurons, "--language", "mlt_Latn", "--dry-run", "--gpu", "RTX 1"], "RTX 1"),
        (["evaluate", "--model", workplace / "nowhere", "--corpus", texts], "nowhere"),
        (["evaluate", "--model", base, "--corpus", workplace / "nowhere"], "nowhere"),
        # Told before the base is loaded and measured: neither is there.
        (["evaluate", "--model", "no/model", "--adapter", workplace / "nowhere"], "is not an adapter folder"),
        (["evaluate", "--model", base, "--corpus", texts, "--quantise", "gptq"], "use one of nf4, int8, torchao-int8"),
        ([*count, "--quantise", "nf4", "--fsdp"], "cannot be quantised as nf4"),
        (["publish", texts, "--counts", counts, "--neurons", neurons], "texts exists already"),
        (["publish", workplace / "new", "--counts", neurons, "--neurons", neurons], "'neurons'"),
        (["info", workplace / "out"], "counts.safetensors, or an adapter folder"),
        (["info", texts], "is not an adapter folder"),
        ([*ablate, "--output", workplace / "ablation.csv"], "ending in .json"),
        ([*ablate, "--output", workplace / "taken.json"], "taken.png exists already"),
        ([*ablate, "--output", workplace / "drawn.json"], "drawn.svg exists already"),
        (["weights", workplace / "out", "--output", workplace / "drawn.json"], "drawn.svg exists already"),
    ):
        sentence = failure(monkeypatch, capsys, *arguments)
        assert sentence.startswith("Error: "), sentence
        assert words in sentence
        assert sentence.strip().endswith((".", ").")), sentence
    assert not (workplace / "n.safetensors").exists()
    assert not (workplace / "new").exists()


def test_debug_shows_the_traceback(workplace, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lape-fast", "info", str(workplace / "missing.safetensors"), "--debug"])
    with pytest.raises(Exception, match="does not exist"):
        main()


def test_facts_are_told_in_short(capsys):
    memory = {"policy": "save", "measured": "allocated", "predicted_bytes": 3 * 2**20, "measured_bytes": None}
    facts = {"seconds": 1.8844975150004757, "memory": memory, "neurons": ["1 5 7", "", "2"]}
    print_facts("adapter", facts, as_json=False)
    printed = capsys.readouterr().out
    assert "1.8845 " in printed
    assert "policy save; 3.0 MiB predicted, none measured" in printed
    assert "4 in 2 of 3 layers" in printed


def test_help_breaks_lines_at_the_width_of_the_terminal_only(monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    assert "The same command resumes an interrupted run." in run("identify", "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    printed = run(command, "--help")
    assert f"lape-fast {command}" in printed
    assert "Example" in printed


def test_python_m_is_the_same_program_and_info_tells_what_is_here():
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "lape_fast", "info", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"]
    assert {"cpu_backend", "gpu_backend", "gpus"} <= facts.keys()


def test_known_corpora_are_listed():
    rows = json.loads(run("corpora", "--json"))
    assert {"glotcc", "fineweb-2", "wikipedia"} <= {row["name"] for row in rows}
    printed = run("corpora")
    assert all(row["name"] in printed and row["note"].split()[0] in printed for row in rows)


def test_help_starts_without_loading_torch():
    code = "import sys, lape_fast.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["False", "False"]


def test_the_version_is_the_packages():
    import lape_fast

    assert run("--version").strip() == lape_fast.__version__


def test_methods_are_compared_on_one_base(workplace):
    common = ["--model", workplace / "base", "--corpus", workplace / "texts"]
    short = ["--steps", 3, "--context-length", 32, "--rows-per-step", 2, "--learning-rate", "0.01", "--lines", "1-20"]
    folders = {}
    for method in ("lora:rank=2", "ffn", "random-per-layer"):
        folder = folders[method] = workplace / f"by-{method.partition(':')[0]}"
        needed = ["--neurons", workplace / "out" / "neurons.safetensors"] if method.startswith("random") else []
        watched = ["--validation-lines", "21-25", "--others", "eng,rus", "--evaluate-every", 2]
        tune = ("tune", *common, *short, *watched, *needed, "--language", "mt", "--method", method)
        facts = json.loads(run(*tune, "--output", folder, "--json"))
        assert facts["method"].startswith(method)
        assert (folder / "training-dynamics.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "training-dynamics.svg").exists()
        page = (folder / "report.html").read_text()
        assert f"Maltese: {facts['method']}" in page and f"{facts['trainable']:,} weights" in page
        assert all(name in page for name in ("English", "Russian", str(workplace / "texts")))
        records = [json.loads(line) for line in (folder / "dynamics.jsonl").read_text().splitlines()]
        assert records[0]["measured"].keys() == TEXTS.keys()
        assert json.loads(run("info", folder, "--json"))
    adapters = [part for folder in folders.values() for part in ("--adapter", folder)]
    scores = json.loads(run("evaluate", *common, *adapters, "--lines", "26-30", "--json"))
    assert list(scores) == ["base", "by-lora", "by-ffn", "by-random-per-layer"]
    alone = json.loads(run("evaluate", *common, "--adapter", folders["ffn"], "--lines", "26-30", "--json"))
    assert alone["adapter"] == scores["by-ffn"] and alone["base"] == scores["base"]
    values = [scores[name]["mlt_Latn"]["bits_per_byte"] for name in ("base", "by-ffn")]
    table = run("evaluate", *common, *adapters, "--lines", "26-30")
    assert f"{values[1]:.4f} ({values[1] - values[0]:+.4f})" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lorra"], "did you mean 'lora'?"),
        (["--method", "masked"], "trains chosen neurons, but none were given"),
        (["--method", "ffn", "--dry-run"], "plans the memory of subnetwork, random, random-per-layer only"),
        (["--method", "ffn", "--others", "eng"], "is measured on the validation lines"),
    ],
)
def test_wrong_methods_are_refused_before_a_model_is_loaded(options, message, workplace, monkeypatch, capsys):
    command = ["tune", "--model", workplace / "nowhere", "--language", "mt", "--output", workplace / "none", *options]
    assert message in " ".join(failure(monkeypatch, capsys, *command).split())


def test_atlas_writes_a_page_of_what_identify_found(workplace, tmp_path, monkeypatch, capsys):
    page = tmp_path / "atlas.html"
    files = [workplace / "out" / f"{name}.safetensors" for name in ("neurons", "counts")]
    facts = json.loads(run("atlas", *files, "--output", page, "--json"))
    assert facts["languages"] == len(TEXTS) and page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "exists already" in failure(monkeypatch, capsys, "atlas", *files, "--output", page)
