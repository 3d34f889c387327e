"""Tasks of lm-evaluation-harness on a model in memory, and on the same model with one adapter after the other.

Every task is measured on its own: one that cannot be (an unknown name, data that are not here, no memory) is a row
that says why. The harness is an extra, ``pip install "lape-fast[evaluate]"``, and imported only when it is needed.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lape_fast.errors import ConfigError
from lape_fast.progress import progress_bar
from lape_fast.study.suites import SUITES, NamedTask, expand_tasks, own_task
from lape_fast.study.task_results import BASE, TaskResults, TaskRow
from lape_fast.tune import load_adapter

# Resamplings of the documents behind the standard error of a score that is no mean over them.
RESAMPLINGS = 100
# What the harness draws examples for its prompts with, so that every model sees the same ones.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Measure:
    """One score of one model.

    Attributes:
        value: the score.
        n: documents behind it.
        spread: numbers whose standard deviation is the score's standard error, drawn alike for every model, so that
            the standard deviation of a difference between two models is the standard error of their difference; None
            where the score does not come from documents one by one.
    """

    value: float
    n: int
    spread: Tensor | None


# What came of a task: its scores by the name of the task (a tag stands for several) and of the metric, or why not.
Outcome = dict[tuple[str, str], Measure] | str


def evaluate_tasks(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    languages: Sequence[str] | None = None,
    *,
    adapters: Sequence[str | os.PathLike] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int = 8,
) -> TaskResults:
    """Measures a model on tasks of lm-evaluation-harness, and then again with each adapter.

    Args:
        model: the base; afterwards it is what it was.
        tokenizer: its tokenizer.
        tasks: suites (``belebele``, ``sib200``, ``global_mmlu``, ``arc``, ``hellaswag``, ``flores``), and names that
            the harness or the folder knows.
        languages: codes in any style, for the suites.
        adapters: folders that ``load_adapter`` reads; one is attached at a time.
        limit: use only so many documents of each task.
        num_fewshot: solved examples in a prompt; the task's own number by default.
        include_path: a folder with more tasks, in the harness's YAML. Python that they name is run.
        batch_size: prompts per forward pass.

    Returns:
        A row per task, metric and model; one with ``status`` "failed" and a reason for a task that could not be
        measured.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, no task was named, or a suite without languages.
        LanguageError: a suite has no task in a language.
        FileFormatError, ArchitectureError: an adapter cannot be attached to the model.

    Example:
        >>> results = evaluate_tasks(model, tokenizer, ["belebele", "arc"], ["de"], adapters=["adapters/deu_Latn"])
        >>> results.save("tasks.json")
    """
    named = expand_tasks(tasks, languages)
    _require_harness()
    for folder in adapters:
        # A wrong adapter is refused before hours are spent on the base.
        load_adapter(model, folder).detach(keep=False)
    training = model.training
    names = [task.name for task in named]
    rows: list[TaskRow] = []
    base: dict[str, Outcome] = {}
    try:
        with _quiet(), progress_bar("evaluating tasks", len(named) * (1 + len(adapters))) as advance:
            from lm_eval.models.huggingface import HFLM

            # The harness may give the tokenizer another padding token.
            harness_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            loaded = _load_tasks(names, include_path, num_fewshot)
            for adapter in (None, *adapters):
                with _attached(model, adapter):
                    for task in named:
                        outcome = _measure(harness_model, loaded[task.name], limit)
                        reference = base.setdefault(task.name, outcome)
                        rows += _rows(task, BASE if adapter is None else str(adapter), outcome, reference)
                        advance(1, note=task.name)
    finally:
        model.train(training)
    return TaskResults(tuple(rows), _metadata(model, limit, num_fewshot))


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'Tasks need lm-evaluation-harness, which is not installed ({error}); pip install "lape-fast[evaluate]".'
        ) from error


@contextlib.contextmanager
def _attached(model: nn.Module, adapter: str | os.PathLike | None) -> Iterator[None]:
    if adapter is None:
        yield
        return
    attached = load_adapter(model, adapter)
    try:
        yield
    finally:
        attached.detach(keep=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells much; what matters of it is in the rows."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load_tasks(names: Sequence[str], folder: str | os.PathLike | None, num_fewshot: int | None) -> dict[str, Any]:
    """What the harness loads for each name (its ``TaskDict``), or the sentence that says why it could not."""
    from lm_eval.tasks import TaskManager

    include = None if folder is None else os.fspath(folder)
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(own_task(name) or name in manager.task_index for name in names):
        # Its index of thousands of files takes seconds.
        manager = TaskManager(include_path=include)
    return {name: _load_task(manager, name, num_fewshot) for name in dict.fromkeys(names)}


def _load_task(manager, name: str, num_fewshot: int | None) -> Any:
    own = own_task(name)
    if own is None and name not in manager.task_index:
        near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
        return f"{name} is no task of lm-evaluation-harness and none of the task folder; {hint}"
    try:
        loaded = manager.load([own or name])
    except Exception as error:
        return _reason(error)
    for task in loaded["tasks"].values():
        # A task that sets 0 itself has no examples to show.
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _measure(harness_model, loaded: Any, limit: int | None) -> Outcome:
    if isinstance(loaded, str):
        return loaded
    from lm_eval import evaluator

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        found = evaluator.evaluate(harness_model, loaded, limit=limit, bootstrap_iters=0)
        return _measures(found, loaded)
    except Exception as error:
        return _reason(error)
    finally:
        for task in loaded["tasks"].values():
            # Prompts and answers of every document, which would stay as long as the task.
            task._instances = None


def _measures(found: dict[str, Any], loaded: dict[str, Any]) -> dict[tuple[str, str], Measure]:
    """The scores among the harness's results: those of the outermost groups that have any, else those of the tasks."""
    groups = loaded.get("groups") or {}
    inner = {each.name for group in groups.values() for each in group.get_all_groups()}
    outer = [group for name, group in groups.items() if name not in inner and name in found.get("groups", {})]
    covered = {task.task_name for group in outer for task in group.get_all_tasks()}
    members = {group.name: group.get_all_tasks() for group in outer}
    members |= {name: [task] for name, task in loaded["tasks"].items() if name not in covered}
    measures = {}
    for name, tasks in members.items():
        for key, value in found["results"][name].items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            items = [
                sample[metric]
                for task in tasks
                for sample in found["samples"][task.task_name]
                if sample["filter"] == answers and metric in sample
            ]
            score = tasks[0].aggregation().get(metric) if len(tasks) == 1 else None
            title = metric if answers == "none" else key
            measures[name, title] = Measure(float(value), len(items), _spread(float(value), items, score))
    return measures


def _spread(value: float, items: list[Any], score: Callable[[list[Any]], float] | None) -> Tensor | None:
    """See ``Measure.spread``: from the documents where the score is their mean, else from resamplings of them."""
    if len(items) < 2:
        return None
    if all(isinstance(item, Real) for item in items) and math.isclose(fmean(items), value, abs_tol=1e-9):
        return torch.tensor(items, dtype=torch.float64) / math.sqrt(len(items))
    if score is None:
        return None
    draw = random.Random(FEWSHOT_SEED)
    scores = [float(score(draw.choices(items, k=len(items)))) for _ in range(RESAMPLINGS)]
    return torch.tensor(scores, dtype=torch.float64)


def _rows(task: NamedTask, model: str, outcome: Outcome, base: Outcome) -> list[TaskRow]:
    if isinstance(outcome, str):
        return [TaskRow(task.name, task.language, model, why=outcome)]
    rows = []
    for (name, metric), measure in outcome.items():
        change, error = None, None
        if model != BASE and not isinstance(base, str):
            change = measure.value - base[name, metric].value
            error = _deviation(measure.spread, base[name, metric].spread)
        row = (measure.value, _deviation(measure.spread), measure.n, change, error)
        rows.append(TaskRow(name, task.language, model, metric, *row))
    return rows


def _deviation(spread: Tensor | None, other: Tensor | None = None) -> float | None:
    """The standard deviation of a spread, or of its difference to another."""
    if spread is None:
        return None
    return float((spread if other is None else spread - other).std())


def _reason(error: Exception) -> str:
    """One sentence that says why a task could not be measured, and what to do."""
    chain = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    said = " ".join(str(error).split())
    for names, sentence in REASONS:
        if kinds & names:
            return sentence.format(said=said)
    return f"{type(error).__name__}: {said}"


# The names of errors, since some belong to packages that not every version of the harness's libraries has.
REASONS = (
    (
        {"OutOfMemoryError"},
        "The memory of the device does not suffice; choose a smaller batch size or a smaller model ({said}).",
    ),
    (
        {"GatedRepoError"},
        "The data are given only to those who accept their terms; do so on the hub, then `hf auth login` ({said}).",
    ),
    (
        {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "NetworkError", "TransportError"},
        "The data are not in the cache and cannot be downloaded here; run the task once where there is a network and "
        "copy that cache (HF_HOME) ({said}).",
    ),
)


def _metadata(model: nn.Module, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model": getattr(model, "name_or_path", ""),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "versions": {name: version(name) for name in ("lm_eval", "sacrebleu", "transformers", "torch")},
    }
