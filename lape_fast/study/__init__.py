"""Studying what happened: scores per language, and what switching neurons off costs."""

from lape_fast.study.ablate import ablate_neurons, ablate_to_file, silenced
from lape_fast.study.evaluate import (
    EvaluationText,
    LanguageScore,
    bits_per_byte,
    evaluate_languages,
    prepare_text,
    score,
)
from lape_fast.study.matrix import AblationMatrix

__all__ = [
    "AblationMatrix",
    "EvaluationText",
    "LanguageScore",
    "ablate_neurons",
    "ablate_to_file",
    "bits_per_byte",
    "evaluate_languages",
    "prepare_text",
    "score",
    "silenced",
]
