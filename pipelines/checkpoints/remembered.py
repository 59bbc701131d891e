"""What transformers said of a config.json, kept on the disk between commands.

To ask a model's class, transformers must be imported, which takes seconds: longer than a small
merge. But its answers follow from the config, the question and the installed packages. So they are
kept under the digest of all these, in a folder of small JSON files: `$POISE_CACHE/architectures`,
by default `~/.cache/poise/architectures`; an empty POISE_CACHE keeps nothing. Whatever is wrong
with the folder or a file costs the time of asking again, never the answer.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_file

VARIABLE = "POISE_CACHE"
_SUFFIXES = (".dist-info", ".egg-info")
MOST_FILES = 4096  # the oldest half goes when there are more


def remembered(asked_by: Path, question: Any, answer: Callable[[], Any]) -> Any:
    """The answer to a question, from the memory or by asking.

    Args:
        asked_by: the file of the code that asks; a change of it makes its answers unknown.
        question: all that the answer depends on, beside the packages; a value that JSON can hold.
        answer: asks. Its result is a value that JSON can hold; an exception is not kept.

    Returns:
        the answer as JSON gives it back (lists for tuples), be it remembered or new.
    """
    folder, packages = _folder(), _packages()
    if folder is None or packages is None:
        return json.loads(json.dumps(answer()))
    key = fingerprint([packages, fingerprint_file(asked_by), question])
    file = folder / f"{key}.json"
    text = _read(file, key)
    if text is None:
        text = json.dumps(answer())
        _write(file, key, text)
    return json.loads(text)


def _folder() -> Path | None:
    """Where answers are kept; None if they are not."""
    place = os.environ.get(VARIABLE)
    if place is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        place = str(Path(base) / "poise")
    return Path(place).expanduser() / "architectures" if place else None


@cache
def _packages() -> str | None:
    """The fingerprint of Python and of all installed packages with their versions; None if
    transformers is not an installed package but a working copy, whose code changes in a version.
    """
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return None
    beside = Path(found.origin).parent.parent
    if not any(beside.glob("transformers-*.dist-info")):
        return None
    return fingerprint([sys.version, str(beside), sorted(_distributions(beside))])


def _distributions(beside: Path) -> Iterator[str]:
    """The folders that installing a package leaves; their names have its version.

    setuptools and Ray, once imported, put folders of their own among those of `beside` on the path;
    what lies there makes no difference.
    """
    for place in map(Path, dict.fromkeys(sys.path)):
        if place.is_dir() and beside not in place.parents:
            yield from (each.name for each in place.iterdir() if each.suffix in _SUFFIXES)


def _read(file: Path, key: str) -> str | None:
    """A kept answer; None if there is none, or a damaged one."""
    try:
        digest, _, text = file.read_text("utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return text if digest == fingerprint([key, text]) else None


def _write(file: Path, key: str, text: str) -> None:
    """Keep an answer, if that is possible."""
    try:
        write_atomically(file, f"{fingerprint([key, text])}\n{text}")
        kept = sorted(file.parent.glob("*.json"), key=lambda each: each.stat().st_mtime_ns)
        if len(kept) > MOST_FILES:
            for each in kept[: len(kept) // 2]:
                each.unlink()
    except (OSError, InputError):
        return
