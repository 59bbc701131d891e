"""`poise score`: rewards of a file's responses, and what they say."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import apply_overrides, check
from pipelines.evaluate.estimate import measured_flops
from pipelines.rewards import ScoreConfig, ScorePlan, plan_scores, score
from pipelines.storage import resolve_output
from ray_jobs.tables import print_table

_OPTION = "poise score"


def run_score(
    values: dict[str, Any],
    out: Path,
    overrides: list[str],
    *,
    only_plan: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Score a file and print the summary, or print the plan."""
    config = check(apply_overrides(values, overrides), ScoreConfig, _OPTION)
    plan = plan_scores(config, resolve_output(out, None), force=force)
    _remark(plan)
    if only_plan:
        print(_size(plan))
        return
    print(f"  {_size(plan)}", file=sys.stderr)
    record = score(plan)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        for table in tables(record["summary"]):
            print_table(table)
    print(f"scores: {plan.out}", file=sys.stderr)


def _remark(plan: ScorePlan) -> None:
    """What a user should know of the rows, on stderr."""
    rows = plan.rows
    if rows.reader is not None and plan.config.reader is None:
        print(f"  rows of RewardBench: read with reader={rows.reader}", file=sys.stderr)
    if rows.plain:
        print(
            f"  {rows.plain} rows are texts without roles: scored as they stand, without the chat "
            "template (reader=text_pairs makes messages of pairs)",
            file=sys.stderr,
        )
    if remarks := rows.counts.remarks():
        print(f"  {remarks}", file=sys.stderr)


def _size(plan: ScorePlan) -> str:
    """The size of the work, in a line."""
    rows = plan.rows
    size = (
        f"{len(rows.rows):,} rows, {rows.num_conversations:,} conversations, "
        f"{rows.num_tokens:,} tokens: {len(plan.missing)} of {plan.num_blocks} blocks to do"
    )
    if not plan.missing:
        return size
    seconds = 2 * plan.model.parameters * plan.tokens_left / measured_flops()
    return f"{size}, {seconds:,.0f} s or more here" if seconds >= 1 else size


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The summary as tables: rewards and accuracy, RewardBench's sections, length."""
    found = [_main_table(summary)]
    if "sections" in summary:
        found.append(_sections(summary["sections"]))
    return [*found, _lengths(summary["length"]), _bins(summary["length"])]


def _main_table(summary: Mapping[str, Any]) -> Table:
    """A row for all, for each role, and for each subset."""
    table = Table("", "n", "reward", "deviation", "pairs", "accuracy %", "ties", "difference")
    for name, reward in summary["reward"].items():
        pairs = summary.get("pairs", {}) if name == "all" else {}
        table.add_row(name, *_rewards(reward), *_pairs(pairs))
    for name, of in summary.get("subsets", {}).items():
        table.add_row(f"  {name}", *_rewards(of["reward"]), *_pairs(of))
    return table


def _rewards(of: Mapping[str, Any]) -> list[str]:
    return [f"{of['n']:,}", number(of), _plain(of["deviation"])]


def _pairs(of: Mapping[str, Any]) -> list[str]:
    if "accuracy" not in of:
        return [""] * 4
    accuracy = of["accuracy"]
    numbers = [f"{accuracy['n']:,}", number(accuracy, 100, 1), f"{of['ties']:,}"]
    return [*numbers, number(of["difference"])]


def _sections(sections: Mapping[str, Any]) -> Table:
    """RewardBench's sections; one that lacks a subset has no number."""
    table = Table("RewardBench", "pairs", "accuracy %", "missing")
    for name, of in sections.items():
        missing = of.get("missing", [])
        told = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        table.add_row(name, f"{of['n']:,}", number(of, 100, 1), told)
    return table


def _lengths(length: Mapping[str, Any]) -> Table:
    """How rewards go with length."""
    table = Table("reward against length", "n", "value")
    _add_correlation(table, "responses", length["correlation"])
    if pairs := length.get("pairs"):
        _add_correlation(table, "differences of pairs", pairs["correlation"])
        longer, equal = pairs["longer_chosen"], pairs["difference_at_equal_length"]
        table.add_row("chosen is longer, %", f"{longer['n']:,}", number(longer, 100, 1))
        if matched := pairs["matched"]:
            n = f"{matched['accuracy']['n']:,}"
            table.add_row("lengths within 10%: accuracy %", n, number(matched["accuracy"], 100, 1))
            table.add_row("lengths within 10%: difference", n, number(matched["difference"]))
        table.add_row("difference at equal length (line)", f"{equal['n']:,}", number(equal))
    return table


def _add_correlation(table: Table, name: str, of: Mapping[str, Any]) -> None:
    for kind in ("pearson", "spearman"):
        table.add_row(f"{name}: {kind.title()}", f"{of['n']:,}", _plain(of[kind]))


def _bins(length: Mapping[str, Any]) -> Table:
    """Rewards by length."""
    table = Table("tokens of the response", "n", "reward")
    for of in length["bins"]:
        table.add_row(f"{of['from']} to {of['to']}", f"{of['reward']['n']:,}", number(of["reward"]))
    return table


def number(of: Mapping[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """A value with its standard error."""
    if of["value"] is None:
        return "-"
    error = "" if of["stderr"] is None else f" ±{scale * of['stderr']:.{digits}f}"
    return f"{scale * of['value']:.{digits}f}{error}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
