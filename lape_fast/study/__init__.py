"""Studying what happened: scores, ablation, alignment of languages, change of weights, and steering."""

from lape_fast.study.ablate import ablate_neurons, ablate_to_file, silenced
from lape_fast.study.alignment import Alignment, align_languages, linear_cka
from lape_fast.study.evaluate import (
    EvaluationText,
    LanguageScore,
    bits_per_byte,
    evaluate_languages,
    prepare_text,
    score,
)
from lape_fast.study.language_identifier import LanguageIdentifier, train_identifier
from lape_fast.study.matrix import AblationMatrix
from lape_fast.study.plan import plan_study
from lape_fast.study.recipe import Recipe, read_recipe
from lape_fast.study.steer import Steering, force_language, mean_activations, steered
from lape_fast.study.study import run_study
from lape_fast.study.suites import SUITES, expand_tasks
from lape_fast.study.summary import summarise
from lape_fast.study.task_results import TaskResults, TaskRow
from lape_fast.study.tasks import evaluate_tasks
from lape_fast.study.weight_change import WeightChange, effective_rank, measure_weight_change

__all__ = [
    "AblationMatrix",
    "Alignment",
    "EvaluationText",
    "LanguageIdentifier",
    "LanguageScore",
    "Recipe",
    "SUITES",
    "Steering",
    "TaskResults",
    "TaskRow",
    "WeightChange",
    "ablate_neurons",
    "ablate_to_file",
    "align_languages",
    "bits_per_byte",
    "effective_rank",
    "evaluate_languages",
    "evaluate_tasks",
    "expand_tasks",
    "force_language",
    "linear_cka",
    "mean_activations",
    "measure_weight_change",
    "plan_study",
    "prepare_text",
    "read_recipe",
    "run_study",
    "score",
    "silenced",
    "steered",
    "summarise",
    "train_identifier",
]
