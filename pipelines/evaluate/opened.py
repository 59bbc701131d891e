"""The tasks that a config names, opened."""

from collections.abc import Sequence

from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.tasks import DIMENSIONS, Task, load_tasks


def open_tasks(config: EvaluateConfig, names: Sequence[str] | None = None) -> list[EvaluationTask]:
    """The tasks of a config, with their documents.

    Args:
        names: open only these, which the config asks for.

    Raises:
        InputError: a task that is unknown or cannot be read.
    """
    return [
        GradedTask(task, config.split, max_tokens=config.max_new_tokens, limit=config.limit)
        for task in _selected(config)
        if names is None or task.name in names
    ]


def dimension_groups(config: EvaluateConfig) -> dict[str, list[str]]:
    """The groups of a `tasks.yaml`: each H with its tasks, and the average of the H's."""
    tasks = _selected(config)
    groups = {
        dimension: [task.name for task in tasks if task.dimension == dimension]
        for dimension in DIMENSIONS
    }
    groups = {name: members for name, members in groups.items() if members}
    return groups | ({"average": list(groups)} if groups else {})


def _selected(config: EvaluateConfig) -> list[Task]:
    """The tasks that the config asks for."""
    tasks = load_tasks(config.tasks)
    known = [task.name for task in tasks]
    for name in config.only or ():
        if name not in known:
            raise InputError(f"{config.tasks}: only: unknown task {name!r}; allowed: {known}")
    return [task for task in tasks if config.only is None or task.name in config.only]
