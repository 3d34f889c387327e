"""Studying what happened: scores per language, and what switching neurons off costs."""

from lape_fast.study.ablate import ablate_neurons, ablate_to_file, silenced
from lape_fast.study.alignment import Alignment, align_languages, linear_cka
from lape_fast.study.evaluate import EvaluationText, LanguageScore, evaluate_languages, prepare_text, score
from lape_fast.study.matrix import AblationMatrix

__all__ = [
    "AblationMatrix",
    "Alignment",
    "EvaluationText",
    "LanguageScore",
    "ablate_neurons",
    "ablate_to_file",
    "align_languages",
    "evaluate_languages",
    "linear_cka",
    "prepare_text",
    "score",
    "silenced",
]
