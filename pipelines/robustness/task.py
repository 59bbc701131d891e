"""An attacked task: a task of lm-evaluation-harness with the prompt that an attack finds for each
model, as an `EvaluationTask` beside the unattacked one.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.evaluate.harness import Task
from pipelines.evaluate.harness.library import FAILURES, first_line
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.evaluate.library_task import LibraryTask
from pipelines.fingerprint import fingerprint
from pipelines.robustness.attacks import Attack
from pipelines.robustness.config import AttackConfig
from pipelines.robustness.queries import Queries
from pipelines.robustness.search import Found
from pipelines.robustness.template import PromptTemplate

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text

MOST_LABELS = 20  # answers of a task with more different ones are no labels


class AttackedTask:
    """A task under an attack.

    Args:
        config: the attack.
        of: the unattacked task.

    Raises:
        InputError: the task's prompt is no template with words, its metric is unclear, or what the
            attack needs is not there.
    """

    def __init__(self, config: AttackConfig, of: LibraryTask) -> None:
        self.config, self.of, self.name = config, of, config.full_name
        self.num_documents = of.num_documents
        self.metric = _metric(config, of)
        self.attack = Attack(config, template_of(of.task, config.full_name), labels_of(of.task))
        identity = {**self.attack.identity, "metric": self.metric}
        self.described = {"of": of.name, "task_fingerprint": of.fingerprint, **identity}
        self.fingerprint = fingerprint(["attacked", of.fingerprint, identity])
        most = self.attack.most_queries
        self.remark = "; ".join(filter(None, [of.remark, f"{most} attacked prompts at most"]))
        self._found: tuple[str, Found] | None = None  # of the last key of queries

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`, with all queries kept in memory."""
        return self.measure_through(_Direct(engine), first, last)[0]

    def measure_through(
        self, queries: Queries, first: int, last: int
    ) -> tuple[list[Sample], dict[str, Any]]:
        """The samples of a range with the attacked prompt, and what was found, for the notes."""
        if self._found is None or self._found[0] != queries.key:
            self._found = queries.key, self.attack.run(lambda t: self._score(queries, t))
        found = self._found[1]
        samples = queries.samples(self.with_prompt(found.template), first, last)
        return list(samples), self.record(found)

    def with_prompt(self, template: PromptTemplate) -> LibraryTask:
        """The unattacked task with another prompt; its examples and answers stay."""
        if template.key == self.attack.start.key:
            return self.of
        return LibraryTask(with_template(self.of.task, template), self.of.long_prompts)

    def record(self, found: Found) -> dict[str, Any]:
        """What a search found, as JSON can hold it."""
        start, end = self.attack.start, found.template
        changed = [[a, b] for a, b in zip(start.pieces, end.pieces, strict=False) if a != b]
        return {
            "of": self.of.name,
            "metric": self.metric,
            "unattacked": found.unattacked,
            "attacked": found.value,
            "description": end.description,
            "text": end.text,
            "changed": changed + [["", piece] for piece in end.pieces[len(start.pieces) :]],
            "without_candidates": list(found.without_candidates),
            "queries": [[template.shown, value] for template, value in found.asked],
        }

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `EvaluationTask.numbers`."""
        return self.of.numbers(samples)

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """As `EvaluationTask.num_cut`."""
        return self.of.num_cut(samples)

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """As `EvaluationTask.num_tokens`: of all prompts that the attack asks at most."""
        return self.attack.most_queries * self.of.num_tokens(text, first, last)

    def _score(self, queries: Queries, template: PromptTemplate) -> float:
        """The metric of all documents with a prompt."""
        task = self.with_prompt(template)
        samples = [
            dataclasses.replace(sample, requests=[], answers=[])
            for sample in queries.samples(task, 0, self.num_documents)
        ]
        return self.of.values(samples)[self.metric].value


class _Direct:
    """Queries that are measured each time."""

    def __init__(self, engine: "Engine") -> None:
        self._engine, self.key = engine, engine.weights

    def samples(self, task: EvaluationTask, first: int, last: int) -> Iterator[Sample]:
        """As `Queries.samples`."""
        return iter(task.measure(self._engine, first, last))


def attacked_tasks(
    attacks: Sequence[AttackConfig], tasks: Sequence[LibraryTask]
) -> list[AttackedTask]:
    """The attacked tasks of an evaluation.

    Raises:
        InputError: an attack on a task that is not there, or a name that is there twice.
    """
    by_name = {task.name: task for task in tasks}
    found: list[AttackedTask] = []
    for place, config in enumerate(attacks):
        if config.task not in by_name:
            raise InputError(
                f"attacks.{place}.task: found {config.task!r}; allowed: {', '.join(by_name)}"
            )
        if config.full_name in [*by_name, *(each.name for each in found)]:
            raise InputError(
                f"attacks.{place}: {config.full_name} is there twice; names must differ"
            )
        try:
            found.append(AttackedTask(config, by_name[config.task]))
        except InputError as error:
            raise InputError(f"attacks.{place}: {error}") from None
    return found


def template_of(task: Task, name: str) -> PromptTemplate:
    """A task's prompt.

    Raises:
        InputError: it is a function, a column, or a choice between several.
    """
    config = task.library.config
    text, description = config.doc_to_text, config.description or ""
    reason = ""
    if config.use_prompt is not None or not isinstance(text, str) or callable(description):
        reason = "is made by code"
    elif text in task.library.features:
        reason = f"is the column {text!r} of its rows"
    elif task.library.multiple_input or task.output_type == "loglikelihood_rolling":
        reason = "has no text of its own"
    if reason:
        raise InputError(
            f"{name}: the prompt of {task.name} {reason}; allowed: a template (doc_to_text)"
        )
    return PromptTemplate.parse(text, description)


def with_template(task: Task, template: PromptTemplate) -> Task:
    """A task with another prompt. Few-shot examples have the old one: they have a field of their
    own for it, which the library fills in when it loads the task.
    """
    library = copy.copy(task.library)
    library._config = copy.copy(library._config)
    library._config.doc_to_text = template.text
    library._config.description = template.description
    if hasattr(library, "sampler"):
        library.sampler = copy.copy(library.sampler)  # it holds a generator
    return dataclasses.replace(task, library=library)


def labels_of(task: Task) -> list[str]:
    """The words of a task's labels: of its choices, or else its answers, where there are few."""
    found: dict[str, None] = {}
    has_choices = task.library.config.doc_to_choice is not None
    for place in range(len(task)):
        document = dict(task.document(place))
        try:
            if has_choices:
                labels = task.library.doc_to_choice(document)
            else:
                target = task.library.doc_to_target(document)
                labels = target if isinstance(target, list) else [target]
        except FAILURES as error:
            raise InputError(
                f"task {task.name}: document {task.ids[place]}: {first_line(error)}"
            ) from None
        found |= dict.fromkeys(str(label) for label in labels)
        if len(found) > MOST_LABELS:
            return []
    return list(found)


def _metric(config: AttackConfig, of: LibraryTask) -> str:
    """The metric that an attack lowers."""
    known = of.rising_metrics
    if config.metric in known:
        return config.metric
    if config.metric is None and len(known) == 1:
        return known[0]
    found = "none" if config.metric is None else repr(config.metric)
    raise InputError(
        f"{config.full_name}: metric: found {found}; allowed: "
        f"{', '.join(known) or 'a task with a metric of which more is better'}"
    )
