"""Studying what happened: scores per language, and what switching neurons off costs."""

from lape_fast.study.ablate import ablate_neurons, ablate_to_file, silenced
from lape_fast.study.alignment import Alignment, align_languages, linear_cka
from lape_fast.study.evaluate import EvaluationText, LanguageScore, evaluate_languages, prepare_text, score
from lape_fast.study.matrix import AblationMatrix
from lape_fast.study.weight_change import WeightChange, effective_rank, measure_weight_change

__all__ = [
    "AblationMatrix",
    "Alignment",
    "EvaluationText",
    "LanguageScore",
    "WeightChange",
    "ablate_neurons",
    "ablate_to_file",
    "align_languages",
    "effective_rank",
    "evaluate_languages",
    "linear_cka",
    "measure_weight_change",
    "prepare_text",
    "score",
    "silenced",
]
