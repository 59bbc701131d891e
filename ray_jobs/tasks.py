"""`poise tasks`: tasks of lm-evaluation-harness with their splits, requests and metrics."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.evaluate.harness import Task, load_tasks
from pipelines.evaluate.harness.splits import SPLITS
from ray_jobs.tables import print_table


def run_tasks(
    names: list[str], include_path: Path | None, *, allow_code: bool, as_json: bool
) -> None:
    """Load tasks with their data, and print what they ask and of how many documents.

    Raises:
        InputError: as from `load_tasks`.
    """
    chosen = {"names": names or None, "include_path": include_path}
    loaded = {split: load_tasks([chosen], split, allow_code=allow_code) for split in SPLITS}
    tasks = {
        development.name: _described(development, test)
        for development, test in zip(loaded["development"], loaded["test"], strict=True)
    }
    if as_json:
        print(json.dumps(tasks, indent=2))
        return
    table = Table("task", "requests", "examples", *SPLITS, "metrics", title="tasks")
    for name, each in tasks.items():
        parts = [
            f"{part['documents']} of {part['split']}" for part in (each[split] for split in SPLITS)
        ]
        metrics = ", ".join(each["metrics"])
        table.add_row(name, each["requests"], str(each["num_fewshot"]), *parts, metrics)
    print_table(table)


def _described(development: Task, test: Task) -> dict[str, Any]:
    """A task as values for JSON."""
    parts: dict[str, Any] = {
        task.split: {"documents": len(task), "split": task.remark} for task in (development, test)
    }
    return {
        "requests": test.output_type,
        "num_fewshot": test.num_fewshot,
        "chat": test.chat.wanted,
        **parts,
        "metrics": test.metrics,
    }
