"""The tasks and groups that a config names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.groups import Group
from pipelines.evaluate.harness import TaskSet, load_tasks_and_averages
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.tasks import DIMENSIONS, Task, load_tasks
from pipelines.judges.config import JudgedSet
from pipelines.rewards.rewarded import RewardedSet
from pipelines.robustness.task import attacked_tasks


def open_tasks(config: EvaluateConfig) -> list[EvaluationTask]:
    """As `open_all`, but the tasks alone."""
    tasks, _ = open_all(config)
    return tasks


def open_all(config: EvaluateConfig) -> tuple[list[EvaluationTask], dict[str, Group]]:
    """The tasks of a config, with their documents, and its groups. Those of a `tasks.yaml` are by
    default each H, the mean of its tasks in percent, and the average of the H's; with a list of
    tasks the averages that the library's groups among them define stand before the config's own.

    Raises:
        InputError: a task that is unknown or cannot be read.
    """
    if isinstance(config.tasks, Path):
        chosen = _selected(config, config.tasks)
        graded: list[EvaluationTask] = [
            GradedTask(task, config.split, max_tokens=config.max_new_tokens, limit=config.limit)
            for task in chosen
        ]
        return graded, _dimensions(chosen) if config.groups is None else config.groups
    plain, averages = _library_tasks(config, config.tasks)
    tasks = [*_with_attacks(config, plain), *_scored_tasks(config, config.tasks)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tasks: {name} is there twice; names must differ (name: sets one)")
    groups = config.groups or {}
    for name in averages:
        if name in groups:
            raise InputError(f"groups.{name}: is an average of the task's own group; rename yours")
    return tasks, {**averages, **groups}


def _library_tasks(
    config: EvaluateConfig, entries: Sequence[Any]
) -> tuple[list[LibraryTask], dict[str, Group]]:
    """The tasks of lm-evaluation-harness among the entries of `tasks:`, and the averages of its
    own groups.
    """
    named = [each for each in entries if isinstance(each, str | TaskSet)]
    if not named:
        return [], {}
    tasks, averages = load_tasks_and_averages(
        named, config.split, limit=config.limit, seed=config.seed, allow_code=config.allow_code
    )
    return [LibraryTask(task, config.long_prompts) for task in tasks], averages


def _with_attacks(config: EvaluateConfig, plain: Sequence[LibraryTask]) -> list[EvaluationTask]:
    """The tasks, each before its attacks."""
    attacked = attacked_tasks(config.attacks, plain)
    found: list[EvaluationTask] = []
    for each in plain:
        found += [each, *(one for one in attacked if one.of is each)]
    return found


def _judged_task(entry: Any, config: EvaluateConfig) -> ScoredTask:
    from pipelines.judges.tasks import judged_task

    return judged_task(entry, config.split, limit=config.limit, seed=config.seed)


def _rewarded_task(entry: Any, config: EvaluateConfig) -> ScoredTask:
    from pipelines.rewards.metric import rewarded_task

    return rewarded_task(entry, config)


# By the classes of `SCORED_ENTRIES`.
OPENERS: dict[type[Config], Callable[[Any, EvaluateConfig], ScoredTask]] = {
    JudgedSet: _judged_task,
    RewardedSet: _rewarded_task,
}


def _scored_tasks(config: EvaluateConfig, entries: Sequence[Any]) -> list[ScoredTask]:
    """The tasks among the entries whose answers a scorer values."""
    return [OPENERS[type(each)](each, config) for each in entries if type(each) in OPENERS]


def _dimensions(tasks: Sequence[Task]) -> dict[str, Group]:
    """Each H that has tasks, and the average of the H's."""
    members = {
        dimension: [task.name for task in tasks if task.dimension == dimension]
        for dimension in DIMENSIONS
    }
    groups = {name: Group(members=of, scale=100.0) for name, of in members.items() if of}
    return groups | ({"average": Group(members=list(groups))} if groups else {})


def _selected(config: EvaluateConfig, path: Path) -> list[Task]:
    """The tasks of a `tasks.yaml` that the config asks for."""
    tasks = load_tasks(path)
    known = [task.name for task in tasks]
    for name in config.only or ():
        if name not in known:
            raise InputError(f"{path}: only: unknown task {name!r}; allowed: {known}")
    return [task for task in tasks if config.only is None or task.name in config.only]
