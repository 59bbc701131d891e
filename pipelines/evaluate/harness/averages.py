"""Averages that the library's own groups define (`aggregate_metric_list`), as groups of ours."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.evaluate.groups import Group
from pipelines.evaluate.harness.tasks import Task

if TYPE_CHECKING:
    from lm_eval.api.group import Group as LibraryGroup


def averages_of(groups: "Sequence[LibraryGroup]", tasks: Sequence[Task]) -> dict[str, Group]:
    """The averages of the library's groups, by `group.metric`, with the filter after a comma unless
    it is "none".

    As in the library an average is over all tasks below the group that have the metric after the
    filter, weighted by their documents unless `weight_by_size` is false; without a list of filters
    there is one for each that a task has.

    Args:
        tasks: those of the groups, and perhaps others.
    """
    measured = {task.name: set(filtered_metrics(task)) for task in tasks}
    found = {}
    for group in groups:
        names = [task.task_name for task in group.get_all_tasks()]
        for wanted in group.aggregate_metric_list or []:
            have = {f for name in names for metric, f in measured[name] if metric == wanted.metric}
            for filtered in wanted.filter_list or sorted(have):
                key = metric_name(wanted.metric, filtered)
                own = [name for name in names if (wanted.metric, filtered) in measured[name]]
                if own:
                    found[f"{group.name}.{key}"] = Group(
                        members=[f"{name}.{key}" for name in own],
                        rule="pooled" if wanted.weight_by_size else "mean",
                    )
    return found


def filtered_metrics(task: Task) -> list[tuple[str, str]]:
    """Each metric of a task after each of its filters; functions may give more."""
    return [(metric, each.name) for metric in task.metrics for each in task.library._filters]


def metric_name(metric: str, filtered: str) -> str:
    """A metric's name in results, with the filter unless it is "none"."""
    return f"{metric},{filtered}".removesuffix(",none")
