"""The rules by which neurons are selected: what each one asks of a neuron, its settings, its name and its text form.

Which one to prefer, measured by ablation in docs/identify.md: ``Budget`` where languages are compared or few neurons
are taken from each, ``Lape`` to reproduce published results, ``Percentile`` as a control: it takes what others need.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar

from lape_fast.errors import SelectionError


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if not _is_number(value) or not fits(value):
            raise SelectionError(f"`{name}` is {value!r}; it must be a number {wanted}.")
        return float(value)

    return check


_rate = _number("above 0 and at most 1", lambda value: 0 < value <= 1)
_percentile = _number("above 0 and below 1, such as 0.99", lambda value: 0 < value < 1)
_floor = _number("of at least 0 and below 1", lambda value: 0 <= value < 1)


def _size(name: str, value: Any) -> int | float:
    if _is_number(value):
        if isinstance(value, Integral) and value >= 1:
            return int(value)
        if 0 < value < 1:
            return float(value)
    raise SelectionError(
        f"`{name}` is {value!r}; it must be a whole number of at least 1, or a share of all neurons between 0 and 1."
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SelectionError(f"`{name}` is {value!r}; it must be True or False.")
    return value


def _layers(name: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, Sequence) and all(isinstance(each, Integral) for each in value)
    if not whole or len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise SelectionError(
            f"`{name}` is {value!r}; it must be the first and the last layer, counted from 0, such as (16, 31)."
        )
    return int(value[0]), int(value[1])


def _setting(default: Any, check: Callable[[str, Any], Any], label: str = "") -> Any:
    """A field with its check, and what stands before its value in the name of a rule."""
    return field(default=default, metadata={"check": check, "label": label})


@dataclass(frozen=True)
class Rule:
    """What all rules have in common.

    Args:
        exclusive: keep only the neurons that belong to exactly one language after the rule.
        layers: the first and the last layer, counted from 0, of those that the rule looks at; everything, quantiles
            and shares included, is then as if the model had these layers only. All layers by default.

    Raises:
        SelectionError: a setting out of its range.
    """

    # Whether a language's neurons depend on what other languages do.
    compares_languages: ClassVar[bool] = True

    exclusive: bool = field(default=False, kw_only=True, metadata={"check": _flag})
    layers: tuple[int, int] | None = field(default=None, kw_only=True, metadata={"check": _layers})

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, each.metadata["check"](each.name, getattr(self, each.name)))


@dataclass(frozen=True)
class Lape(Rule):
    """Language activation probability entropy (arXiv 2402.16438): the neurons whose firing tells languages apart.

    A language may end with no neurons at all, and the sizes of the languages differ. Ties in entropy go to the lower
    layer, then to the lower neuron.

    Args:
        top_rate: the share of all neurons to select; fewer are selected where fewer are candidates.
        filter_rate: the quantile of all probabilities above which some language must lie for a neuron to be a
            candidate.
        activation_bar: the quantile of all probabilities above which a selected neuron belongs to a language.
        exclusive, layers: see ``Rule``.

    Raises:
        SelectionError: a rate outside (0, 1].

    Example:
        >>> rule_name(Lape(top_rate=0.01))
        'lape-top0.01'
    """

    top_rate: float = _setting(0.05, _rate, "top")
    filter_rate: float = _setting(0.95, _rate, "filter")
    activation_bar: float = _setting(0.95, _rate, "bar")


@dataclass(frozen=True)
class Percentile(Rule):
    """The neurons whose activation probability is above a percentile of the language's own probabilities.

    It does not ask what other languages do: without ``exclusive`` most of its neurons are shared.

    Args:
        percentile: which quantile of a language's probabilities a neuron must exceed.
        exclusive, layers: see ``Rule``.

    Raises:
        SelectionError: a percentile outside (0, 1).

    Example:
        >>> rule_name(Percentile(0.99, exclusive=True))
        'percentile-0.99-exclusive'
    """

    compares_languages: ClassVar[bool] = False

    percentile: float = _setting(0.99, _percentile)


@dataclass(frozen=True)
class Budget(Rule):
    """As many neurons for every language: those with the highest p over the mean p of the other languages.

    p is the probability that a neuron fires for a token of the language. A neuron that never fires for any other
    language has an infinite ratio. Ties go to the higher p, then to the lower layer, then to the lower neuron. A
    language has fewer neurons only where fewer are above the floor, and with ``exclusive``.

    Args:
        neurons: how many for each language: a whole number, or a share below 1 of all neurons.
        floor: the probability that p must exceed, so that no neuron counts that hardly ever fires.
        exclusive, layers: see ``Rule``.

    Raises:
        SelectionError: a setting out of its range.

    Example:
        >>> rule_name(Budget(150, floor=0.1))
        'budget-150-floor0.1'
    """

    neurons: int | float = _setting(0.01, _size)
    floor: float = _setting(0.05, _floor, "floor")


# What a text form may start with: the rule whose settings it changes. "paper" is arXiv 2510.13580, "tang" 2402.16438.
RULES: dict[str, Rule] = {
    "lape": Lape(),
    "paper": Lape(top_rate=0.05, filter_rate=0.95, activation_bar=0.95),
    "tang": Lape(top_rate=0.01, filter_rate=0.95, activation_bar=0.95),
    "percentile": Percentile(),
    "budget": Budget(),
}


def rule_kind(rule: Rule) -> str:
    """``lape``, ``percentile`` or ``budget``."""
    return type(rule).__name__.lower()


def rule_settings(rule: Rule) -> dict[str, Any]:
    """Every setting of a rule as a JSON value."""
    values = {each.name: getattr(rule, each.name) for each in fields(rule)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def rule_name(rule: Rule) -> str:
    """A readable name, different for different rules, that may name a file: the rule, its rate, and what is unusual.

    Example:
        >>> rule_name(Lape(filter_rate=0.8, layers=(16, 31)))
        'lape-top0.05-filter0.8-layers16-31'
    """
    own = [each for each in fields(rule) if "label" in each.metadata]
    parts = [rule_kind(rule)]
    for number, each in enumerate(own):
        value = getattr(rule, each.name)
        if number == 0 or value != each.default:
            parts.append(f"{each.metadata['label']}{value}")
    if rule.exclusive:
        parts.append("exclusive")
    if rule.layers:
        parts.append("layers{}-{}".format(*rule.layers))
    return "-".join(parts)


def parse_rules(text: str) -> list[Rule]:
    """The rules that a text form names, one per combination of its values.

    Args:
        text: ``NAME`` or ``NAME:SETTING,SETTING``, with a name of ``RULES``; a setting is ``exclusive`` or
            ``name=value``, and ``name=value/value/value`` stands for several rules.

    Raises:
        SelectionError: an unknown name or setting, or a value out of its range.

    Example:
        >>> [rule_name(rule) for rule in parse_rules("lape:top_rate=0.01/0.02")]
        ['lape-top0.01', 'lape-top0.02']
        >>> parse_rules("budget:neurons=150,floor=0.1,exclusive,layers=16-31")
        [Budget(exclusive=True, layers=(16, 31), neurons=150, floor=0.1)]
    """
    name, colon, rest = text.partition(":")
    if name not in RULES:
        raise SelectionError(f"Rule {text!r} starts with {name!r}; it must start with one of {', '.join(RULES)}.")
    values: dict[str, list[Any]] = {}
    for part in rest.split(",") if colon else []:
        setting, found = _parse_setting(text, RULES[name], part)
        if setting in values:
            raise SelectionError(
                f"Rule {text!r} sets {setting} twice; separate several values by /, as in {setting}=VALUE/VALUE."
            )
        values[setting] = found
    return [
        replace(RULES[name], **dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def _parse_setting(text: str, rule: Rule, part: str) -> tuple[str, list[Any]]:
    if part == "exclusive":
        return part, [True]
    setting, equals, values = part.partition("=")
    known = [each.name for each in fields(rule) if each.name != "exclusive"]
    if setting not in known or not equals:
        raise SelectionError(
            f"Rule {text!r} has the setting {part!r}; a setting of {rule_kind(rule)} is exclusive or "
            f"{', '.join(f'{name}=VALUE' for name in known)}, and several values are separated by /."
        )
    read = _read_layers if setting == "layers" else _read_number
    return setting, [read(text, setting, value) for value in values.split("/")]


def _read_number(text: str, setting: str, value: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise SelectionError(f"Rule {text!r} sets {setting} to {value!r}; write a number, as in {setting}=0.01.")


def _read_layers(text: str, setting: str, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
    if not found:
        raise SelectionError(
            f"Rule {text!r} sets {setting} to {value!r}; write the first and the last layer, as in {setting}=16-31."
        )
    return int(found[1]), int(found[2] or found[1])
