"""What the store and the runner know of a task: documents in a fixed order, answered by an engine
and valued one by one, and how values become numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text


@dataclass(frozen=True, slots=True)
class Sample:
    """One document of a task with a model's answers to it.

    Attributes:
        document: its place in the task, from 0.
        id: its name in the task's data.
        cluster: documents of one cluster are not independent.
        requests: what the engine was asked, as JSON can hold it.
        answers: what it answered, one for each request.
        values: by metric, what the task's aggregation takes, often 0.0 or 1.0.
    """

    document: int
    id: str
    cluster: str
    requests: list[Any]
    answers: list[Any]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Number:
    """A metric's value in its own unit, its standard error (NaN where none is known), and the
    number of documents that it is of.
    """

    value: float
    stderr: float
    n: int


class EvaluationTask(Protocol):
    """A task as the store and the runner see it."""

    @property
    def name(self) -> str:
        """Its name in configs and results."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that samples depend on beside the model and the engine: documents,
        prompts, decoding, seed, scoring.
        """

    @property
    def num_documents(self) -> int:
        """How many documents are measured."""

    @property
    def remark(self) -> str:
        """What a reader of its numbers should know of its documents; may be empty."""

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """The samples of the documents `first` to `last - 1`. They do not depend on the range that
        they are measured in.

        Raises:
            InputError: the model cannot be asked, as for want of a chat template.
        """

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """The metrics over all samples, in the order of their documents."""

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """How many prompts did not fit into the model's context and were cut."""

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """How many tokens a model with this tokenizer reads and at most writes for a range of
        documents.
        """
