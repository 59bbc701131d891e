"""`poise export`: a training checkpoint as an ordinary model."""

import sys
from pathlib import Path
from typing import cast, get_args

from pipelines.errors import InputError
from pipelines.provenance import read_record
from pipelines.rounding import rounding_lines
from pipelines.storage import resolve_output
from pipelines.train.config import SavedDtype
from pipelines.train.export_run import export_checkpoint


def run_export(run: Path, out: Path, *, step: int | None, dtype: str | None, force: bool) -> None:
    """Export the newest checkpoint of an unfinished run, or the one of a step."""
    if dtype not in (None, *get_args(SavedDtype)):
        allowed = ", ".join(get_args(SavedDtype))
        raise InputError(f"--dtype: found {dtype!r}; allowed: {allowed}")
    place = resolve_output(out, None)
    path = export_checkpoint(run, place, step=step, dtype=cast(SavedDtype, dtype), force=force)
    for line in rounding_lines(read_record(path), "--dtype float32"):
        print(line, file=sys.stderr)
    print(f"exported model: {path}", file=sys.stderr)
