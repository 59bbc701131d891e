"""CONTRIBUTING.md's table of additions. Oracle: the files that name the tables' entries."""

import re
from pathlib import Path

import pytest

from operators.consensus import CONSENSUS
from operators.losses import OBJECTIVES
from operators.merging import METHODS
from operators.sparsify import SPARSIFIERS
from pipelines.evaluate.graders import GRADERS
from pipelines.train.row_kinds import ROW_KINDS
from pipelines.train.rows.readers import READERS
from pipelines.train.strategy_table import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for floor in ("operators", "pipelines", "ray_jobs")
    for path in (ROOT / floor).rglob("*.py")
}
TABLES = {
    "merge method": METHODS,
    "sparsifier": SPARSIFIERS,
    "consensus": CONSENSUS,
    "objective": OBJECTIVES,
    "grader of tasks": GRADERS,
    "strategy": STRATEGIES,
    "kind of rows": ROW_KINDS,
    "reader of a published set": READERS,
}
# Entries of that name in two tables, defaults, and what reads methods from the other tables.
ELSEWHERE = {
    "ray_jobs/demo_results.py": {"merge method", "objective"},  # the demo's own story
    "pipelines/real_model/data.py": {"grader of tasks"},  # of the real model's tasks
    "pipelines/real_model/pairs.py": {"grader of tasks"},
    "operators/merging/table.py": {"sparsifier", "consensus"},
    "operators/optim/options.py": {"sparsifier", "consensus"},
    "operators/merging/method.py": {"sparsifier", "consensus"},
    "pipelines/serve/protocol.py": {"grader of tasks"},  # json_schema is a field of OpenAI's API
    "pipelines/rewards/rows.py": {"reader of a published set"},  # RewardBench's sections are there
}
NAMES_OF_OTHER_THINGS = {
    *("linear", "identity", "sum", "top", "exact", "phrase", "single", "ddp", "fsdp2", "pairs"),
    *(
        "ties",
        "expo",
        "dam",
        "sign",
        "breadcrumbs",
        "mixup",
        "dpo",
        "texts",
        "sft",
        "task_arithmetic",
        "passthrough",
        "reward",
    ),
}


def documented() -> dict[str, tuple[str, str]]:
    """The table: for each addition, the number of files and their names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## What an addition touches")[1].split("## ")[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    return {name: (count, which) for name, count, which in rows if name not in ("addition", "---")}


def files_in(which: str) -> list[str]:
    """The files and folders that a line names."""
    return [name for name in re.findall(r"`(.*?)`", which) if "/" in name]


def test_every_table_is_there_and_the_numbers_are_those_of_the_files() -> None:
    assert set(documented()) == {*TABLES, "task"}
    for name, (count, which) in documented().items():
        assert int(count.split()[-1]) == len(files_in(which)), name
        assert all((ROOT / file).exists() for file in files_in(which)), name


@pytest.mark.parametrize("kind", TABLES)
def test_an_entry_is_named_in_these_files_alone(kind: str) -> None:
    """As a text of the program: comments and examples may name it, too."""
    allowed = files_in(documented()[kind][1])
    for entry in set(TABLES[kind]) - NAMES_OF_OTHER_THINGS:
        found = [file for file, text in SOURCES.items() if f'"{entry}"' in text]
        others = [
            file
            for file in found
            if not any(file.startswith(place) for place in allowed)
            and kind not in ELSEWHERE.get(file, ())
        ]
        assert found, entry
        # A compiled pass has the name of the function that it is.
        assert [file for file in others if not file.startswith("operators/kernels/")] == [], entry


def test_tasks_are_entries_of_a_file() -> None:
    assert documented()["task"][0] == "0"
    assert not any('"reverse"' in text for file, text in SOURCES.items() if "evaluate" in file)
