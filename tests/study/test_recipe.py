"""Recipes: what is wrong with one is named before anything is loaded, and those that are shipped are right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from lape_fast.errors import ConfigError, CorpusError
from lape_fast.study import plan_study, read_recipe
from lape_fast.study.recipe import parse_recipe
from lape_fast.study.runs import count_runs
from tests.tiny_models import save_tiny

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PAPER = {
    "paper-llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 32, 4096),
    "paper-mistral-nemo-12b": ("mistralai/Mistral-Nemo-Base-2407", 40, 5120),
    "paper-aya-expanse-8b": ("CohereLabs/aya-expanse-8b", 32, 4096),
}
SMALLEST = {
    "base": {"steps": 4},
    "text": {"corpus": "cldr", "train": "1-10", "validation": "11-20", "test": "21-30"},
    "targets": ["mt", "isl_Latn"],
    "training": {"steps": 4},
}


def recipe(**changes):
    """The smallest recipe with changes; ``section__key`` is a key of a section."""
    given = copy.deepcopy(SMALLEST)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            given.setdefault(section, {})[key] = value
        else:
            given[section] = value
    return parse_recipe(given)


def test_defaults_fill_what_a_recipe_leaves_out_and_codes_become_canonical():
    found = recipe()
    assert found.targets == ("mlt_Latn", "isl_Latn")
    assert found.preset == "corrected"
    # Every method gets the same rates, and three seeds at its best.
    assert len({found.rates(method) for method in found.methods}) == 1
    assert len(found.seeds) == 3
    assert found.training.total_steps == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"traning": {}}, "unknown key `traning`; did you mean `training`?"),
        ({"training__warmpu": 0}, "unknown key `training.warmpu`; did you mean `warmup`?"),
        ({"zzzzz": 1}, "unknown key `zzzzz`; write one of preset, model"),
        ({"preset": "papre"}, "`preset` is 'papre'; did you mean `paper`?"),
        ({"training__schedule": "cosin"}, "did you mean `cosine`?"),
        ({"training__steps": 0}, "`training.steps` is 0; write a whole number of at least 1"),
        ({"training__tokens": 100}, "either `steps` or `tokens`"),
        ({"training__rows_per_pass": 3}, "multiple of 3"),
        ({"targets": []}, "`targets` is \\[\\]; write a list with one value"),
        ({"targets": ["mt", "mlt_Latn"]}, "`targets` names mlt_Latn twice"),
        ({"targets": ["xx"]}, "`targets\\[0\\]`: 'xx' is no known language code"),
        ({"methods": ["lorra"]}, "`methods\\[0\\]`.*did you mean 'lora'"),
        ({"methods": ["lora:rnk=3"]}, "did you mean 'rank'"),
        ({"learning_rates": ["fast"]}, "`learning_rates.*0\\]` is 'fast'; write a number above 0"),
        ({"learning_rates": [0]}, "above 0"),
        (
            {"learning_rates": {"default": [1e-4], "fll": [1e-5]}},
            "'fll', which is none of the methods; did you mean `full`",
        ),
        ({"learning_rates": {"full": [1e-5]}}, "none for 'subnetwork', and no `default`"),
        ({"identify__rule": "lap"}, "`identify.rule`.*must start with one of lape"),
        ({"identify__rule": "lape:top_rate=0.1/0.2"}, "which is 2 rules"),
        ({"text__train": "ten"}, "`text.train`: 'ten' is no range of lines"),
        ({"text__validation": "5-15"}, "`text.train` \\(1-10\\) and `text.validation` \\(5-15\\) overlap"),
        ({"text__test": "20-30"}, "overlap"),
        ({"model": "some/model"}, "either `model`, the base, or `base`"),
        ({"base": None}, "either `model`, the base, or `base`"),
        ({"base": {"steps": 3, "hidden_size": 100, "heads": 3}}, "3 heads of an even size cannot share"),
        ({"base": {}}, "lacks `base.steps`"),
        ({"text": "cldr"}, "`text` is 'cldr'; write a mapping"),
        ({"evaluation__gain_shares": [1.5]}, "above 0 and at most 1"),
        ({"seeds": [1, 1]}, "`seeds` names 1 twice"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_known(changes, words):
    with pytest.raises(ConfigError, match=words):
        recipe(**changes)


def test_a_recipe_that_is_no_mapping_or_no_yaml_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, words in (("- 1", "must be a mapping"), ("a: [", "cannot be read")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_recipe(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_rates_written_as_yaml_reads_them_are_numbers():
    """YAML takes 1e-4 for a text and 1.0e-4 for a number."""
    given = yaml.safe_load("learning_rates: [1e-4, 1.0e-4, 3]")
    with pytest.raises(ConfigError, match="names 0.0001 twice"):
        recipe(**given)
    assert recipe(learning_rates=["1e-4", 3]).rates("lora") == (1e-4, 3.0)


def test_the_same_lines_of_two_corpora_do_not_overlap():
    assert recipe(text__evaluation_corpus="flores+", text__validation="1-5", text__test="6-9").text.validation == "1-5"
    with pytest.raises(ConfigError, match="overlap"):
        recipe(text__evaluation_corpus="flores+", text__validation="1-5", text__test="5-9")


def test_the_presets_differ_in_what_the_paper_chose_and_a_recipe_still_wins():
    paper, corrected = (
        parse_recipe({**SMALLEST, "preset": preset, "training": {}} | extra)
        for preset, extra in (("paper", {}), ("corrected", {"training": {"steps": 4}}))
    )
    assert paper.rates("subnetwork") == paper.rates("lora:rank=32,alpha=64,dropout=0.1") == (1e-4,)
    assert paper.rates("full") == paper.rates("ffn") == (1e-5,)
    assert (paper.training.schedule, paper.training.warmup) == ("constant", 0.0)
    assert paper.identify.rule == "paper"
    # 100 M tokens in steps of 2 x 512.
    assert paper.training.total_steps == 97_657
    assert len({corrected.rates(method) for method in corrected.methods}) == 1
    assert corrected.training.schedule == "cosine"
    shorter = parse_recipe({**SMALLEST, "preset": "paper", "methods": ["lora", "full"], "training": {"steps": 3}})
    assert shorter.training.total_steps == 3
    assert shorter.training.schedule == "constant"
    assert (shorter.rates("lora"), shorter.rates("full")) == ((1e-4,), (1e-5,))


@pytest.mark.parametrize(
    ("name", "preset"), [*((name, "paper") for name in PAPER), ("paper-llama-3.1-8b", "corrected")]
)
def test_the_papers_recipes_are_planned_without_weights_and_without_a_network(name, preset, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, layers, _ = PAPER[name]
    found = read_recipe(RECIPES / f"{name}.yaml", preset)
    facts, memory = plan_study(found, gpu="H100")
    assert found.model == model
    assert len(found.targets) == 12
    assert (
        facts["runs"]
        == count_runs(found)
        == 12 * sum(len(found.rates(method)) + len(found.seeds) - 1 for method in found.methods)
    )
    assert facts["tokens per run"] == pytest.approx(100_000_000, rel=1e-4)
    # 1 % of 14,336 neurons in every layer.
    assert memory.training["neurons"] == 143 * layers
    assert memory.fits("checkpoint")


def test_a_model_is_planned_in_the_dtype_of_its_checkpoint(tmp_path):
    for language in ("mlt_Latn", "isl_Latn"):
        (tmp_path / f"{language}.txt").write_text("a\n" * 30)
    save_tiny(tmp_path / "base", "llama")
    planned = {
        dtype: plan_study(recipe(base=None, model=str(tmp_path / "base"), text__corpus=str(tmp_path), dtype=dtype))[1]
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert planned["auto"].to_dict() == planned["float32"].to_dict() != planned["bfloat16"].to_dict()


def test_the_small_recipe_is_what_the_study_of_record_needs(shared_corpus):
    found = read_recipe(RECIPES / "small.yaml").with_corpus(str(shared_corpus))
    facts, memory = plan_study(found)
    assert memory is None
    assert len(found.methods) == 7
    assert len(found.targets) >= 4
    assert all(len(found.rates(method)) >= 3 for method in found.methods)
    assert len(found.seeds) == 3
    assert (found.text.train, found.text.validation, found.text.test) == ("1-1597", "1598-1797", "1798-1997")
    assert "123 languages" in facts["text"]


def test_the_quick_recipe_is_planned():
    facts, memory = plan_study(read_recipe(RECIPES / "quick.yaml"))
    assert memory is None
    assert facts["runs"] == 18


def test_a_language_that_the_text_lacks_is_named_before_anything_runs(tmp_path):
    for language in ("mlt_Latn", "deu_Latn"):
        (tmp_path / f"{language}.txt").write_text("a\n" * 30)
    lacking = recipe(text__corpus=str(tmp_path), text__aligned=True)
    with pytest.raises(CorpusError, match="isl_Latn"):
        plan_study(lacking)
    with pytest.raises(CorpusError, match="no folder with .txt files"):
        plan_study(lacking.with_corpus(str(tmp_path / "nothing")))


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match="'texts/' does not exist"):
        plan_study(recipe(text__corpus="texts/"))
    facts, _ = plan_study(recipe(text__corpus="owner/texts"))
    assert "on the hub" in facts["text"]


def test_only_files_of_the_folder_itself_are_aligned(tmp_path):
    """What lies in a subfolder has other lines."""
    for folder, languages in ((tmp_path, ("mlt_Latn", "isl_Latn")), (tmp_path / "mono", ("mlt_Latn", "fin_Latn"))):
        folder.mkdir(exist_ok=True)
        for language in languages:
            (folder / f"{language}.txt").write_text("a\n" * 30)
    facts, _ = plan_study(recipe(text__corpus=str(tmp_path), text__aligned=True))
    assert "in 2 languages" in facts["text"]
    facts, _ = plan_study(recipe(text__corpus=str(tmp_path)))
    assert "in 3 languages" in facts["text"]
