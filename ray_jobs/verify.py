"""`poise verify`: check a model against its own record."""

import json
from dataclasses import asdict
from pathlib import Path

from pipelines.errors import InputError
from pipelines.merge.verify import Verification, verify


def run_verify(folder: Path, *, again: bool, as_json: bool) -> None:
    """Print the state of a model and of its inputs.

    Raises:
        InputError: the model differs from its record, or making it again gave another model.
    """
    found = verify(folder, again=again)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(folder, found)
    if found.changed:
        parts = " and ".join(found.changed)
        raise InputError(f"{folder}: its {parts} are not those that its record describes")
    if found.again is False:
        raise InputError(f"{folder}: the same config gave other weights when it was made again")


def _print(folder: Path, found: Verification) -> None:
    print(f"{found.output:8} {folder}")
    for path, state in found.inputs.items():
        print(f"{state:8} {path} (input)")
    if found.again is not None:
        print(f"{'same' if found.again else 'changed':8} made again")
