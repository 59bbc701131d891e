"""Fingerprints: they show whether the inputs of finished work have changed."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
CHECKPOINT_FILES = ("*.safetensors", "*.json")  # of a model, in the inputs of a training's record
# The version of the meaning of each kind of work. Raise it when the same config and inputs give
# another result (because a default, a formula or a prompt changed). Then older results no longer
# count as finished, and older unfinished work is not resumed. Version 1 is not in fingerprints.
MEANING = {"merge": 1, "align": 1, "evaluate": 2, "sweep": 1, "extract": 1, "score": 1, "dam": 1}


def fingerprint(value: Any) -> str:
    """32 hex digits of a value that JSON can hold; the order of a mapping's keys is irrelevant."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint_work(value: Any, *kinds: str) -> str:
    """32 hex digits of a piece of work: its config, its inputs, and the versions of their meaning.

    Args:
        kinds: names in `MEANING`: the kind of work, and the kinds of its parts.
    """
    raised = {kind: MEANING[kind] for kind in kinds if MEANING[kind] > 1}
    return fingerprint([raised, value] if raised else value)


def fingerprint_file(path: str | Path) -> str:
    """32 hex digits of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_directory(path: str | Path, patterns: Iterable[str] = ("*",)) -> str:
    """32 hex digits of the names and bytes of the files in a directory that match a pattern."""
    path = Path(path)
    files = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1) or 1) as threads:
        digests = dict(zip(files, threads.map(fingerprint_file, files), strict=True))
    return fingerprint({str(file.relative_to(path)): digests[file] for file in files})
