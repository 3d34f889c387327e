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
from lape_fast.study.plan import plan_study
from lape_fast.study.recipe import Recipe, read_recipe
from lape_fast.study.study import run_study
from lape_fast.study.summary import summarise

__all__ = [
    "AblationMatrix",
    "EvaluationText",
    "LanguageScore",
    "Recipe",
    "ablate_neurons",
    "ablate_to_file",
    "bits_per_byte",
    "evaluate_languages",
    "plan_study",
    "prepare_text",
    "read_recipe",
    "run_study",
    "score",
    "silenced",
    "summarise",
]
