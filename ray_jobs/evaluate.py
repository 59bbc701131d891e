"""`poise evaluate`: measure models on tasks with engines under Ray."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import load_config
from pipelines.evaluate import EvaluateConfig, EvaluationPlan, evaluate_planned, plan_evaluation
from pipelines.evaluate.estimate import Estimate, estimates, measured_flops
from pipelines.storage import output_place
from ray_jobs.results import run_results
from ray_jobs.session import ray_session
from ray_jobs.tables import print_table


def run_evaluate(
    config_path: Path,
    out: str,
    overrides: list[str],
    *,
    only_plan: bool,
    force: bool,
    as_json: bool,
) -> bool:
    """Run the matrix of a config and print it, or print its plan; whether all was measured."""
    config = load_config(config_path, EvaluateConfig, overrides)
    if isinstance(config.tasks, Path):
        print(
            "  tasks: a tasks.yaml is read; the new form is a list of names and folders: "
            "tasks: [NAME, {include_path: FOLDER}]",
            file=sys.stderr,
        )
    place = output_place(out, config.storage)
    plan = plan_evaluation(config, place)  # checks all inputs before Ray starts
    found = estimates(plan)
    if only_plan:
        _print_plan(plan, found)
        return True
    print(f"  {_in_words(plan, found)}", file=sys.stderr)
    with ray_session():
        [summary] = evaluate_planned([plan], force=force)
    _tell(place, summary, as_json=as_json)
    return not summary["failed"]


def _tell(place: Path | str, summary: dict[str, Any], *, as_json: bool) -> None:
    """Print a finished evaluation."""
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        run_results([place], models=(), tasks=(), compare=None, form="table", harness=None)
    for task, remark in summary["remarks"].items():
        print(f"{task}: {remark}", file=sys.stderr)
    for model, entry in summary["models"].items():
        for task, number in entry.get("prompts_cut", {}).items():
            print(f"{model} on {task}: {number} prompts were cut", file=sys.stderr)
        for task, notes in entry.get("scores", {}).items():
            if line := notes.get("line"):
                print(f"{model} on {task}: {line}", file=sys.stderr)
    print(f"evaluation: {place}/evaluation.json", file=sys.stderr)


def _in_words(plan: EvaluationPlan, found: list[Estimate]) -> str:
    """The size of the work, in a line."""
    missing, blocks = sum(each.missing for each in found), sum(each.blocks for each in found)
    size = (
        f"{len(plan.models)} models x {len(plan.tasks)} tasks: {missing} of {blocks} blocks to do"
    )
    if not missing:
        return size
    seconds = sum(each.flops for each in found) / measured_flops()
    tokens, calls = sum(each.tokens for each in found), sum(each.calls for each in found)
    time = f", {seconds:,.0f} s or more on one engine here" if seconds >= 1 else ""
    asked = f", up to {calls:,} calls of judges" if calls else ""
    return f"{size}, about {tokens:,} tokens{time}{asked}"


def _print_plan(plan: EvaluationPlan, found: list[Estimate]) -> None:
    """Print the work by task."""
    remarks = {task.name: task.remark for task in plan.tasks}
    judged = any(each.calls for each in found)
    heads = ("documents", "blocks", "to do", "tokens", *(("calls",) if judged else ()))
    table = Table("task", *heads, "split")
    for each in found:
        numbers = [each.documents, each.blocks, each.missing, each.tokens]
        numbers += [each.calls] if judged else []
        split = remarks[each.task] or plan.config.split
        table.add_row(each.task, *(f"{number:,}" for number in numbers), split)
    print_table(table)
    print(_in_words(plan, found))
