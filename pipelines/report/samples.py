"""The samples that a page holds: of each task those documents on which the models differ most.

The choice is bounded and seeded: `count` documents of each task, fewer where models and tasks are
many; among documents on which models differ alike, a hash with the seed decides. Texts are cut.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.evaluate.interface import Sample
from pipelines.evaluate.results import Evaluation
from pipelines.report.joined import Frame, Set, numeric_values

MOST_ANSWERS = 20_000  # on one page
LONGEST = 2_000  # characters of a text


@dataclass(slots=True)
class Texts:
    """Texts by number; equal texts are held once."""

    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """The number of a text, which is cut if it is too long."""
        if len(text) > LONGEST:
            half = LONGEST // 2  # an answer often ends with what was asked for
            gap = f"\n[… {len(text) - 2 * half:,} characters left out …]\n"
            text = text[:half] + gap + text[-half:]
        return self.numbers.setdefault(text, len(self.numbers))


def chosen_samples(found: Set, count: int, seed: int) -> dict[str, Any]:
    """The samples as the page reads them.

    Args:
        count: the most documents of a task; 0: none.
        seed: decides among documents on which the models differ alike.

    Returns:
        `texts`, and for each task its metrics, how many documents it has, on how many models
        differ, and the chosen documents: prompt, and for each row the answer and the metrics'
        values. Texts stand there by their numbers.
    """
    texts = Texts()
    rows = list(found.rows.values())
    pairs = [(frame, task) for frame in found.frames for task in found.metrics(frame)]
    count = min(count, max(1, MOST_ANSWERS // max(1, len(rows) * len(pairs)))) if count else 0
    tasks = [_of_task(found, frame, task, rows, count, seed, texts) for frame, task in pairs]
    return {"texts": list(texts.numbers), "tasks": tasks}


def _of_task(
    found: Set, frame: Frame, task: str, rows: Sequence[str], count: int, seed: int, texts: Texts
) -> dict[str, Any]:
    metrics = found.metrics(frame)[task]
    own = found.with_task(frame, task)
    spreads = _spreads(found, frame, task, metrics)
    differing = sum(spread > 0 for spread in spreads.values())
    order = sorted(spreads, key=lambda name: (-spreads[name], _hash(seed, task, name)))
    wanted = {name: place for place, name in enumerate(order[:count])}
    documents: list[dict[str, Any]] = [{} for _ in wanted]
    names = list(metrics)  # then further values of samples, such as a judge's words
    for row in own if wanted else ():
        evaluation, model = found.places[row][frame][task]
        for sample in _with_answers(evaluation, model, task):
            if sample.id in wanted:
                document = documents[wanted[sample.id]]
                _put(document, sample, rows.index(row), len(rows), names, texts)
    return {
        "task": found.named(task, frame),
        "metrics": names,
        "total": len(spreads),
        "differing": differing,
        "documents": documents,
    }


def _spreads(found: Set, frame: Frame, task: str, metrics: Sequence[str]) -> dict[str, float]:
    """How much the models differ on each document, in the first metric that has numbers."""
    values, clusters = numeric_values(found, frame, task)
    known = {metric for own in values.values() for metric in own}
    first = next((metric for metric in (*metrics, *sorted(known)) if metric in known), "")
    columns = [own.get(first, {}) for own in values.values()]
    spreads = {}
    for name in clusters:
        numbers = [column[name] for column in columns if name in column]
        spreads[name] = statistics.pstdev(numbers) if numbers else 0.0
    return spreads


def _with_answers(evaluation: Evaluation, model: str, task: str) -> list[Sample]:
    """A cell's samples; scores of answers come with the answers, and with the judge's words."""
    scores = evaluation.samples(model, task)
    answered = evaluation.answered(model, task)
    if answered is None:
        return scores
    return [
        replace(answer, values=score.values | _verdicts(score.answers))
        for score, answer in zip(scores, answered, strict=True)
    ]


def _verdicts(answers: Sequence[Any]) -> dict[str, str]:
    """What a judge said of an answer, verdict by verdict, under one name."""
    said = [each for each in answers if isinstance(each, Mapping) and "text" in each]
    read = ["unreadable" if each.get("value") is None else each["value"] for each in said]
    lines = [f"{value}: {each['text']}" for value, each in zip(read, said, strict=True)]
    return {"verdicts": "\n".join(lines)} if lines else {}


def _hash(seed: int, task: str, name: str) -> bytes:
    return hashlib.sha256(json.dumps([seed, task, name]).encode()).digest()


def _put(
    document: dict[str, Any], sample: Sample, row: int, num_rows: int, names: list[str],
    texts: Texts,
) -> None:  # fmt: skip
    """Put a model's answer into a document; its prompt too, where another model's was different."""
    prompt = [[role, texts.add(text)] for role, text in prompt_of(sample)]
    if not document:
        document |= {"id": sample.id, "prompt": prompt, "answers": [None] * num_rows}
    names += [name for name in sample.values if name not in names]
    values = [_shown(sample.values.get(name), texts) for name in names]
    answer: list[Any] = [texts.add(answer_of(sample)), values]
    document["answers"][row] = [*answer, prompt] if prompt != document["prompt"] else answer


def _shown(value: Any, texts: Texts) -> Any:
    """A value for the page: numbers as they are, all else as a text's number in a list."""
    if value is None:
        return None
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return [texts.add(value if isinstance(value, str) else _json(value))]


def prompt_of(sample: Sample) -> list[tuple[str, str]]:
    """What a model was asked: (role or "", text) of each message; a context asked twice once, and
    the model's own earlier turns, which are answers, not at all.
    """
    found: dict[tuple[str, str], None] = {}
    for request in sample.requests:
        found |= dict.fromkeys(_messages(request))
    return [(role, text) for role, text in found if role != "assistant" or text not in
            sample.answers]  # fmt: skip


def _messages(request: Any) -> Iterator[tuple[str, str]]:
    if isinstance(request, str):
        yield "", request
    elif isinstance(request, Mapping) and "context" in request:
        yield "", request["context"] or request.get("continuation", "")
    elif isinstance(request, list) and all(isinstance(m, Mapping) and "role" in m for m in request):
        for message in request:
            content = message.get("content", "")
            yield str(message["role"]), content if isinstance(content, str) else _json(content)
    else:
        yield "", _json(request)


def answer_of(sample: Sample) -> str:
    """What a model answered: texts, numbered where there are several, or each scored continuation
    with its log-likelihood; `>` marks the likeliest.
    """
    answers = [each if isinstance(each, Mapping) else {"text": each} for each in sample.answers]
    scores = [each["value"] for each in answers if isinstance(each.get("value"), int | float)]
    several = sum(isinstance(each.get("text"), str) for each in answers) > 1
    lines = []
    for number, answer in enumerate(answers):
        if answer.get("text") is not None:
            text = answer["text"] if isinstance(answer["text"], str) else _json(answer["text"])
            lines.append(f"[{number + 1}] {text}" if several else text)
        elif scores and answer.get("value") is not None:
            request = sample.requests[number] if number < len(sample.requests) else {}
            asked = request.get("continuation", "") if isinstance(request, Mapping) else ""
            mark = ">" if answer["value"] == max(scores) and len(scores) > 1 else " "
            lines.append(f"{mark} {answer['value']:9.3f}  {asked.strip()[:200]}")
        else:
            lines.append(_json(answer))
    return "\n".join(lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
