"""`poise sweep`: search a space of merges or trainings, and write the best of what was measured."""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.config import load_config
from pipelines.progress import PLAIN_INTERVAL_S
from pipelines.search import Search, StudyConfig, StudyPlan, plan_study, search
from pipelines.search.page import PAGE_FILE, write_page
from pipelines.search.results import choose, front
from pipelines.search.run import ALIGN_FILE, MERGE_FILE
from pipelines.storage import resolve_output
from ray_jobs.session import ray_session
from ray_jobs.tables import print_table

MOST_ROWS = 30  # of the table of trials


def run_sweep(
    config_path: Path,
    out: Path,
    overrides: list[str],
    *,
    only_plan: bool,
    smoke: bool,
    more: int,
    force: bool,
    as_json: bool,
) -> None:
    """Run the study of a config and print its trials, or only its plan."""
    config = load_config(config_path, StudyConfig, overrides)
    out = resolve_output(out, config.storage)
    plan = plan_study(config, smoke=smoke)  # finds all mistakes before anything starts
    if only_plan:
        _print_plan(plan)
        return
    on_ray = plan.trains or config.max_concurrent_trials != 1 or bool(os.environ.get("RAY_ADDRESS"))
    # A training shows its own progress.
    with ray_session() if on_ray else nullcontext(), _Display(live=not plan.trains) as display:
        executor: Literal["local", "ray"] = "ray" if on_ray else "local"
        result = search(
            plan, out, more=more, force=force, executor=executor, on_change=display.show
        )
    write_page(out, result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    if result["split"] == "test":
        print("chosen on test: these numbers are too high for a comparison", file=sys.stderr)
    _tell(result, out)


class _Display:
    """A table on a terminal, which changes as the study goes on; elsewhere a line now and then.

    Args:
        live: whether there may be a table.
    """

    def __init__(self, *, live: bool) -> None:
        self._live: Live | None = None
        self._may_live = live
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._may_live and sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), transient=True, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, state: Search) -> None:
        """Show where a study is."""
        now = time.monotonic()
        if self._live is None and now - self._last < PLAIN_INTERVAL_S:
            return
        self._last = now
        found = _state(state)
        if self._live is None:
            line = ", ".join(f"{name} {text}" for name, text in found.items())
            print(f"  {line}", file=sys.stderr, flush=True)
            return
        table = Table.grid("", "", padding=(0, 2))
        for name, text in found.items():
            table.add_row(name, text)
        self._live.update(table)


def _state(state: Search) -> dict[str, str]:
    """Where a study is, in words."""
    study, plan = state.study, state.plan
    states = [trial.state for trial in study.trials.values()]
    found = {"trials": f"{len(states) - states.count('running')}/{study.wanted}"}
    if state.goals is not None and study.complete:
        best = choose(plan.config, study, state.goals)
        if best is not None:
            values = study.trials[best].values
            numbers = (f"{o.label} {o.value(values):.2f}" for o in state.goals.objectives)
            found["best so far"] = f"{', '.join(numbers)} (trial {best})"
        found["front"] = str(len(front(study, state.goals)))
    if state.running:
        found["running"] = ", ".join(str(job) for job in state.running.values())
    for name in ("stopped", "failed"):
        if name in states:
            found[name] = str(states.count(name))
    if (left := state.seconds_left) is not None:
        found["left"] = f"about {left:.0f} s"
    return found


def _print_plan(plan: StudyPlan) -> None:
    """Print what a study would do."""
    table = Table("variable", "values", "where", title="the space")
    for each in plan.space.variables:
        if each.values:
            values = ", ".join(map(str, each.values))
        else:
            kind = " by factors" if each.log else f" by {each.step:g}" if each.step else ""
            values = f"{each.low:g} to {each.high:g}{kind}"
        where = ", ".join(f"{name} is {value}" for name, value in each.when)
        table.add_row(each.name, values, where)
    print_table(table)
    config = plan.config
    lines = {
        "sampler": f"{config.sampler.name}, {plan.num_trials} trials, seed {config.seed}",
        "objectives": ", ".join(f"{each.mode} {each.label}" for each in config.objectives),
        "constraints": ", ".join(each.label for each in config.constraints) or "none",
        "beside them": ", ".join(plan.others) or "none",
        "tasks": ", ".join(plan.tasks),
        "chosen on": f"{config.choose_on}{'; the winner is measured on test' if plan.test else ''}",
        "racing": "yes" if config.racing else "no",
        "engine": f"{plan.evaluation.engine.name}, {config.max_concurrent_trials} at once",
    }
    for name, text in lines.items():
        print(f"{name:16}{text}")


def _print(result: Mapping[str, Any]) -> None:
    """Print the trials, or the best of many, below them what was measured beside them."""
    objectives = result["objectives"]
    names = list(dict.fromkeys(name for t in result["trials"] for name in t["parameters"]))
    labels = [each["name"] for each in objectives]
    title = f"{result['split']} split{', chosen on it' if result['split'] == 'test' else ''}"
    table = Table("trial", *names, *labels, "state", "stays undominated", title=title)
    best = result["best"]["number"] if result["best"] else None
    for trial in _shown(result):
        number = trial["number"]
        mark = f"{number} *" if number == best else str(number)
        share = result["undominated"].get(str(number))
        table.add_row(
            mark,
            *(_text(trial["parameters"].get(name)) for name in names),
            *_numbers(trial, labels),
            trial["state"],
            "" if share is None else f"{share:.0%}",
        )
    for name, numbers in result["baselines"].items():
        table.add_row(name, *("" for _ in names), *_numbers(numbers, labels), "", "")
    print_table(table)


def _shown(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials of the table: all, or the front and the best ones."""
    trials = result["trials"]
    if len(trials) <= MOST_ROWS:
        return list(trials)
    first = result["objectives"][0]
    sign = 1 if first["mode"] == "max" else -1
    done = [trial for trial in trials if trial["state"] == "complete"]
    order = sorted(
        done, key=lambda t: (t["number"] not in result["front"], -sign * t["values"][first["name"]])
    )
    return order[:MOST_ROWS]


def _numbers(entry: Mapping[str, Any], labels: list[str]) -> list[str]:
    """Values with errors, one for each objective."""
    if not entry["values"]:
        return ["failed", *("" for _ in labels[1:])]
    found = []
    for label in labels:
        value, error = entry["values"][label], entry["stderr"][label]
        found.append(f"{value:.2f}" + ("" if error is None else f" ±{error:.2f}"))
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tell(result: Mapping[str, Any], out: Path) -> None:
    """What is to be known of the winner."""
    labels = [each["name"] for each in result["objectives"]]
    if result["best"] is None:
        print("no trial meets the constraints: nothing is written", file=sys.stderr)
    else:
        chance = result["expected_best_of_equals"]
        for label in labels:
            if chance[label] is not None:
                print(
                    f"{label}: the best of {result['evaluations']} candidates has "
                    f"{result['best']['values'][label]:.2f}; chance alone gives up to "
                    f"{chance[label]:.2f} where all are equally good",
                    file=sys.stderr,
                )
        if result["test"] is not None:
            numbers = zip(labels, _numbers(result["test"], labels), strict=True)
            text = ", ".join(f"{label} {number}" for label, number in numbers)
            print(f"the best on test: {text}", file=sys.stderr)
        name = next(name for name in (MERGE_FILE, ALIGN_FILE) if (out / name).is_file())
        print(f"the best model: {out / 'best'}; its config: {out / name}", file=sys.stderr)
    print(f"sweep: {out / 'sweep.json'}; its page: {out / PAGE_FILE}", file=sys.stderr)
