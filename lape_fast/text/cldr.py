"""The built-in corpus: running text in more than 120 languages, composed from the CLDR data that Babel carries.

Each document is two or three sentence-like clauses: which languages a territory speaks, what it pays with, what time
its zone keeps, when something happened, how long or how heavy something is. What is stated as a fact (languages,
currencies, zones, scripts) is one; dates and amounts are drawn. The words come only from a locale's own data, and the
grammar of lists, plurals, dates and numbers is the locale's. Every document has a seed of its own, so that any range
of lines is composed directly.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from lape_fast.files import file_hash
from lape_fast.text.cldr_words import Words, load_words
from lape_fast.text.languages import cldr_locales

# As many as the aligned news text that the splits 1-1597, 1598-1797 and 1798-1997 were made for, rounded up.
DOCUMENTS = 2000

_EPOCH = datetime.datetime(1950, 1, 1)
_EPOCH_DAYS = 36500


def cldr_languages() -> list[str]:
    """The canonical codes of the built-in languages, sorted."""
    return list(cldr_locales())


def cldr_documents(language: str, first: int = 1, last: int | None = None) -> Iterator[str]:
    """Composes documents of one language, the same ones on every machine and in every run.

    Args:
        language: one of ``cldr_languages()``.
        first: the number of the first document, from 1.
        last: the number of the last, itself included; None, like any number above it, means ``DOCUMENTS``.
    """
    words = load_words(cldr_locales()[language], script=language.split("_")[1])
    sentences = [sentence for sentence, needs in SENTENCES.items() if all(getattr(words, need) for need in needs)]
    for number in range(first, min(last or DOCUMENTS, DOCUMENTS) + 1):
        draw = random.Random(f"{language} {number}")
        chosen = draw.sample(sentences, draw.choice((2, 2, 3)))
        document = "".join(sentence(words, draw).rstrip(" .") + words.stop for sentence in chosen)
        yield document.translate(words.clean).strip()


def cldr_version() -> dict[str, str]:
    """What decides the text of the built-in corpus: the version of Babel's data, and the code that composes it."""
    import babel

    code = {name: file_hash(Path(__file__).with_name(name)) for name in ("cldr.py", "cldr_words.py")}
    return {"babel": babel.__version__, **code}


def _spoken(words: Words, draw: random.Random) -> str:
    territory, shares = draw.choice(words.spoken)
    return words.territories[territory] + words.colon + words.listed([words.languages[each] for each in shares], draw)


def _shares(words: Words, draw: random.Random) -> str:
    from babel.numbers import format_percent

    territory, shares = draw.choice(words.spoken)
    spoken = [
        f"{words.languages[language]} {format_percent(percent / 100, locale=words.locale)}"
        for language, percent in shares.items()
    ]
    return words.territories[territory] + words.colon + words.listed(spoken[:3], draw)


def _money(words: Words, draw: random.Random) -> str:
    territory, currency = draw.choice(words.money)
    return words.territories[territory] + words.colon + words.price(currency, draw)


def _exchange(words: Words, draw: random.Random) -> str:
    first, second = draw.sample(list(words.currencies), 2)
    return f"{words.price(first, draw)} = {words.price(second, draw)}"


def _shopping(words: Words, draw: random.Random) -> str:
    return words.measure(draw) + words.colon + words.price(draw.choice(list(words.currencies)), draw)


def _measures(words: Words, draw: random.Random) -> str:
    return words.listed([words.measure(draw) for _ in range(draw.randint(2, 4))], draw)


def _journey(words: Words, draw: random.Random) -> str:
    return f"{words.place(draw)} – {words.place(draw)}{words.colon}{words.measure(draw)}"


def _clock(words: Words, draw: random.Random) -> str:
    from babel.dates import format_time

    city, territory, zone = draw.choice(words.clocks)
    time = format_time(_moment(draw), "short", locale=words.locale)
    return f"{city} ({words.territories[territory]}){words.colon}{time}{words.comma}{zone}"


def _zone_places(words: Words, draw: random.Random) -> str:
    zone, territories = draw.choice(words.zones)
    some = draw.sample(territories, min(len(territories), draw.randint(2, 4)))
    return zone + words.colon + words.listed([words.territories[territory] for territory in some], draw)


def _appointment(words: Words, draw: random.Random) -> str:
    from babel.dates import format_date, format_time

    moment = _moment(draw)
    day = format_date(moment, "full", locale=words.locale)
    return day + words.comma + format_time(moment, "short", locale=words.locale) + words.colon + words.place(draw)


def _period(words: Words, draw: random.Random) -> str:
    from babel.dates import format_interval

    start = _moment(draw)
    end = start + datetime.timedelta(days=draw.choice((2, 3, 5, 8, 21, 34, 55, 400, 4000)))
    return words.place(draw) + words.colon + format_interval(start, end, "yMMMd", locale=words.locale)


def _month(words: Words, draw: random.Random) -> str:
    from babel.dates import format_skeleton

    moment = _moment(draw)
    days = [words.weekdays[(moment.weekday() + step) % 7] for step in range(draw.randint(2, 4))]
    return format_skeleton("yMMMM", moment, locale=words.locale) + words.colon + words.listed(days, draw)


def _seasons(words: Words, draw: random.Random) -> str:
    start = draw.randrange(12)
    months = [words.months[(start + step) % 12] for step in range(draw.randint(2, 4))]
    return words.place(draw) + words.colon + words.listed(months, draw)


def _distances(words: Words, draw: random.Random) -> str:
    return words.listed([words.distance(draw) for _ in range(draw.randint(1, 3))], draw)


def _news(words: Words, draw: random.Random) -> str:
    place = words.place(draw)
    return words.distance(draw) + words.comma + place + words.colon + words.some(words.languages, draw)


def _writing(words: Words, draw: random.Random) -> str:
    language, script, territory = draw.choice(words.writing)
    return f"{words.languages[language]} ({words.territories[territory]}){words.colon}{words.scripts[script]}"


def _places(words: Words, draw: random.Random) -> str:
    return words.some(words.territories, draw)


def _tongues(words: Words, draw: random.Random) -> str:
    return words.place(draw) + words.colon + words.some(words.languages, draw)


def _moment(draw: random.Random) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(days=draw.randrange(_EPOCH_DAYS), minutes=5 * draw.randrange(288))


# Every kind of sentence, and the words that a locale must have for it.
SENTENCES: dict[Callable[[Words, random.Random], str], tuple[str, ...]] = {
    _spoken: ("spoken",),
    _shares: ("spoken",),
    _money: ("money",),
    _exchange: ("money",),
    _shopping: ("money", "units"),
    _measures: ("units",),
    _journey: ("units",),
    _clock: ("clocks",),
    _zone_places: ("zones",),
    _appointment: ("territories",),
    _period: ("territories",),
    _month: ("territories",),
    _seasons: ("territories",),
    _distances: ("distances",),
    _news: ("distances", "languages"),
    _writing: ("writing",),
    _places: ("territories",),
    _tongues: ("languages",),
}
