"""`poise status`: what a storage holds, and what of it may go."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from pipelines.status import Item, PipelineStatus, Storage, items_of, old_runs, pipelines_of
from ray_jobs.tables import print_table

DAY_S = 86400.0


def run_status(address: str, *, prune: bool, days: float, yes: bool, as_json: bool) -> None:
    """Print what a storage holds; with `prune`, show or (`yes`) remove old unfinished runs.

    Args:
        days: how long a run that is pruned has not changed.

    Raises:
        InputError: there is no such storage.
    """
    storage = Storage(address)
    files = storage.files()
    items, pipelines = items_of(storage, files), pipelines_of(storage, files)
    old = list(old_runs(items, time.time() - days * DAY_S)) if prune else []
    removed = [each for each in old if yes and _remove(storage, each, list(files))]
    if as_json:
        print(json.dumps(_as_json(address, items, pipelines, old, removed, prune), indent=2))
        return
    if prune:
        _print_pruned(old, removed, yes, days)
        return
    for pipeline in pipelines:
        _print_pipeline(pipeline)
    _print_items(items)


def _remove(storage: Storage, item: Item, files: Sequence[str]) -> bool:
    """Remove an unfinished run, unless somebody works on it by now."""
    inside = [name for name in files if name == item.name or name.startswith(f"{item.name}/")]
    return storage.remove(item.name, inside)


def _as_json(
    address: str,
    items: Sequence[Item],
    pipelines: Sequence[PipelineStatus],
    old: Sequence[Item],
    removed: Sequence[Item],
    prune: bool,
) -> dict[str, object]:
    pruned = {"old": [each.name for each in old], "removed": [each.name for each in removed]}
    return {
        "storage": address,
        "bytes": sum(each.size for each in items),
        "items": [asdict(each) for each in items],
        "pipelines": [each.as_dict() for each in pipelines],
        **(pruned if prune else {}),
    }


def _print_pipeline(pipeline: PipelineStatus) -> None:
    """Print a pipeline's stages."""
    runs = {True: "runs", False: "does not run", None: "may run on another machine"}
    table = Table(
        "stage",
        "kind",
        "state",
        "seconds",
        "since (UTC)",
        "why",
        title=f"pipeline {pipeline.name}: {runs[pipeline.is_running]}",
    )
    for name, record in pipeline.stages.items():
        seconds = record.get("seconds")
        table.add_row(
            name,
            record.get("kind", ""),
            record.get("state", ""),
            "" if seconds is None else f"{seconds:,.1f}",
            record.get("at", "")[:19].replace("T", " "),
            record.get("reason", ""),
        )
    print_table(table)


def _print_items(items: Sequence[Item]) -> None:
    table = Table("result", "kind", "state", "size", "changed", "note")
    for item in items:
        table.add_row(*_row(item))
    print_table(table)
    print(f"{size_in_words(sum(each.size for each in items))} in all")


def _row(item: Item) -> tuple[str, ...]:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.changed))
    return item.name, item.kind, item.state, size_in_words(item.size), changed, item.note


def _print_pruned(old: Sequence[Item], removed: Sequence[Item], yes: bool, days: float) -> None:
    """Print what may go, or has gone."""
    if not old:
        print(f"no unfinished run is older than {days:g} days")
        return
    table = Table("unfinished run", "kind", "state", "size", "changed", "note")
    for item in old:
        gone = "removed" if item in removed else "is in use" if yes else item.state
        name, kind, _, *rest = _row(item)
        table.add_row(name, kind, gone, *rest)
    print_table(table)
    size = size_in_words(sum(each.size for each in (removed if yes else old)))
    print(f"{size} removed" if yes else f"{size} would go; --yes removes them")


def size_in_words(count: float) -> str:
    """Bytes in the largest unit of which there is one, by powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
