"""From an entry of a config's `tasks:` to a judged task."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.engines.interface import Sampling
from pipelines.errors import InputError
from pipelines.evaluate.conversations import Conversation, ConversationTask, file_of_split
from pipelines.evaluate.scoring import ScoredTask
from pipelines.fingerprint import fingerprint
from pipelines.judges.alpaca import read_gamed, require_sklearn
from pipelines.judges.config import JudgedSet
from pipelines.judges.judge import open_judge
from pipelines.judges.parsers import Choice, Label, Parser, Probabilities, Rating
from pipelines.judges.protocols import (
    NEED_REFERENCES,
    AlpacaEval,
    ByCategory,
    MtBench,
    Protocol,
    Ways,
)
from pipelines.judges.scorer import Asking, JudgeScorer
from pipelines.judges.templates import load_templates

# MT-Bench's temperatures by category; 0 in the others.
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_TOKENS = {"mt_bench": 1024, "alpaca_eval": 2048}  # of an answer; else 1024
_SCORES = {
    "halueval_wild": "no_hallucination",
    "salad_bench": "safe",
    "or_bench": "direct_answer",
    "refusal": "refusal",
    "prompts": "",
}
_PROMPTS = ("prompt", "question", "query", "instruction")  # names of the column of prompts
_PLAIN = {"question", "answer", "conversation"}
_LABELLED = (Label, Probabilities)
# The parsers that make sense with a protocol.
_PARSERS: dict[str, tuple[type[Parser], ...]] = {
    "mt_bench": (Rating,),
    "alpaca_eval": (Choice, Probabilities),
    "prompts": (Rating, *_LABELLED),
}


def judged_task(entry: JudgedSet, split: str, *, limit: int | None, seed: int) -> ScoredTask:
    """The task of an entry.

    Args:
        limit: only so many documents, from the first on.
        seed: of sampled answers, and of the order of two answers.

    Raises:
        InputError: data, a template or a judge that cannot be had or does not fit.
    """
    path = file_of_split(entry.data, split)
    if path is None:
        raise InputError(
            f"tasks: {entry.column}: data: has no {split} file; allowed: data: {{{split}: PATH}}"
        )
    rows = _rows(entry, path)
    # Of the documents, so that tasks with the same ones, by other judges, share their answers.
    answers = f"{entry.judged}.answers-{fingerprint([row.turns for row in rows])[:8]}"
    rows = rows[:limit]
    protocol = _protocol(entry, rows)
    asking = Asking(
        both_orders=entry.order == "both",
        repeats=entry.repeats,
        seed=seed,
        max_calls=entry.max_calls,
        max_invalid=entry.max_invalid,
    )
    source = entry.template or "words of Poise's own"
    judge = open_judge(entry.judge, entry.max_calls)
    scorer = JudgeScorer(entry.column, protocol, judge, asking, source)
    return ScoredTask(entry.column, ConversationTask(answers, rows, seed=seed), scorer)


def _rows(entry: JudgedSet, path: Path) -> list[Conversation]:
    """The documents of an entry."""
    table = read_rows(path)
    if entry.judged == "mt_bench":
        rows = _mt_bench(entry, table, path)
    elif entry.judged == "alpaca_eval":
        rows = _alpaca_eval(entry, table, path)
    else:
        rows = _prompts(entry, table, path)
    for name, count in Counter(row.id for row in rows).items():
        if count > 1:
            raise InputError(f"{path}: the id {name} is there twice; ids must differ")
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, or of JSONL.

    Raises:
        InputError: no such file, or no rows in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {getattr(error, 'strerror', None) or 'is no text in UTF-8'}"
        ) from None
    lines = enumerate(text.splitlines(), 1)
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [_json(line, f"{path} line {n}") for n, line in lines if line.strip()]
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise InputError(f"{path}: expected rows of named values, as a JSON list or in JSONL")
    return rows


def _json(line: str, source: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise InputError(f"{source}: not JSON") from None


def _text(row: Mapping[str, Any], name: str, source: str) -> str:
    """A text of a row."""
    found = row.get(name)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{source}: {name}: expected a text, found {_kind(found)}")
    return found


def _texts(row: Mapping[str, Any], name: str, count: int, source: str) -> list[str]:
    """So many texts of a row."""
    found = row.get(name)
    fits = isinstance(found, list) and len(found) == count
    if not fits or not all(isinstance(each, str) and each.strip() for each in found or ()):
        raise InputError(f"{source}: {name}: expected {count} texts")
    return list(found or ())


def _kind(value: Any) -> str:
    return "nothing" if value in (None, "") else type(value).__name__


def _sampling(entry: JudgedSet, temperature: float = 0.0) -> Sampling:
    """How a document is answered."""
    own = entry.sampling.model_dump() if entry.sampling else {"temperature": temperature}
    return Sampling(max_tokens=entry.max_new_tokens or _TOKENS.get(entry.judged, 1024), **own)


def _mt_bench(entry: JudgedSet, table: Sequence[Any], path: Path) -> list[Conversation]:
    """FastChat's `question.jsonl`, with the references of its `reference_answer/`."""
    references = {}
    for number, row in enumerate(read_rows(entry.references) if entry.references else (), 1):
        source = f"{entry.references} line {number}"
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else row
        turns = first if isinstance(first, dict) else {}
        references[str(row.get("question_id"))] = _texts(turns, "turns", 2, source)
    rows = []
    for number, row in enumerate(table, 1):
        source = f"{path} line {number}"
        name, category = str(row.get("question_id", number)), _text(row, "category", source)
        needed = category in NEED_REFERENCES
        if needed and name not in references:
            where = entry.references or "references: not given"
            raise InputError(f"{where}: question {name} ({category}): needs a reference")
        rows.append(
            Conversation(
                id=name,
                cluster=name,
                turns=tuple(_texts(row, "turns", 2, source)),
                sampling=_sampling(entry, _TEMPERATURES.get(category, 0.0)),
                about={"category": category, "references": references[name] if needed else None},
            )
        )
    return rows


def _alpaca_eval(entry: JudgedSet, table: Sequence[Any], path: Path) -> list[Conversation]:
    """AlpacaEval's `alpaca_eval.json`, with the outputs of the baseline in the same form."""
    assert entry.baseline is not None
    baseline = {}
    for number, row in enumerate(read_rows(entry.baseline), 1):
        source = f"{entry.baseline} row {number}"
        baseline[_text(row, "instruction", source)] = _text(row, "output", source)
    rows = []
    for number, row in enumerate(table):
        instruction = _text(row, "instruction", f"{path} row {number + 1}")
        if instruction not in baseline:
            raise InputError(f"{entry.baseline}: has no output for row {number + 1} of {path}")
        about = {"baseline": baseline[instruction], "index": number}
        name = str(number)
        rows.append(Conversation(name, name, (instruction,), _sampling(entry), (), about))
    return rows


def _prompts(entry: JudgedSet, table: Sequence[Any], path: Path) -> list[Conversation]:
    """Any prompts: a text, or the user's turns; further columns are fields of the template."""
    columns, sampling = dict(entry.columns), _sampling(entry)
    names = [columns["prompt"]] if "prompt" in columns else ["turns", *_PROMPTS]
    prompt = next((name for name in names if name in table[0]), None)
    if prompt is None:
        raise InputError(
            f"{path} row 1: found {', '.join(table[0])}; expected one of {', '.join(names)} (or "
            "columns: {prompt: NAME})"
        )
    for role, name in columns.items():
        if name not in table[0]:
            raise InputError(f"columns.{role}: found {name!r}; {path} has {', '.join(table[0])}")
    rows = []
    for number, row in enumerate(table, 1):
        source = f"{path} row {number}"
        said = row.get(prompt)
        turns = _texts(row, prompt, len(said), source) if isinstance(said, list) and said else None
        about = {key: value for key, value in row.items() if key != prompt}
        for role in ("reference", "category"):
            about[role] = row.get(columns.get(role, role))
        if entry.judged == "salad_bench":
            about["category"] = _text(row, columns.get("category", "category"), source)
        name = str(row.get(columns.get("id", "id"), number))
        rows.append(
            Conversation(
                id=name,
                cluster=str(row.get(columns.get("cluster", "cluster"), name)),
                turns=tuple(turns or [_text(row, prompt, source)]),
                sampling=sampling,
                about=about,
            )
        )
    return rows


def _ways(entry: JudgedSet, rows: Sequence[Conversation]) -> dict[str, set[str]]:
    """The ways in which a protocol asks, with the fields that each may use."""
    if entry.judged == "mt_bench":
        both = {f"{name}_{turn}" for name in ("question", "answer") for turn in (1, 2)}
        single = {"question", "answer"}
        return {
            "first": single,
            "first_with_reference": single | {"ref_answer_1"},
            "second": both,
            "second_with_reference": both | {"ref_answer_1", "ref_answer_2"},
        }
    if entry.judged == "alpaca_eval":
        return {"prompt": {"instruction", "output_1", "output_2"}}
    # A column is a field where every row has it.
    shared = {
        key
        for key in rows[0].about
        if key.isidentifier() and all(row.about.get(key) is not None for row in rows)
    }
    if entry.judged == "halueval_wild":
        plain = _PLAIN | (shared - {"reference"})
        return {"without_reference": plain, "with_reference": plain | {"reference"}}
    return {"prompt": _PLAIN | shared}


def _protocol(entry: JudgedSet, rows: Sequence[Conversation]) -> Protocol:
    """The protocol with its templates.

    Raises:
        InputError: templates or parsers that do not fit it.
    """
    ways: Ways = load_templates(entry.template, entry.judged, _ways(entry, rows), entry.parser)
    parsers = [parser for _, parser in ways.values()]
    allowed = _PARSERS.get(entry.judged, _LABELLED)
    for parser in parsers:
        if not isinstance(parser, allowed):
            kinds = ", ".join(each.__name__.lower() for each in allowed)
            raise InputError(
                f"tasks: {entry.column}: parser: found {type(parser).__name__.lower()}; allowed: "
                f"{kinds}"
            )
        if parser != parsers[0]:
            raise InputError(f"tasks: {entry.column}: template: its parsers differ; allowed: one")
        score = _SCORES.get(entry.judged, "")
        if isinstance(parser, Label) and score and score not in parser.labels.values():
            raise InputError(
                f"tasks: {entry.column}: parser.labels: has no word for {score}; found: "
                f"{', '.join(parser.labels.values())}"
            )
    if entry.judged == "mt_bench":
        return MtBench(ways, rows)
    if entry.judged == "alpaca_eval":
        require_sklearn()
        gamed = read_gamed(entry.difficulty) if entry.difficulty else None
        lacks = [row.id for row in rows if gamed and row.about["index"] not in gamed.difficulty]
        if lacks:
            raise InputError(f"difficulty: {entry.difficulty}: has no instruction {lacks[0]}")
        return AlpacaEval(ways, rows, gamed)
    kind = ByCategory if entry.judged == "salad_bench" else Protocol
    return kind(ways, rows, _SCORES[entry.judged])
