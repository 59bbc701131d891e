"""`poise judges`: the bias and noise of the judges of a finished evaluation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.errors import InputError
from pipelines.evaluate.results import Evaluation
from pipelines.judges.noise import Agreement, Noise, agreements, judged_tasks, noise
from pipelines.storage import is_address
from ray_jobs.tables import known, print_table


def run_judges(folder: Path, labels: Path | None, *, as_json: bool) -> None:
    """Print how the judges of an evaluation judge.

    Raises:
        InputError: no judged task there, or labels that do not fit.
    """
    if is_address(folder):
        raise InputError(f"{folder}: is an address, where no verdicts are; allowed: a folder")
    evaluation = Evaluation(folder)
    tasks = judged_tasks(evaluation)
    found = [noise(evaluation, task) for task in tasks]
    agreed = agreements(evaluation, tasks, labels)
    if as_json:
        values = {
            "judges": [asdict(each) for each in found],
            "agreement": [asdict(each) for each in agreed],
        }
        print(json.dumps(_without_nan(values), indent=2))
        return
    _print_noise(found)
    if agreed:
        _print_agreement(agreed)


def _print_noise(found: list[Noise]) -> None:
    """A row for each judged task."""
    heads = ("verdicts", "invalid", "order flips", "first shown", "repeats differ", "deviation")
    table = Table("task", *heads)
    for each in found:
        first = each.first_shown
        table.add_row(
            each.task,
            f"{each.verdicts:,}",
            f"{each.invalid:,}",
            _shown(each.order_flips),
            "-" if first is None else f"{first[0]:+.3f} ±{first[1]:.3f}",
            _shown(each.repeat_changes),
            _shown(each.repeat_deviation),
        )
    print_table(table)


def _print_agreement(found: list[Agreement]) -> None:
    """A row for each pair."""
    table = Table("first", "second", "items", "equal", "kappa")
    for each in found:
        kappa = _shown(known(each.kappa))
        table.add_row(each.first, each.second, f"{each.items:,}", _shown(each.share), kappa)
    print_table(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    """Values for JSON, which has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return known(value) if isinstance(value, float) else value
