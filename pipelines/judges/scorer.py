"""A judge and a protocol as the scorer of stored answers."""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipelines.engines import EngineConfig, answer_seed
from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.scoring import UnreadableScoresError
from pipelines.fingerprint import fingerprint
from pipelines.judges.judge import Judge
from pipelines.judges.parsers import Reply
from pipelines.judges.protocols import Protocol, Verdict
from pipelines.judges.verdicts import Verdicts, question_key


@dataclass(frozen=True, slots=True)
class Asking:
    """How often and in which order a judge is asked.

    Attributes:
        both_orders: of two answers that are compared; else one is drawn.
        seed: of the draw.
        max_calls: in one run.
        max_invalid: the share of unreadable verdicts above which a cell fails.
    """

    both_orders: bool = False
    repeats: int = 1
    seed: int = 0
    max_calls: int | None = None
    max_invalid: float = 0.05


@dataclass(frozen=True, slots=True)
class _Question:
    """A question about a part of a document's answers."""

    part: str
    way: str
    swapped: bool
    repeat: int
    messages: list[Message]
    key: str


class JudgeScorer:
    """A `Scorer` that asks a judge.

    Args:
        name: the task's.
        source: where the templates are from, for readers.
    """

    needs_folder = True  # of verdicts

    def __init__(
        self, name: str, protocol: Protocol, judge: Judge, asking: Asking, source: str
    ) -> None:
        self._name, self._protocol, self._judge, self._asking = name, protocol, judge, asking
        words = {
            way: [template.system, template.prompt, parser.model_dump(mode="json")]
            for way, (template, parser) in protocol.ways.items()
        }
        drawn = protocol.compares and not asking.both_orders
        order = ["drawn", asking.seed] if drawn else "both"
        self.described: dict[str, Any] = {
            "protocol": type(protocol).__name__,
            "judge": judge.identity,
            "templates": words,
            "order": order if protocol.compares else None,
            "repeats": asking.repeats,
        }
        about = [dict(row.about) for row in protocol.rows]
        self.fingerprint = fingerprint([self.described, protocol.metrics, about])
        self.remark = f"judged by {_named(judge.identity)} with {source}"
        self.engine: EngineConfig | None = judge.engine
        self._changed = threading.Condition()
        self._verdicts: Verdicts | None = None
        self._pending: set[str] = set()

    def num_calls(self, documents: int) -> int:
        """As `Scorer.num_calls`."""
        orders = 2 if self._protocol.compares and self._asking.both_orders else 1
        return documents * self._protocol.most_parts * orders * self._asking.repeats

    def check(self, documents: int) -> None:
        """As `Scorer.check`."""
        calls, most = self.num_calls(documents), self._asking.max_calls
        if most is not None and calls > most:
            raise InputError(
                f"task {self._name}: max_calls: found {most}; {calls} are needed; allowed: "
                f"{calls} or more, or a limit"
            )
        self._judge.check()

    def score(self, samples: Sequence[Sample], folder: str) -> list[Sample]:
        """As `Scorer.score`."""
        known = self._opened(folder)
        questions = [list(self._questions(sample)) for sample in samples]
        self._ask([each for own in questions for each in own], known)
        scored = []
        for sample, own in zip(samples, questions, strict=True):
            verdicts = [self._verdict(each, known[each.key]) for each in own]
            row = self._protocol.rows[sample.document]
            values = self._protocol.values(row, sample.answers, verdicts)
            keys = [each.key for each in own]
            scored.append(replace(sample, requests=keys, answers=verdicts, values=values))
        return scored

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Scorer.numbers`."""
        verdicts, invalid = _verdicts_of(samples)
        if invalid > self._asking.max_invalid * len(verdicts) or invalid == len(verdicts):
            example = next(each["text"] for each in verdicts if each["value"] is None)
            raise UnreadableScoresError(
                f"{self._told(samples)}; max_invalid is {self._asking.max_invalid}; such as "
                f"{_short(example)!r}"
            )
        return self._protocol.numbers(samples)

    def notes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """As `Scorer.notes`: numbers of verdicts and labels, bounds of the means where some
        verdicts are unreadable, the models that the endpoint named.
        """
        verdicts, invalid = _verdicts_of(samples)
        found: dict[str, Any] = {"verdicts": len(verdicts), "invalid": invalid}
        labels = Counter(each["value"] for each in verdicts if isinstance(each["value"], str))
        if labels:
            found["labels"] = dict(sorted(labels.items()))
        if models := sorted({each["model"] for each in verdicts if each["model"]}):
            found["models"] = models
        lines = []
        if invalid:
            found["bounds"] = self.bounds(samples)
            lines.append(self._told(samples))
        if len(models) > 1:
            lines.append(f"the endpoint names several models: {', '.join(models)}")
        return found | ({"line": "; ".join(lines)} if lines else {})

    def bounds(self, samples: Sequence[Sample]) -> dict[str, list[float]]:
        """By metric: its mean if all parts without a value were worst, and if all were best."""
        parts = [
            values
            for sample in samples
            for values in self._protocol.part_values(sample.answers).values()
        ]
        worst, best = self._protocol.range
        found = {}
        for metric in self._protocol.metrics:
            known = math.fsum(each[metric] for each in parts if each)
            missing = sum(not each for each in parts)
            found[metric] = [(known + missing * end) / len(parts) for end in (worst, best)]
        return found

    def close(self) -> None:
        """As `Scorer.close`."""
        self._judge.close()
        with self._changed:
            if self._verdicts is not None:
                self._verdicts.close()

    def _told(self, samples: Sequence[Sample]) -> str:
        """How many verdicts are unreadable, in words."""
        verdicts, invalid = _verdicts_of(samples)
        bounds = [f"{n} {low:.4g} to {high:.4g}" for n, (low, high) in self.bounds(samples).items()]
        return f"{invalid} of {len(verdicts)} verdicts are unreadable: {', '.join(bounds)}"

    def _opened(self, folder: str) -> Verdicts:
        """The stored verdicts of this judge."""
        with self._changed:
            if self._verdicts is None:
                self._verdicts = Verdicts(folder, fingerprint(self._judge.identity))
            return self._verdicts

    def _questions(self, sample: Sample) -> Iterator[_Question]:
        """All questions about a document's answers."""
        row, asking = self._protocol.rows[sample.document], self._asking
        orders = [False]
        if self._protocol.compares:
            drawn = answer_seed(asking.seed, "order", row.id) % 2 == 1
            orders = [False, True] if asking.both_orders else [drawn]
        for part in self._protocol.parts(row, sample.answers):
            parameters = self._parameters(part.way)
            for swapped in orders:
                messages = part.messages(self._protocol.ways, swapped)
                for repeat in range(asking.repeats):
                    key = question_key(messages, parameters, repeat)
                    yield _Question(part.name, part.way, swapped, repeat, messages, key)

    def _parameters(self, way: str) -> dict[str, Any]:
        return self._judge.parameters(self._protocol.ways[way][1])

    def _verdict(self, question: _Question, reply: Reply) -> Verdict:
        """What the parser reads in a reply."""
        return {
            "part": question.part,
            "swapped": question.swapped,
            "repeat": question.repeat,
            "text": reply.text,
            "value": self._protocol.ways[question.way][1].read(reply),
            "model": reply.model,
        }

    def _ask(self, questions: Sequence[_Question], known: Verdicts) -> None:
        """Ask what has no reply yet; what another thread is asking is waited for."""
        wanted = {each.key: each for each in questions}
        while True:
            with self._changed:
                open_ = [key for key in wanted if key not in known]
                mine = [key for key in open_ if key not in self._pending]
                others = set(open_) - set(mine)
                self._pending |= set(mine)
            try:
                for way in dict.fromkeys(wanted[key].way for key in mine):
                    self._ask_way(way, [wanted[k] for k in mine if wanted[k].way == way], known)
            finally:
                with self._changed:
                    self._pending -= set(mine)
                    self._changed.notify_all()
            if not others:
                return
            with self._changed:
                self._changed.wait_for(partial(self._none_pending, others))

    def _none_pending(self, keys: set[str]) -> bool:
        """Whether nobody asks for any of these now."""
        return not keys & self._pending

    def _ask_way(self, way: str, questions: Sequence[_Question], known: Verdicts) -> None:
        """Ask questions of one way, and keep each reply as it comes."""
        self._judge.ask(
            [each.messages for each in questions],
            self._parameters(way),
            lambda number, reply: known.add(questions[number].key, reply),
        )


def _verdicts_of(samples: Sequence[Sample]) -> tuple[list[Verdict], int]:
    """The verdicts on all samples, and how many are unreadable."""
    verdicts = [each for sample in samples for each in sample.answers]
    return verdicts, sum(each["value"] is None for each in verdicts)


def _named(identity: Mapping[str, Any]) -> str:
    """A judge in a word or two."""
    return " ".join(
        str(identity[key]) for key in ("model", "version", "weights") if identity.get(key)
    )


def _short(text: str) -> str:
    """The beginning of a reply, in one line."""
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:57]}..."
