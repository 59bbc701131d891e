"""Readers of published preference sets: their raw columns become pairs of messages.

A reader is a function and a line in `READERS`. It takes a row (or all rows of one prompt) and gives
rows in TRL's columns; keyword-only parameters are its options. Where the columns are known from
memory alone, a set with other columns is refused with what was expected and what was found.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipelines.errors import InputError
from pipelines.train.rows.columns import WrongColumnsError
from pipelines.train.rows.examples import LeftOutError
from pipelines.train.rows.messages import Messages

Fields = dict[str, Any]
Draw = Callable[[str, int], int]  # (what is drawn for, a number of choices) -> one of them
TIE = "that are a tie"


@dataclass(frozen=True, slots=True)
class Reader:
    """How one set is read.

    Attributes:
        read: (row, draw, options) to rows in TRL's columns; with `group_by` it takes a list of
            rows.
        columns: what a row must have.
        also: further columns of the set, which are not needed.
        dimension: what the set teaches.
        group_by: the column by which rows belong together.
        draws: whether it draws by the seed.
        from_memory: whether the columns are known from memory, not from the published files.
    """

    read: Callable[..., list[Fields]]
    columns: tuple[str, ...]
    dimension: str
    also: tuple[str, ...] = ()
    group_by: str | None = None
    draws: bool = False
    from_memory: bool = True


def pair(prompt: str, chosen: str, rejected: str, system: str | None = None) -> Fields:
    """A pair of messages; an empty system text is none."""
    first = [_message("system", system)] if system and system.strip() else []
    return {
        "prompt": [*first, _message("user", prompt)],
        "chosen": [_message("assistant", chosen)],
        "rejected": [_message("assistant", rejected)],
    }


def text_pairs(row: Fields, draw: Draw) -> list[Fields]:
    """Any texts in prompt, chosen and rejected, with or without a system text, as messages."""
    return [pair(row["prompt"], row["chosen"], row["rejected"], row.get("system"))]


def helpsteer(rows: list[Fields], draw: Draw) -> list[Fields]:
    """The best and the worst answer to a prompt, by helpfulness, then correctness + coherence."""
    if len(rows) < 2:
        raise LeftOutError("with one response alone")
    ranked = sorted(rows, key=_helpsteer_rating, reverse=True)  # stable: earlier rows stay first
    best, worst = ranked[0], ranked[-1]
    if _helpsteer_rating(best) == _helpsteer_rating(worst):
        raise LeftOutError(TIE)
    return [pair(best["prompt"], best["response"], worst["response"])]


def _helpsteer_rating(row: Fields) -> tuple[float, float]:
    return row["helpfulness"], row["correctness"] + row["coherence"]


def orca(
    row: Fields, draw: Draw, *, min_score: float | None = None, leave_out_gsm8k: bool = False
) -> list[Fields]:
    """Ties are left out; on request low scores and questions of GSM8K's training set too."""
    if row["status"] == "tie":
        raise LeftOutError(TIE)
    if min_score is not None and (row["chosen_score"] or 0) < min_score:
        raise LeftOutError(f"whose chosen_score is below {min_score:g}")
    if leave_out_gsm8k and row["in_gsm8k_train"]:
        raise LeftOutError("that are in GSM8K's training set")
    return [pair(row["input"], row["chosen"], row["rejected"], row["system"])]


def conversations(row: Fields, draw: Draw) -> list[Fields]:
    """Whole conversations that begin with the same prompt; equal scores are ties."""
    scores = row.get("score_chosen"), row.get("score_rejected")
    if None not in scores and scores[0] == scores[1]:
        raise LeftOutError(TIE)
    return [{"chosen": row["chosen"], "rejected": row["rejected"]}]


def ultrasafety(row: Fields, draw: Draw) -> list[Fields]:
    """A completion rated 1 (harmless) against one rated 0, drawn by the seed."""
    rated: dict[float, list[str]] = {0.0: [], 1.0: []}
    for completion in row["completions"]:
        rated.setdefault(float(completion["rating"]), []).append(completion["response"])
    good, bad = rated[1.0], rated[0.0]
    if not good or not bad:
        raise LeftOutError("without both a harmless and a harmful response")
    prompt = row["instruction"]
    chosen, rejected = (each[draw(prompt, len(each))] for each in (good, bad))
    return [pair(prompt, chosen, rejected)]


def grath(row: Fields, draw: Draw) -> list[Fields]:
    """A user's file: the correct and the incorrect answer that a model wrote to a question."""
    return [pair(row["question"], row["correct"], row["incorrect"])]


def pku_saferlhf(
    row: Fields, draw: Draw, *, prefer: Literal["better", "safer", "agree"] = "better"
) -> list[Fields]:
    """The better response, or the safer one, or the one that is both."""
    better, safer = row["better_response_id"], row["safer_response_id"]
    if prefer == "agree" and better != safer:
        raise LeftOutError("whose better response is not the safer one")
    chosen = safer if prefer == "safer" else better
    if chosen not in (0, 1):
        raise InputError(f"{prefer}_response_id: found {chosen!r}; allowed: 0, 1")
    return [pair(row["prompt"], row[f"response_{chosen}"], row[f"response_{1 - chosen}"])]


def nectar(
    row: Fields,
    draw: Draw,
    *,
    pairs: Literal["one", "all"] = "one",
    good_natured_only: bool = False,
) -> list[Fields]:
    """The answer of rank 1 against another, drawn by the seed; or every pair of two ranks."""
    if good_natured_only and not row.get("good_natured", True):
        raise LeftOutError("that are not good-natured")
    prompt = dialogue(row["prompt"])
    ranked = sorted(row["answers"], key=lambda answer: answer["rank"])
    if pairs == "one":
        others = [answer for answer in ranked if answer["rank"] > ranked[0]["rank"]]
        chosen = [(ranked[0], others[draw(row["prompt"], len(others))])] if others else []
    else:
        chosen = [
            (first, second)
            for place, first in enumerate(ranked)
            for second in ranked[place + 1 :]
            if first["rank"] < second["rank"]
        ]
    if not chosen:
        raise LeftOutError(TIE)
    return [
        {
            "prompt": prompt,
            "chosen": [_message("assistant", first["answer"])],
            "rejected": [_message("assistant", second["answer"])],
        }
        for first, second in chosen
    ]


def dialogue(text: str) -> Messages:
    """The messages of a text whose turns begin with "Human:" and "Assistant:"; its last turn, which
    the answer follows, is left open.

    Raises:
        InputError: it does not begin with "Human:", or does not end with an open turn.
    """
    names = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    places = sorted((i, name) for name in names for i in _places(text, name))
    if not places or text[: places[0][0]].strip() or places[0][1] != "\n\nHuman:":
        raise InputError("prompt: does not begin with 'Human:'")
    ends = [*(place for place, _ in places[1:]), len(text)]
    turns = [
        _message(names[name], text[place + len(name) : end].strip())
        for (place, name), end in zip(places, ends, strict=True)
    ]
    if turns[-1]["role"] != "assistant" or turns[-1]["content"]:
        raise InputError("prompt: does not end with 'Assistant:'")
    return turns[:-1]


def _places(text: str, part: str) -> Iterator[int]:
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)


def _message(role: str, content: Any) -> Fields:
    return {"role": role, "content": content}


PAIR = ("prompt", "chosen", "rejected")
# By name; the sets are allenai/reward-bench, nvidia/HelpSteer, jondurbin/py-dpo-v0.1,
# argilla/distilabel-intel-orca-dpo-pairs, argilla/distilabel-capybara-dpo-7k-binarized,
# openbmb/UltraSafety, jondurbin/truthy-dpo-v0.1, HuggingFaceH4/ultrafeedback_binarized,
# PKU-Alignment/PKU-SafeRLHF, berkeley-nest/Nectar.
READERS: dict[str, Reader] = {
    "text_pairs": Reader(text_pairs, PAIR, "", ("system",), from_memory=False),
    "rewardbench": Reader(
        text_pairs, (*PAIR, "subset"), "", ("id", "chosen_model", "rejected_model")
    ),
    "helpsteer": Reader(
        helpsteer,
        ("prompt", "response", "helpfulness", "correctness", "coherence"),
        "helpful",
        ("complexity", "verbosity"),
        group_by="prompt",
    ),
    "py_dpo": Reader(text_pairs, PAIR, "helpful", ("system",)),
    "orca": Reader(
        orca,
        ("system", "input", "chosen", "rejected", "status", "chosen_score", "in_gsm8k_train"),
        "helpful",
        ("generations", "order", "rationale", "labelling_prompt", "raw_labelling_response"),
    ),
    "capybara": Reader(
        conversations,
        ("chosen", "rejected"),
        "helpful",
        (
            *("prompt", "conversation", "original_response", "generation_prompt"),
            *("new_generations", "raw_generation_responses"),
        ),
    ),
    "ultrasafety": Reader(
        ultrasafety, ("instruction", "completions"), "harmless", ("models",), draws=True
    ),
    "truthy": Reader(text_pairs, ("system", *PAIR), "honest"),
    "grath": Reader(grath, ("question", "correct", "incorrect"), "honest", from_memory=False),
    "ultrafeedback": Reader(conversations, PAIR, "helpful+honest", ("messages",)),
    "pku_saferlhf": Reader(
        pku_saferlhf,
        ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
        "helpful+harmless",
        tuple(f"{what}_{i}" for i in "01" for what in ("is_response", "response")),
    ),
    "nectar": Reader(
        nectar, ("prompt", "answers"), "helpful+harmless", ("good_natured", "turns"), draws=True
    ),
}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check a reader's options by the types of its function's parameters.

    Raises:
        ValueError: an option that it does not have, or a value that is not allowed.
    """
    parameters = inspect.signature(READERS[name].read).parameters.values()
    allowed = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in allowed:
            those = ", ".join(allowed) or "none"
            raise ValueError(f"reader_options: {name} has no option {option!r}; allowed: {those}")
        try:
            TypeAdapter(allowed[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"].removeprefix("Input should be ")
            raise ValueError(
                f"reader_options.{option}: found {value!r}; allowed: {problem}"
            ) from None


def seeded_draw(seed: int) -> Draw:
    """A draw that is a function of the seed and of what is drawn for."""

    def draw(what: str, count: int) -> int:
        digest = hashlib.blake2b(f"{seed} {what}".encode("utf-8", "replace"), digest_size=8)
        return int.from_bytes(digest.digest(), "little") % count

    return draw


class Group(list[Fields]):
    """All rows that have one value of a column in common."""


def grouped(rows: Iterable[tuple[str, Any]], column: str) -> Iterator[tuple[str, Any]]:
    """Rows in groups by a column, each at the place of its first row. What is no row, or lacks the
    column, comes as it is.
    """
    groups: dict[str, tuple[str, Group]] = {}
    for place, row in rows:
        if isinstance(row, dict) and isinstance(row.get(column), str):
            groups.setdefault(row[column], (place, Group()))[1].append(row)
        else:
            yield place, row
    yield from groups.values()


def read_published(
    name: str, found: Fields | Group, draw: Draw, options: Mapping[str, Any]
) -> list[Fields]:
    """A row of a published set, or all rows of a group, in TRL's columns.

    Raises:
        WrongColumnsError: a column that the reader needs is missing: it is another set.
        InputError: a value that cannot be read.
        LeftOutError: a tie, or what the options leave out.
    """
    reader = READERS[name]
    for row in found if isinstance(found, Group) else [found]:
        if missing := [column for column in reader.columns if column not in row]:
            memory = " (from memory: its columns may have changed)" if reader.from_memory else ""
            raise WrongColumnsError(
                f"reader {name} expects the columns {', '.join(reader.columns)}{memory}; found: "
                f"{', '.join(row)}; missing: {', '.join(missing)}"
            )
    try:
        return reader.read(found, draw, **options)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"reader {name}: cannot read the row: {error!r}"[:200]) from None
