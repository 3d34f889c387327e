"""What a study measures: bits per byte of the target and of the other languages, on validation and on test lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from lape_fast.errors import CorpusError
from lape_fast.study.evaluate import EvaluationText, prepare_text, score
from lape_fast.study.recipe import ALL, Recipe
from lape_fast.text import Corpus, open_corpus
from lape_fast.text.records import LineRange

# Figures are kept to a millionth of a bit: what is behind it differs between machines.
DIGITS = 6


@dataclass(frozen=True)
class Corpora:
    """The text of a study, opened; nothing of it is read yet."""

    recipe: Recipe
    training: str
    evaluation: str

    def train(self, languages: Sequence[str] | None = None) -> Corpus:
        """Training lines."""
        return self._open(self.training, self.recipe.text.train, languages)

    def validation(self, languages: Sequence[str] | None = None, lines: int | None = None) -> Corpus:
        """The first so many validation lines, or all of them."""
        return self._open(self.evaluation, first_lines(self.recipe.text.validation, lines), languages)

    def test(self, languages: Sequence[str] | None = None, lines: int | None = None) -> Corpus:
        """The first so many test lines, or all of them."""
        return self._open(self.evaluation, first_lines(self.recipe.text.test, lines), languages)

    def others(self) -> list[str]:
        """The languages in which change is measured, targets among them."""
        return self.validation().languages if self.recipe.others == ALL else list(self.recipe.others)

    def _open(self, corpus: str, lines: str, languages: Sequence[str] | None) -> Corpus:
        return open_corpus(corpus, lines=lines, languages=languages, text_column=self.recipe.text.text_column)


def open_corpora(recipe: Recipe, workspace: Path) -> Corpora:
    """Opens a recipe's text and makes sure that it has its languages.

    Args:
        recipe: the recipe.
        workspace: where links to aligned files are put: what lies in a corpus's subfolders is not aligned.

    Raises:
        CorpusError: no such corpus, or one that lacks a language.
    """
    names = (recipe.text.corpus, recipe.text.evaluation_corpus or recipe.text.corpus)
    if recipe.text.aligned:
        names = tuple(
            link_files(name, workspace / ("corpus" if name == names[0] else "evaluation-corpus")) for name in names
        )
    corpora = Corpora(recipe, *names)
    corpora.train(recipe.targets)
    corpora.validation(recipe.targets)
    corpora.validation(corpora.others())
    return corpora


def link_files(corpus: str, folder: Path) -> str:
    """A folder of links to the text files that lie in ``corpus`` itself.

    Raises:
        CorpusError: it is no folder, or there are none.
    """
    files = sorted(Path(corpus).resolve().glob("*.txt"))
    if not files:
        raise CorpusError(f"{corpus} is no folder with .txt files of aligned lines; name one, as in --corpus DIR.")
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        link = folder / path.name
        if not link.is_symlink() or link.resolve() != path:
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    return str(folder)


def first_lines(lines: str, number: int | None) -> str:
    """The first so many lines of a range, as a range.

    Example:
        >>> first_lines("1598-1797", 10)
        '1598-1607'
    """
    given = LineRange.parse(lines)
    last = given.last if number is None else min(given.last or given.first + number - 1, given.first + number - 1)
    return str(LineRange(given.first, last))


class Yardstick:
    """The prepared text of a study, and what it makes of a model.

    Args:
        recipe, corpora: the study's.
        model, tokenizer: the base, which decides how text is packed.
    """

    def __init__(self, recipe: Recipe, corpora: Corpora, model: nn.Module, tokenizer) -> None:
        sizes = recipe.evaluation

        def prepare(corpus: Corpus) -> EvaluationText:
            lengths = {"context_length": sizes.context_length, "batch_tokens": sizes.batch_tokens}
            return prepare_text(model, tokenizer, corpus, **lengths)

        others = corpora.others()
        self._others = prepare(corpora.validation(others, sizes.other_lines))
        self._test_others = prepare(corpora.test(others, sizes.test_other_lines))
        self._targets = {each: prepare(corpora.validation([each], sizes.lines)) for each in recipe.targets}
        self._test_targets = {each: prepare(corpora.test([each])) for each in recipe.targets}

    def base(self, model: nn.Module) -> dict[str, Any]:
        """The base's bits per byte: what every later measurement is compared with."""
        return {
            "validation_targets": {each: bits(model, text)[each] for each, text in self._targets.items()},
            "validation_others": bits(model, self._others),
            "test_targets": {each: bits(model, text)[each] for each, text in self._test_targets.items()},
            "test_others": bits(model, self._test_others),
        }

    def measure(self, base: Mapping[str, Any], target: str) -> Callable[[nn.Module], dict[str, float]]:
        """What a run on ``target`` measures again and again: its bits per byte, and the mean change elsewhere."""

        def measured(model: nn.Module) -> dict[str, float]:
            elsewhere = mean_change(base["validation_others"], bits(model, self._others), target)
            return {"target": bits(model, self._targets[target])[target], "elsewhere": elsewhere}

        return measured

    def test(self, model: nn.Module, base: Mapping[str, Any], target: str) -> dict[str, Any]:
        """Target and other languages on the test lines; ``elsewhere`` is the mean change, ``others`` each language."""
        others = bits(model, self._test_others)
        return {
            "target": bits(model, self._test_targets[target])[target],
            "elsewhere": mean_change(base["test_others"], others, target),
            "others": {language: others[language] for language in others if language != target},
        }


def bits(model: nn.Module, text: EvaluationText) -> dict[str, float]:
    """Bits per byte by language."""
    return {language: round(each.bits_per_byte, DIGITS) for language, each in score(model, text).items()}


def mean_change(before: Mapping[str, float], after: Mapping[str, float], target: str) -> float:
    """The mean change of the languages that are not the target.

    Raises:
        CorpusError: there is no other language.
    """
    changes = [after[language] - before[language] for language in before if language != target]
    if not changes:
        raise CorpusError(f"No language but the target {target} is measured; add some to `others`.")
    return round(fmean(changes), DIGITS)
