"""Several sets in one run: which rows are used, how they are counted, that they train.

Oracle: the sets' own tables, and counts by hand.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_files import align_config, metrics, preference_rows, run_here, write_rows

from pipelines.train import plan_alignment
from pipelines.train.data import TokenTable
from ray_jobs.align import describe_plan

Rows = list[tuple[bytes, ...]]


def rows_of(table: TokenTable, first: int = 0, count: int | None = None) -> Rows:
    """The tokens of rows, as they can be compared."""
    last = table.num_rows if count is None else first + count
    return [tuple(ids.tobytes() for ids, _ in table.sequences(row)) for row in range(first, last)]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Path]:
    """Two files of 40 and 20 rows, of which five prompts are in both."""
    rows = preference_rows(60, seed=4)
    shared = [rows[40 + i] | {"prompt": rows[i]["prompt"]} for i in range(5)]
    return {
        "help": write_rows(tmp_path / "help.jsonl", rows[:40]),
        "safe": write_rows(tmp_path / "safe.jsonl", [*shared, *rows[45:]]),
    }


def plan(model: Path, data: Any, folder: Path, **fields: Any) -> Any:
    """The plan of a run."""
    return plan_alignment(align_config(model, data, **fields), folder / "cache")


def test_sets_follow_each_other(sets: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    """All rows of each; one set by itself is the file's own table."""
    alone = {name: plan(tiny_llama, path, tmp_path) for name, path in sets.items()}
    both = plan(tiny_llama, [str(path) for path in sets.values()], tmp_path)
    assert rows_of(both.table) == [row for each in alone.values() for row in rows_of(each.table)]
    assert both.table.counts.rows == 60 and both.table.counts.shared_prompts == 5
    for form in ({"path": sets["help"]}, [sets["help"]]):
        one = plan(tiny_llama, form, tmp_path)
        assert (one.data_key, one.table.folder) == (
            alone["help"].data_key,
            alone["help"].table.folder,
        )


@pytest.mark.parametrize(
    ("size", "count"),
    [({"rows": 7}, 7), ({"share": 0.25}, 10), ({"share": 2.5}, 100), ({"rows": 45}, 45)],
)
def test_shares(
    size: dict[str, float],
    count: int,
    sets: dict[str, Path],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """Drawn without replacement by the seed; beyond the whole, copies and then a draw."""
    data = [{"path": sets["help"], **size}, {"path": sets["safe"]}]
    whole = rows_of(plan(tiny_llama, sets["help"], tmp_path).table)
    found = {seed: plan(tiny_llama, data, tmp_path, seed=seed).table for seed in (0, 1)}
    drawn = {seed: rows_of(table, 0, count) for seed, table in found.items()}
    assert found[0].num_rows == count + 20
    for rows in drawn.values():
        copies, rest = divmod(count, 40)
        numbers = [whole.index(row) for row in rows]
        times = np.bincount(numbers, minlength=40)
        assert set(times.tolist()) <= {copies, copies + 1} and (times > copies).sum() == rest
    assert drawn[0] != drawn[1]
    other = [{"path": sets["safe"]}, data[0]]  # the draw is the set's, wherever it stands
    again = plan(tiny_llama, other, tmp_path).table
    assert rows_of(again, 20) == drawn[0]


def test_sets_of_labelled_rows(sets: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    """A share counts the rows of the table: two for each pair."""
    data = [{"path": sets["help"], "rows": 3}, {"path": sets["safe"], "share": 0.5}]
    table = plan(tiny_llama, data, tmp_path, objective={"name": "kto"}).table
    assert [each.rows for each in table.sets] == [3, 20]
    assert table.labels.sum() < 23


def test_a_run_counts_its_sets(sets: dict[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    """In the plan, with what they teach; in each step's numbers; and it trains on them."""
    orca = {"system": "a", "input": "b", "status": "unchanged", "chosen_score": 1}
    orca |= {"in_gsm8k_train": False, "chosen": "yes", "rejected": "no"}
    raw = write_rows(tmp_path / "raw.jsonl", [orca | {"input": x} for x in "abcdefgh"])
    data = [
        {"path": sets["help"], "name": "mine", "share": 0.5, "dimension": "honest"},
        {"path": raw, "reader": "orca"},
    ]
    config = align_config(tiny_llama, data, num_steps=7, global_batch_size=4)
    lines = describe_plan(config).splitlines()
    assert "  mine          20 from 40 rows, honest" in lines
    assert "  raw           8 from 8 rows, helpful" in lines
    assert "rows            28 of 48 (0 bad, 0 dropped, 0 prompts cut)" in lines
    steps = metrics(run_here(config, tmp_path / "run"))
    assert all(step["rows/mine"] + step["rows/raw"] == 4 for step in steps)
    assert sum(step["rows/raw"] for step in steps) == 8  # an epoch
    assert all(np.isfinite(step["loss"]) for step in steps)
