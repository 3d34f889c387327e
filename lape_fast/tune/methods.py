"""The methods by which a language can be tuned: their names, their options and their text form.

subnetwork         the language's own neurons
random             as many neurons, none of them the language's, over all layers
random-per-layer   the same with as many in each layer as the language has there
masked             the language's neurons through dense gradients times a mask: the oracle of `subnetwork`
ffn                every weight and bias of the feed-forward blocks
full               every weight
lora               low-rank updates of the feed-forward projections, through PEFT (arXiv 2106.09685)
ia3                learned factors of activations, through PEFT (arXiv 2205.05638)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lape_fast.errors import ConfigError
from lape_fast.identify import NeuronSet
from lape_fast.identify.counts import find_language
from lape_fast.text import canonical

PROJECTIONS = ("gate", "up", "down")


class Option(NamedTuple):
    """An option of a method: its default, and what reads a value of it or raises ValueError saying what is wanted."""

    default: Any
    read: Callable[[str], Any]


class Kind(NamedTuple):
    """What a method needs and takes."""

    options: Mapping[str, Option] = {}
    needs_neurons: bool = False


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError("a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise ValueError("a number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise ValueError("a number of at least 0 and below 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _projections(text: str) -> tuple[str, ...]:
    chosen = text.split("+")
    if not set(chosen) <= set(PROJECTIONS):
        raise ValueError(f"some of {', '.join(PROJECTIONS)} with + between them")
    return tuple(name for name in PROJECTIONS if name in chosen)


def _projections_or_default(text: str) -> tuple[str, ...] | None:
    return None if text == "default" else _projections(text)


METHODS: dict[str, Kind] = {
    "subnetwork": Kind(needs_neurons=True),
    "random": Kind(needs_neurons=True),
    "random-per-layer": Kind(needs_neurons=True),
    "masked": Kind(needs_neurons=True),
    "ffn": Kind(),
    "full": Kind(),
    "lora": Kind(
        {
            "rank": Option(16, _whole),
            "alpha": Option(32.0, _positive),
            "dropout": Option(0.0, _share),
            "targets": Option(PROJECTIONS, _projections),
        }
    ),
    # Without targets, where PEFT puts the factors in this architecture.
    "ia3": Kind({"targets": Option(None, _projections_or_default)}),
}


@dataclass(frozen=True)
class Method:
    """A method with the values of its options, as ``parse_method`` reads it; its ``str`` is its text form."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_neurons(self) -> bool:
        """Whether it trains chosen neurons."""
        return METHODS[self.name].needs_neurons

    def __str__(self) -> str:
        settings = ",".join(f"{name}={_as_text(value)}" for name, value in self.options.items())
        return f"{self.name}:{settings}" if settings else self.name


def parse_method(text: str | Method) -> Method:
    """The method that a text form names.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``, with a name of ``METHODS``.

    Raises:
        ConfigError: an unknown name or option, named with the nearest known one, or a value out of its range.

    Example:
        >>> str(parse_method("lora:rank=32,alpha=64"))
        'lora:rank=32,alpha=64,dropout=0,targets=gate+up+down'
    """
    if isinstance(text, Method):
        return text
    name, colon, rest = text.partition(":")
    if name not in METHODS:
        raise ConfigError(f"The method {name!r} is unknown; {nearest(name, METHODS)}.")
    known = METHODS[name].options
    given: dict[str, Any] = {}
    for part in rest.split(",") if colon else []:
        option, equals, value = part.partition("=")
        if option not in known:
            advice = nearest(option, known) if known else f"{name} has no options"
            raise ConfigError(f"The method {text!r} sets {option!r}, which {name} does not know; {advice}.")
        if option in given or not equals:
            raise ConfigError(f"The method {text!r} does not give {option} one value; write {option}=VALUE once.")
        try:
            given[option] = known[option].read(value)
        except ValueError as error:
            raise ConfigError(f"The method {text!r} sets {option} to {value!r}; it must be {error}.") from error
    return Method(name, {option: given.get(option, known[option].default) for option in known})


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice for a misspelt name: the nearest known one, if any is near, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known are {', '.join(known)}"


@dataclass(frozen=True)
class TuningConfig:
    """What to tune, by which method.

    Args:
        method: a text form, see ``parse_method``.
        language: whose text, and whose neurons.
        neurons: a neuron file or a ``NeuronSet``, for the methods that train chosen neurons; others leave it alone.
        policy: what a subnetwork FFN keeps for its backward pass, for ``subnetwork`` and the random controls.
        seed: of random neurons and of LoRA's first values.

    Raises:
        ConfigError: the method is unknown, or it needs neurons and there are none.
        LanguageError: the language code is unknown, or the neurons lack the language.
        FileFormatError: the neuron file cannot be read.

    Example:
        >>> config = TuningConfig(method="lora:rank=8", language="mlt_Latn")
    """

    method: str | Method
    language: str
    neurons: Any = None
    policy: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", parse_method(self.method))
        object.__setattr__(self, "language", canonical(self.language))
        if self.method.needs_neurons and self.neurons is None:
            raise ConfigError(
                f"The method {self.method} trains chosen neurons, but none were given; name a neuron file, such as "
                "neurons.safetensors, or use ffn, full, lora or ia3."
            )
        if self.method.needs_neurons:
            neurons = self.neurons if isinstance(self.neurons, NeuronSet) else NeuronSet.load(self.neurons)
            find_language(neurons.languages, self.language)
            object.__setattr__(self, "neurons", neurons)


def _as_text(value: Any) -> str:
    if value is None:
        return "default"
    return "+".join(value) if isinstance(value, tuple) else f"{value:g}"
