"""Held-out rows: which they are, which settings are refused, what plan and record say.

Oracles: the properties of a draw by prompts, the same data without held-out rows, and the lines
written out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_files import align_config, evaluated, preference_rows, run_here, write_rows

from pipelines.errors import InputError
from pipelines.train import plan_alignment, workers
from pipelines.train.data import prompts_of
from pipelines.train.data.held_out import drawn_rows
from pipelines.train.material import material
from pipelines.train.run import _commit
from ray_jobs.align import describe_plan

BEST = {"share": 0.25, "every": 1, "keep": "best", "metric": "accuracy", "patience": 2}


@given(
    prompts=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_a_share_is_drawn_by_prompt(prompts: list[int], share: float, seed: int) -> None:
    """Each prompt is whole on one side, and one prompt fewer would be too few rows."""
    numbers = np.array(prompts, np.uint64)
    chosen = drawn_rows(numbers, share, seed)
    assert not set(numbers[chosen]) & set(numbers[~chosen])
    assert chosen.sum() >= share * len(prompts)
    sizes = [int((numbers == each).sum()) for each in set(numbers[chosen])]
    assert chosen.sum() - max(sizes) < share * len(prompts)
    assert (chosen == drawn_rows(numbers, share, seed)).all()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_share_of_the_training_rows(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Of two sets with common prompts: nothing is lost, nothing is on both sides."""
    rows = preference_rows(30)
    paths = [write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((rows, rows[20:]))]
    fields = {"objective": {"name": name}}
    data = [{"path": path} for path in paths]
    whole = plan_alignment(align_config(tiny_llama, data, **fields), tmp_path)
    config = align_config(tiny_llama, data, **fields, evaluation={"share": 0.3, "every": 9})
    plan = plan_alignment(config, tmp_path)
    assert plan.held_out is not None
    sides = [plan.table, plan.held_out]
    assert not set(prompts_of(sides[0])) & set(prompts_of(sides[1]))
    count = whole.table.num_rows
    assert sum(side.num_rows for side in sides) == count
    assert 0.3 <= sides[1].num_rows / count < 0.4
    expected = sorted(map(repr, map(whole.table.sequences, range(count))))
    assert expected == sorted(
        repr(side.sequences(i)) for side in sides for i in range(side.num_rows)
    )
    for side in sides:
        told = side.rows_by_set(list(range(side.num_rows)))
        assert told == {f"rows/{each.name}": each.rows for each in side.sets}
    assert [each.rows for each in whole.table.sets] == [
        sum(each.rows for each in both) for both in zip(*(side.sets for side in sides), strict=True)
    ]


def test_one_prompt_cannot_be_shared(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [row | {"prompt": [{"role": "user", "content": "a"}]} for row in preference_rows(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = align_config(tiny_llama, data, evaluation={"share": 0.2, "every": 1})
    with pytest.raises(InputError, match=r"^evaluation.share: found 0.2, for which no prompt is"):
        plan_alignment(config, tmp_path)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 2}, "evaluation: give either data or share"),
        ({"every": 2, "share": 0.1, "data": "rows"}, "evaluation: give either data or share"),
        ({"every": 2, "share": 1.0}, "share"),
        ({"share": 0.1}, "every"),
        ({"every": 2, "share": 0.1, "metric": "margin"}, "metric: has no effect without keep"),
        (
            {"every": 2, "share": 0.1, "metric": "bleu/a", "patience": 2},
            "metric: found bleu/a; allowed: loss, accuracy, margin, or one of a set, as loss/NAME",
        ),
        (
            {"every": 2, "share": 0.1, "metric": "accuracy", "patience": 2},
            "evaluation.metric: found accuracy, which objective sft does not have; allowed: loss",
        ),
    ],
)
def test_what_makes_no_sense(evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_config(Path("m"), Path("r"), objective={"name": "sft"}, evaluation=evaluation)


def test_weights_that_are_not_measured() -> None:
    """Those of a merge that is still to come, and a moving average."""
    online = {"name": "onties", "learning_rate": 1e-3, "density": 0.5, "alpha": 0.1}
    online |= {"merge_every": 3, "tau": {"base": "b", "tuned": "t"}}
    average = {"learning_rate": 1e-3, "ema": {"coefficient": 0.1}}
    evaluation = {"every": 2, "share": 0.1}
    for optimizer, message in (
        (online, "evaluation.every: found 2 with optimizer.merge_every 3; allowed: its multiples"),
        (average, "evaluation: found optimizer.ema with mode export, whose average is written"),
    ):
        with pytest.raises(ValueError, match=message):
            align_config(Path("m"), Path("r"), optimizer=optimizer, evaluation=evaluation)


def test_the_plan_and_the_record(
    tiny_llama: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many rows; what becomes of them; held-out prompts that are trained on, too."""
    config = align_config(tiny_llama, preferences, evaluation=BEST, num_steps=2)
    lines = describe_plan(config).splitlines()
    assert "rows            30 of 40 (0 bad, 0 dropped, 0 prompts cut)" in lines
    assert (
        "held out        10 rows of 10 prompts, measured every 1 steps; the model of the best "
        "accuracy is written; stops after 2 without a better accuracy"
    ) in lines
    same = align_config(tiny_llama, preferences, evaluation={"data": preferences, "every": 1})
    note = "note: evaluation.data: 40 of 40 held-out rows have a prompt of the training rows"
    assert note in describe_plan(same).splitlines()
    out = tmp_path / "out"
    run_here(config, tmp_path / ".out.partial")
    _commit(config, plan_alignment(config, tmp_path / "cache"), out, force=False)
    record = json.loads((out / "poise.json").read_text())
    step, value = (record["evaluation"][name] for name in ("best_step", "best"))
    text = (
        f"eval_accuracy was best at step {step} ({value:.4g}); the model of step {step} is written"
    )
    assert capsys.readouterr().err.endswith(f"  out: {text}\n")
    card = (out / "README.md").read_text()
    assert f"- held-out rows: {text}\n" in card and f"steps: {step} of 8 rows" in card
    assert set(record["inputs"]) == {"model", "data", "evaluation.data"}
    last = evaluated(out)[2]["loss"]
    note = workers._held_out_note(out / "metrics.jsonl")
    assert note == f"; held out at step 2: loss {last:.3f}"


def test_fingerprints(tiny_llama: Path, preferences: Path, held_out: Path, tmp_path: Path) -> None:
    """Those of runs without held-out rows stay; the place of held-out rows does not matter."""
    assert "evaluation" not in material(align_config(tiny_llama, preferences))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(held_out.read_bytes())
    found = {
        plan_alignment(
            align_config(tiny_llama, preferences, evaluation={"data": path, "every": 2}), tmp_path
        ).fingerprint
        for path in (held_out, moved)
    }
    assert len(found) == 1
