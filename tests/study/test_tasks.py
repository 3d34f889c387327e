"""Tasks of lm-evaluation-harness: local ones, without a network, against independent computations."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import pytest
import sacrebleu
import torch
import yaml

from lape_fast.errors import ArchitectureError, ConfigError, FileFormatError, LanguageError
from lape_fast.study import SUITES, TaskResults, evaluate_tasks, expand_tasks
from lape_fast.study.suites import NamedTask, own_task
from lape_fast.tune import SubnetworkConfig, load_adapter, write_adapter
from tests.test_cli import failure
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

WORDS = ["mat", "cats", "Katze", "кошка", "tapit", "yes", "qattus"]
DRAW = random.Random(0)
QUESTIONS = [
    {"question": f"The cat {number} sat on", "choices": DRAW.sample(WORDS, 4), "answer": DRAW.randrange(4)}
    for number in range(24)
]
SOURCES = [f"The cat number {number} sat on the mat." for number in range(12)]
NEW_TOKENS = 24
TASKS = ["letters", "translate", "both", "one_of_two", "broken", "nothing_like_it"]


def choice_task(name: str, file: Path, cache: Path, **more) -> dict:
    return {
        "task": name,
        **data_of(file, cache),
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("acc", "acc_norm")
        ],
        **more,
    }


def data_of(file: Path, cache: Path) -> dict:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(cache)},
        "test_split": "test",
    }


def write_lines(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model):
    """Two adapters of the model, whose neurons were moved by different amounts."""
    folders = []
    for language, scale in (("mlt_Latn", 1.0), ("deu_Latn", 4.0)):
        folder = tmp_path_factory.mktemp("adapters") / language
        folder.mkdir()
        config = SubnetworkConfig(neurons=[torch.arange(0, 40), torch.arange(8, 48)], language=language)
        subnetwork = config.attach(model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in subnetwork.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator) / math.sqrt(32))
        write_adapter(subnetwork, folder, config.to_dict())
        subnetwork.detach(keep=False)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def references(model):
    """Half of them what the base says, so that its translation is neither perfect nor worthless."""
    return [
        said if number % 2 else "Il-qattus." for number, said in enumerate(map(lambda s: greedy(model, s), SOURCES))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, references):
    """Tasks as a user writes them: multiple choice, generation, a group of two, a tag, and one without its data."""
    folder, cache = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("cache")
    questions = write_lines(folder / "questions.jsonl", QUESTIONS)
    some = write_lines(folder / "some.jsonl", QUESTIONS[:7])
    lines = [{"source": source, "target": target} for source, target in zip(SOURCES, references, strict=True)]
    translate = {
        "task": "translate",
        **data_of(write_lines(folder / "lines.jsonl", lines), cache),
        "output_type": "generate_until",
        "doc_to_text": "{{source}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": each, "aggregation": each, "higher_is_better": True} for each in ("bleu", "chrf++")],
    }
    sizes = {"metric": "acc", "weight_by_size": True}
    for config in (
        choice_task("letters", questions, cache),
        choice_task("all_of_them", questions, cache, tag=["one_of_two"]),
        choice_task("some_of_them", some, cache, tag=["one_of_two"]),
        choice_task("broken", folder / "absent.jsonl", cache),
        {"group": "both", "task": ["all_of_them", "some_of_them"], "aggregate_metric_list": [sizes]},
        translate,
    ):
        (folder / f"{config.get('task') if isinstance(config['task'], str) else 'both'}.yaml").write_text(
            yaml.dump(config)
        )
    return folder


@pytest.fixture(scope="module")
def results(model, adapters, folder):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    return evaluate_tasks(model, tokenizer, TASKS, adapters=adapters, include_path=folder, batch_size=4)


@torch.inference_mode()
def hits(model) -> dict[str, list[float]]:
    """Which questions the model answers rightly, from the summed log-probabilities of each choice, one at a time."""
    tokenizer, found = tiny_tokenizer(), {"acc": [], "acc_norm": []}
    for each in QUESTIONS:
        context = tokenizer(f"Question: {each['question']}\nAnswer:")["input_ids"]
        sums = []
        for choice in each["choices"]:
            ids = tokenizer(f"Question: {each['question']}\nAnswer: {choice}")["input_ids"]
            assert ids[: len(context)] == context
            likelihoods = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            positions = torch.arange(len(context), len(ids))
            sums.append(float(likelihoods[positions - 1, torch.tensor(ids)[positions]].sum()))
        per_character = [total / len(choice) for total, choice in zip(sums, each["choices"], strict=True)]
        for metric, scores in (("acc", sums), ("acc_norm", per_character)):
            found[metric].append(float(scores.index(max(scores)) == each["answer"]))
    return found


@torch.inference_mode()
def greedy(model, text: str) -> str:
    """What the model says next, token by token, up to the end of the line."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + NEW_TOKENS and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def test_the_accuracy_is_that_of_the_summed_log_probabilities(model, adapters, results):
    base = hits(model)
    for folder in adapters:
        subnetwork = load_adapter(model, folder)
        tuned = hits(model)
        subnetwork.detach(keep=False)
        for metric in ("acc", "acc_norm"):
            row, before = results.find("letters", metric, folder), results.find("letters", metric)
            # Sums of as many fp64 numbers in two orders.
            close = {"abs": 1e-12}
            assert before.value == pytest.approx(fmean(base[metric]), **close)
            assert before.stderr == pytest.approx(stdev(base[metric]) / math.sqrt(len(QUESTIONS)), **close)
            assert before.difference is None and before.n == len(QUESTIONS)
            assert row.value == pytest.approx(fmean(tuned[metric]), **close)
            changes = [new - old for new, old in zip(tuned[metric], base[metric], strict=True)]
            assert row.difference == pytest.approx(fmean(changes), **close)
            assert row.difference_stderr == pytest.approx(stdev(changes) / math.sqrt(len(changes)), **close)
    assert 0 < fmean(base["acc"]) < 1
    assert len({results.find("letters", "acc_norm", each).value for each in ("base", *adapters)}) > 1


def test_bleu_and_chrf_are_sacrebleus_of_the_whole_corpus(model, adapters, results, references):
    said = {"base": [greedy(model, source) for source in SOURCES]}
    for folder in adapters:
        subnetwork = load_adapter(model, folder)
        said[str(folder)] = [greedy(model, source) for source in SOURCES]
        subnetwork.detach(keep=False)
    for name, lines in said.items():
        bleu = sacrebleu.corpus_bleu(lines, [references]).score
        chrf = sacrebleu.corpus_chrf(lines, [references], word_order=2).score
        assert results.find("translate", "bleu", name).value == pytest.approx(bleu)
        assert results.find("translate", "chrf++", name).value == pytest.approx(chrf)
    base, tuned = (results.find("translate", "chrf++", each) for each in ("base", adapters[1]))
    assert 0 < base.value < 100 and base.value != tuned.value
    assert tuned.difference == pytest.approx(tuned.value - base.value)
    assert base.stderr > 0 and tuned.difference_stderr > 0 and base.n == len(SOURCES)


def test_the_spread_of_resamplings_approaches_the_closed_form(model):
    from lape_fast.study.tasks import RESAMPLINGS, _deviation, _spread

    values = [float(number % 5 == 0) for number in range(200)]
    # Not the mean itself, so it has to be resampled.
    shifted = _spread(0.0, values, lambda items: fmean(items) + 1)
    exact = _deviation(_spread(fmean(values), values, None))
    assert exact == pytest.approx(stdev(values) / math.sqrt(200))
    # The deviation of a sample of R has itself a relative standard error of 1/sqrt(2 (R - 1)); four of them.
    assert _deviation(shifted) == pytest.approx(exact, rel=4 / math.sqrt(2 * (RESAMPLINGS - 1)))
    assert _deviation(shifted, shifted) == 0


def test_a_group_is_one_row_over_all_its_documents_and_a_tag_a_row_for_each(model, results):
    base = hits(model)["acc"]
    row = results.find("both", "acc")
    assert row.n == len(QUESTIONS) + 7
    assert row.value == pytest.approx(fmean(base + base[:7]))
    assert row.stderr == pytest.approx(stdev(base + base[:7]) / math.sqrt(row.n))
    assert results.find("some_of_them", "acc").value == pytest.approx(fmean(base[:7]))
    assert Counter(row.task for row in results.rows if row.metric == "acc" and row.adapter == "base") == {
        "letters": 1,
        "both": 1,
        "all_of_them": 1,
        "some_of_them": 1,
    }


def test_a_task_that_fails_is_a_row_of_each_model(adapters, results):
    models = {"base", *map(str, adapters)}
    for task, words in (("broken", "absent.jsonl"), ("nothing_like_it", "is no task of lm-evaluation-harness")):
        rows = [row for row in results.rows if row.task == task]
        assert {row.adapter for row in rows} == models
        assert all(row.status == "failed" and words in row.why and row.value is None for row in rows)
    assert {row.task for row in results.failed} == {"broken", "nothing_like_it"}


def test_running_out_of_memory_is_a_row_and_the_next_task_is_measured(model, folder):
    def exhaust(*_):
        hook.remove()
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    hook = model.register_forward_pre_hook(exhaust)
    found = evaluate_tasks(model, tiny_tokenizer(), ["letters", "some_of_them"], include_path=folder)
    (failed,) = found.failed
    assert failed.task == "letters" and "smaller batch size" in failed.why and "9 GiB" in failed.why
    assert found.find("some_of_them", "acc").n == 7


def test_the_base_is_what_it_was_and_gives_the_same_again(model, adapters, folder, results):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    again = evaluate_tasks(model, tiny_tokenizer(), ["letters", "translate"], include_path=folder, batch_size=4)
    first = [row for row in results.rows if row.adapter == "base" and row.task in ("letters", "translate")]
    assert list(again.rows) == first
    fresh = tiny_model().state_dict()
    assert values.keys() == fresh.keys() and all(torch.equal(values[name], fresh[name]) for name in fresh)


def test_examples_in_the_prompt_are_the_same_for_every_model(model, adapters, folder):
    shown = []

    def note(_, arguments, named):
        shown.append(named["input_ids"] if "input_ids" in named else arguments[0])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    options = {"include_path": folder, "num_fewshot": 1, "limit": 3}
    found = evaluate_tasks(model, tiny_tokenizer(), ["letters"], adapters=adapters[:1], **options)
    hook.remove()
    half = len(shown) // 2
    assert half and all(torch.equal(one, other) for one, other in zip(shown[:half], shown[half:], strict=True))
    assert max(ids.shape[1] for ids in shown) > 60
    assert found.find("letters", "acc").n == 3


def test_the_files_hold_every_row(results, tmp_path):
    results.save(tmp_path / "tasks.json")
    assert TaskResults.load(tmp_path / "tasks.json") == results
    results.save_csv(tmp_path / "tasks.csv")
    with (tmp_path / "tasks.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.rows)
    assert [line["value"] and float(line["value"]) for line in lines] == [
        "" if row.value is None else row.value for row in results.rows
    ]
    (tmp_path / "other.json").write_text('{"kind": "ablation"}')
    with pytest.raises(FileFormatError, match="holds no results of tasks"):
        TaskResults.load(tmp_path / "other.json")


def test_an_adapter_of_another_base_is_refused_before_anything_is_measured(adapters, folder):
    with pytest.raises(ArchitectureError, match="another base"):
        evaluate_tasks(tiny_model(seed=1), tiny_tokenizer(), ["letters"], adapters=adapters, include_path=folder)


def test_suites_expand_to_tasks_in_languages():
    found = expand_tasks(["belebele", "flores", "piqa", "arc"], ["de"])
    assert [task.name for task in found] == [
        "belebele_deu_Latn",
        "flores_eng_Latn-deu_Latn",
        "flores_deu_Latn-eng_Latn",
        "piqa",
        "arc_de",
    ]
    assert [task.language for task in found] == ["deu_Latn"] * 3 + [None, "deu_Latn"]
    assert expand_tasks(["hellaswag_de"]) == [NamedTask("hellaswag_de", "deu_Latn")]
    with pytest.raises(LanguageError, match="arc has no task in tur_Latn"):
        expand_tasks(["arc"], ["tr"])
    with pytest.raises(LanguageError, match="global_mmlu has no task in arz_Arab.*arb_Arab"):
        expand_tasks(["global_mmlu"], ["arz_Arab"])
    with pytest.raises(ConfigError, match="belebele has tasks in 123 languages"):
        expand_tasks(["belebele"])
    with pytest.raises(ConfigError, match="No task was named"):
        expand_tasks([])


def test_every_task_of_a_suite_exists_and_no_language_is_left_out():
    from lm_eval.tasks import TaskManager

    index = set(TaskManager().all_tasks)
    for suite in SUITES.values():
        for code, names in suite.items():
            assert re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", code)
            for name in names:
                assert (own_task(name) or {}).get("task") == name or name in index
    families = {
        "belebele": r"belebele_[a-z]{3}_[A-Z][a-z]{3}",
        "global_mmlu": r"global_mmlu_full_[a-z]{2,3}",
        "hellaswag": r"hellaswag_[a-z]{2}",
        "arc": r"arc_[a-z]{2}",
    }
    for suite, pattern in families.items():
        listed = {name for names in SUITES[suite].values() for name in names if re.fullmatch(pattern, name)}
        assert listed == {name for name in index if re.fullmatch(pattern, name)}
    assert {suite: len(languages) for suite, languages in SUITES.items()} == {
        "belebele": 123,
        "sib200": 205,
        "global_mmlu": 42,
        "arc": 37,
        "hellaswag": 33,
        "flores": 203,
    }


def test_own_tasks_ask_for_topics_and_translations(tmp_path):
    from lm_eval.tasks import TaskManager

    topic = {"index_id": 1, "category": "travel", "text": "Il-belt hija sabiħa."}
    pair = {"id": 1, "eng_Latn": "The cat.", "mlt_Latn": "Il-qattus.", "deu_Latn": "Die Katze."}
    manager = TaskManager(include_defaults=False)
    prompts = {}
    for name, document in (("sib200_mlt_Latn", topic), ("flores_eng_Latn-mlt_Latn", pair)):
        config = own_task(name)
        splits = {value for key, value in config.items() if key.endswith("_split")}
        file = str(write_lines(tmp_path / f"{name}.jsonl", [document]))
        local = {"data_files": dict.fromkeys(splits, file), "cache_dir": str(tmp_path / "cache")}
        config = {**config, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": local}
        (task,) = manager.load([config])["tasks"].values()
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompts[name] = [instance.args for instance in task.instances]
        assert set(task.aggregation()) == {each["metric"] for each in config["metric_list"]}
    contexts, choices = zip(*prompts["sib200_mlt_Latn"], strict=True)
    assert len(set(contexts)) == 1 and contexts[0].startswith("Text: Il-belt hija sabiħa.\n")
    assert len(choices) == 7 and " travel" in choices
    ((context, options),) = prompts["flores_eng_Latn-mlt_Latn"]
    assert context == "English: The cat.\nMaltese:" and options["until"] == ["\n"] and not options["do_sample"]
    assert own_task("flores_eng_Latn-xyz_Latn") is None and own_task("sib200_xyz_Latn") is None


def test_the_command_measures_tasks_offline_and_says_what_needs_a_download(folder, tmp_path):
    base = save_tiny(tmp_path / "base")
    command = ["evaluate", "--model", base, "--tasks", "letters,belebele", "--languages", "mt", "--task-folder", folder]
    finished = subprocess.run(
        [sys.executable, "-m", "lape_fast", *map(str, command), "--limit", "5", "--device", "cpu", "--json"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    printed = json.loads(finished.stdout)
    assert list(printed) == ["tasks"]
    rows = {(row["task"], row["metric"]): row for row in printed["tasks"]["rows"]}
    assert rows["letters", "acc"]["n"] == 5
    failed = rows["belebele_mlt_Latn", None]
    assert failed["status"] == "failed" and "cannot be downloaded here" in failed["why"]
    assert failed["language"] == "mlt_Latn"


def test_the_command_fails_where_every_task_failed(folder, tmp_path, monkeypatch, capsys):
    base = save_tiny(tmp_path / "base")
    command = ["evaluate", "--model", base, "--tasks", "nothing_like_it", "--task-folder", folder, "--device", "cpu"]
    error = failure(monkeypatch, capsys, *command)
    assert "No task could be measured; why nothing_like_it could not: nothing_like_it is no task of" in error
