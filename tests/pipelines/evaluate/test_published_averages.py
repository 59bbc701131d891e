"""The papers' averages. Oracle: their tables, cell by cell, which are not part of the project.

The tables are JSON files: `columns`, `rows` (name -> values), `average_columns` (column -> the
columns it averages), `categories` with `categories_printed_in` (another table), a `tolerance` of
half a printed unit, and the cells that do not follow (`inconsistent`). `POISE_PAPER_TABLES` names
their folder; without them a table of one row, made up, stands for the rest.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate.groups import Group, Measure, load_groups, resolve_groups

ROOT = Path(__file__).resolve().parents[3]
PLACE = Path(os.environ.get("POISE_PAPER_TABLES") or ROOT.parent / "shared" / "papers" / "tables")
CONFIGS = ROOT / "configs" / "evaluate"
# The columns of the papers' tables by the names that the configs have.
ELEVEN = {
    "MATH": "Math", "GSM8K": "GSM8K", "ARC-E": "ARC-E", "ARC-C": "ARC-C", "MMLU": "MMLU",
    "MBPP+": "MBPP_Plus", "HumanEval+": "HumanEval_Plus", "MT-Bench": "MT-Bench",
    "HaluEval-Wild": "HaluEval_Wild", "SALAD-Bench": "Salad_Bench", "OR-Bench": "OR-Bench",
    "helpfulness": "Helpful_Avg", "honesty": "Honest_Avg", "harmlessness": "Harmless_Avg",
    "average": "AVG",
}  # fmt: skip
BENCHMARKS = {
    "gsm8k": "gsm8k", "math401": "math401", "math23k": "math23k", "ds1000_code": "ds1000 pass@1",
    "mbpp_code": "mbpp pass@1", "codeapex_code": "codeapex pass@1",
    "humaneval_code": "humaneval pass@1", "prompt_level_strict_acc": "ifeval strict prompt",
    "inst_level_strict_acc": "ifeval strict instruction", "coqa_recall": "coqa",
    "drop_recall": "drop", "mmlu": "mmlu", "agent": "agent function call",
    "code_switch": "code switch",
}  # fmt: skip
MADE_UP = {
    "columns": ["p", "q", "pq", "r", "all"],
    "average_columns": {"pq": ["p", "q"], "all": ["pq", "r"]},
    "tolerance": 0.01,
    "rows": {"good": [1.0, 2.0, 1.5, 3.5, 2.5], "bad": [1.0, 2.0, 1.53, 3.5, 2.52]},
    "inconsistent": [["bad", "pq", 1.53, 1.5]],
}
Cell = tuple[str, str, float, float]  # row, column, printed, computed


def tables() -> dict[str, dict[str, Any]]:
    if not PLACE.is_dir():
        pytest.skip("POISE_PAPER_TABLES names no folder of the papers' tables")
    return {path.stem: json.loads(path.read_text()) for path in sorted(PLACE.glob("*.json"))}


def cells(table: dict[str, Any]) -> Iterator[Cell]:
    """Each average that a table prints, and the same from the columns that it prints beside it."""
    groups = {name: Group(members=members) for name, members in table["average_columns"].items()}
    for name, group in groups.items():
        resolved = resolve_groups({"it": group}, {column: ["value"] for column in group.members})
        for row, values in table["rows"].items():
            printed = dict(zip(table["columns"], values, strict=True))
            measures = {column: {"value": Measure(printed[column])} for column in group.members}
            computed = resolved.averages(measures)["it"].value
            assert computed is not None
            yield row, name, printed[name], computed


def deviating(table: dict[str, Any], found: list[Cell]) -> set[Cell]:
    bound = table["tolerance"] + 1e-9
    return {cell for cell in found if abs(cell[2] - cell[3]) > bound}


def listed(entries: list[list[Any]]) -> list[Any]:
    return sorted((row, name, printed, pytest.approx(value, abs=1e-3)) for row, name, printed, value
                  in entries)  # fmt: skip


def test_a_made_up_table() -> None:
    found = list(cells(MADE_UP))
    assert len(found) == 4
    assert sorted(deviating(MADE_UP, found)) == listed(MADE_UP["inconsistent"])


def test_every_average_but_the_inconsistent_ones() -> None:
    total, wrong = 0, 0
    for name, table in tables().items():
        if not table["average_columns"]:
            continue
        found = list(cells(table))
        deviations = deviating(table, found)
        assert sorted(deviations) == listed(table["inconsistent"]), name
        total, wrong = total + len(found), wrong + len(deviations)
    assert (total, wrong) == (380, 16)


def test_the_eleven_columns_of_the_config() -> None:
    """From the eleven columns alone: what a wrong average of an H does to the last column."""
    groups = load_groups(CONFIGS / "eleven_columns.yaml")
    tasks = {"task": [name for name in groups if name in list(ELEVEN)[:11]]}
    columns = {
        name: group.model_copy(update={"members": [f"task.{name}"]})
        for name, group in groups.items()
        if name in tasks["task"]
    }
    resolved = resolve_groups({**groups, **columns}, tasks)
    deviations: dict[tuple[str, str], float] = {}
    for name, table in tables().items():
        if not set(ELEVEN.values()) <= set(table["columns"]):
            continue
        for row, values in table["rows"].items():
            printed = dict(zip(table["columns"], values, strict=True))
            task = {c: Measure(printed[ELEVEN[c]] / groups[c].scale) for c in columns}
            for column, average in resolved.averages({"task": task}).items():
                assert average.value is not None
                if abs(average.value - printed[ELEVEN[column]]) > 0.0125:
                    deviations[f"{name[:10]} {row}", column] = round(average.value, 2)
    by_column = {c: sum(column == c for _, column in deviations) for c in groups}
    assert sum(by_column[column] for column in columns) == by_column["honesty"] == 0
    assert by_column["helpfulness"] == 5 and by_column["harmlessness"] == 5
    assert deviations["001_table3 3H Mixture Training (Hummer)", "average"] == 62.25
    assert deviations["001_table3 3H Mixture Full Training (ArmoRM)", "average"] == 60.85
    assert deviations["001_table4 DELLA", "average"] == 61.38


def test_the_seven_categories_of_the_config() -> None:
    groups = load_groups(CONFIGS / "seven_categories.yaml")
    every, wrong = tables(), 0
    total = 0
    for table in every.values():
        if "categories" not in table:
            continue
        printed_table = every[table["categories_printed_in"]]
        deviations = []
        for row, values in table["rows"].items():
            if row not in printed_table["rows"]:
                continue
            benchmark = dict(zip(table["columns"], values, strict=True))
            printed = dict(zip(printed_table["columns"], printed_table["rows"][row], strict=True))
            for name, column in printed.items():
                if name not in groups:
                    continue
                total += 1
                computed = category(groups[name], benchmark)
                if abs(computed - column) > table["tolerance"] + 1e-9:
                    deviations.append((row, name, column, computed))
        assert sorted(deviations) == listed(table["inconsistent_categories"])
        wrong += len(deviations)
    assert (total, wrong) == (217, 12)


def category(group: Group, benchmark: dict[str, float]) -> float:
    """One category of the config over one row of a table of benchmarks."""
    tasks: dict[str, dict[str, Measure]] = {}
    for member in group.members:
        task, _, metric = member.partition(".")
        column = BENCHMARKS.get(metric) or BENCHMARKS[task]
        measure = Measure(benchmark[column] / group.scale)
        tasks.setdefault(task, {})[metric or "value"] = measure
    resolved = resolve_groups({"it": group}, {task: list(each) for task, each in tasks.items()})
    value = resolved.averages(tasks)["it"].value
    assert value is not None
    return value


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_resolves_with_its_tasks(path: Path) -> None:
    groups = load_groups(path)
    leaves = [m for group in groups.values() for m in group.members if m not in groups]
    tasks: dict[str, list[str]] = {}
    for leaf in leaves:
        task, _, metric = leaf.partition(".")
        tasks.setdefault(task, []).append(metric or "value")
    resolved = resolve_groups(groups, tasks)
    assert {f"{task}.{metric}".removesuffix(".value") for task, metric in resolved.leaves} == set(
        leaves
    )
    assert "average" in resolved.groups
