"""`poise expo`: choose one parameter of a merge by a reward model, and write the winner."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import load_config
from pipelines.expo import ExpoConfig, ExpoPlan, expo, finished, plan_expo
from pipelines.expo.bracket import most_measurements
from pipelines.expo.plan import number_text
from pipelines.expo.run import BEST, CURVE, HISTOGRAMS
from pipelines.storage import resolve_output
from ray_jobs.score import number
from ray_jobs.tables import print_table


def run_expo(
    config_path: Path,
    out: Path,
    overrides: list[str],
    *,
    only_plan: bool,
    smoke: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run the choice of a config and print what was measured, or only the plan."""
    config = load_config(config_path, ExpoConfig, overrides)
    out = resolve_output(out, config.storage)
    plan = plan_expo(config, smoke=smoke)
    if only_plan:
        _print_plan(plan, out)
        return

    def told(value: float, numbers: Mapping[str, Any]) -> None:
        text = f"reward {number(numbers['reward'])}, {number(numbers['tokens'], 1, 1)} tokens"
        print(f"  {plan.label(value)}: {text}", file=sys.stderr, flush=True)

    result = expo(plan, out, force=force, on_value=told)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_table(_table(result))
    _tell(result, out)


def _print_plan(plan: ExpoPlan, out: Path) -> None:
    """Print what a choice would do."""
    config, count = plan.config, len(plan.values)
    at_end = plan.reference in (plan.values[0], plan.values[-1])
    most = count if config.search == "grid" else most_measurements(count, at_end=at_end)
    prompts = plan.task.num_documents
    decoding = ", ".join(f"{k} {v:g}" for k, v in config.decoding.model_dump().items())
    reward = plan.task.scorer.described["reward"]
    values = ", ".join(map(number_text, plan.values))
    on_test = (
        "" if plan.test_task is None else f"; then two on {plan.test_task.num_documents} of test"
    )
    lines = {
        "parameter": f"{config.parameter} of {plan.method}",
        "values": f"{values}; compared with {number_text(plan.reference)}",
        "search": f"{config.search}, {most} candidates at most",
        "prompts": f"{prompts:,} of {config.choose_on}{on_test}",
        "responses": f"{most * prompts:,} at most, up to {config.max_new_tokens:,} tokens each",
        "decoding": f"{decoding}, seed {config.seed}",
        "reward model": f"{reward['path']}, label {reward['label']}",
        "engines": f"{plan.evaluation.engine.name}; rewards: {config.reward_engine.name}",
    }
    for name, text in lines.items():
        print(f"{name:14}{text}")
    if finished(plan, out) is not None:
        print(f"{out}: is finished")


def _table(result: Mapping[str, Any]) -> Table:
    """A row for each measured value; the best one has a mark."""
    test = result["split"] == "test"
    title = f"{result['split']} split{', chosen on it' if test else ''}, ± standard error"
    less = f"less {result['name']} {number_text(result['reference'])}"
    table = Table(
        result["name"], "reward", less, "at equal length", "tokens", less, "r(reward, tokens)",
        title=title,
    )  # fmt: skip
    for trial in result["trials"]:
        mark = " *" if trial["value"] == result["best"]["value"] else ""
        difference = trial.get("difference")
        pearson = trial["correlation"]["pearson"]
        table.add_row(
            f"{number_text(trial['value'])}{mark}",
            number(trial["reward"]),
            number(difference["reward"]) if difference else "",
            number(difference["reward_at_equal_length"]) if difference else "",
            number(trial["tokens"], 1, 1),
            number(difference["tokens"], 1, 1) if difference else "",
            "-" if pearson is None else f"{pearson:+.2f}",
        )
    return table


def _tell(result: Mapping[str, Any], out: Path) -> None:
    """What is to be known of the choice, on stderr."""
    for line in result["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if result["split"] == "test":
        print("chosen on test: these numbers are too high for a comparison", file=sys.stderr)
    if test := result["test"]:
        gain = test.get("difference")
        less = f", {number(gain['reward'])} above the reference" if gain else ""
        print(f"the best on test: reward {number(test['reward'])}{less}", file=sys.stderr)
    print(
        f"{result['name']} {number_text(result['best']['value'])} of {result['evaluations']} "
        f"measured: {out / BEST}",
        file=sys.stderr,
    )
    print(
        f"numbers: {out / 'expo.json'}; plots: {out / CURVE}.png, {out / HISTOGRAMS}.png; "
        f"responses side by side: poise report {out}",
        file=sys.stderr,
    )
