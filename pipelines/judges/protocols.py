"""The protocols of judged benchmarks: what is asked about an answer, and what the verdicts give.

MT-Bench: Zheng et al. 2023. AlpacaEval 2: Dubois et al. 2024. HaluEval-Wild: Zhu et al. 2024.
SALAD-Bench: Li et al. 2024. OR-Bench: Cui et al. 2024.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from operators.statistics import clustered_mean, mean_of_means
from pipelines.engines.interface import Message
from pipelines.evaluate.conversations import Conversation
from pipelines.evaluate.interface import Number, Sample
from pipelines.judges.alpaca import Gamed, length_controlled
from pipelines.judges.parsers import Label, Parser, Rating, Value
from pipelines.judges.templates import Template

Ways = Mapping[str, tuple[Template, Parser]]  # the ways to ask, by name
Verdict = Mapping[str, Any]  # part, swapped, repeat, text, value, model
NEED_REFERENCES = ("math", "coding", "reasoning")  # categories of MT-Bench


@dataclass(frozen=True, slots=True)
class Part:
    """What is judged by itself: a turn, or a whole answer.

    Attributes:
        way: of the protocol's ways to ask.
        fields: of the template; where two answers are compared, with the baseline's first.
    """

    name: str
    way: str
    fields: Mapping[str, str]

    def messages(self, ways: Ways, swapped: bool) -> list[Message]:
        """The question; `swapped` shows the model's answer first."""
        fields = dict(self.fields)
        if swapped:
            fields["output_1"], fields["output_2"] = fields["output_2"], fields["output_1"]
        return ways[self.way][0].filled(fields)


class Protocol:
    """Answers judged one by one, each by a rating or a label.

    Args:
        ways: to ask.
        rows: the documents.
        score: the label whose share is the task's metric; "": every label's is one.

    Attributes:
        compares: two answers are judged, the model's and a baseline's.
    """

    compares = False

    def __init__(self, ways: Ways, rows: Sequence[Conversation], score: str = "") -> None:
        self.ways, self.rows, self._score = ways, rows, score

    @property
    def most_parts(self) -> int:
        """The most parts of a document."""
        return 1

    @property
    def parser(self) -> Parser:
        """The parser; all ways to ask have one of the same kind and range."""
        return next(iter(self.ways.values()))[1]

    @property
    def range(self) -> tuple[float, float]:
        """The worst and the best value of the metrics."""
        parser = self.parser
        return (parser.lowest, parser.highest) if isinstance(parser, Rating) else (0.0, 1.0)

    @property
    def metrics(self) -> list[str]:
        """The metrics that a verdict has a value of."""
        parser = self.parser
        if isinstance(parser, Rating):
            return ["rating"]
        if self._score:
            return [self._score]
        return list(dict.fromkeys(parser.labels.values())) if isinstance(parser, Label) else ["p"]

    def parts(self, row: Conversation, answers: Sequence[str]) -> list[Part]:
        """What is asked about a document's answers."""
        said = [
            f"{who}: {text}"
            for asked, answer in zip(row.turns, answers, strict=True)
            for who, text in (("User", asked), ("Assistant", answer))
        ]
        own = {"question": row.turns[-1], "answer": answers[-1], "conversation": "\n\n".join(said)}
        reference = row.about.get("reference")
        way = next(iter(self.ways))
        if len(self.ways) > 1:
            way = "without_reference" if reference is None else "with_reference"
        return [Part("answer", way, {**_texts(row.about), **own})]

    def worth(self, verdict: Verdict) -> dict[str, float]:
        """A verdict as a number for each metric; none where it is invalid."""
        value: Value = verdict["value"]
        if value is None:
            return {}
        if isinstance(value, str):
            return {metric: float(value == metric) for metric in self.metrics}
        return dict.fromkeys(self.metrics, value)

    def part_values(self, verdicts: Iterable[Verdict]) -> dict[str, dict[str, float]]:
        """The values of a document's parts: means over repeats, then over both orders. A part has
        none where one of its orders has no readable verdict.
        """
        sides: dict[str, dict[bool, list[dict[str, float]]]] = {}
        for each in verdicts:
            side = sides.setdefault(each["part"], {}).setdefault(each["swapped"], [])
            side += [worth] if (worth := self.worth(each)) else []
        found: dict[str, dict[str, float]] = {}
        for part, by_order in sides.items():
            whole = all(by_order.values())
            found[part] = {
                metric: float(
                    np.mean([np.mean([each[metric] for each in own]) for own in by_order.values()])
                )
                for metric in (self.metrics if whole else ())
            }
        return found

    def values(self, row: Conversation, answers: Sequence[str], verdicts: Any) -> dict[str, Any]:
        """A document's values: of each metric, where all its parts have one."""
        parts = self.part_values(verdicts).values()
        whole = all(parts)
        return {m: float(np.mean([each[m] for each in parts])) for m in self.metrics if whole}

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """The metrics over all parts that have a value, with errors by cluster of documents."""
        return {metric: self.mean(samples, metric) for metric in self.metrics}

    def mean(self, samples: Sequence[Sample], metric: str, only: str | None = None) -> Number:
        """The mean of a metric over all parts, or over those of one name."""
        return _mean(
            [
                (values[metric], sample.cluster)
                for sample in samples
                for part, values in self.part_values(sample.answers).items()
                if values and only in (None, part)
            ]
        )


class MtBench(Protocol):
    """Both turns of a conversation are rated, the second one with both in view; some categories
    with reference answers. The rating is the mean over all turns of all documents.
    """

    @property
    def most_parts(self) -> int:
        """As `Protocol.most_parts`."""
        return 2

    def parts(self, row: Conversation, answers: Sequence[str]) -> list[Part]:
        """As `Protocol.parts`."""
        references = row.about["references"] or ()
        ending = "_with_reference" if references else ""
        known = {f"ref_answer_{i}": text for i, text in enumerate(references, 1)}
        first = {"question": row.turns[0], "answer": answers[0]}
        both = {
            f"{name}_{i}": text
            for name, texts in (("question", row.turns), ("answer", answers))
            for i, text in enumerate(texts, 1)
        }
        return [
            Part("turn_1", f"first{ending}", known | first),
            Part("turn_2", f"second{ending}", known | both),
        ]

    def values(self, row: Conversation, answers: Sequence[str], verdicts: Any) -> dict[str, Any]:
        """As `Protocol.values`, and those of each turn."""
        parts = self.part_values(verdicts)
        turns = {part: values["rating"] for part, values in parts.items() if values}
        return super().values(row, answers, verdicts) | turns

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Protocol.numbers`, and of each turn."""
        turns = {part: self.mean(samples, "rating", part) for part in ("turn_1", "turn_2")}
        return super().numbers(samples) | turns


class AlpacaEval(Protocol):
    """An answer beside a baseline's: the share in which it is preferred, in percent, and the same
    at equal length (`alpaca.py`).

    Args:
        gamed: what the length-controlled rate needs of the published file; None: without it.
    """

    compares = True

    def __init__(self, ways: Ways, rows: Sequence[Conversation], gamed: Gamed | None) -> None:
        super().__init__(ways, rows)
        self._gamed = gamed

    @property
    def range(self) -> tuple[float, float]:
        """As `Protocol.range`."""
        return 0.0, 100.0

    @property
    def metrics(self) -> list[str]:
        """As `Protocol.metrics`."""
        return ["win_rate"]

    def parts(self, row: Conversation, answers: Sequence[str]) -> list[Part]:
        """As `Protocol.parts`."""
        outputs = {"output_1": row.about["baseline"], "output_2": answers[0]}
        return [Part("answer", "prompt", {"instruction": row.turns[0], **outputs})]

    def worth(self, verdict: Verdict) -> dict[str, float]:
        """As `Protocol.worth`: the preference for the model's answer, in percent."""
        first = verdict["value"]
        if first is None:
            return {}
        return {"win_rate": 100.0 * (first if verdict["swapped"] else 1.0 - first)}

    def values(self, row: Conversation, answers: Sequence[str], verdicts: Any) -> dict[str, Any]:
        """As `Protocol.values`, and the answer's length in characters."""
        return super().values(row, answers, verdicts) | {"length": len(answers[0])}

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Protocol.numbers`, at equal length, and the mean length."""
        about = [self.rows[sample.document].about for sample in samples]
        preferences = [each.values.get("win_rate", math.nan) / 100 for each in samples]
        found = super().numbers(samples)
        if found["win_rate"].n:
            rate = length_controlled(
                np.asarray(preferences),
                np.asarray([len(each["baseline"]) for each in about]),
                np.asarray([each.values["length"] for each in samples]),
                np.asarray([each["index"] for each in about]),
                self._gamed,
            )
            found[rate.name] = Number(rate.value, rate.stderr, found["win_rate"].n)
        return found | {"length": _mean([(each.values["length"], each.id) for each in samples])}


class ByCategory(Protocol):
    """The share of a label, and its mean over categories, which may have different sizes."""

    def values(self, row: Conversation, answers: Sequence[str], verdicts: Any) -> dict[str, Any]:
        """As `Protocol.values`. The mean over documents of `..._by_category` is that over
        categories, so that models can be compared by document.
        """
        found = super().values(row, answers, verdicts)
        weight = self._weights[row.about["category"]]
        return found | {f"{name}_by_category": weight * value for name, value in found.items()}

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Protocol.numbers`, and by category."""
        found = super().numbers(samples)
        metric = self._score
        means = []
        for category in self._weights:
            own = [s for s in samples if self.rows[s.document].about["category"] == category]
            means.append(self.mean(own, metric))
        known = all(each.n for each in means)
        value, error = mean_of_means([(each.value, each.stderr) for each in means])
        if known:
            found[f"{metric}_by_category"] = Number(value, error, sum(each.n for each in means))
        return found

    @cached_property
    def _weights(self) -> dict[str, float]:
        """By category: documents of a mean category, for each of its own."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.about["category"]] = counts.get(row.about["category"], 0) + 1
        return {name: len(self.rows) / len(counts) / count for name, count in counts.items()}


def _texts(about: Mapping[str, Any]) -> dict[str, str]:
    """What a template may use of a document's columns."""
    return {key: str(value) for key, value in about.items() if value is not None}


def _mean(found: Sequence[tuple[float, str]]) -> Number:
    """The mean of values with their clusters."""
    if not found:
        return Number(math.nan, math.nan, 0)
    mean, error = clustered_mean([value for value, _ in found], [cluster for _, cluster in found])
    return Number(mean, error, len(found))
