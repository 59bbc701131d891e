"""The answers of an engine to some documents of several tasks, as samples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.evaluate.graded import GradedTask
from pipelines.evaluate.interface import EvaluationTask, Sample
from pipelines.evaluate.scoring import ScoredTask

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine

Documents = Mapping[str, Sequence[int]]  # by task


def answers(
    engine: "Engine", tasks: Mapping[str, EvaluationTask], documents: Documents, scores: str = ""
) -> dict[str, list[Sample]]:
    """The samples of some documents of each task. Tasks with the same decoding are asked at once,
    as an engine answers many prompts faster together; answers do not depend on it. What several
    scorers value is answered once.

    Args:
        scores: a folder where scorers may keep files.
    """
    found: dict[str, list[Sample]] = {}
    together: dict[Any, list[GradedTask]] = {}
    answered: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}  # by task and documents
    for name, places in documents.items():
        task = tasks[name]
        if isinstance(task, GradedTask):
            together.setdefault(task.sampling, []).append(task)
        elif isinstance(task, ScoredTask):
            key = task.answered.fingerprint, tuple(places)
            if key not in answered:
                answered[key] = _measured(engine, task.answered, places)
            found[name] = task.scorer.score(answered[key], scores)
        else:
            found[name] = _measured(engine, task, places)
    for sampling, graded in together.items():
        prompts = [prompt for task in graded for prompt in task.prompts(documents[task.name])]
        completions = iter(engine.generate(prompts, sampling) if prompts else [])
        for task in graded:
            places = documents[task.name]
            found[task.name] = task.graded(places, [next(completions) for _ in places])
    return {name: found[name] for name in documents}


def _measured(engine: "Engine", task: EvaluationTask, places: Sequence[int]) -> list[Sample]:
    return [sample for first, end in _runs(places) for sample in task.measure(engine, first, end)]


def series_of(samples: Mapping[str, list[Sample]]) -> dict[str, list[float]]:
    """By `task.metric`: the scores of samples; metrics that are not a number a sample are not in
    it.
    """
    found: dict[str, list[float]] = {}
    for task, of in samples.items():
        for metric in of[0].values if of else ():
            scores = [sample.values.get(metric) for sample in of]
            if all(isinstance(score, int | float) for score in scores):
                found[f"{task}.{metric}"] = [float(score) for score in scores]  # type: ignore[arg-type]
    return found


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as ranges [first, last) of neighbours."""
    first = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield places[first], places[end - 1] + 1
            first = end
