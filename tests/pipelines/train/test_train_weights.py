"""Weights of rows in the loss. Oracle: a row of weight n counts as n rows without weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_files import align_config, metrics, preference_rows, run_here, write_rows

from operators.losses import OBJECTIVES
from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.data import num_steps_of
from pipelines.train.material import material
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.objectives import (
    MicroLoss,
    Responses,
    Shares,
    labelled_loss,
    mismatched_point,
    pair_loss,
    ranked_loss,
    text_loss,
)
from ray_jobs.align import describe_plan
from tests.tiny_models import save_tiny_llama

WEIGHTS = [1.0, 2.0, 3.0, 2.0]
ROWS = [row | {"w": w} for row, w in zip(preference_rows(4), WEIGHTS, strict=True)]
REPEATED = [ROWS[i] for i, weight in enumerate(WEIGHTS) for _ in range(int(weight))]
MAPPED = {"columns": {"weight": "w"}}


def loss_of(name: str | list[str], rows: list[int], weights: list[int] | None) -> MicroLoss:
    """An objective's loss on rows of eight, drawn once, with weights or without."""
    config = ObjectiveConfig(name=name)
    kind = config.definition.rows
    draw = torch.Generator().manual_seed(0)
    columns = 2 if kind in ("pairs", "ranked") else 1
    values, before = (-4 * torch.rand(columns, 8, generator=draw) for _ in range(2))
    lengths = torch.randint(1, 9, (columns, 8), generator=draw)
    desirable = torch.tensor([True, False, True, True, False, False, True, False])[rows]
    given = None if weights is None else torch.tensor(weights).float()
    counted = torch.ones(len(rows)) if given is None else given
    shares = Shares(
        rows=float(counted.sum()),
        desirable=float(counted[desirable].sum()),
        undesirable=float(counted[~desirable].sum()),
        tokens=int(lengths[:, rows].sum()),
        likelihood_tokens=float((counted * lengths[0, rows]).sum()),
    )
    values.requires_grad_()
    responses = Responses(values[:, rows].reshape(-1), lengths[:, rows].reshape(-1), torch.empty(0))
    reference = before[:, rows]
    if kind == "pairs":
        uses = config.definition.uses_reference
        return pair_loss(config, responses, reference.T if uses else None, shares, given)
    if kind == "ranked":
        return ranked_loss(config, responses.log_probability, before[0, rows], shares, given)
    if kind == "texts":
        return text_loss(config, responses, shares, given)
    point = mismatched_point(
        lambda: responses.log_probability + 5, reference[0], lambda total: total, shares.rows, given
    )
    return labelled_loss(config, responses, reference[0], desirable, point, shares, given)


@given(
    name=st.sampled_from([*OBJECTIVES, ["dpo", "sft"]]),
    weights=st.lists(st.integers(1, 4), min_size=1, max_size=8),
)
def test_a_weight_is_a_number_of_rows(name: str | list[str], weights: list[int]) -> None:
    """For the loss and all metrics of every objective, whatever weights or copies a row has."""
    found = loss_of(name, list(range(len(weights))), weights)
    copies = [row for row, weight in enumerate(weights) for _ in range(weight)]
    expected = loss_of(name, copies, None)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert found.metrics.keys() == expected.metrics.keys()
    for key, value in found.metrics.items():
        torch.testing.assert_close(value, expected.metrics[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "sft", "reward"])
def test_a_run_with_weights(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Steps on the whole data: with a column of weights, and with the rows repeated."""
    rows, copies = ROWS, REPEATED
    if name == "sft":
        rows, copies = (
            [{"messages": row["prompt"] + row["chosen"], "w": row["w"]} for row in each]
            for each in (ROWS, REPEATED)
        )
    fields: dict[str, Any] = {"objective": {"name": name}, "num_steps": 3}
    if name == "dpo":  # a reference that differs, so that no margin is 0
        fields["reference_model"] = save_tiny_llama(tmp_path / "reference", seed=5)
    fields["optimizer"] = {"learning_rate": 1e-3, "eps": 1e-3}
    runs = []
    for data, more in (
        (rows, {**MAPPED, "global_batch_size": 4, "micro_batch_size": 2}),
        (copies, {"ignored_columns": ["w"], "global_batch_size": 8}),
    ):
        path = write_rows(tmp_path / f"{len(data)}.jsonl", data)
        runs.append(
            run_here(align_config(tiny_llama, path, **fields, **more), tmp_path / path.stem)
        )
    for one, other in zip(*map(metrics, runs), strict=True):
        for key in {"loss", "accuracy", "margin", "gradient_norm", "delta_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=0, atol=2e-6)


def test_weights_of_sets(tiny_llama: Path, tmp_path: Path) -> None:
    """A set's weight times that of its column; also among held-out rows, and in the plan."""
    paths = [write_rows(tmp_path / f"{n}.jsonl", ROWS) for n in "ab"]
    sets = [{"path": paths[0], **MAPPED, "row_weight": 0.5}, {"path": paths[1], "share": 2}]
    sets[1]["ignored_columns"] = ["w"]
    config = align_config(tiny_llama, sets)
    table = plan_alignment(config, tmp_path).table
    assert table.weights is not None
    assert table.weights.tolist() == [w / 2 for w in WEIGHTS] + [1.0] * 8
    assert "weights         0.5 to 1.5, 1 on average" in describe_plan(config).splitlines()
    split = plan_alignment(
        align_config(tiny_llama, sets, evaluation={"share": 0.25, "every": 1}), tmp_path
    )
    assert split.held_out is not None
    sides = [side.weights for side in (split.table, split.held_out)]
    assert sorted(np.concatenate(sides).tolist()) == sorted(table.weights.tolist())
    plain = material(align_config(tiny_llama, [{"path": paths[0]}, {"path": paths[1]}]))
    assert all("row_weight" not in each for each in plain["data"])
    assert plan_alignment(align_config(tiny_llama, paths[0]), tmp_path).table.weights is None


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, "weight: found -1; allowed: a number, 0 or more"),
        (float("nan"), "weight: found nan; allowed"),
        (float("inf"), "weight: found inf; allowed"),
        (True, "weight: found True; allowed"),
        ("2", "weight: found '2'; allowed"),
        (None, "weight: found None; allowed"),
    ],
)
def test_bad_weights(weight: Any, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"w": weight}])
    with pytest.raises(InputError, match=message):
        plan_alignment(align_config(tiny_llama, data, **MAPPED), tmp_path)


def test_rows_of_weight_0_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"w": 0}])
    plan = plan_alignment(align_config(tiny_llama, data, **MAPPED), tmp_path)
    assert plan.table.num_rows == 4
    assert plan.table.counts.left_out == {"with weight 0": 1}


def test_a_weight_of_the_only_set_has_no_effect() -> None:
    with pytest.raises(ValueError, match=r"row_weight: found 2\.0, which has no effect"):
        align_config(Path("m"), {"path": "rows", "row_weight": 2.0})


@pytest.mark.parametrize(
    ("epochs", "rows", "size", "steps"),
    [
        (1, 40, 8, 5),
        (1, 41, 8, 6),
        (0.5, 41, 20, 2),
        (0.1, 30, 1, 3),
        (1.1, 10, 1, 11),
        (0.01, 9, 8, 1),
    ],
)
def test_epochs_are_rounded_up(epochs: float, rows: int, size: int, steps: int) -> None:
    assert num_steps_of(epochs, rows, size) == steps
