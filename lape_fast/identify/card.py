"""The model card of a neuron release: Markdown behind a YAML header, into which no metadata can write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from lape_fast.errors import LanguageError
from lape_fast.identify.counts import ActivationCounts, canonical_or_same
from lape_fast.text.languages import language_name

TEMPLATE = "card.md.j2"
TAGS = ("lape-fast", "language-neurons", "interpretability", "multilingual")

SELECTIVITY = ("own", "over_next_worst", "over_mean_of_others")

# What means something inside a line of Markdown; a backslash takes the meaning away.
MARKUP = re.compile(r"([\\`*_{}\[\]()#|!<>~&$:@])")


class _Markdown(str):
    """Text that is Markdown already."""


def render_card(index: dict[str, Any], counts: ActivationCounts) -> str:
    """The card of a release.

    Args:
        index: what ``release.json`` holds.
        counts: of the release.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lape_fast.identify"),
        # Everything that the template writes is escaped, unless it was made here.
        finalize=lambda value: value if isinstance(value, _Markdown) else escaped(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    stability = counts.metadata.get("stability") or {}
    languages = [
        {
            "code": code,
            "name": _name(code),
            "tokens": tokens,
            "stability": _stability(stability[code]) if code in stability else "not measured",
            "neurons": [each["neurons"].get(code, "") for each in index["sets"]],
        }
        for code, tokens in index["tokens"].items()
    ]
    return environment.get_template(TEMPLATE).render(
        header=_Markdown(_header(index)),
        # Inside a block of code nothing is markup, and a quoted text stays on its line.
        quoted=lambda text: _Markdown(json.dumps(text)),
        index=index,
        metadata=counts.metadata,
        corpus=_corpus_in_words(counts.metadata.get("corpus")),
        languages=languages,
        sets=[{**each, **_set_facts(each)} for each in index["sets"]],
        in_words=in_words,
    )


def escaped(value: Any) -> str:
    """A value as one line of Markdown that shows it, whatever it holds."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return MARKUP.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def in_words(value: Any, levels: int = 8) -> str:
    """JSON values on one line, down to so many levels: a stranger's may nest as deep as JSON can."""
    if isinstance(value, dict | list) and not levels:
        return "..."
    if isinstance(value, dict):
        given = {str(name).replace("_", " "): each for name, each in value.items() if each is not None}
        return ", ".join(f"{name} {in_words(each, levels - 1)}" for name, each in given.items())
    if isinstance(value, list):
        return ", ".join(in_words(each, levels - 1) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _header(index: dict[str, Any]) -> str:
    import yaml

    model = index["model"].get("model")
    # Were a text to go on in the next line, it could end the header there.
    header = {
        "license": _one_line(index["license"] or ""),
        "base_model": model if _is_hub_id(model) else None,
        # The hub knows languages without their script.
        "language": sorted({_one_line(canonical_or_same(code)).partition("_")[0] for code in index["tokens"]}),
        "library_name": "lape_fast",
        "tags": list(TAGS),
    }
    given = {name: value for name, value in header.items() if value}
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=float("inf"))


def _is_hub_id(model: Any) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(model, str):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    # A model that was read from a folder has the folder's name.
    return not Path(model).exists()


def _stability(measured: dict[str, Any]) -> str:
    if measured["jaccard"] is None:
        return "unknown"
    if measured.get("interval") is None:
        return f"{measured['jaccard']:.2f}"
    return "{:.2f}, {:.2f} to {:.2f}".format(measured["jaccard"], *measured["interval"])


def _corpus_in_words(corpus: Any) -> str:
    if not corpus:
        return "not named"
    # The languages have a table of their own.
    return in_words({name: value for name, value in corpus.items() if name != "languages"})


def _set_facts(each: dict[str, Any]) -> dict[str, Any]:
    sizes = list(each["neurons"].values())
    facts = {
        "median": f"{median(sizes):g}",
        "without": sizes.count(0),
        "text": _corpus_in_words(each["measured_on"]),
        "measured": [],
    }
    for language, found in (each["selectivity"] or {}).items():
        values = ["" if found[name] is None else f"{found[name]:+.4f}" for name in SELECTIVITY]
        facts["measured"].append((language, _name(language), each["neurons"].get(language, ""), *values))
    return facts


def _name(code: str) -> str:
    try:
        return language_name(code)
    except LanguageError:
        return code
