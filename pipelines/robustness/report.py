"""What an evaluation says of its attacks on one model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.evaluate.interface import Sample
from pipelines.evaluate.store import Store
from pipelines.robustness.drops import drops, plain
from pipelines.robustness.task import AttackedTask

if TYPE_CHECKING:
    from pipelines.evaluate.plan import EvaluationPlan


def attacks_on(
    plan: "EvaluationPlan", model: str, samples: Mapping[tuple[str, str], Sequence[Sample]]
) -> dict[str, dict[str, Any]]:
    """By attacked task: the prompt that was found, the prompts that were asked, and the drop of
    each metric. Tasks that were not measured, attacked and unattacked, are left out.

    Args:
        samples: those of whole cells, by model and task.
    """
    found = {}
    for task in plan.tasks:
        if not isinstance(task, AttackedTask):
            continue
        pair = [samples.get((model, name)) for name in (task.of.name, task.name)]
        unattacked, attacked = pair
        if unattacked is None or attacked is None:
            continue
        _, notes = Store(plan.out).read(plan.cells[model, task.name], 0)
        by_metric = drops(task, unattacked, attacked)
        found[task.name] = {
            **notes["attack"],
            "drops": {metric: plain(each) for metric, each in by_metric.items()},
        }
    return found
