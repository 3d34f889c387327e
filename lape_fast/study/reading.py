"""How the values of a recipe are read from YAML: a reader checks a value and names where it stands if it is wrong."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any

from lape_fast.errors import ConfigError, LapeFastError
from lape_fast.identify import parse_rules
from lape_fast.text import canonical
from lape_fast.text.records import LineRange
from lape_fast.tune import parse_method

# The rates of methods that are not named.
DEFAULT = "default"

Reader = Callable[[Any, str], Any]


def key(read: Reader, default: Any = MISSING) -> Any:
    """A field of a section: how its value is read from YAML, and what it is where the recipe is silent."""
    return field(default=default, metadata={"read": read})


def a_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"`{where}` is {value!r}; write a text.")
    return value


def a_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"`{where}` is {value!r}; write true or false.")
    return value


def a_range(value: Any, where: str) -> str:
    try:
        return str(LineRange.parse(str(value)))
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {error}") from error


def a_number(fits: Callable[[float], bool], wanted: str) -> Reader:
    def read(value: Any, where: str) -> float:
        # YAML reads 1e-4 as a text, and 1.0e-4 as a number.
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not fits(number) or not math.isfinite(number):
            raise ConfigError(f"`{where}` is {value!r}; write a number {wanted}.")
        return number

    return read


def a_whole(least: int) -> Reader:
    def read(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"`{where}` is {value!r}; write a whole number of at least {least}.")
        return value

    return read


def one_of(choices: Sequence[str]) -> Reader:
    def read(value: Any, where: str) -> str:
        if value not in choices:
            raise ConfigError(f"`{where}` is {value!r}; {did_you_mean(value, choices)}")
        return value

    return read


def each_of(read: Reader) -> Reader:
    def read_all(value: Any, where: str) -> tuple:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"`{where}` is {value!r}; write a list with one value or more.")
        found = tuple(read(each, f"{where}[{number}]") for number, each in enumerate(value))
        twice = sorted({str(each) for each in found if found.count(each) > 1})
        if twice:
            raise ConfigError(f"`{where}` names {twice[0]} twice; name it once.")
        return found

    return read_all


def a_code(value: Any, where: str) -> str:
    try:
        return canonical(a_text(value, where))
    except LapeFastError as error:
        raise ConfigError(f"`{where}`: {error}") from error


def codes(*words: str) -> Reader:
    """A list of language codes, or one of the words."""

    def read(value: Any, where: str) -> str | tuple[str, ...]:
        return value if value in words else each_of(a_code)(value, where)

    return read


def a_rule(value: Any, where: str) -> str:
    try:
        rules = parse_rules(a_text(value, where))
    except LapeFastError as error:
        raise ConfigError(f"`{where}`: {error}") from error
    if len(rules) > 1:
        raise ConfigError(f"`{where}` is {value!r}, which is {len(rules)} rules; give one.")
    return value


def a_method(value: Any, where: str) -> str:
    try:
        parse_method(a_text(value, where))
    except LapeFastError as error:
        raise ConfigError(f"`{where}`: {error}") from error
    return value


a_rate = a_number(lambda value: value > 0, "above 0, such as 1e-4")
a_share = a_number(lambda value: 0 <= value <= 1, "from 0 to 1")
a_positive = a_number(lambda value: value > 0, "above 0")


def rates_of(value: Any, where: str) -> dict[str, tuple[float, ...]]:
    """Learning rates of all methods, or by method with those of the others under ``default``."""
    if not isinstance(value, Mapping):
        return {DEFAULT: each_of(a_rate)(value, where)}
    return {str(name): each_of(a_rate)(rates, f"{where}.{name}") for name, rates in value.items()}


def a_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"`{where or 'the recipe'}` is {value!r:.60}; write a mapping of names to values.")
    return dict(value)


def a_section(kind: type) -> Reader:
    """Reads a mapping into a dataclass whose fields are keys."""

    def read(value: Any, where: str) -> Any:
        given = a_mapping(value, where)
        known = {each.name: each for each in fields(kind)}
        prefix = f"{where}." if where else ""
        for name in given:
            if name not in known:
                raise ConfigError(f"The recipe has the unknown key `{prefix}{name}`; {did_you_mean(name, known)}")
        # What is written as null is as if it were left out.
        values = {
            name: known[name].metadata["read"](each, prefix + name) for name, each in given.items() if each is not None
        }
        lacking = [name for name, each in known.items() if each.default is MISSING and name not in values]
        if lacking:
            raise ConfigError(f"The recipe lacks `{prefix}{lacking[0]}`; add it.")
        return kind(**values)

    return read


def did_you_mean(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"write one of {', '.join(known)}."
