"""The ablation matrix: its figures, its files, and runs that are stopped at any moment."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time

import pandas
import pytest
import torch

from lape_fast.errors import ArchitectureError, ConfigError, FileExistsAlreadyError, FileFormatError, LanguageError
from lape_fast.identify import NeuronSet
from lape_fast.study import AblationMatrix, ablate_neurons, ablate_to_file, prepare_text, score, silenced
from lape_fast.text import open_corpus
from tests.report.samples import matrix_of
from tests.test_cli import run
from tests.tiny_models import quantised_tiny_model, save_tiny, tiny_model, tiny_tokenizer

TEXTS = {
    "deu_Latn": ["Die Katze saß auf der Matte.", "Guten Morgen!"],
    "eng_Latn": ["The cat sat on the mat.", "Good morning, everybody.", "yes"],
    "mlt_Latn": ["Il-qattus qagħad fuq it-tapit.", "Bonġu!"],
    "rus_Cyrl": ["Кошка сидела на коврике."],
}
NEURONS = {
    "deu_Latn": [[3, 4], [9]],
    "eng_Latn": [[], []],
    "fra_Latn": [[2], [2]],
    "mlt_Latn": [[1, 5, 40], [0, 2]],
    "rus_Cyrl": [[], [7, 8, 11]],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for language, lines in TEXTS.items():
        (tmp_path / "texts" / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def neurons():
    return NeuronSet.from_lists(NEURONS, neurons_per_layer=48)


@pytest.fixture
def model():
    return tiny_model()


def text_of(folder, model, **options):
    return prepare_text(model, tiny_tokenizer(), open_corpus(str(folder / "texts")), context_length=64, **options)


class Passes:
    """Counts a model's forward passes, and stops the run as Ctrl-C would before one of them."""

    def __init__(self, model, stop_before=None):
        self.count = 0
        self.stop_before = stop_before
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, *_):
        if self.count == self.stop_before:
            self.handle.remove()
            raise KeyboardInterrupt
        self.count += 1


def test_every_cell_is_the_score_without_those_neurons(folder, model, neurons):
    text = text_of(folder, model)
    matrix = ablate_neurons(model, neurons, text)
    # French has neurons and no text; English has text and no neurons.
    assert matrix.ablated == matrix.evaluated == tuple(TEXTS)
    assert matrix.neurons == (3, 0, 5, 3)
    base = score(model, text)
    for row, language in enumerate(matrix.ablated):
        with silenced(model, neurons[language]):
            without = score(model, text)
        for column, other in enumerate(matrix.evaluated):
            before, after = base[other], without[other]
            assert float(matrix.cost[row, column]) == after.bits_per_byte - before.bits_per_byte
            assert float(matrix.perplexity[row, column]) == pytest.approx(
                math.exp(after.nats / after.tokens), rel=1e-14
            )
            assert float(matrix.base_perplexity[column]) == pytest.approx(before.perplexity, rel=1e-14)
    english = matrix.ablated.index("eng_Latn")
    assert not matrix.cost[english].any() and matrix.cost[0].any()
    assert "eng_Latn" not in matrix.hits_own_hardest()


def test_chosen_languages_in_any_spelling(folder, model, neurons):
    text = text_of(folder, model)
    assert ablate_neurons(model, neurons, text, ["mt", "fra_Latn"]).ablated == ("mlt_Latn", "fra_Latn")
    spelled = NeuronSet.from_lists({"mt": NEURONS["mlt_Latn"]}, neurons_per_layer=48)
    assert ablate_neurons(model, spelled, text).ablated == ("mlt_Latn",)
    for wanted in (["swh_Latn"], []):
        with pytest.raises(LanguageError):
            ablate_neurons(model, neurons, text, wanted)


def test_neurons_of_another_model_are_refused_before_anything_is_measured(folder, model):
    passes = Passes(model)
    with pytest.raises(ArchitectureError, match="3 layers"):
        ablate_neurons(model, NeuronSet.from_lists({"mt": [[1]] * 3}, 48), text_of(folder, model))
    assert passes.count == 0


def test_a_quantised_model_is_refused_before_anything_is_measured(folder):
    model = quantised_tiny_model("nf4", neurons=64)
    passes = Passes(model)
    with pytest.raises(ArchitectureError, match="down projection of layer 0 is quantised"):
        ablate_neurons(model, NeuronSet.from_lists(NEURONS, neurons_per_layer=64), text_of(folder, model))
    assert passes.count == 0


def test_selectivity_of_a_hand_made_matrix():
    languages = ["mlt_Latn", "eng_Latn", "rus_Cyrl"]
    cost = torch.tensor([[0.50, 0.20, 0.10], [0.30, 0.10, -0.10], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    matrix = matrix_of([*languages, "fra_Latn"], languages, cost, [5, 5, 0, 2])
    selectivity = matrix.selectivity()
    expected = {
        "mlt_Latn": {"own": 0.50, "over_next_worst": 0.30, "over_mean_of_others": 0.35},
        "eng_Latn": {"own": 0.10, "over_next_worst": -0.20, "over_mean_of_others": 0.0},
        "rus_Cyrl": {"own": 0.0, "over_next_worst": 0.0, "over_mean_of_others": 0.0},
    }
    # The costs were given in fp32, and French was not measured.
    assert {language: pytest.approx(found, abs=1e-6) for language, found in selectivity.items()} == expected
    mean = {"own": 0.2, "over_next_worst": 0.1 / 3, "over_mean_of_others": 0.35 / 3}
    assert matrix.mean_selectivity() == pytest.approx(mean, abs=1e-6)
    assert matrix.hits_own_hardest() == ["mlt_Latn"]


def test_with_one_language_there_is_nothing_to_compare():
    matrix = matrix_of(["mlt_Latn"], ["mlt_Latn"], torch.tensor([[0.5]]), [1])
    found = matrix.selectivity()["mlt_Latn"]
    assert found["own"] == pytest.approx(0.5)
    assert (
        found["over_next_worst"] is found["over_mean_of_others"] is matrix.mean_selectivity()["over_next_worst"] is None
    )
    assert matrix.hits_own_hardest() == []


def test_the_table_holds_every_cell_in_full(folder, model, neurons):
    matrix = ablate_neurons(model, neurons, text_of(folder, model))
    path = folder / "ablation.csv"
    matrix.save_csv(path)
    with path.open(newline="") as file:
        cells = {(line["ablated"], line["evaluated"]): line for line in csv.DictReader(file)}
    assert len(cells) == 16
    for row, language in enumerate(matrix.ablated):
        for column, other in enumerate(matrix.evaluated):
            line = cells[language, other]
            assert int(line["neurons"]) == matrix.neurons[row]
            assert float(line["cost_bits_per_byte"]) == matrix.cost[row, column]
            assert float(line["bits_per_byte"]) == matrix.bits_per_byte[row, column]
            assert float(line["perplexity"]) == matrix.perplexity[row, column]
            assert float(line["base_bits_per_byte"]) == matrix.base[column]
            assert float(line["base_perplexity"]) == matrix.base_perplexity[column]
    wide = pandas.read_csv(path).pivot(index="ablated", columns="evaluated", values="cost_bits_per_byte")
    assert (list(wide.index), list(wide.columns)) == (list(matrix.ablated), list(matrix.evaluated))
    # Before its version 3, pandas reads the last bit of a number as it pleases.
    assert wide.to_numpy().ravel().tolist() == pytest.approx(matrix.cost.ravel().tolist(), rel=1e-14)


def test_a_file_comes_back_as_it_was(folder, model, neurons):
    matrix = ablate_to_file(model, neurons, text_of(folder, model), folder / "ablation.json")
    written = json.loads((folder / "ablation.json").read_text())
    assert written == matrix.to_json() == AblationMatrix.load(folder / "ablation.json").to_json()
    assert written["neurons_fingerprint"] == neurons.fingerprint()
    assert written["selectivity"] == matrix.selectivity()
    assert written["corpus"]["languages"] == list(TEXTS)
    assert list(folder.glob("*.partial")) == []


def test_other_files_are_no_ablation(tmp_path):
    path = tmp_path / "ablation.json"
    for content, words in (
        ("[]", "holds no ablation"),
        ('{"kind": "counts"}', "holds no ablation"),
        ('{"kind": "ablation", "schema_version": 99}', "upgrade"),
        ('{"kind": "ablation", "schema_version": 1}', "lacks ablated"),
        ("{", "not valid JSON"),
    ):
        path.write_text(content)
        with pytest.raises(FileFormatError, match=words):
            AblationMatrix.load(path)


@pytest.mark.parametrize("stop_before", range(8))
def test_a_run_stopped_before_any_pass_goes_on_to_the_same_file(folder, model, neurons, stop_before):
    # Two forward passes a row of the matrix; the row of English, which has no neurons, takes none.
    text = text_of(folder, model, batch_tokens=128)
    assert len(text.packed.input_ids) == 3
    ablate_to_file(model, neurons, text, folder / "undisturbed.json")
    passes = Passes(model, stop_before)
    with pytest.raises(KeyboardInterrupt):
        ablate_to_file(model, neurons, text, folder / "stopped.json")
    assert not (folder / "stopped.json").exists()
    passes = Passes(model)
    ablate_to_file(model, neurons, text, folder / "stopped.json")
    # Finished rows are not measured again.
    assert passes.count == 8 - stop_before // 2 * 2
    assert (folder / "stopped.json").read_bytes() == (folder / "undisturbed.json").read_bytes()
    assert list(folder.glob("*.partial")) == []


def test_a_finished_run_is_not_repeated(folder, model, neurons):
    text, path = text_of(folder, model), folder / "ablation.json"
    first = ablate_to_file(model, neurons, text, path)
    passes, written = Passes(model), path.stat().st_mtime_ns
    assert ablate_to_file(model, neurons, text, path).to_json() == first.to_json()
    assert passes.count == 0 and path.stat().st_mtime_ns == written


def other_text(folder):
    path = folder / "texts" / "deu_Latn.txt"
    # Of the same size, which is all that a corpus's own fingerprint sees.
    path.write_text(path.read_text(encoding="utf-8").replace("Katze", "Tatze"), encoding="utf-8")


CHANGES = {
    "context_length was 64 and is 32": lambda folder, model, neurons: (
        model,
        neurons,
        prepare_text(model, tiny_tokenizer(), open_corpus(str(folder / "texts")), context_length=32),
    ),
    "neurons_fingerprint was": lambda folder, model, neurons: (
        model,
        NeuronSet.from_lists({**NEURONS, "mlt_Latn": [[1], [2]]}, neurons_per_layer=48),
        text_of(folder, model),
    ),
    "dtype was float32 and is float64": lambda folder, model, neurons: (
        model.double(),
        neurons,
        text_of(folder, model),
    ),
    "config_hash was": lambda folder, model, neurons: (
        tiny_model(rope_theta=5e5),
        neurons,
        text_of(folder, model),
    ),
    "text_hash was": lambda folder, model, neurons: (other_text(folder), (model, neurons, text_of(folder, model)))[1],
}


@pytest.mark.parametrize("words", CHANGES)
@pytest.mark.parametrize(("finished", "error"), [(True, FileExistsAlreadyError), (False, ConfigError)])
def test_a_run_with_something_changed_is_refused_and_told_what(folder, model, neurons, words, finished, error):
    text, path = text_of(folder, model), folder / "ablation.json"
    if finished:
        ablate_to_file(model, neurons, text, path)
    else:
        Passes(model, 2)
        with pytest.raises(KeyboardInterrupt):
            ablate_to_file(model, neurons, text, path)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(error, match=words):
        ablate_to_file(*CHANGES[words](folder, model, neurons), path)
    assert before == {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_killed_command_goes_on_to_identical_files(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    languages = ["afr_Latn", "cym_Latn", "deu_Latn", "eng_Latn", "fra_Latn", "ita_Latn", "mlt_Latn", "spa_Latn"]
    for number, language in enumerate(languages):
        lines = "\n".join(f"{language} {number + line} " * 8 for line in range(40))
        (tmp_path / "texts" / f"{language}.txt").write_text(lines)
    lists = {language: [[number, number + 9], [number]] for number, language in enumerate(languages)}
    NeuronSet.from_lists(lists, neurons_per_layer=48).save(tmp_path / "neurons.safetensors")
    command = ["ablate", "--model", tmp_path / "base", "--corpus", tmp_path / "texts", "--context-length", 128]
    command += ["--neurons", tmp_path / "neurons.safetensors", "--output"]

    partial = tmp_path / "killed.json.partial"
    killed = [sys.executable, "-m", "lape_fast", *map(str, command), str(tmp_path / "killed.json")]
    started = subprocess.Popen(killed, stdout=subprocess.DEVNULL)
    while not partial.exists() and started.poll() is None:
        time.sleep(0.002)
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert partial.exists() and not (tmp_path / "killed.json").exists()
    for name in ("killed.json", "undisturbed.json"):
        run(*command, tmp_path / name)
    for suffix in (".json", ".csv", ".png", ".svg"):
        killed, undisturbed = (tmp_path / f"{name}{suffix}" for name in ("killed", "undisturbed"))
        assert killed.read_bytes() == undisturbed.read_bytes()
    assert not partial.exists()
