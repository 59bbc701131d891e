"""Check a model, and the inputs of a merge or extraction, against the record; make it again."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import changed_parts
from pipelines.checkpoints.hub import here
from pipelines.config import check
from pipelines.errors import InputError
from pipelines.extract import ExtractConfig, extract
from pipelines.merge.config import MergeConfig
from pipelines.merge.run import merge
from pipelines.provenance import read_record, recorded_digest

State = Literal["same", "changed", "missing"]


@dataclass(frozen=True, slots=True)
class Verification:
    """The state of a model, and of its inputs, compared with the record.

    Attributes:
        changed: the parts of the model that differ from the record: `weights`, `companions` (its
            config and tokenizer files).
        again: whether the same config gave the same model again; None: not tried.
    """

    output: State
    changed: list[str]
    inputs: dict[str, State]
    again: bool | None


def verify(folder: str | Path, *, again: bool = False) -> Verification:
    """Compare a model, and the inputs of a merge or extraction, with the digests in its record.

    Args:
        again: also make it again, beside the folder, and compare.

    Raises:
        InputError: no record; with `again` also: the model is neither merged nor extracted, or its
            inputs no longer fit together.
    """
    folder = Path(folder).absolute()
    record = _record(folder)
    changed = _changed(folder, _digest(folder, record))
    inputs: dict[str, State] = {}
    if record["kind"] in MADE_AGAIN:  # inputs of other kinds are not only checkpoints
        inputs = {name: _state(name, known) for name, known in record["inputs"].items()}
    same = None
    if again:
        same = _made_again(folder, record)
    return Verification("changed" if changed else "same", changed, inputs, same)


def _record(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None:
        raise InputError(
            f"{folder}: no {RECORD_FILE}; allowed: the output of poise merge, align, export or "
            "extract-lora"
        )
    _digest(folder, record)
    return record


def _digest(folder: Path, record: dict[str, Any]) -> dict[str, str] | str:
    """The model's digests in a record."""
    digest = recorded_digest(record)
    if digest is None:
        raise InputError(f"{folder / RECORD_FILE}: has no digest of the weights")
    return digest


def _state(name: str, known: dict[str, str] | str) -> State:
    """The state of a checkpoint or adapter: a path, or a commit of the hub, in its cache here."""
    path = here(name)
    if path is None:
        return "missing"
    return "changed" if _changed(path, known) else "same"


def _changed(path: Path, known: dict[str, str] | str) -> list[str]:
    """The changed parts of a checkpoint or adapter; damaged weights count as changed."""
    try:
        return changed_parts(Checkpoint.at(path), known)
    except InputError:
        return ["weights"]


def _merged_again(settings: Mapping[str, Any], source: str, out: Path) -> Path:
    return Path(merge(check(settings, MergeConfig, source), out))


def _extracted_again(settings: Mapping[str, Any], source: str, out: Path) -> Path:
    return extract(check(settings, ExtractConfig, source), out)


# By kind of record: results whose inputs are only checkpoints and adapters.
MADE_AGAIN = {"merged": _merged_again, "extracted": _extracted_again}


def _made_again(folder: Path, record: dict[str, Any]) -> bool:
    """Whether merging or extracting again, in a folder beside, gives the same model."""
    if record["kind"] not in MADE_AGAIN:
        raise InputError(
            f"{folder}: found an {record['kind']} model; allowed with --again: "
            f"{', '.join(MADE_AGAIN)}"
        )
    make = MADE_AGAIN[record["kind"]]
    scratch = Path(mkdtemp(prefix=f".{folder.name}.verify-", dir=folder.parent))
    try:
        out = make(record["config"], str(folder / RECORD_FILE), scratch / "again")
        known = _digest(folder, record)
        if isinstance(known, str):
            return not _changed(out, known)
        return _digest(out, _record(out)) == known
    finally:
        shutil.rmtree(scratch)
