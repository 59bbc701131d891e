"""Fingerprints: how a finished piece of work recognises that its inputs have not changed."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
# The version of what each kind of work means. Raise it when the same config and inputs come to give
# another result (a default, a formula or a prompt has changed): results from before then do not
# pass for finished any more, and unfinished work is not gone on with. 1 adds nothing.
MEANING = {"merge": 1, "align": 1, "evaluate": 1, "sweep": 1}


def fingerprint(value: Any) -> str:
    """32 hex digits of a JSON-able value; the order of a mapping's keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint_work(value: Any, *kinds: str) -> str:
    """32 hex digits of a piece of work: its config and inputs, and what they mean at present.

    Args:
        kinds: names of `MEANING`: the kind of work, and those that it is made of.
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
