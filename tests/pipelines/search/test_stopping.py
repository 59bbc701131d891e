"""Bounds of trainings, and a training that ends at one. Oracle: written-out examples, brute force
over ranks, and a training that nobody stops.
"""

import json
import math
from pathlib import Path
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import check
from pipelines.errors import InputError
from pipelines.search.stopping import StoppingConfig, bounds_of
from pipelines.train.evaluation import Bounds, Evaluations
from pipelines.train.evaluation_config import EvaluationConfig

LOSS = EvaluationConfig(share=0.1, every=1)
ACCURACY = EvaluationConfig(share=0.1, every=1, metric="accuracy", keep="best")
curves_of = st.lists(
    st.dictionaries(st.integers(1, 12), st.floats(-1, 1), min_size=1), min_size=0, max_size=9
)


def goes_on(evaluation: EvaluationConfig, bounds: Bounds, curve: dict[int, float]) -> int | None:
    """The step at which a training ends by its bounds; None: at none."""
    evaluations = Evaluations(evaluation, Path("none"), 0, bounds)
    for step in sorted(curve):
        evaluations.add(step, {f"eval_{evaluation.metric}": curve[step]})
        if evaluations.is_over:
            return step
    return None


@given(curves_of, st.dictionaries(st.integers(1, 12), st.floats(-1, 1), min_size=12))
def test_one_in_so_many_goes_on(curves: list[dict[int, float]], own: dict[int, float]) -> None:
    config = StoppingConfig(name="asha", min_steps=2, reduction=3)
    expected = None
    for rung in (2, 6):
        steps = sorted(step for curve in curves for step in curve if step >= rung)
        if not steps:
            break
        values = [curve[steps[0]] for curve in curves if steps[0] in curve]
        allowed = (len(values) + 1) // 3
        better = sum(value > own[steps[0]] for value in values)
        if allowed and better >= allowed:
            expected = steps[0] if expected is None else min(expected, steps[0])
    assert goes_on(ACCURACY, bounds_of(config, ACCURACY, curves, curves), own) == expected
    losses = [{step: -value for step, value in curve.items()} for curve in curves]
    bounds = bounds_of(config, LOSS, losses, losses)
    assert goes_on(LOSS, bounds, {step: -value for step, value in own.items()}) == expected


def test_the_best_so_far_must_reach_the_median_of_means() -> None:
    config = StoppingConfig(name="median", min_steps=2, min_trials=3)
    curves = [{1: 1.0, 2: 3.0, 3: 5.0}, {1: 2.0, 2: 2.0, 3: 2.0}, {1: 9.0, 2: 1.0, 3: 8.0}]
    bounds = bounds_of(config, ACCURACY, curves, curves)
    means = {step: [fmean(list(c.values())[:step]) for c in curves] for step in (2, 3)}
    assert bounds.by_step == {step: median(values) for step, values in means.items()}
    assert goes_on(ACCURACY, bounds, {1: 2.5, 2: 0.0, 3: 0.0}) == 3  # 2.5 is enough at step 2
    assert goes_on(ACCURACY, bounds, {1: 0.0, 2: 1.9, 3: 9.0}) == 2
    assert goes_on(ACCURACY, bounds, {1: 0.0, 2: 2.0, 3: 3.0}) is None
    assert goes_on(ACCURACY, bounds, {1: math.nan, 2: math.nan}) == 2
    assert not bounds_of(config, ACCURACY, curves, curves[:2]).by_step  # too few whole ones


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "asha", "min_steps": 1, "min_trials": 2}, "min_trials: has no effect with asha"),
        ({"name": "median", "min_steps": 1, "reduction": 2}, "reduction: has no effect with medi"),
        ({"name": "asha", "min_steps": 0}, "min_steps"),
    ],
)
def test_settings_without_effect(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(fields, StoppingConfig, "study.yaml")


def test_a_run_ends_where_it_is_behind(tmp_path: Path) -> None:
    """A real training, here, whose curve is that of a whole one up to its end."""
    from pipelines.train import AlignConfig, plan_alignment
    from pipelines.train.files import EXPORTED_FILE
    from pipelines.train.loop import train_worker
    from pipelines.train.run import worker_settings
    from tests.tiny_models import WORDS, save_tiny_llama

    model = save_tiny_llama(tmp_path / "model", 0)
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": a, "chosen": f" {b}", "rejected": " no"} for a in WORDS for b in WORDS[:2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AlignConfig(
        model=model,
        data=data,
        optimizer={"learning_rate": 1e-3},  # type: ignore[arg-type]
        evaluation={"share": 0.2, "every": 1},  # type: ignore[arg-type]
        num_steps=5,
        global_batch_size=4,
        strategy="single",
        num_workers=1,
    )
    curves = {}
    for name, bounds in (("whole", None), ("behind", Bounds({2: 100.0, 3: 1e-9}, False))):
        folder = tmp_path / name
        folder.mkdir()
        settings = worker_settings(
            config, plan_alignment(config, tmp_path / "cache"), folder, tmp_path / "cache"
        )
        train_worker({"runs": [settings | {"bounds": bounds}]})
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves[name] = [line["eval_loss"] for line in lines]
        told = json.loads((folder / EXPORTED_FILE).read_text())["evaluation"]
        assert told.get("behind", False) == (name == "behind")
    assert curves["behind"] == curves["whole"][:3] and len(curves["whole"]) == 5
    assert told["stopped_at"] == told["written_step"] == 3
