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
from lape_fast.study.suites import SUITES, expand_tasks
from lape_fast.study.task_results import TaskResults, TaskRow
from lape_fast.study.tasks import evaluate_tasks

__all__ = [
    "AblationMatrix",
    "EvaluationText",
    "LanguageScore",
    "SUITES",
    "TaskResults",
    "TaskRow",
    "ablate_neurons",
    "ablate_to_file",
    "bits_per_byte",
    "evaluate_languages",
    "evaluate_tasks",
    "expand_tasks",
    "prepare_text",
    "score",
    "silenced",
]
