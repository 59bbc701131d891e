"""The demo's page with its evaluation at hand, and pictures of any matrix.

Oracle: `Evaluation.differences`, and shares by hand.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.evaluate.groups import Group
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.summary import percentages
from pipelines.report import Settings, load_results
from pipelines.report.contents import EVALUATION, page_of_demo
from pipelines.report.figures import plot_heat, plot_scatter, shares
from pipelines.report.matrix import UNKNOWN, Column, Matrix
from tests.pipelines.report.made_up_evaluation import sample, save_evaluation

TASKS = {"helpfulness": ["operations"], "honesty": ["known", "unknown"], "harmlessness": ["harm"]}
KINDS = {"sft": "sft", "dpo-helpful": "aligned", "linear": "merge"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose evaluation has another order of models than the report, and lay elsewhere."""
    folder = tmp_path / "run"
    random = np.random.default_rng(2)
    samples = {
        name: {
            task: [
                sample(i, f"{task} {i}", f"{name} {i}", exact=float(x))
                for i, x in enumerate(random.integers(0, 2, 20))
            ]
            for tasks in TASKS.values()
            for task in tasks
        }
        for name in ("linear", "sft", "dpo-helpful")
    }
    groups = {name: Group(members=tasks, scale=100) for name, tasks in TASKS.items()}
    groups["average"] = Group(members=list(TASKS))
    paths = {name: f"/elsewhere/run/models/{name}" for name in samples}
    save_evaluation(folder / EVALUATION, samples, groups, paths=paths)
    (folder / "models" / "linear").mkdir(parents=True)
    config = {"merge_method": "linear", "base_model": paths["sft"]}
    record = {"schema": 2, "kind": "merged", "config": config, "weights": "w"}
    inputs = {paths["dpo-helpful"]: {"weights": "unknown"}}
    (folder / "models/linear/poise.json").write_text(json.dumps(record | {"inputs": inputs}))
    summary = json.loads((folder / EVALUATION / "evaluation.json").read_text())
    models = {
        name: percentages(summary, name)
        | {"kind": kind, "parents": [], "config": "c.yaml", "chosen": {}, "path": f"models/{name}"}
        for name, kind in KINDS.items()
    }
    content = {
        "schema": 1, "seed": 0, "split": "test", "models": models, "best_merge": "linear",
        "timings_s": {}, "versions": {},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_its_differences_are_paired_and_its_samples_in_order(run: Path) -> None:
    page = page_of_demo(run, load_results(run), Settings())
    assert page.matrix.rows == tuple(KINDS)
    evaluation = Evaluation(run / EVALUATION)
    for (task, metric), contrast in evaluation.differences("linear", "sft").items():
        column = page.matrix.index(task, "column")
        scale = 1 if metric == "group" else 100
        found = page.matrix.difference_error(column, 2, 0)
        assert found == (pytest.approx(scale * contrast.stderr), True)
    assert "paired by prompt" in page.findings_note
    assert page.samples is not None
    texts = page.samples["texts"]
    for document in page.samples["tasks"][0]["documents"]:
        said = [texts[answer[0]].split()[0] for answer in document["answers"]]
        assert said == list(KINDS)
    linear = next(each for each in page.origins if each.name == "linear")
    assert linear.parents == ["dpo-helpful"] and linear.path == "models/linear"
    assert "/elsewhere" not in linear.config and "base_model: models/sft" in linear.config


def test_an_evaluation_that_contradicts_is_refused(run: Path) -> None:
    path = run / "results.json"
    content = json.loads(path.read_text())
    content["models"]["sft"]["tasks"]["harm"]["value"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"evaluation-test: has other numbers than results\.json"):
        page_of_demo(run, load_results(run), Settings())


def test_pictures_of_a_matrix() -> None:
    """A missing value, a column with one value, and a name that would begin a formula."""
    values = np.array([[1.0, 5.0, 3.0], [2.0, 5.0, np.nan], [5.0, 5.0, 1.0]])
    columns = (
        Column(name="up", kind="group"),
        Column(name="even", kind="task"),
        Column(name="down", kind="task", lower=True),
    )
    matrix = Matrix(
        rows=("a$b$", "b", "c"),
        columns=columns,
        values=values,
        stderrs=np.full((3, 3), np.nan),
        pairs=np.full((3, 3, 3), np.nan),
        support=np.full((3, 3, 3), UNKNOWN, np.uint16),
        num_draws=0,
    )
    expected = [[0, 0.5, 0], [0.25, 0.5, np.nan], [1, 0.5, 1]]
    assert np.array_equal(shares(matrix), expected, equal_nan=True)
    far = replace(matrix, rows=tuple("abcdefg"), values=np.array([[1, 2, 3, 4, 5, 6, -90.0]] * 3).T)
    # The middle half is from 1.5 to 4.5, so the fence is at 1.5 - 3 * 3.
    assert far.fences().tolist() == [[-7.5, 6.0]] * 3
    assert shares(far)[:, 0].tolist() == [(x + 7.5) / 13.5 for x in range(1, 7)] + [0]
    assert plot_heat(matrix)["svg"].startswith(b"<?xml")
    scatter = plot_scatter(matrix, ["x", "y", "x"], 0, 2)
    assert scatter == plot_scatter(matrix, ["x", "y", "x"], 0, 2)
