"""The tasks and groups that a config names."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.groups import Group
from pipelines.evaluate.harness import load_tasks_and_averages
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.tasks import DIMENSIONS, Task, load_tasks


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
    tasks, averages = load_tasks_and_averages(
        config.tasks,
        config.split,
        limit=config.limit,
        seed=config.seed,
        allow_code=config.allow_code,
    )
    groups = config.groups or {}
    for name in averages:
        if name in groups:
            raise InputError(f"groups.{name}: is an average of the task's own group; rename yours")
    return [LibraryTask(task, config.long_prompts) for task in tasks], {**averages, **groups}


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
