"""Studying what happened: scores per language, and what switching neurons off costs."""

from lape_fast.study.ablate import AblationMatrix, ablate_neurons, silenced
from lape_fast.study.evaluate import EvaluationText, LanguageScore, evaluate_languages, prepare_text, score

__all__ = [
    "AblationMatrix",
    "EvaluationText",
    "LanguageScore",
    "ablate_neurons",
    "evaluate_languages",
    "prepare_text",
    "score",
    "silenced",
]
