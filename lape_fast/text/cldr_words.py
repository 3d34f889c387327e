"""What a locale of Babel's CLDR data has words for: the material of the built-in corpus.

Only a locale's own names are taken, never those of the root locale that fill its gaps.
"""

from __future__ import annotations

import copy
import datetime
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from babel import Locale

# How a script writes a comma, the mark between a heading and what it introduces, and the end of a sentence.
MARKS = {
    "Arab": ("، ", ": ", ". "),
    "Armn": (", ", "՝ ", "։ "),
    "Beng": (", ", ": ", "। "),
    "Deva": (", ", ": ", "। "),
    "Ethi": ("፣ ", "፦ ", "። "),
    "Guru": (", ", ": ", "। "),
    "Hans": ("，", "：", "。"),
    "Hant": ("，", "：", "。"),
    "Jpan": ("、", "：", "。"),
    "Khmr": (" ", "៖ ", "។ "),
    "Laoo": (", ", ": ", " "),
    "Mymr": ("၊ ", " - ", "။ "),
    "Olck": (", ", ": ", "᱾ "),
    "Orya": (", ", ": ", "। "),
    "Thai": (" ", ": ", " "),
    "Tibt": ("། ", "། ", "། "),
}
USUAL_MARKS = (", ", ": ", ". ")

# The digit zero of the numbering systems that are some locale's default.
ZEROS = {
    "adlm": "\U0001e950",
    "arab": "٠",
    "arabext": "۰",
    "beng": "০",
    "cakm": "\U00011136",
    "deva": "०",
    "mymr": "၀",
    "nkoo": "߀",
    "olck": "᱐",
    "tibt": "༠",
}

# Codes that stand for no territory, language, script or currency in particular.
PLACEHOLDERS = {
    *("XA", "XB", "ZZ"),
    *("mis", "mul", "und", "zxx"),
    *("Zinh", "Zmth", "Zsye", "Zsym", "Zxxx", "Zyyy", "Zzzz"),
    *("XTS", "XXX"),
}

# Spans of time, of which CLDR has past and future ("3 days ago", "in 3 days"); the other fields are abbreviations.
SPANS = ("year", "quarter", "month", "week", "day", "hour", "minute", "second",
         "mon", "tue", "wed", "thu", "fri", "sat", "sun")  # fmt: skip

# Typographic blanks become plain ones, and marks of direction go: they are layout, not language.
_PLAIN = str.maketrans({"\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u200e": None, "\u200f": None, "\u061c": None})

_MONEY_SINCE = datetime.date(1950, 1, 1)


def load_words(identifier: str, script: str) -> Words:
    """Collects the words of one locale.

    Args:
        identifier: the name of a locale in Babel's data, such as ``sr_Latn``.
        script: the ISO 15924 code of the script it is written in.
    """
    from babel.localedata import load

    locale = _isolated_locale(identifier)
    # load(merge_inherited=False) would give this directly, but would leave Babel's cache without the inherited data.
    own = defaultdict(dict, _beyond(load(identifier), load("root")))
    territories, languages, scripts, currencies = (
        {code: name for code, name in sorted(own[category].items()) if name != code and code not in PLACEHOLDERS}
        for category in ("territories", "languages", "scripts", "currency_names")
    )
    clocks, zones = _time_zones(own, territories)
    # Months that stand alone may need another case than those in dates (Polish "maj", but "1 maja").
    months = {**locale.months["format"]["wide"], **locale.months["stand-alone"].get("wide", {})}
    comma, colon, stop = MARKS.get(script, USUAL_MARKS)
    zero = ZEROS.get(locale.default_numbering_system, "0")
    digits = {ord("0") + digit: chr(ord(zero) + digit) for digit in range(10)}
    return Words(
        locale=locale,
        territories=territories,
        languages=languages,
        scripts=scripts,
        currencies=currencies,
        weekdays=[locale.days["format"]["wide"][day] for day in range(7)],
        months=[months[month] for month in range(1, 13)],
        units=sorted(unit for unit, forms in own["unit_patterns"].items() if "other" in forms.get("long", {})),
        distances=[
            own["date_fields"][span][direction]
            for span in SPANS
            for direction in ("past", "future")
            if "other" in own["date_fields"].get(span, {}).get(direction, {})
        ],
        spoken=_spoken(territories, languages),
        money=_money(territories, currencies),
        writing=_writing(languages, scripts, territories),
        clocks=clocks,
        zones=zones,
        list_styles=["standard", "or"] if "or" in own["list_patterns"] else ["standard"],
        comma=comma,
        colon=colon,
        stop=stop,
        clean=_PLAIN | digits,
    )


@dataclass(frozen=True)
class Words:
    """What one locale has names for, in orders that do not depend on the process.

    Attributes:
        units: units of measure that have a long form.
        distances: patterns of distances in time ("in {0} days"), each by plural category.
        spoken: a territory, and the percentage of its people who speak each language, the largest first.
        money: a territory and a currency that it has used since 1950.
        writing: a language, its script and its territory.
        clocks: the name of a city, its territory and the name of its time zone.
        zones: the name of a time zone and its territories.
        list_styles: the kinds of lists ("and", "or") that the locale has words for.
        clean: native digits and plain blanks, for ``str.translate``.
    """

    locale: Locale
    territories: dict[str, str]
    languages: dict[str, str]
    scripts: dict[str, str]
    currencies: dict[str, str]
    weekdays: list[str]
    months: list[str]
    units: list[str]
    distances: list[dict[str, str]]
    spoken: list[tuple[str, dict[str, float]]]
    money: list[tuple[str, str]]
    writing: list[tuple[str, str, str]]
    clocks: list[tuple[str, str, str]]
    zones: list[tuple[str, list[str]]]
    list_styles: list[str]
    comma: str
    colon: str
    stop: str
    clean: dict[int, str | None]

    def place(self, draw: random.Random) -> str:
        """The name of some territory."""
        return draw.choice(list(self.territories.values()))

    def some(self, names: Mapping[str, str], draw: random.Random) -> str:
        """A list of two to four of the names."""
        return self.listed(draw.sample(list(names.values()), draw.randint(2, 4)), draw)

    def listed(self, items: list[str], draw: random.Random) -> str:
        """The items joined as the locale joins a list; each of them once."""
        from babel.lists import format_list

        return format_list(list(dict.fromkeys(items)), draw.choice(self.list_styles), locale=self.locale)

    def price(self, currency: str, draw: random.Random) -> str:
        """Some amount of a currency, its name in the right plural."""
        from babel.numbers import format_currency

        amount = draw.choice((1, 2, 3, 5, 7, 12, 20, 45, 60, 101, 250, 999, 1500, 20000))
        return format_currency(amount, currency, locale=self.locale, currency_digits=False, format_type="name")

    def measure(self, draw: random.Random) -> str:
        """Some amount of some unit, in the right plural."""
        from babel.units import format_unit

        amount = draw.choice((1, 2, 3, 4, 5, 8, 11, 16, 25, 70, 120, 1000))
        return format_unit(amount, draw.choice(self.units), locale=self.locale)

    def distance(self, draw: random.Random) -> str:
        """Some distance in time from now, such as "in 3 days"."""
        from babel.numbers import format_decimal

        amount = draw.choice((1, 2, 3, 4, 5, 6, 7, 10, 12, 15, 20, 21, 30, 40, 100))
        patterns = draw.choice(self.distances)
        pattern = patterns.get(self.locale.plural_form(amount), patterns["other"])
        return pattern.replace("{0}", format_decimal(amount, locale=self.locale))


def _isolated_locale(identifier: str) -> Locale:
    """A locale whose data no other locale shares.

    Babel's locales share what they inherit, and write into it when they follow a reference to other data: the months
    of one language can so become those of the next, depending on which was used first.
    """
    from babel import Locale, localedata

    class IsolatedLocale(Locale):
        _data = localedata.LocaleDataDict(copy.deepcopy(localedata.load(identifier)))

    language, *script = identifier.split("_")
    return IsolatedLocale(language, script=script[0] if script else None)


def _beyond(entry: Any, root: Any) -> Any:
    """The texts of nested data that differ from the root locale's, in the same nesting; None where there are none."""
    # A pair is a reference into other data and what this locale puts over it.
    entry, root = (value[1] if isinstance(value, tuple) else value for value in (entry, root))
    if not isinstance(entry, Mapping):
        return entry if isinstance(entry, str) and entry != root else None
    known = root if isinstance(root, Mapping) else {}
    return {key: own for key, value in entry.items() if (own := _beyond(value, known.get(key)))}


def _spoken(territories: Mapping[str, str], languages: Mapping[str, str]) -> list[tuple[str, dict[str, float]]]:
    from babel.languages import get_territory_language_info

    spoken = []
    for territory in territories:
        shares = [
            (language, facts["population_percent"])
            for language, facts in get_territory_language_info(territory).items()
            if language in languages and facts["population_percent"] >= 1
        ]
        if shares:
            spoken.append((territory, dict(sorted(shares, key=lambda share: (-share[1], share[0]))[:5])))
    return spoken


def _money(territories: Mapping[str, str], currencies: Mapping[str, str]) -> list[tuple[str, str]]:
    from babel.numbers import get_territory_currencies

    return [
        (territory, currency)
        for territory in territories
        for currency in get_territory_currencies(territory, start_date=_MONEY_SINCE)
        if currency in currencies
    ]


def _writing(
    languages: Mapping[str, str], scripts: Mapping[str, str], territories: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    from babel.core import get_global

    likely = [(language, get_global("likely_subtags").get(language, "").split("_")) for language in languages]
    return [
        (language, subtags[1], subtags[2])
        for language, subtags in likely
        if len(subtags) == 3 and subtags[1] in scripts and subtags[2] in territories
    ]


def _time_zones(
    own: Mapping[str, dict], territories: Mapping[str, str]
) -> tuple[list[tuple[str, str, str]], list[tuple[str, list[str]]]]:
    from babel.core import get_global

    clocks = []
    zones: dict[str, list[str]] = {}
    for location, territory in sorted(get_global("zone_territories").items()):
        zone = get_global("meta_zones").get(location)
        names = own["meta_zones"].get(zone, {}).get("long")
        if not names or territory not in territories:
            continue
        name = names.get("standard", next(iter(names.values())))
        territories_of_zone = zones.setdefault(name, [])
        if territory not in territories_of_zone:
            territories_of_zone.append(territory)
        city = own["time_zones"].get(location, {}).get("city", territories[territory])
        if city != territories[territory]:
            clocks.append((city, territory, name))
    return clocks, sorted(zones.items())
