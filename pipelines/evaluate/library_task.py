"""Tasks of lm-evaluation-harness as `EvaluationTask`s."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines.evaluate.harness import (
    Answer,
    LongPrompts,
    Metric,
    Request,
    Score,
    Task,
    TaskResult,
    measure_range,
    requests_of,
)
from pipelines.evaluate.harness.averages import filtered_metrics, metric_name
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.statistics import Estimates, aggregates, make_sheet, means
from pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text

BOOTSTRAPS = 100  # samples of clusters for the error of a metric that is no mean


class LibraryTask:
    """A task of lm-evaluation-harness on one split.

    Args:
        long_prompts: what happens to prompts that do not fit into the context.
    """

    def __init__(self, task: Task, long_prompts: LongPrompts) -> None:
        self.task, self.long_prompts = task, long_prompts
        self.name, self.num_documents = task.name, len(task)
        self.remark = task.remark if task.documents.is_halved else ""
        self.fingerprint = fingerprint([task.fingerprint, long_prompts])

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`."""
        requests, answers, scores = measure_range(engine, self.task, first, last, self.long_prompts)
        return [
            Sample(
                document=place,
                id=str(self.task.ids[place]),
                cluster=self.task.clusters[place],
                requests=[asdict(each) for each in requests if each.document == place],
                answers=[asdict(each) for each in answers if each.document == place],
                values={
                    metric_name(metric, score.filter): item
                    for score in scores
                    if score.document == place
                    for metric, item in score.metrics.items()
                },
            )
            for place in range(first, last)
        ]

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `EvaluationTask.numbers`: by the task's own aggregation. Errors are by clusters: of a
        mean in closed form, of another metric from bootstrap samples.
        """
        found = {}
        for name, metric in self.values(samples).items():
            [error] = self._estimates(name, metric, {"": samples}).stderrs
            found[name] = Number(metric.value, float(error), metric.n)
        return found

    def estimates(self, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Estimates]:
        """The joint estimates of several rows of samples of the same documents, by metric; errors
        as in `numbers`.
        """
        first = next(iter(samples.values()))
        return {
            name: self._estimates(name, metric, samples)
            for name, metric in self.values(first).items()
        }

    @property
    def metric_names(self) -> list[str]:
        """The names of its metrics; functions may give others."""
        return [metric_name(*each) for each in filtered_metrics(self.task)]

    @property
    def rising_metrics(self) -> list[str]:
        """The names of those of which more is better."""
        better = self.task.higher_is_better
        return [metric_name(*each) for each in filtered_metrics(self.task) if better(each[0])]

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """As `EvaluationTask.num_cut`."""
        return sum(answer["num_cut"] > 0 for sample in samples for answer in sample.answers)

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """As `EvaluationTask.num_tokens`."""
        requests = requests_of(text, self.task, first, last)
        texts = [each.context + each.continuation for each in requests]
        most = sum(each.sampling.max_tokens for each in requests if each.sampling)
        return most + sum(len(text.encode(each)) for each in texts if each)

    def result(self, samples: Sequence[Sample]) -> TaskResult:
        """What the library's own files are written from."""
        requests = [
            Request(**{**each, "sampling": None}) for sample in samples for each in sample.requests
        ]
        answers = [Answer(**each) for sample in samples for each in sample.answers]
        scores = self.task.score(0, len(samples), answers)
        return TaskResult(self.task, requests, answers, scores, self.task.aggregate(scores))

    def values(self, samples: Sequence[Sample]) -> dict[str, Metric]:
        """The metrics of samples, which may be any, without errors."""
        scores = [
            Score(sample.document, filtered, metrics)
            for sample in samples
            for filtered, metrics in _by_filter(sample.values).items()
        ]
        found = self.task.aggregate(scores)
        return {metric_name(*key.split(",", 1)): metric for key, metric in found.items()}

    def _estimates(
        self, name: str, metric: Metric, samples: Mapping[str, Sequence[Sample]]
    ) -> Estimates:
        """One metric of all rows."""
        own = {
            row: [sample for sample in each if name in sample.values]
            for row, each in samples.items()
        }
        first = next(iter(own.values()))
        if metric.is_mean:
            values = {
                row: {sample.id: float(sample.values[name]) for sample in each}
                for row, each in own.items()
            }
            return means(
                make_sheet(self.name, values, {sample.id: sample.cluster for sample in first})
            )

        def aggregate(items: Sequence[Any]) -> float:
            drawn = [Sample(0, "", "", [], [], {name: item}) for item in items]
            return self.values(drawn)[name].value

        items = {row: [sample.values[name] for sample in each] for row, each in own.items()}
        clusters = [sample.cluster for sample in first]
        seed = self.task.seed
        return aggregates(self.name, aggregate, items, clusters, BOOTSTRAPS, seed)[0]


def _by_filter(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A document's items by filter, then metric."""
    found: dict[str, dict[str, Any]] = {}
    for name, item in values.items():
        metric, _, filtered = name.partition(",")
        found.setdefault(filtered or "none", {})[metric] = item
    return found
