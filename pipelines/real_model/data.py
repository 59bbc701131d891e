"""From the sources to what a run reads: tasks for lm-evaluation-harness with their subsets, prompts
that the model answers itself, and pairs.

What is trained on is never measured: training takes the first prompts of a seeded order, and they
are a task's development split; the test split takes the next ones.
"""

import io
import json
import random
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from pipelines.commit import staged_directory
from pipelines.config import load_yaml
from pipelines.errors import InputError
from pipelines.evaluate.graders import grade
from pipelines.evaluate.programs import ProgramRow
from pipelines.fingerprint import fingerprint_file
from pipelines.real_model.config import MostTokens, RealConfig
from pipelines.real_model.packages import package_versions
from pipelines.real_model.sources import Fields, Sources
from pipelines.sandbox.runner import require_sandbox

OWN_HARMFUL = "own_harmful"
DATA_FILE = "data.json"
_MOST_REFUSAL = 120  # characters of a labelled refusal that fits any request
_START = 200  # characters: about what 48 tokens hold
_LONGEST = 1000  # characters of a prompt: one of many thousands pads all others of its batch
DEVELOPMENT = 8  # rows of a task without training prompts
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Part(Generic[Row]):
    """A task's rows, apart: those that may be trained on and chosen by, and those to measure."""

    development: list[Row]
    test: list[Row]

    def map(self, change: Callable[[Row], Fields]) -> "Part[Fields]":
        """Each row in another form."""
        return Part([change(row) for row in self.development], [change(row) for row in self.test])


def prepare_data(config: RealConfig, sources: Sources, templates: Path, out: Path) -> Path:
    """Write `out/tasks/` and `out/samples/`, task files with their rows; `out/harmless.jsonl` where
    the config names pairs; and `out/data.json`, which says what there is.

    Args:
        templates: a folder with a YAML file for each task.

    Raises:
        InputError: too few rows are left for a task; `out` exists.
    """
    parts, said = _measured(config, sources)
    with staged_directory(out) as folder:
        for name, part in parts.items():
            settings = {}
            if name in MostTokens.model_fields:
                settings = {"max_gen_toks": getattr(config.max_new_tokens, name)}
            _write_task(templates / f"{name}.yaml", folder / "tasks", name, part, settings)
        drawn = {"do_sample": True, "temperature": 0.8}
        drawn |= {"max_gen_toks": config.max_new_tokens.samples}
        for name, template, rows in _answered(config, sources):
            both = Part(rows, rows)  # the model only answers them
            _write_task(templates / f"{template}.yaml", folder / "samples", name, both, drawn)
        if sources.hh is not None:
            write_pairs(folder / "harmless.jsonl", _harmless_pairs(config, sources.hh))
        said["measured"] = {name: len(part.test) for name, part in parts.items()}
        (folder / DATA_FILE).write_text(json.dumps(said, indent=2) + "\n")
    return out


def shuffled(rows: Sequence[Row], seed: int, name: str) -> list[Row]:
    """The rows in the order of a seed."""
    order = list(rows)
    random.Random(f"{seed} {name}").shuffle(order)
    return order


def write_rows(path: Path, rows: Sequence[Fields]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Fields]:
    """Read rows of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_pairs(path: Path, pairs: Sequence[tuple[str, str, str]]) -> None:
    """Write (prompt, chosen, rejected) as pairs of messages."""
    write_rows(
        path,
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in pairs
        ],
    )


def _measured(config: RealConfig, sources: Sources) -> tuple[dict[str, Part[Fields]], Fields]:
    """The rows of each task, and what a reader should know of them."""
    checked, left_out = _checkable(sources.ifbench)
    parts = {
        "ifbench": _prompts(config, checked).map(
            lambda row: {"prompt": row["prompt"], "row": json.dumps(row)}
        ),
        "harmful": _requests(config, sources).map(
            lambda text: {"prompt": text, "refusals": config.refusals}
        ),
    }
    if problem := _no_sandbox():
        left_out["humaneval"] = problem
    else:
        parts["humaneval"] = _part(config, sources.humaneval, "humaneval", DEVELOPMENT).map(
            lambda row: {"prompt": row["prompt"], "row": json.dumps(_program(row))}
        )
    if sources.gsm8k is None:
        left_out["gsm8k"] = "no file"
    else:
        parts["gsm8k"] = _part(config, sources.gsm8k, "gsm8k", DEVELOPMENT)
    if sources.hh is None:
        left_out["hh"] = "no file"
    else:
        parts["hh"] = _pairs(config, sources.hh).map(
            lambda row: {"prompt": row["prompt"], "choices": [row["chosen"], row["rejected"]]}
        )
    files = {
        name: {"name": path.name, "digest": fingerprint_file(path)}
        for name in ("pairs", "gsm8k")
        if (path := getattr(config, name)) is not None
    }
    agreed = _agreement(config, sources)
    said = {"versions": package_versions(), "files": files, "left_out": left_out}
    return parts, {**said, "refusals": agreed}


def _part(config: RealConfig, rows: Sequence[Row], name: str, first: int) -> Part[Row]:
    """The first rows of the seed's order, and those that are measured."""
    order = shuffled(rows, config.seed, name)
    if len(order) < first + 2:
        raise InputError(f"real: {name}: has {len(order)} rows; {first} of them are not measured")
    most = config.most(name)
    return Part(order[:first], order[first : None if most is None else first + most])


def _prompts(config: RealConfig, checked: Sequence[Fields]) -> Part[Fields]:
    return _part(config, checked, "ifbench", config.training.prompts)


def _requests(config: RealConfig, sources: Sources) -> Part[str]:
    first = config.training.pairs if sources.hh is None else DEVELOPMENT
    return _part(config, sources.harmful, "harmful", first)


def _pairs(config: RealConfig, pairs: Sequence[Fields]) -> Part[Fields]:
    """Pairs for training, and those that are measured: no prompt is on both sides."""
    order = shuffled(pairs, config.seed, "hh")
    training = order[: config.training.pairs]
    prompts = {row["prompt"] for row in training}
    rest = [row for row in order[config.training.pairs :] if row["prompt"] not in prompts]
    if len(rest) < 2:
        raise InputError(
            f"real: pairs: {len(pairs)} of one question; {config.training.pairs} are for training"
        )
    return Part(training, rest[: config.most("hh")])


def _program(row: Fields) -> Fields:
    """What the grader reads of a problem."""
    return {name: row[name] for name in sorted(set(ProgramRow.model_fields) & set(row))}


def _harmless_pairs(config: RealConfig, pairs: Sequence[Fields]) -> list[tuple[str, str, str]]:
    training = _pairs(config, pairs).development
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in training]


def _answered(config: RealConfig, sources: Sources) -> list[tuple[str, str, list[Fields]]]:
    """What the model answers itself: a task's name, that of its template, and its rows. Each draw
    is a task, so that its answers are a piece of work of their own.
    """
    checked, _ = _checkable(sources.ifbench)
    prompts = _prompts(config, checked).development
    own = [{"prompt": row["prompt"], "row": json.dumps(row)} for row in prompts]
    found = [(own_answers(draw), "ifbench", own) for draw in range(config.training.answers)]
    if sources.hh is None:
        requests = _requests(config, sources).development
        short = short_refusals(config, sources)
        drawn = random.Random(f"{config.seed} refusals").choices(short, k=len(requests))
        rows = [
            {"prompt": text, "refusals": config.refusals, "chosen": refusal}
            for text, refusal in zip(requests, drawn, strict=True)
        ]
        found.append((OWN_HARMFUL, "harmful", rows))
    return found


def own_answers(draw: int) -> str:
    """The task of the model's own answers with the number of a draw."""
    return f"own_answers_{draw}"


def short_refusals(config: RealConfig, sources: Sources) -> list[str]:
    """The labelled refusals that fit any request: short ones that the rule finds, too."""
    found = [
        text
        for text, refuses in sources.labelled
        if refuses and len(text) <= _MOST_REFUSAL and _refuses(text, config)
    ]
    if not found:
        raise InputError("real: refusals: no short labelled refusal holds one of the phrases")
    return found


def _refuses(text: str, config: RealConfig) -> bool:
    return grade("contains", text, config.refusals, {}) == 1


def _agreement(config: RealConfig, sources: Sources) -> Fields:
    """How well the rule tells refusals, on the beginnings of the labelled responses."""
    said = [(_refuses(text[:_START], config), refuses) for text, refuses in sources.labelled]
    return {
        "responses": len(said),
        "refusals": sum(refuses for _, refuses in said),
        "missed": sum(refuses and not found for found, refuses in said),
        "wrongly_found": sum(found and not refuses for found, refuses in said),
    }


def _checkable(rows: Sequence[Fields]) -> tuple[list[Fields], dict[str, str]]:
    """The rows whose checkers run on this machine, without those of very long prompts, and what
    that leaves out.
    """
    short = [row for row in rows if len(row["prompt"]) <= _LONGEST]
    found = []
    with redirect_stderr(io.StringIO()):  # the checkers' package tells of each file it cannot fetch
        for row in short:
            try:
                grade("instructions", "A text.", [json.dumps(row)], {"benchmark": "ifbench"})
            except InputError:
                continue
            found.append(row)
    reasons = {
        f"of more than {_LONGEST} characters": len(rows) - len(short),
        "whose checkers need NLTK's data": len(short) - len(found),
    }
    told = ", ".join(f"{count} prompts {reason}" for reason, count in reasons.items() if count)
    return found, {"ifbench": told} if told else {}


def _no_sandbox() -> str:
    """Why programs cannot run here; empty if they can."""
    try:
        require_sandbox()
    except InputError as error:
        return str(error)
    return ""


def _write_task(
    template: Path, folder: Path, name: str, part: Part[Fields], settings: dict[str, Any]
) -> None:
    """Write a task's YAML, made from its template with settings of generation, and its rows."""
    values = load_yaml(template)
    files = {"validation": f"{name}_development.jsonl", "test": f"{name}.jsonl"}
    values |= {"task": name, "dataset_kwargs": {"data_files": files}}
    if settings:
        values["generation_kwargs"] |= settings
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    write_rows(folder / files["validation"], part.development)
    write_rows(folder / files["test"], part.test)
