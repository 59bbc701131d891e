"""Learning rates of all steps, and batches beyond the data.

Oracle: transformers' schedulers, driven step by step.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import align_config
from transformers import get_scheduler

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.optimizer import learning_rate
from ray_jobs.align import describe_plan

STEPS, RATE = 40, 2e-3
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "constant_with_warmup": ({}, {}),
    "linear": ({}, {}),
    "cosine": ({}, {}),
    "cosine_with_restarts": ({"num_cycles": 3}, {"num_cycles": 3}),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
    "polynomial": ({"power": 2.0, "min_lr_rate": 0.05}, {"power": 2.0, "lr_end": 1e-4}),
    "inverse_sqrt": ({"timescale": 5}, {"timescale": 5}),
    "inverse_sqrt of the warm-up": ({}, {}),
    "warmup_stable_decay": ({"num_decay_steps": 12}, {"num_decay_steps": 12}),
    "warmup_stable_decay from a minimum": (
        {"min_lr_rate": 0.2, "decay_type": "1-sqrt"},
        {"min_lr_ratio": 0.2, "decay_type": "1-sqrt", "num_decay_steps": 4},
    ),
    "warmup_stable_decay by a line": (
        {"num_decay_steps": 30, "decay_type": "linear"},
        {"num_decay_steps": 30, "decay_type": "linear"},
    ),
}


def rates_of_transformers(name: str, warm_up: int, specific: dict[str, Any]) -> list[float]:
    """The rate of each step of a real optimizer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = get_scheduler(
        name, optimizer, warm_up, STEPS, scheduler_specific_kwargs=specific or None
    )
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warm_up", [0, 1, 7])
@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_transformers(case: str, warm_up: int) -> None:
    """All steps with `warmup_from_zero`; without it, the warm-up is one step ahead."""
    ours, theirs = CASES[case]
    name = case.split()[0]
    expected = rates_of_transformers(name, warm_up, theirs)
    for from_zero in (True, False):
        config = align_config(
            Path("model"),
            Path("rows"),
            optimizer={"learning_rate": RATE},
            schedule={"name": name, **ours, "warmup_from_zero": from_zero},
            warmup_steps=warm_up or None,
        )
        found = [learning_rate(config, step, STEPS) for step in range(1, STEPS + 1)]
        if from_zero:
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)
        else:
            assert found[warm_up:] == pytest.approx(expected[warm_up:], rel=1e-9, abs=1e-15)
            ahead = [*expected[1:warm_up], RATE][:warm_up]
            assert found[:warm_up] == pytest.approx(ahead, rel=1e-9)


def test_a_share_and_a_number_of_steps_are_the_same_warm_up() -> None:
    """A name alone is a schedule of defaults."""
    share = align_config(Path("m"), Path("r"), schedule="linear", warmup_share=0.25)
    steps = align_config(Path("m"), Path("r"), schedule={"name": "linear"}, warmup_steps=10)
    for step in range(1, STEPS + 1):
        assert learning_rate(share, step, STEPS) == learning_rate(steps, step, STEPS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": {"name": "cosine", "power": 2}}, "power: has no effect on cosine; allowed"),
        ({"schedule": "cosine_with_min_lr"}, "schedule: cosine_with_min_lr needs min_lr_rate"),
        ({"schedule": {"name": "cosine_with_min_lr"}}, "min_lr_rate: required with cosine_with"),
        ({"schedule": "cosinus"}, "Input should be 'constant', "),
        ({"warmup_share": 0.1, "warmup_steps": 3}, "give either warmup_share or warmup_steps"),
    ],
)
def test_what_a_config_cannot_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_config(Path("m"), Path("r"), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": 7}, "warmup_steps: found 7; allowed: at most 6, all"),
        (
            {
                "schedule": {"name": "warmup_stable_decay", "num_decay_steps": 5},
                "warmup_steps": 2,
            },
            "schedule.num_decay_steps: found 5; allowed: at most 4, the steps after the warm-up",
        ),
        (
            {"schedule": {"name": "linear", "warmup_from_zero": True}},
            "schedule.warmup_from_zero: has no effect without a warm-up",
        ),
    ],
)
def test_what_does_not_fit_the_steps(
    fields: dict[str, Any], message: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        plan_alignment(align_config(tiny_llama, preferences, **fields), tmp_path)


def test_a_batch_larger_than_the_data_is_remarked(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """One row more than there are, and not as many."""
    rows = len(preferences.read_text().splitlines())
    for size, expected in ((rows, 0), (rows + 1, 1)):
        config = align_config(tiny_llama, preferences, global_batch_size=size)
        told = describe_plan(config).splitlines()
        line = (
            f"note: global_batch_size: a step of {size} rows takes some of the {rows} rows of the "
            "data more than once"
        )
        assert told.count(line) == expected
