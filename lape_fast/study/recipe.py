"""Recipes: a YAML file that says everything about a study, checked completely before anything is loaded.

A recipe is read over the defaults of its preset: ``corrected`` (those of the classes here) trains every method alike,
``paper`` repeats the choices published in arXiv 2510.13580 and its scripts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lape_fast.errors import ConfigError, LapeFastError
from lape_fast.study.reading import (
    DEFAULT,
    a_flag,
    a_mapping,
    a_method,
    a_number,
    a_positive,
    a_range,
    a_rate,
    a_rule,
    a_section,
    a_share,
    a_text,
    a_whole,
    codes,
    did_you_mean,
    each_of,
    key,
    one_of,
    rates_of,
)
from lape_fast.text.records import LineRange
from lape_fast.tune import BaseSize, TrainingSettings
from lape_fast.yaml_files import compose_plain

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ALL, TARGETS = "all", "targets"

# How far a recipe nests: itself, a section, a mapping in it, a list in that.
DEEPEST = 4

# What a preset changes of the defaults. Neither repeats the faults of the published scripts (docs/study.md).
PRESETS: dict[str, dict[str, Any]] = {
    "corrected": {},
    "paper": {
        "identify": {"rule": "paper", "languages": TARGETS},
        "methods": ["subnetwork", "random", "ffn", "full", "lora:rank=32,alpha=64,dropout=0.1"],
        "learning_rates": {DEFAULT: [1e-4], "full": [1e-5], "ffn": [1e-5]},
        "seeds": [0],
        "training": {
            "tokens": 100_000_000,
            "context_length": 512,
            "rows_per_step": 2,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": 0.01,
            "evaluate_every": 500,
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text is trained on, chosen by and reported on.

    Attributes:
        corpus: of training and counting.
        evaluation_corpus: of validation and test; the same where it is None.
        aligned: read only the files that lie in the corpus folder itself, line N of each being the same sentence.
        text_column: of records.
        train, validation, test: lines.
    """

    corpus: str = key(a_text)
    evaluation_corpus: str | None = key(a_text, None)
    aligned: bool = key(a_flag, False)
    text_column: str | None = key(a_text, None)
    train: str = key(a_range)
    validation: str = key(a_range)
    test: str = key(a_range)


@dataclass(frozen=True, kw_only=True)
class Identify:
    """How neurons are found: counted and selected by a rule, or read from a file.

    Attributes:
        rule: as for ``lape-fast select``.
        neurons: a neuron file to use instead.
        languages: which are counted: all of the corpus, the targets, or codes.
        tokens_per_language: None counts all training lines.
        context_length: tokens per row.
    """

    rule: str = key(a_rule, "lape")
    neurons: str | None = key(a_text, None)
    languages: str | tuple[str, ...] = key(codes(ALL, TARGETS), ALL)
    tokens_per_language: int | None = key(a_whole(1), None)
    context_length: int = key(a_whole(2), 512)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The same for every method; see ``TrainingSettings``.

    Attributes:
        tokens: of a run, from which the steps follow; not beside ``steps``.
        evaluate_every: steps between measurements; a quarter of a run where it is None.
    """

    steps: int | None = key(a_whole(1), None)
    tokens: int | None = key(a_whole(1), None)
    context_length: int = key(a_whole(2), 512)
    rows_per_step: int = key(a_whole(1), 8)
    rows_per_pass: int | None = key(a_whole(1), None)
    schedule: str = key(one_of(SCHEDULES), "cosine")
    warmup: float = key(a_share, 0.05)
    weight_decay: float = key(a_number(lambda value: value >= 0, "of at least 0"), 0.01)
    max_grad_norm: float = key(a_positive, 1.0)
    evaluate_every: int | None = key(a_whole(1), None)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("`training` needs either `steps` or `tokens`, the length of a run; give one of them.")
        self.settings(self.steps or 1, 1e-4, 0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run."""
        return self.steps or math.ceil(self.tokens / self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.context_length

    def settings(self, steps: int, learning_rate: float, seed: int) -> TrainingSettings:
        """What the trainer is told.

        Raises:
            ConfigError: the rows of a step are no multiple of those of a pass.
        """
        every = self.evaluate_every or math.ceil(steps / 4)
        given = {
            name: value for name, value in asdict(self).items() if name not in ("tokens", "steps", "evaluate_every")
        }
        settings = TrainingSettings(
            **given, steps=steps, learning_rate=learning_rate, seed=seed, evaluate_every=every, save_every=every
        )
        settings.rows_and_passes(1)
        return settings


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model that the study trains first.

    Attributes:
        hidden_size, neurons_per_layer, layers, heads, vocabulary: its shape.
        languages: that it is trained on: all of the corpus, or codes.
        under_represented: languages that have only ``target_share`` of their training lines; the targets by default.
        steps, rows_per_step, context_length, learning_rate, seed: of its training.
    """

    hidden_size: int = key(a_whole(8), BaseSize.hidden_size)
    neurons_per_layer: int = key(a_whole(8), BaseSize.neurons_per_layer)
    layers: int = key(a_whole(1), BaseSize.layers)
    heads: int = key(a_whole(1), BaseSize.heads)
    vocabulary: int = key(a_whole(300), BaseSize.vocabulary)
    languages: str | tuple[str, ...] = key(codes(ALL), ALL)
    under_represented: tuple[str, ...] | None = key(codes(), None)
    target_share: float = key(a_number(lambda value: 0 < value <= 1, "above 0 and at most 1"), 0.25)
    steps: int = key(a_whole(1))
    rows_per_step: int = key(a_whole(1), 12)
    context_length: int = key(a_whole(8), 256)
    learning_rate: float = key(a_rate, 3e-3)
    seed: int = key(a_whole(0), 0)

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"`base.hidden_size` is {self.hidden_size}, which {self.heads} heads of an even size cannot share; "
                f"give a multiple of {2 * self.heads}."
            )

    @property
    def size(self) -> BaseSize:
        return BaseSize(self.hidden_size, self.neurons_per_layer, self.layers, self.heads, self.vocabulary)

    @property
    def settings(self) -> TrainingSettings:
        return TrainingSettings(
            context_length=self.context_length,
            rows_per_step=self.rows_per_step,
            steps=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How much text is measured, and at which levels methods are compared.

    Attributes:
        lines: of the validation lines, those of the target at every measurement; None for all.
        other_lines: of the validation lines, those of every other language at every measurement.
        test_other_lines: of the test lines, those of every other language at the end; the target has all.
        context_length: tokens per row.
        batch_tokens: tokens per forward pass.
        gain_shares: gains at which methods are compared, as shares of the best gain of any method.
        forgetting_levels: mean changes elsewhere, in bits per byte, at which methods are compared.
    """

    lines: int | None = key(a_whole(1), None)
    other_lines: int = key(a_whole(1), 10)
    test_other_lines: int = key(a_whole(1), 20)
    context_length: int = key(a_whole(2), 512)
    batch_tokens: int = key(a_whole(1), 8192)
    gain_shares: tuple[float, ...] = key(
        each_of(a_number(lambda value: 0 < value <= 1, "above 0 and at most 1")), (0.25, 0.5, 0.75)
    )
    forgetting_levels: tuple[float, ...] = key(
        each_of(a_number(lambda value: value >= 0, "of at least 0")), (0.0, 0.01, 0.03, 0.1)
    )


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of lm-evaluation-harness for the base and the chosen run of every method; see ``evaluate_tasks``."""

    names: tuple[str, ...] = key(each_of(a_text))
    folder: str | None = key(a_text, None)
    limit: int | None = key(a_whole(1), None)
    num_fewshot: int | None = key(a_whole(0), None)
    batch_size: int = key(a_whole(1), 8)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a study.

    Attributes:
        preset: whose defaults the recipe is read over.
        model: folder or hub id of the base; or
        base: one that the study trains.
        architecture: ``model_type`` and fields of the model's config, from which a dry run plans without the hub.
        dtype: of the model.
        text, identify, training, evaluation: see their classes.
        targets: languages that are tuned, one at a time.
        others: languages in which change elsewhere is measured: all of the evaluation corpus, or codes; the target of a
            run never counts as another.
        methods: what is compared, as for ``lape-fast tune --method``.
        learning_rates: by method, those of methods that are not named under ``default``.
        seeds: the first runs every learning rate, and all of them the best.
        tasks: of lm-evaluation-harness, in each target language; None for none.
    """

    preset: str = key(one_of(tuple(PRESETS)), "corrected")
    model: str | None = key(a_text, None)
    base: Base | None = key(a_section(Base), None)
    architecture: dict[str, Any] | None = key(a_mapping, None)
    dtype: str = key(one_of(DTYPES), "auto")
    text: Text = key(a_section(Text))
    targets: tuple[str, ...] = key(codes())
    others: str | tuple[str, ...] = key(codes(ALL), ALL)
    identify: Identify = key(a_section(Identify), Identify())
    methods: tuple[str, ...] = key(each_of(a_method), ("subnetwork", "random", "ffn", "full", "lora", "ia3"))
    learning_rates: dict[str, tuple[float, ...]] = key(rates_of, None)
    seeds: tuple[int, ...] = key(each_of(a_whole(0)), (0, 1, 2))
    training: Training = key(a_section(Training))
    evaluation: Evaluation = key(a_section(Evaluation), Evaluation())
    tasks: Tasks | None = key(a_section(Tasks), None)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.base is None):
            raise ConfigError("A recipe needs either `model`, the base, or `base`, how to train one; give one of them.")
        if self.learning_rates is None:
            object.__setattr__(self, "learning_rates", {DEFAULT: (1e-5, 3e-5, 1e-4, 3e-4)})
        for name in self.learning_rates:
            if name != DEFAULT and name not in self.methods:
                raise ConfigError(
                    f"`learning_rates` has rates for {name!r}, which is none of the methods; "
                    f"{did_you_mean(name, [*self.methods, DEFAULT])}"
                )
        for method in self.methods:
            self.rates(method)
        self._check_lines()

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried for a method."""
        found = self.learning_rates.get(method, self.learning_rates.get(DEFAULT))
        if found is None:
            raise ConfigError(f"`learning_rates` has none for {method!r}, and no `{DEFAULT}`; add either.")
        return found

    def _check_lines(self) -> None:
        """No line may be both trained on and measured."""
        parts = {name: LineRange.parse(getattr(self.text, name)) for name in ("train", "validation", "test")}
        same = self.text.evaluation_corpus in (None, self.text.corpus)
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            if (same or first != "train") and parts[first].meets(parts[second]):
                raise ConfigError(
                    f"The lines `text.{first}` ({parts[first]}) and `text.{second}` ({parts[second]}) overlap; what is "
                    "reported must not have been trained on or chosen by."
                )

    def with_corpus(self, corpus: str | None) -> Recipe:
        """The recipe on another corpus, for training and evaluation."""
        return self if corpus is None else replace(self, text=replace(self.text, corpus=corpus, evaluation_corpus=None))

    def to_json(self) -> dict[str, Any]:
        """Every setting as JSON values, defaults filled in."""
        return _plain(asdict(self))


def read_recipe(path: str | os.PathLike, preset: str | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file.
        preset: instead of the recipe's own.

    Raises:
        ConfigError: it is no YAML, a key is unknown (the message names the nearest known one) or lacking, or a value
            makes no sense.

    Example:
        >>> read_recipe("recipes/small.yaml").methods
    """
    import yaml

    node = compose_plain(path, "recipe", DEEPEST)
    try:
        given = yaml.constructor.SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"The recipe {path} cannot be read ({error}); write plain values.") from error
    try:
        return parse_recipe(given, preset)
    except LapeFastError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_recipe(given: Any, preset: str | None = None) -> Recipe:
    """Reads and checks a recipe that is a mapping already; see ``read_recipe``."""
    given = a_mapping(given, "")
    chosen = one_of(tuple(PRESETS))(preset or given.get("preset", "corrected"), "preset")
    return a_section(Recipe)(_over(PRESETS[chosen], {**given, "preset": chosen}), "")


def slug(method: str) -> str:
    """A method's text as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", method)


def _over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, with what it leaves out of the defaults' sections."""
    merged = {**defaults, **given}
    if "learning_rates" not in given and "methods" in given and "learning_rates" in defaults:
        named = {DEFAULT, *(given["methods"] if isinstance(given["methods"], list) else ())}
        merged["learning_rates"] = {name: each for name, each in defaults["learning_rates"].items() if name in named}
    for name in ("identify", "training"):
        if name in defaults and isinstance(given.get(name), Mapping):
            merged[name] = {**defaults[name], **given[name]}
            # Another length of a run.
            if "steps" in given[name] and "tokens" not in given[name]:
                merged[name].pop("tokens", None)
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
