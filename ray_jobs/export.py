"""`poise export`: a training checkpoint as an ordinary model."""

import sys
from pathlib import Path

from pipelines.storage import resolve_output
from pipelines.train.export_run import export_checkpoint


def run_export(run: Path, out: Path, *, step: int | None, force: bool) -> None:
    """Export the newest checkpoint of an unfinished run, or the one of a step."""
    path = export_checkpoint(run, resolve_output(out, None), step=step, force=force)
    print(f"exported model: {path}", file=sys.stderr)
