"""Our own graders as metrics of the library's tasks.

A task's YAML names one of `pipelines.evaluate.graders` with its parameters:

    metadata:
      grader: {name: phrase, phrase: I do not know.}

The grader reads what the task's filters leave of the answer, beside the targets of `doc_to_target`.
It takes the place of the library's default metrics; those that `metric_list` names stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.evaluate.graders import grade
from pipelines.evaluate.tasks import GraderConfig

if TYPE_CHECKING:
    from lm_eval.api.task import Task as LibraryTask


@dataclass(frozen=True, slots=True)
class Grading:
    """A grader as a metric: 1 where it finds an answer right, 0 where wrong, or a share.

    Attributes:
        name: the grader's, and the metric's.
        alone: there are no other metrics.
    """

    name: str
    parameters: Mapping[str, Any]
    alone: bool

    @classmethod
    def of(cls, task: "LibraryTask", name: str) -> "Grading | None":
        """The grader that a task's `metadata.grader` names, if it does.

        Args:
            name: the task's, for messages.

        Raises:
            InputError: an unknown grader, other parameters than its own, no generated answers.
        """
        from pipelines.config import check

        metadata = task.config.metadata
        values = metadata.get("grader") if isinstance(metadata, dict) else None
        if values is None:
            return None
        config = check(values, GraderConfig, f"task {name}: metadata.grader")
        if task.OUTPUT_TYPE != "generate_until":
            raise InputError(
                f"task {name}: metadata.grader: has no effect with {task.OUTPUT_TYPE}; allowed: "
                "output_type: generate_until"
            )
        alone = task.config.metric_list is None and task.config.process_results is None
        return cls(config.name, config.parameters, alone)

    def graded(self, target: Any, responses: list[Any]) -> dict[str, float]:
        """The metric of one document.

        Args:
            target: the accepted answer, or a list of them.
            responses: what the filters leave of the answers to its only request: a text, or a list
                of texts, of which the first counts.
        """
        found = responses[0]
        text = found if isinstance(found, str) else found[0]
        answers = [str(each) for each in target] if isinstance(target, list) else [str(target)]
        # The leave to run code was asked for when the task was loaded.
        value = grade(self.name, text, answers, self.parameters, allow_code=True)
        return {self.name: value}
