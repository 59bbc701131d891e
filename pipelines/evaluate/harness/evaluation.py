"""A task on an engine: what is asked, answered and scored for a range of its documents."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.engines import Engine
from pipelines.errors import InputError
from pipelines.evaluate.harness.requests import Answer, LongPrompts, Request, answered
from pipelines.evaluate.harness.tasks import ChatTemplate, Metric, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipelines.engines.text import Text


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model on one task.

    Attributes:
        answers: to the requests, in their order.
        metrics: by "METRIC,FILTER".
    """

    task: Task
    requests: Sequence[Request]
    answers: Sequence[Answer]
    scores: Sequence[Score]
    metrics: Mapping[str, Metric]

    @property
    def num_cut(self) -> int:
        """Prompts whose beginning did not fit into the context."""
        return sum(answer.num_cut > 0 for answer in self.answers)


def requests_of(text: "Text", task: Task, first: int, last: int) -> list[Request]:
    """The requests of a range of documents, in a model's chat template where the task wants one.

    Raises:
        InputError: it wants one and the model has none.
    """
    check_chat(text, task)
    template = chat_template_of(text.tokenizer) if task.chat.wanted else None
    return task.requests(first, last, template)


def measure_range(
    engine: Engine, task: Task, first: int, last: int, long_prompts: LongPrompts = "cut"
) -> tuple[list[Request], list[Answer], list[Score]]:
    """Ask an engine about the documents `first` to `last - 1`, and score its answers.

    Args:
        long_prompts: as for `answered`.

    Raises:
        InputError: as `measure_tasks`.
    """
    requests = requests_of(engine.text, task, first, last)
    answers = answered(engine, requests, task.name, long_prompts)
    return requests, answers, task.score(first, last, answers)


def measure_tasks(
    engine: Engine, tasks: Sequence[Task], *, long_prompts: LongPrompts = "cut"
) -> dict[str, TaskResult]:
    """Measure an engine's model on whole tasks, in this process and without a store.

    Args:
        long_prompts: as for `answered`.

    Returns:
        results by the tasks' names.

    Raises:
        InputError: no chat template where a task wants one, prompts that do not fit, a task that
            does not fit its data.
    """
    for task in tasks:
        check_chat(engine.text, task)
    found = {}
    for task in tasks:
        requests, answers, scores = measure_range(engine, task, 0, len(task), long_prompts)
        found[task.name] = TaskResult(task, requests, answers, scores, task.aggregate(scores))
    return found


def check_chat(text: "Text", task: Task) -> None:
    """Raise InputError if a task wants a chat template and the model has none."""
    if task.chat.wanted and not text.tokenizer.chat_template:
        raise InputError(
            f"task {task.name}: chat: model {text.name}: its tokenizer has no chat "
            "template; allowed: a model with one, or chat: false"
        )


def chat_template_of(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """A tokenizer's chat template as the library applies it: a prompt that ends with the beginning
    of an answer goes on with it; a template that refuses a system message does without, and a line
    says so.
    """
    from jinja2 import TemplateError

    told = False

    def filled(messages: list[dict[str, str]], begin_answer: bool) -> Any:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=begin_answer,
            continue_final_message=not begin_answer,
        )

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(filled(messages, add_generation_prompt))
        except TemplateError:
            nonlocal told
            if not told:
                print("  the chat template takes no system message: left out", file=sys.stderr)
            told = True
            without = [each for each in messages if each["role"] != "system"]
            return str(filled(without, add_generation_prompt))

    return render
