"""From the sources to what a run reads: tasks for lm-evaluation-harness with their subsets, prompts
that the model answers itself, and pairs.

What is trained on is never measured: training takes the first prompts of a seeded order, the tasks
take the next ones.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipelines.commit import staged_directory
from pipelines.config import load_yaml
from pipelines.errors import InputError
from pipelines.evaluate.graders import grade
from pipelines.evaluate.programs import ProgramRow
from pipelines.fingerprint import fingerprint_file
from pipelines.real_model.config import RealConfig
from pipelines.real_model.packages import package_versions
from pipelines.real_model.sources import Fields, Sources
from pipelines.sandbox.runner import require_sandbox

OWN_ANSWERS, OWN_HARMFUL = "own_answers", "own_harmful"
DATA_FILE = "data.json"
_MOST_REFUSAL = 120  # characters of a labelled refusal that fits any request
_START = 200  # characters: about what 48 tokens hold
Row = TypeVar("Row")


def prepare_data(config: RealConfig, sources: Sources, templates: Path, out: Path) -> Path:
    """Write `out/tasks/` and `out/samples/`, task files with their rows; `out/harmless.jsonl` where
    the config names pairs; and `out/data.json`, which says what there is.

    Args:
        templates: a folder with a YAML file for each task.

    Raises:
        InputError: too few rows are left for a task; `out` exists.
    """
    rows, said = _measured(config, sources)
    with staged_directory(out) as folder:
        for name, own in rows.items():
            most = getattr(config.max_new_tokens, name, None)
            _write_task(templates / f"{name}.yaml", folder / "tasks", name, own, most)
        for name, template, own in _answered(config, sources):
            settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
            most = config.max_new_tokens.samples
            path = templates / f"{template}.yaml"
            _write_task(path, folder / "samples", name, own, most, settings)
        if sources.hh is not None:
            write_pairs(folder / "harmless.jsonl", _harmless_pairs(config, sources.hh))
        said["measured"] = {name: len(own) for name, own in rows.items()}
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


def _measured(config: RealConfig, sources: Sources) -> tuple[dict[str, list[Fields]], Fields]:
    """The rows of each task, and what a reader should know of them."""
    checked, unchecked = _checkable(sources.ifbench)
    _, ifbench = _parts(config, checked, "ifbench", config.training.prompts)
    first = config.training.pairs if sources.hh is None else 0
    _, harmful = _parts(config, sources.harmful, "harmful", first)
    rows = {
        "ifbench": [{"prompt": row["prompt"], "row": json.dumps(row)} for row in ifbench],
        "harmful": [{"prompt": text, "refusals": config.refusals} for text in harmful],
    }
    said: Fields = {"versions": package_versions(), "files": {}, "left_out": {}}
    if unchecked:
        said["left_out"]["ifbench"] = f"{unchecked} prompts whose checkers need NLTK's data"
    if problem := _no_sandbox():
        said["left_out"]["humaneval"] = problem
    else:
        _, programs = _parts(config, sources.humaneval, "humaneval", 0)
        fields = set(ProgramRow.model_fields)
        rows["humaneval"] = [
            {
                "prompt": row["prompt"],
                "row": json.dumps({key: row[key] for key in sorted(fields & set(row))}),
            }
            for row in programs
        ]
    if sources.gsm8k is None:
        said["left_out"]["gsm8k"] = "no file"
    else:
        _, rows["gsm8k"] = _parts(config, sources.gsm8k, "gsm8k", 0)
    if sources.hh is None:
        said["left_out"]["hh"] = "no file"
    else:
        rows["hh"] = [
            {"prompt": row["prompt"], "choices": [row["chosen"], row["rejected"]]}
            for row in _split_pairs(config, sources.hh)[1]
        ]
    for name in ("pairs", "gsm8k"):
        if (path := getattr(config, name)) is not None:
            said["files"][name] = {"name": path.name, "digest": fingerprint_file(path)}
    said["refusals"] = _agreement(config, sources)
    return rows, said


def _parts(
    config: RealConfig, rows: Sequence[Row], name: str, first: int
) -> tuple[list[Row], list[Row]]:
    """The first rows of the seed's order, for training, and those that are measured."""
    order = shuffled(rows, config.seed, name)
    if len(order) < first + 2:
        raise InputError(f"real: {name}: has {len(order)} rows; {first} are for training")
    most = config.most(name)
    return order[:first], order[first : None if most is None else first + most]


def _split_pairs(config: RealConfig, pairs: Sequence[Fields]) -> tuple[list[Fields], list[Fields]]:
    """Pairs for training, and those that are measured: no prompt is on both sides."""
    order = shuffled(pairs, config.seed, "hh")
    training = order[: config.training.pairs]
    prompts = {row["prompt"] for row in training}
    rest = [row for row in order[config.training.pairs :] if row["prompt"] not in prompts]
    if len(rest) < 2:
        raise InputError(
            f"real: pairs: {len(pairs)} of one question; {config.training.pairs} are for training"
        )
    return training, rest[: config.most("hh")]


def _harmless_pairs(config: RealConfig, pairs: Sequence[Fields]) -> list[tuple[str, str, str]]:
    training, _ = _split_pairs(config, pairs)
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in training]


def _answered(config: RealConfig, sources: Sources) -> list[tuple[str, str, list[Fields]]]:
    """What the model answers itself: a task's name, that of its template, and its rows."""
    checked, _ = _checkable(sources.ifbench)
    prompts, _ = _parts(config, checked, "ifbench", config.training.prompts)
    own = [
        {"prompt": row["prompt"], "row": json.dumps(row), "number": number}
        for number, row in enumerate(prompts)
        for _ in range(config.training.answers)
    ]
    found = [(OWN_ANSWERS, "ifbench", own)]
    if sources.hh is None:
        requests, _ = _parts(config, sources.harmful, "harmful", config.training.pairs)
        short = short_refusals(config, sources)
        drawn = random.Random(f"{config.seed} refusals").choices(short, k=len(requests))
        rows = [
            {"prompt": text, "refusals": config.refusals, "number": number, "chosen": refusal}
            for number, (text, refusal) in enumerate(zip(requests, drawn, strict=True))
        ]
        found.append((OWN_HARMFUL, "harmful", rows))
    return found


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


def _checkable(rows: Sequence[Fields]) -> tuple[list[Fields], int]:
    """The rows whose checkers run on this machine, and the number of others."""
    found = []
    for row in rows:
        try:
            grade("instructions", "A text.", [json.dumps(row)], {"benchmark": "ifbench"})
        except InputError:
            continue
        found.append(row)
    return found, len(rows) - len(found)


def _no_sandbox() -> str:
    """Why programs cannot run here; empty if they can."""
    try:
        require_sandbox()
    except InputError as error:
        return str(error)
    return ""


def _write_task(
    template: Path,
    folder: Path,
    name: str,
    rows: Sequence[Fields],
    most_tokens: int | None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write a task's YAML, made from its template, beside its rows."""
    values = load_yaml(template)
    values |= {
        "task": name,
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
    }
    if most_tokens is not None:
        values["generation_kwargs"] |= {"max_gen_toks": most_tokens} | (settings or {})
    if rows and "number" in rows[0]:
        values["metadata"]["cluster"] = "number"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    write_rows(folder / f"{name}.jsonl", rows)
