"""What a storage holds: results that stand, runs that are not finished, and why."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.evaluate.store import RESULT_FILE as EVALUATION_FILE
from pipelines.evaluate.store import STORE_FILE
from pipelines.merge.journal import JOURNAL_FILE
from pipelines.merge.journal import PLAN_FILE as MERGE_PLAN
from pipelines.merge.remote import MARKER_FILE
from pipelines.pipeline.state import FOLDER as PIPELINES
from pipelines.search.journal import JOURNAL_FILE as STUDY_FILE
from pipelines.search.results import RESULT_FILE as SWEEP_FILE
from pipelines.status.listing import File, Storage
from pipelines.train.errors import FAILURE_FILE
from pipelines.train.files import METRICS_FILE
from pipelines.train.run import CACHE_FOLDER

ItemState = Literal["stands", "running", "unfinished", "failed", "cache", "other"]
_RUN_FILE = "run.json"  # of an alignment that is not finished
_PARTIAL = re.compile(r"\.(.+)\.partial")
_LEFT = re.compile(r"\.poise-probe-.*|\.(.+)\.old")
OTHER = "other files"


@dataclass(frozen=True, slots=True)
class Item:
    """A result or an unfinished run.

    Attributes:
        name: its place in the storage.
        kind: such as aligned, merged, evaluation, sweep.
        changed: when one of its files last did, in seconds since 1970.
        note: why it failed, or how far it is.
    """

    name: str
    kind: str
    state: ItemState
    size: int
    changed: float
    note: str = ""


def items_of(storage: Storage, files: Mapping[str, File]) -> list[Item]:
    """What a storage holds, by name; all that is nothing of ours is one last item.

    Args:
        files: of the storage, by name.
    """
    roots = _roots(files)
    by_root: dict[str, dict[str, File]] = {}
    for name, file in files.items():
        by_root.setdefault(_root_of(name, roots), {})[name] = file
    rest = by_root.pop("", {})
    found = [_item(storage, root, own) for root, own in sorted(by_root.items())]
    if rest:
        found.append(Item(OTHER, "", "other", *_totals(rest)))
    return found


def _roots(files: Mapping[str, File]) -> set[str]:
    """The topmost folders that are a result, an unfinished run or a cache."""
    marks = {RECORD_FILE, EVALUATION_FILE, STORE_FILE, SWEEP_FILE, STUDY_FILE, MARKER_FILE}
    found = set()
    for name in files:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            if _PARTIAL.fullmatch(part) or _LEFT.fullmatch(part) or part == CACHE_FOLDER:
                found.add("/".join(parts[: depth + 1]))
        if parts[-1] in marks and len(parts) > 1:
            found.add("/".join(parts[:-1]))
        if PIPELINES in parts[:-1]:
            found.add("/".join(parts[: parts.index(PIPELINES) + 1]))
    return found


def _root_of(name: str, roots: set[str]) -> str:
    """The topmost root that a file is in, or nothing."""
    parts = name.split("/")
    above = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((each for each in above if each in roots), "")


def _totals(files: Mapping[str, File]) -> tuple[int, float]:
    """Bytes, and the last change."""
    return sum(f.size for f in files.values()), max(f.changed for f in files.values())


def _item(storage: Storage, root: str, files: Mapping[str, File]) -> Item:
    kind, state, note = _described(storage, root, {name[len(root) + 1 :] for name in files})
    if state == "unfinished" and _is_held(storage, root, files):
        state = "running"
    return Item(root, kind, state, *_totals(files), note)


def _is_held(storage: Storage, root: str, files: Mapping[str, File]) -> bool:
    """Whether a process works on an unfinished run: it holds a lock on its folder, or on a lock
    file in it or beside it.
    """
    locks = [name for name in files if name.endswith((".lock", "/lock"))]
    parent, slash, last = root.rpartition("/")
    if found := _PARTIAL.fullmatch(last):
        locks.append(f"{parent}{slash}.{found[1]}.lock")  # of a command of the user's own
    return storage.is_locked(root) or any(map(storage.is_locked, locks))


def _described(storage: Storage, root: str, inside: set[str]) -> tuple[str, ItemState, str]:
    """Kind, state and note of what is in a folder with these files."""
    last = root.rpartition("/")[2]
    if last == CACHE_FOLDER:
        return "tokens", "cache", ""
    if last == PIPELINES:
        return "pipelines", "other", ""
    if _LEFT.fullmatch(last):
        return "left behind", "unfinished", "an old result or a probe"
    if _PARTIAL.fullmatch(last):
        return _partial(storage, root, inside)
    for mark, described in _FINISHED.items():
        if mark in inside:
            return described(storage, f"{root}/{mark}")
    if STUDY_FILE in inside:
        events = storage.read(f"{root}/{STUDY_FILE}").count(b"\n")
        return "sweep", "unfinished", f"{events} events in its journal"
    if MARKER_FILE in inside:
        shards = len(_json(storage, f"{root}/{MARKER_FILE}").get("shards", ()))
        return "merge", "unfinished", f"{shards} shards are there"
    return "evaluation", "unfinished", "its numbers are not written"


def _partial(storage: Storage, root: str, inside: set[str]) -> tuple[str, ItemState, str]:
    """An unfinished result in a hidden folder."""
    if _RUN_FILE in inside:
        if FAILURE_FILE in inside:
            reason = _json(storage, f"{root}/{FAILURE_FILE}").get("message", "")
            return "alignment", "failed", str(reason)
        steps = storage.read(f"{root}/{METRICS_FILE}").count(b"\n")
        wanted = _json(storage, f"{root}/{_RUN_FILE}").get("config", {}).get("num_steps")
        return "alignment", "unfinished", f"{steps}{f' of {wanted}' if wanted else ''} steps"
    if {JOURNAL_FILE, MERGE_PLAN} & inside:
        items = storage.read(f"{root}/{JOURNAL_FILE}").count(b"\n")
        return "merge", "unfinished", f"{items} parts are written"
    return "result", "unfinished", ""


def _model(storage: Storage, name: str) -> tuple[str, ItemState, str]:
    record = _json(storage, name)
    return str(record.get("kind", "model")), "stands", ""


def _evaluation(storage: Storage, name: str) -> tuple[str, ItemState, str]:
    summary = _json(storage, name)
    failed: Sequence[Mapping[str, Any]] = summary.get("failed") or ()
    if failed:
        first = failed[0]
        note = f"{first['model']} on {first['task']}: {first['reason']}"
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return "evaluation", "failed", note + more
    tasks = {task for each in summary.get("models", {}).values() for task in each["tasks"]}
    return "evaluation", "stands", f"{len(summary.get('models', ()))} models, {len(tasks)} tasks"


def _sweep(storage: Storage, name: str) -> tuple[str, ItemState, str]:
    trials = _json(storage, name).get("trials", ())
    return "sweep", "stands", f"{len(trials)} trials"


_FINISHED: dict[str, Callable[[Storage, str], tuple[str, ItemState, str]]] = {
    SWEEP_FILE: _sweep,
    EVALUATION_FILE: _evaluation,
    RECORD_FILE: _model,
}


def _json(storage: Storage, name: str) -> dict[str, Any]:
    """A JSON file's content; empty where it does not read."""
    with suppress(ValueError):
        found = json.loads(storage.read(name))
        if isinstance(found, dict):
            return found
    return {}


def old_runs(items: Sequence[Item], before: float) -> Iterator[Item]:
    """The unfinished runs that nobody works on and that have not changed since a time."""
    for item in items:
        # An evaluation's store is never old: it keeps every number for the next matrix.
        is_run = item.state in ("unfinished", "failed") and item.kind != "evaluation"
        if is_run and item.changed < before:
            yield item
