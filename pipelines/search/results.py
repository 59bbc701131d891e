"""The result of a study: trials, the best, the front, and what the best is worth on test."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from pipelines.commit import write_atomically
from pipelines.evaluate.statistics import Sheet, mean_draws
from pipelines.search.choice import expected_best, undominated, undominated_shares
from pipelines.search.config import StudyConfig
from pipelines.search.goals import Goals, Sum
from pipelines.search.plan import StudyPlan
from pipelines.search.study import Study, Trial

RESULT_FILE, TABLE = "sweep.json", "trials"
OF_TEST = "test: "  # begins the names of what is measured on the test split
RESAMPLINGS = 1000


def feasible(study: Study, goals: Goals) -> list[int]:
    """The trials that have answered everything and meet the constraints, by number."""
    return [number for number in study.complete if goals.is_met(study.trials[number].values)]


def front(study: Study, goals: Goals) -> list[int]:
    """The feasible trials that no other one dominates."""
    numbers = feasible(study, goals)
    if not numbers:
        return []
    mask = undominated(np.array([goals.gains(study.trials[n].values) for n in numbers]))
    return [number for number, stays in zip(numbers, mask, strict=True) if stays]


def choose(config: StudyConfig, study: Study, goals: Goals) -> int | None:
    """The best: of the front, the trial with the greatest weighted sum of the objectives, the first
    one of equals. None where no trial meets the constraints.
    """
    weights = config.choose_by or {each.label: 1.0 for each in goals.objectives}
    signed = [weights.get(each.label, 0.0) for each in goals.objectives]

    def worth(number: int) -> float:
        gains = goals.gains(study.trials[number].values)
        return sum(weight * gain for weight, gain in zip(signed, gains, strict=True))

    return max(front(study, goals), key=worth, default=None)


def result_of(
    plan: StudyPlan,
    study: Study,
    goals: Goals,
    best: int | None,
    series: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        series: metrics as weighted sums of series' means.
    """
    config = plan.config
    trials = [_entry(plan, goals, number, trial) for number, trial in study.trials.items()]
    on_front = front(study, goals)
    others = {name: _numbers(goals.objectives, study.others[name]) for name in plan.others}
    return {
        "schema": 2,
        "fingerprint": plan.key,
        "split": config.choose_on,
        **({"chosen_on_test": True} if config.choose_on == "test" else {}),
        "objectives": [{"name": each.label, "mode": each.mode} for each in goals.objectives],
        "constraints": [
            {"name": each.label, "at_least" if sign > 0 else "at_most": sign * least}
            for each, sign, least in goals.bounds
        ],
        "trials": trials,
        "best": None
        if best is None
        else trials[best] | {"metrics": _plain(study.trials[best].values)},
        "front": on_front,
        "undominated": _stays(plan, study, goals, on_front, series),
        "baselines": others,
        "test": _test(plan, study, goals, best),
        "evaluations": sum(
            trial.state in ("complete", "stopped") for trial in study.trials.values()
        ),
        "expected_best_of_equals": _expected(study, goals),
        "wanted": study.wanted,
    }


def write_tables(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the trials as `trials.csv` and `trials.parquet`: a column for each field, and two for
    each objective.
    """
    fields = dict.fromkeys(name for trial in result["trials"] for name in trial["parameters"])
    names = [each["name"] for each in result["objectives"]]
    columns: dict[str, list[Any]] = {
        name: [trial[name] for trial in result["trials"]] for name in ("number", "state", "seconds")
    }
    for field in fields:
        values = [trial["parameters"].get(field) for trial in result["trials"]]
        columns[field] = values if _is_column(values) else [_text(value) for value in values]
    for name in names:
        for kind, label in (("values", name), ("stderr", f"{name} stderr")):
            columns[label] = [trial[kind].get(name) for trial in result["trials"]]
    table = pa.table(columns)
    for write, ending in ((csv.write_csv, "csv"), (parquet.write_table, "parquet")):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomically(folder / f"{TABLE}.{ending}", sink.getvalue().to_pybytes())


def _entry(plan: StudyPlan, goals: Goals, number: int, trial: Trial) -> dict[str, Any]:
    return {
        "number": number,
        "parameters": plan.space.fields(trial.point),
        **_numbers(goals.objectives, trial),
        "state": trial.state,
        "seconds": trial.seconds,
        **(
            {"meets_constraints": goals.is_met(trial.values)}
            if goals.bounds and trial.values
            else {}
        ),
        **({"reason": trial.reason} if trial.state == "failed" else {}),
    }


def _numbers(objectives: tuple[Sum, ...], trial: Trial) -> dict[str, Any]:
    """A trial's objectives; of a failed one there are none."""
    if not trial.values:
        return {"values": {}, "stderr": {}, **({"reason": trial.reason} if trial.reason else {})}
    return {
        "values": _plain({each.label: each.value(trial.values) for each in objectives}),
        "stderr": _plain({each.label: each.stderr(trial.stderr) for each in objectives}),
    }


def _test(plan: StudyPlan, study: Study, goals: Goals, best: int | None) -> dict[str, Any] | None:
    """The best and the baselines on test; None where nothing was measured there."""
    found = study.others.get(f"{OF_TEST}{best}")
    if found is None:
        return None
    on_test = {
        name: study.others[f"{OF_TEST}{name}"]
        for name in plan.others
        if f"{OF_TEST}{name}" in study.others
    }
    return {
        "number": best,
        **_numbers(goals.objectives, found),
        "baselines": {name: _numbers(goals.objectives, trial) for name, trial in on_test.items()},
        "candidates": sum(
            name.startswith(OF_TEST) and name.removeprefix(OF_TEST).isdigit()
            for name in study.others
        ),
    }


def _expected(study: Study, goals: Goals) -> dict[str, float | None]:
    """By objective, the best that chance alone would give so many candidates."""
    trials = [study.trials[number] for number in study.complete]
    found: dict[str, float | None] = {}
    for each in goals.objectives:
        mean = fmean(each.value(trial.values) for trial in trials)
        errors = [each.stderr(trial.stderr) for trial in trials]
        known = all(math.isfinite(error) for error in errors)
        found[each.label] = each.sign * expected_best(each.sign * mean, errors) if known else None
    return found


def _stays(
    plan: StudyPlan,
    study: Study,
    goals: Goals,
    on_front: list[int],
    series: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """How often each member of the front stays undominated, by its number, in paired resamplings of
    clusters of prompts. What is no mean over prompts stays as it is.
    """
    if not on_front or not series:
        return {}
    numbers = feasible(study, goals)
    source = next(name for name in plan.others if study.others[name].state == "complete")
    clusters = study.clusters(source)
    scores = [study.scores(number) for number in numbers]
    names = sorted({name for each in series.values() for name in each})
    rows = tuple(map(str, numbers))
    drawn: dict[str, NDArray[np.float64]] = {}
    for name in names:
        task = max((t for t in clusters if name.startswith(f"{t}.")), key=len)
        values = np.array([each[name] for each in scores])
        drawn[name] = mean_draws(Sheet(task, rows, values, clusters[task]), RESAMPLINGS)
    draws = np.zeros((RESAMPLINGS, len(numbers), len(goals.objectives)))
    for place, goal in enumerate(goals.objectives):
        for metric, weight in goal.terms.items():
            if metric in series:
                part = sum(of * drawn[name] for name, of in series[metric].items())
            else:
                part = np.array([study.trials[number].values[metric] for number in numbers])
            draws[:, :, place] += goal.sign * weight * part
    shares = undominated_shares(draws, [numbers.index(number) for number in on_front])
    return {str(n): round(share, 4) for n, share in zip(on_front, shares, strict=True)}


def _plain(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _is_column(values: list[Any]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return kinds <= {int, float} or kinds <= {str} or kinds <= {bool}


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value)
