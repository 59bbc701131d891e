"""Prompts that are answered in a chat, turn by turn: what judges and reward models score."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engines.interface import Message, Sampling, answer_seed
from pipelines.evaluate.interface import Number, Sample
from pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine
    from pipelines.engines.text import Text


@dataclass(frozen=True, slots=True)
class Conversation:
    """One document: what the user says, turn by turn; the model answers each turn.

    Attributes:
        cluster: documents of one cluster are not independent.
        turns: one or more.
        opening: messages before the first turn.
        about: what a scorer knows of it, such as a reference; no part of the prompt.
    """

    id: str
    cluster: str
    turns: tuple[str, ...]
    sampling: Sampling
    opening: tuple[Message, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


class ConversationTask:
    """Conversations as an `EvaluationTask` without values of its own.

    Args:
        seed: of sampled answers.
        remark: as of `EvaluationTask`.
    """

    def __init__(
        self, name: str, rows: Sequence[Conversation], *, seed: int, remark: str = ""
    ) -> None:
        self.name, self.rows, self._seed = name, rows, seed
        self.num_documents, self.remark = len(rows), remark
        asked = [asdict(row) for row in rows]
        for each in asked:
            del each["about"]
        sampled = any(row.sampling.temperature > 0 for row in rows)
        self.fingerprint = fingerprint([asked, [name, seed] if sampled else None])

    def measure(self, engine: "Engine", first: int, last: int) -> list[Sample]:
        """As `EvaluationTask.measure`."""
        rows = self.rows[first:last]
        asked: list[list[list[Message]]] = [[] for _ in rows]
        answers: list[list[str]] = [[] for _ in rows]
        for turn in range(max(len(row.turns) for row in rows)):
            going = [place for place, row in enumerate(rows) if len(row.turns) > turn]
            for place in going:
                asked[place].append(_messages(rows[place], turn, answers[place]))
            # An engine takes one kind of sampling at a time.
            going.sort(key=lambda place: str(rows[place].sampling))
            for _, group in itertools.groupby(going, key=lambda place: rows[place].sampling):
                places = list(group)
                sampling = rows[places[0]].sampling
                seeds = [answer_seed(self._seed, self.name, rows[p].id, turn) for p in places]
                prompts = [asked[place][turn] for place in places]
                sampled = seeds if sampling.temperature > 0 else None
                completions = engine.generate(prompts, sampling, sampled)
                for place, completion in zip(places, completions, strict=True):
                    answers[place].append(completion.text)
        return [
            Sample(first + place, row.id, row.cluster, list(asked[place]), list(answers[place]), {})
            for place, row in enumerate(rows)
        ]

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `EvaluationTask.numbers`: none."""
        return {}

    def num_cut(self, samples: Sequence[Sample]) -> int:
        """As `EvaluationTask.num_cut`: none, as such prompts are refused."""
        return 0

    def num_tokens(self, text: "Text", first: int, last: int) -> int:
        """As `EvaluationTask.num_tokens`; earlier answers are counted with all their tokens."""
        found = 0
        for row in self.rows[first:last]:
            most = row.sampling.max_tokens
            for turn in range(len(row.turns)):
                prompt = _messages(row, turn, [""] * turn)
                found += len(text.encode(prompt)) + (turn + 1) * most
        return found


def file_of_split(data: Path | Mapping[Any, Path] | None, split: str) -> Path | None:
    """The file of a split; a file by itself is that of the test split."""
    if isinstance(data, Mapping):
        return data.get(split)
    return data if split == "test" else None


def _messages(row: Conversation, turn: int, answers: Sequence[str]) -> list[Message]:
    """The conversation up to one of the user's turns."""
    found: list[Message] = [*row.opening]
    for said, answer in zip(row.turns[:turn], answers, strict=True):
        found += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return [*found, {"role": "user", "content": row.turns[turn]}]
