"""Fingerprints: how a finished piece of work recognises that its inputs have not changed."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20


def fingerprint(value: Any) -> str:
    """32 hex digits of a JSON-able value; the order of a mapping's keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
