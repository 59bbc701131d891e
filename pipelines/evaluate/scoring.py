"""Metrics of stored answers by something outside the task: a judge, or a reward model.

A task of this kind is a `ScoredTask`: another task, which is answered and stored as every task is,
and a `Scorer`. The evaluation makes two cells of it: one of answers, and one of scores, whose key
is of the answers' key and the scorer's fingerprint. Both lie in the store in blocks, so scores are
paid for once, survive a kill, and are read, compared and shown like the samples of other tasks.
Two tasks with one `answered` share its answers.

To add a kind of scorer:

1. Write a class with the names of `Scorer`. `score` gets the samples of a block of answers and
   returns as many samples: those, with `requests` and `answers` of the scorer's own (what it was
   asked and what it said; empty lists are fine) and `values` by metric: `replace(sample,
   requests=[], answers=[], values={"reward": 0.5})`. What the answers were is in
   `conversations(sample)`. Where it needs an engine, `engine` says which, so that Ray gives its
   worker the room; the scorer opens it on first use, keeps it, and frees it in `close`. With
   `engine = None` blocks are scored by threads of this process: `score` must bear that.
2. Write a config class with a field that no other entry of `tasks:` has, and give it a line each in
   `SCORED_ENTRIES` and `TaskEntry` of `pipelines/evaluate/config.py`, and one in `OPENERS` of
   `pipelines/evaluate/opened.py`, which makes a `ScoredTask` of the entry. `ConversationTask` has
   prompts that are answered in a chat, of any origin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.engines import EngineConfig
from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text


class UnreadableScoresError(InputError):
    """Scores of which no number can be made, as where too many are invalid; the cell fails."""


class Scorer(Protocol):
    """What gives stored answers their values."""

    @property
    def fingerprint(self) -> str:
        """32 hex digits of all that scores depend on beside the answers, such as a model's digest,
        the template, the parser.
        """

    @property
    def described(self) -> dict[str, Any]:
        """The same in words, for `cell.json`; as JSON can hold it."""

    @property
    def remark(self) -> str:
        """What a reader of the numbers should know; may be empty."""

    @property
    def engine(self) -> EngineConfig | None:
        """The engine that it opens; None: it needs no room of the cluster."""

    @property
    def needs_folder(self) -> bool:
        """Whether it keeps files of its own, which an evaluation in an object store cannot hold."""

    def num_calls(self, documents: int) -> int:
        """The most calls that so many documents take of something that may cost money; 0: none."""

    def check(self, documents: int) -> None:
        """Make sure that so many documents can be scored, before any is answered.

        Raises:
            InputError: they cannot, as for want of an endpoint, or by a limit.
        """

    def score(self, samples: Sequence[Sample], folder: str) -> list[Sample]:
        """The samples with the scorer's values.

        Args:
            folder: the evaluation's, where a scorer may keep files of its own.

        Raises:
            InputError: they cannot be scored, now or later.
        """

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """The metrics over all scored samples.

        Raises:
            UnreadableScoresError: they give none.
        """

    def notes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What `evaluation.json` says beside the numbers; may be empty."""

    def close(self) -> None:
        """Free what it opened."""


class ScoredTask:
    """A task whose values come from a scorer; an `EvaluationTask`.

    Args:
        name: the column's.
        answered: what is answered. Its name must be another one, for its answers are a cell of
            their own.
    """

    def __init__(self, name: str, answered: EvaluationTask, scorer: Scorer) -> None:
        assert name != answered.name, "names of different cells"
        self.name, self.answered, self.scorer = name, answered, scorer
        self.num_documents = answered.num_documents
        self.remark = "; ".join(filter(None, (answered.remark, scorer.remark)))
        self.fingerprint = fingerprint([answered.fingerprint, scorer.fingerprint])

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`: the answers, not yet scored."""
        return self.answered.measure(engine, first, last)

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Scorer.numbers`."""
        return self.scorer.numbers(samples)

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """As `EvaluationTask.num_cut`: scored samples do not tell."""
        return 0

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """As `EvaluationTask.num_tokens`."""
        return self.answered.num_tokens(text, first, last)


def conversations(sample: Sample) -> list[list[Message]]:
    """The conversations of a sample that holds answers, each ending with one of them: of several
    turns one for each turn. A prompt that was a text is a message of the user.

    Raises:
        InputError: a task whose requests are no prompts, such as log-likelihoods.
    """
    found: list[list[Message]] = []
    for request, answer in zip(sample.requests, sample.answers, strict=True):
        prompt = request.get("context") if isinstance(request, dict) else request
        text = answer.get("text") if isinstance(answer, dict) else answer
        if prompt is None or not isinstance(text, str):
            raise InputError(f"document {sample.id}: holds no answers in words")
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        found.append([*before, {"role": "assistant", "content": text}])
    return found
