"""Check a model, and the inputs of a merge, against the record; merge it again."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import RECORD_FILE, changed_parts
from pipelines.config import check
from pipelines.errors import InputError
from pipelines.merge.config import MergeConfig
from pipelines.merge.run import merge
from pipelines.provenance import read_record, recorded_digest

State = Literal["same", "changed", "missing"]


@dataclass(frozen=True, slots=True)
class Verification:
    """The state of a model, and of a merge's inputs, compared with the record.

    Attributes:
        changed: the parts of the model that differ from the record: `weights`, `companions` (its
            config and tokenizer files).
        again: whether a new merge with the same config gave the same model; None: not tried.
    """

    output: State
    changed: list[str]
    inputs: dict[str, State]
    again: bool | None


def verify(folder: str | Path, *, again: bool = False) -> Verification:
    """Compare a model, and a merge's inputs, with the digests in its record.

    Args:
        again: also merge again, beside the folder, and compare.

    Raises:
        InputError: no record; with `again` also: the model is not a merge, or its inputs can no
            longer be merged.
    """
    folder = Path(folder).absolute()
    record = _record(folder)
    changed = _changed(folder, _digest(folder, record))
    inputs: dict[str, State] = {}
    if record["kind"] == "merged":  # inputs of other kinds are not only checkpoints
        inputs = {path: _state(Path(path), known) for path, known in record["inputs"].items()}
    same = None
    if again:
        same = _made_again(folder, record)
    return Verification("changed" if changed else "same", changed, inputs, same)


def _record(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None:
        raise InputError(
            f"{folder}: no {RECORD_FILE}; allowed: the output of poise merge, align or export"
        )
    _digest(folder, record)
    return record


def _digest(folder: Path, record: dict[str, Any]) -> dict[str, str] | str:
    """The model's digests in a record."""
    digest = recorded_digest(record)
    if digest is None:
        raise InputError(f"{folder / RECORD_FILE}: has no digest of the weights")
    return digest


def _state(path: Path, known: dict[str, str] | str) -> State:
    """The state of a checkpoint or adapter."""
    if not path.is_dir():
        return "missing"
    return "changed" if _changed(path, known) else "same"


def _changed(path: Path, known: dict[str, str] | str) -> list[str]:
    """The changed parts of a checkpoint or adapter; damaged weights count as changed."""
    try:
        return changed_parts(Checkpoint.at(path), known)
    except InputError:
        return ["weights"]


def _made_again(folder: Path, record: dict[str, Any]) -> bool:
    """Whether merging again, in a folder beside, gives the same model."""
    if record["kind"] != "merged":
        raise InputError(f"{folder}: found an {record['kind']} model; allowed with --again: merged")
    config = check(record["config"], MergeConfig, str(folder / RECORD_FILE))
    scratch = Path(mkdtemp(prefix=f".{folder.name}.verify-", dir=folder.parent))
    try:
        out = Path(merge(config, scratch / "again"))
        known = _digest(folder, record)
        if isinstance(known, str):
            return not _changed(out, known)
        return _digest(out, _record(out)) == known
    finally:
        shutil.rmtree(scratch)
