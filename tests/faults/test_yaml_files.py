"""YAML files from strangers: options and recipes hold plain values, or are refused."""

from __future__ import annotations

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lape_fast.cli.app import app
from lape_fast.cli.configuration import read_options
from lape_fast.errors import ConfigError, LapeFastError
from lape_fast.files import fits
from lape_fast.study import read_recipe

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "has an alias"),
        ('rule: !!python/object/apply:os.mkdir ["canary"]', "has the tag"),
        ("rule: !!python/name:os.system", "has the tag"),
        ("!!python/object/apply:os.mkdir [canary]", "must be a mapping"),
        ("rule: !!python/tuple [lape]", "has the tag"),
        ("rule: {a: b}", "gives 'rule' a mapping"),
        ("rule: [[lape]]", "nests deeper than 2 levels"),
        ("rule: lape\nrule: paper", "sets 'rule' twice"),
        ("[" * 50_000, "nests deeper than 2 levels"),
        ("? [a, b]\n: c", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("rule: \x07", "cannot be read"),
        ("rule: " + "x" * (1 << 16), "longer than 65,536 bytes"),
    ],
)
def test_options_are_names_with_plain_values(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_options(tmp_path / "recipe.yaml")
    assert "recipe.yaml" in str(error.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "has an alias"),
        ('base: {steps: !!python/object/apply:os.mkdir ["canary"]}', "has the tag"),
        ("!!python/dict {preset: paper}", "has the tag"),
        ("base: [[[[lape]]]]", "nests deeper than 4 levels"),
        ("base: {steps: 1, steps: 2}", "sets 'steps' twice"),
        ("seeds: [2026-13-45]", "cannot be read"),
        ("preset: ''", "`preset` is ''"),
        ("- a", "must be a mapping"),
    ],
)
def test_recipes_hold_plain_values(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    assert not (tmp_path / "canary").exists()


def test_options_are_the_texts_that_a_flag_would_have(tmp_path):
    (tmp_path / "recipe.yaml").write_text("min-tokens: 5\nrule: [lape, 'tang']\njson: yes\nseed:\nx: 1e-4\n")
    read = {"min-tokens": "5", "rule": ["lape", "tang"], "json": "yes", "seed": None, "x": "1e-4"}
    assert read_options(tmp_path / "recipe.yaml") == read


def test_a_list_for_an_option_that_takes_one_value_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("min-tokens: [5]\n")
    command = typer.main.get_command(app).commands["select"]
    with pytest.raises(ConfigError, match="gives min-tokens a list"):
        command.make_context("select", ["c", "--output", "o", "--config", str(tmp_path / "recipe.yaml")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_any_text_is_options_or_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        options = read_options(tmp_path / "recipe.yaml")
    except LapeFastError:
        return
    assert fits(options, {str: (None, str, [(None, str)])})
