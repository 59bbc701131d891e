"""Tasks of lm-evaluation-harness through the store, and what is read from it again.

Oracle: the same tasks in one process without a store, statistics by hand, the library's files.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.engines import open_engine
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, plan_evaluation
from pipelines.evaluate import run as running
from pipelines.evaluate import store as storing
from pipelines.evaluate.estimate import estimates
from pipelines.evaluate.harness import load_tasks, measure_tasks
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.opened import open_tasks
from pipelines.evaluate.results import GROUP, Evaluation, as_csv, as_latex
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.evaluate.made_up_tasks import save_tasks
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")

NAMES = ["choice_shots", "rolling", "generation", "generation_corpus"]
GROUPS = {
    "choices": {"members": ["choice_shots.acc", "choice_shots.exact_match"], "scale": 100},
    "both": {"members": ["choices", "choice_shots.f1"]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_tasks(root / "tasks")
    for seed, name in ((5, "a"), (6, "b")):
        save_chatty(root / name, seed, max_position_embeddings=128)
    return root


def config_of(world: Path, **changes: Any) -> EvaluateConfig:
    values = {
        "models": {name: world / name for name in "ab"},
        "tasks": [{"include_path": world / "tasks", "names": NAMES}],
        "groups": GROUPS,
        "engine": {"batch_size": 16},
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def measured(world: Path) -> Evaluation:
    """Measured in blocks of five documents, with tasks that are loaded once for all blocks."""
    opened: list[EvaluateConfig] = []

    def counting(config: EvaluateConfig) -> list[EvaluationTask]:
        opened.append(config)
        return open_tasks(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storing, "BLOCK_DOCUMENTS", 5)
        patch.setattr(running, "open_tasks", counting)
        evaluate(config_of(world), world / "out", executor="local")
    assert len(opened) == 1
    return Evaluation(world / "out")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "BLOCK_DOCUMENTS", 5)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_give_what_one_process_gives(world: Path, measured: Evaluation) -> None:
    tasks = load_tasks([{"include_path": world / "tasks", "names": NAMES}])
    for model in "ab":
        engine = open_engine(world / model)
        direct = measure_tasks(engine, tasks)
        engine.close()
        own = measured.summary["models"][model]["tasks"]
        assert set(own) == set(NAMES)
        for task, result in direct.items():
            found = {name.removesuffix(",none"): each for name, each in result.metrics.items()}
            assert set(own[task]) == set(found)
            for name, metric in found.items():
                assert own[task][name]["value"] == pytest.approx(metric.value, abs=1e-6)
                assert own[task][name]["n"] == metric.n
                assert own[task][name]["stderr"] > 0 or metric.value in (0, 1)


@pytest.mark.usefixtures("small_blocks")
def test_differences_are_paired(measured: Evaluation) -> None:
    found = measured.differences("a", "b")
    own = [measured.samples(model, "choice_shots") for model in "ab"]
    values = np.array([[sample.values["acc"] for sample in each] for each in own])
    clusters = {sample.cluster for sample in own[0]}
    delta = values[0] - values[1]
    contrast = found["choice_shots", "acc"]
    assert contrast.value == pytest.approx(delta.mean())
    if len(clusters) == len(delta):
        error = delta.std(ddof=1) / math.sqrt(len(delta))
        assert contrast.stderr == pytest.approx(error)
    groups = [measured.summary["models"][model]["groups"]["choices"]["value"] for model in "ab"]
    assert found["choices", GROUP].value == pytest.approx(groups[0] - groups[1])
    assert ("choice_shots", "f1") not in found and ("both", GROUP) not in found
    with pytest.raises(InputError, match="unknown model 'c'; found: a, b"):
        measured.differences("a", "c")


@pytest.mark.usefixtures("small_blocks")
def test_the_librarys_files_are_those_of_one_process(
    world: Path, measured: Evaluation, tmp_path: Path
) -> None:
    first, _ = measured.write_harness_json(tmp_path)
    content = json.loads(first.read_text())
    own = measured.summary["models"]["a"]["tasks"]["choice_shots"]
    assert content["results"]["choice_shots"]["acc,none"] == own["acc"]["value"]
    [samples] = first.parent.glob("samples_rolling_*.jsonl")
    rolled = measured.summary["models"]["a"]["tasks"]["rolling"]
    assert len(samples.read_text().splitlines()) == rolled["word_perplexity"]["n"]


@pytest.mark.usefixtures("small_blocks")
def test_a_changed_task_is_not_taken_for_the_measured_one(
    world: Path, measured: Evaluation, tmp_path: Path
) -> None:
    """Its samples would be given other documents."""
    file = world / "tasks" / "test.jsonl"
    before = file.read_text()
    file.write_text("".join(reversed(before.splitlines(keepends=True))))
    try:
        with pytest.raises(InputError, match="has changed since it was measured; run the eval"):
            measured.write_harness_json(tmp_path)
    finally:
        file.write_text(before)
    assert list(tmp_path.iterdir()) == []


def test_forms(measured: Evaluation) -> None:
    rows = measured.rows()
    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(table) == len(rows)
    [acc] = [r for r in table if (r["model"], r["task"], r["metric"]) == ("a", *NAMES[:1], "acc")]
    assert float(acc["value"]) == measured.summary["models"]["a"]["tasks"][NAMES[0]]["acc"]["value"]
    text = as_latex(["a_b"], ["x & y"], [["50% ±1"]])
    assert r"a\_b & 50\% $\pm$1 \\" in text and r"model & x \& y \\" in text


def test_a_plan_writes_nothing(world: Path, tmp_path: Path) -> None:
    plan = plan_evaluation(config_of(world), tmp_path / "none")
    found = estimates(plan)
    assert [each.task for each in found] == [task.name for task in plan.tasks]
    assert all(each.missing == each.blocks == 2 and each.tokens > 0 for each in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"x": {"members": ["choice_shot"]}}}, "found 'choice_shot'; allowed: a group"),
        ({"groups": {"x": {"members": ["x"]}}}, "a group contains itself: x -> x"),
        ({"tasks": ["no_such_task"]}, "unknown task 'no_such_task'"),
        ({"only": ["a"]}, "only: has no effect with a list of tasks"),
        ({"tasks": []}, "tasks: found an empty list"),
        ({"engine": {"kind": "reward"}}, "found reward; allowed: generate"),
    ],
)
def test_mistakes(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_evaluation(config_of(world, **changes), tmp_path / "out")


@pytest.mark.slow
def test_from_the_command_line(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ray_cluster: None,
) -> None:
    """Fifteen lines of YAML, three models: the plan, the matrix, and what results says of it."""
    config = {
        "models": {"a": str(world / "a"), "b": str(world / "b"), "c": str(world / "a")},
        "tasks": [{"include_path": str(world / "tasks"), "names": ["choice_shots"]}],
        "groups": GROUPS,
        "num_workers": 1,
    }
    file, out = tmp_path / "matrix.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    assert poise(monkeypatch, "evaluate", file, "--out", out, "--plan") == 0
    assert "3 models x 1 tasks: 3 of 3 blocks to do" in capsys.readouterr().out
    assert not out.exists()
    assert poise(monkeypatch, "evaluate", file, "--out", out) == 0
    assert "choices" in capsys.readouterr().out
    assert poise(monkeypatch, "results", out, "--form", "json", "--model", "a") == 0
    assert {row["model"] for row in json.loads(capsys.readouterr().out)} == {"a"}
    assert poise(monkeypatch, "results", out, "--compare", "a,b") == 0
    assert "paired by document" in capsys.readouterr().out
    assert poise(monkeypatch, "results", out, "--model", "z") == 2
    assert capsys.readouterr().err.strip() == "poise: --model: found 'z'; allowed: a, b, c"
