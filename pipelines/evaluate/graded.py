"""Tasks of a `tasks.yaml`: prompts in JSONL files and an exact grader, as an `EvaluationTask`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from operators.statistics import clustered_mean
from pipelines.engines.interface import Sampling
from pipelines.evaluate.graders import grade
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.tasks import Split, Task, load_rows
from pipelines.fingerprint import fingerprint, fingerprint_file

if TYPE_CHECKING:
    from pipelines.engines.interface import Completion, Engine, Prompt
    from pipelines.engines.text import Text


class GradedTask:
    """A task with an exact grader, answered greedily.

    Args:
        max_tokens: of an answer.
        limit: measure only the first so many prompts; None measures all.

    Raises:
        InputError: its file cannot be read.
    """

    def __init__(self, task: Task, split: Split, *, max_tokens: int, limit: int | None) -> None:
        self._task, self._rows = task, load_rows(task, split)[:limit]
        self.sampling = Sampling(max_tokens=max_tokens)
        self.name, self.num_documents, self.remark = task.name, len(self._rows), ""
        self.metric = task.grader.name
        self.fingerprint = fingerprint(
            [
                fingerprint_file(task.files[split]),
                task.grader.model_dump(),
                task.prompt,
                max_tokens,
                len(self._rows),
            ]
        )

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`."""
        documents = range(first, last)
        return self.graded(documents, engine.generate(self.prompts(documents), self.sampling))

    def prompts(self, documents: Sequence[int]) -> list["Prompt"]:
        """What an engine is asked on some documents; together with other tasks' of one sampling."""
        return [self._rows[place].prompt for place in documents]

    def graded(self, documents: Sequence[int], completions: Sequence["Completion"]) -> list[Sample]:
        """The samples of documents from the answers to their prompts."""
        grader = self._task.grader
        rows = [self._rows[place] for place in documents]
        return [
            Sample(
                document=place,
                id=row.id,
                cluster=row.cluster,
                requests=[row.prompt],
                answers=[completion.text],
                values={
                    grader.name: grade(grader.name, completion.text, row.answers, grader.parameters)
                },
            )
            for place, row, completion in zip(documents, rows, completions, strict=True)
        ]

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `EvaluationTask.numbers`: the share of right answers, clustered."""
        metric = self.metric
        values = [sample.values[metric] for sample in samples]
        mean, error = clustered_mean(values, [sample.cluster for sample in samples])
        return {metric: Number(mean, error, len(samples))}

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """As `EvaluationTask.num_cut`: none, as such prompts are refused."""
        return 0

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """As `EvaluationTask.num_tokens`."""
        most = self.sampling.max_tokens
        return sum(len(text.encode(row.prompt)) + most for row in self._rows[first:last])
