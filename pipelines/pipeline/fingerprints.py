"""Fingerprints of stages whose commands keep none: of their config and of what they read."""

import json
from pathlib import Path

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.evaluate.places import open_place
from pipelines.fingerprint import fingerprint, fingerprint_directory, fingerprint_file
from pipelines.pipeline.plan import Job
from pipelines.storage import is_address

# Files that tell what the whole result in their folder is.
_RECORDS = (RECORD_FILE, "evaluation.json", "sweep.json")


def key_of(kind: str, job: Job) -> str:
    """The fingerprint of a job: its config, and the outputs and files that it reads."""
    config = json.loads(job.config.model_dump_json())
    inputs = {name: _content(place) for name, place in job.inputs.items()}
    files = [_content(str(path)) for path in getattr(job.config, "inputs", ())]
    return fingerprint([kind, config, inputs, files])


def _content(place: str) -> str:
    """A fingerprint of an output or a file; empty where there is none."""
    if is_address(place):
        folder = open_place(place)
        found = sorted(set(_RECORDS) & folder.names())
        return fingerprint([folder.read(name).decode() for name in found])
    path = Path(place)
    if path.is_file():
        return fingerprint_file(path)
    for name in _RECORDS:
        if (path / name).is_file():
            return fingerprint_file(path / name)
    return fingerprint_directory(path) if path.is_dir() else ""
