"""`poise verify`: check a merge against its own record."""

import json
from dataclasses import asdict
from pathlib import Path

from pipelines.errors import InputError
from pipelines.merge.verify import Verification, verify


def run_verify(folder: Path, *, again: bool, as_json: bool) -> None:
    """Print what became of a merge and its inputs.

    Raises:
        InputError: the weights are not those of the record, or a new merge gave other ones.
    """
    found = verify(folder, again=again)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print(folder, found)
    if found.output != "same":
        raise InputError(f"{folder}: its weights are not those that its record describes")
    if found.again is False:
        raise InputError(f"{folder}: the same config gave other weights when it was merged again")


def _print(folder: Path, found: Verification) -> None:
    print(f"{found.output:8} {folder}")
    for path, state in found.inputs.items():
        print(f"{state:8} {path} (input)")
    if found.again is not None:
        print(f"{'same' if found.again else 'changed':8} merged again")
