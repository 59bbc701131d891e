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
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.statistics import aggregates, make_sheet, means
from pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text

BOOTSTRAPS = 100  # samples of clusters for the error of a metric that is no mean
_UNFILTERED = ",none"


class LibraryTask:
    """A task of lm-evaluation-harness on one split.

    Args:
        long_prompts: what happens to prompts that do not fit into the context.
    """

    def __init__(self, task: Task, long_prompts: LongPrompts) -> None:
        self.task, self._long_prompts = task, long_prompts
        self.name, self.num_documents = task.name, len(task)
        self.remark = task.remark if task.documents.is_halved else ""
        self.fingerprint = fingerprint([task.fingerprint, long_prompts])

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`."""
        requests, answers, scores = measure_range(
            engine, self.task, first, last, self._long_prompts
        )
        return [
            Sample(
                document=place,
                id=str(self.task.ids[place]),
                cluster=self.task.clusters[place],
                requests=[asdict(each) for each in requests if each.document == place],
                answers=[asdict(each) for each in answers if each.document == place],
                values={
                    _named(metric, score.filter): item
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
        found = self._metrics(samples)
        return {name: self._number(name, metric, samples) for name, metric in found.items()}

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

    def _metrics(self, samples: Sequence[Sample]) -> dict[str, Metric]:
        """The metrics of samples, which may be any."""
        scores = [
            Score(sample.document, filtered, metrics)
            for sample in samples
            for filtered, metrics in _by_filter(sample.values).items()
        ]
        found = self.task.aggregate(scores)
        return {_named(*key.split(",", 1)): metric for key, metric in found.items()}

    def _number(self, name: str, metric: Metric, samples: Sequence[Sample]) -> Number:
        """One metric with its error."""
        own = [sample for sample in samples if name in sample.values]
        if metric.is_mean:
            values = {"": {sample.id: float(sample.values[name]) for sample in own}}
            sheet = make_sheet(self.name, values, {sample.id: sample.cluster for sample in own})
            return Number(metric.value, float(means(sheet).stderrs[0]), metric.n)

        def aggregate(items: Sequence[Any]) -> float:
            drawn = [Sample(0, "", "", [], [], {name: item}) for item in items]
            return self._metrics(drawn)[name].value

        items = {"": [sample.values[name] for sample in own]}
        clusters = [sample.cluster for sample in own]
        seed = self.task.seed
        estimates, _ = aggregates(self.name, aggregate, items, clusters, BOOTSTRAPS, seed)
        return Number(metric.value, float(estimates.stderrs[0]), metric.n)


def _named(metric: str, filtered: str) -> str:
    """A metric's name; the filter "none" is left out."""
    return f"{metric},{filtered}".removesuffix(_UNFILTERED)


def _by_filter(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A document's items by filter, then metric."""
    found: dict[str, dict[str, Any]] = {}
    for name, item in values.items():
        metric, _, filtered = name.partition(",")
        found.setdefault(filtered or "none", {})[metric] = item
    return found
