"""Checking a merge against its own record, and making it again."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import checkpoint_fingerprint
from pipelines.checkpoints.reader import read_json
from pipelines.config import check
from pipelines.errors import InputError
from pipelines.merge.card import PROVENANCE_FILE
from pipelines.merge.config import MergeConfig
from pipelines.merge.run import merge

State = Literal["same", "changed", "missing"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of a merge and of its inputs since it was made.

    `again` says whether a new merge of the same config gave the same weights; None: not tried.
    """

    output: State
    inputs: dict[str, State]
    again: bool | None


def verify(folder: str | Path, *, again: bool = False) -> Verification:
    """Compare a merge and its inputs with the fingerprints in its record.

    Args:
        again: also merge anew, beside the folder, and compare.

    Raises:
        InputError: no merge there, or, with `again`, inputs that cannot be merged any more.
    """
    folder = Path(folder).absolute()
    record = _record(folder)
    output = _state(folder, record["output"])
    inputs = {path: _state(Path(path), known) for path, known in record["inputs"].items()}
    same = None
    if again:
        same = _made_again(folder, record)
    return Verification(output, inputs, same)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {PROVENANCE_FILE}; allowed: the output of poise merge")
    record = read_json(path)
    if record.get("kind") != "merge" or "output" not in record:
        raise InputError(f"{path}: is no record of a merge with its fingerprints")
    return record


def _state(path: Path, known: str) -> State:
    """Whether a checkpoint or adapter still has its fingerprint."""
    if not path.is_dir():
        return "missing"
    try:
        found = checkpoint_fingerprint(Checkpoint.at(path), {})
    except InputError:
        return "changed"
    return "same" if found == known else "changed"


def _made_again(folder: Path, record: dict[str, Any]) -> bool:
    """Merge in a folder beside and compare the weights."""
    config = check(record["config"], MergeConfig, str(folder / PROVENANCE_FILE))
    scratch = Path(mkdtemp(prefix=f".{folder.name}.verify-", dir=folder.parent))
    try:
        out = merge(config, scratch / "again")
        return _record(out)["output"] == record["output"]
    finally:
        shutil.rmtree(scratch)
