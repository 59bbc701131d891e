"""Sweeps with the config of earlier versions: every value tried, the best chosen by the metric.

Oracle: each trial's merge and evaluation, done by hand.
"""

import json
import os
from pathlib import Path
from typing import Literal

import pytest
import yaml

from pipelines.config import check, load_yaml
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.merge import load_merge_config, merge
from pipelines.provenance import read_record
from pipelines.search import StudyConfig, plan_study, search
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, a merge of them, and a task whose right answers one of the merges gives."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("base", "tuned")):
        save_tiny_llama(folder / name, seed=seed)
    merged = {
        "merge_method": "task_arithmetic",
        "models": [{"model": "tuned"}],
        "base_model": "base",
        "parameters": {"lambda": 1.0},
        "dtype": "float32",
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(merged))
    for split in ("development", "test"):
        rows = [
            {"id": str(i), "prompt": [{"role": "user", "content": f"{a} {b}"}], "answer": "yes"}
            for i, (a, b) in enumerate(zip("abcdefgh", "hgfedcba", strict=True))
        ]
        text = "".join(json.dumps({**row, "cluster": row["id"]}) + "\n" for row in rows)
        (folder / f"words-{split}.jsonl").write_text(text)
    task = {
        "name": "words",
        "dimension": "helpfulness",
        "grader": {"name": "not_phrase", "phrases": ["yes"]},
        "prompt": "chat",
        "files": {split: f"words-{split}.jsonl" for split in ("development", "test")},
        "description": "says anything but yes",
    }
    (folder / "tasks.yaml").write_text(yaml.safe_dump([task]))
    return folder


@pytest.fixture(autouse=True)
def in_their_folder(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All paths are relative to the folder of the inputs."""
    monkeypatch.chdir(inputs)


def config_of(inputs: Path, **changes: object) -> StudyConfig:
    values = {
        "merge": "merge.yaml",
        "search": {"parameters.lambda": [0.5, 1.0]},
        "tasks": "tasks.yaml",
        "max_new_tokens": 2,
    }
    return check({**values, **changes}, StudyConfig, "sweep.yaml")


@pytest.mark.parametrize(
    "executor", ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_every_value_is_tried_and_measured_as_by_hand(
    executor: Literal["local", "ray"],
    inputs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if executor == "ray":
        request.getfixturevalue("ray_cluster")
    config = config_of(inputs)
    result = search(plan_study(config), tmp_path / "out", executor=executor)
    assert [t["parameters"] for t in result["trials"]] == [
        {"parameters.lambda": 0.5},
        {"parameters.lambda": 1.0},
    ]
    for trial in result["trials"]:
        value = trial["parameters"]["parameters.lambda"]
        model = tmp_path / f"by-hand-{value}"
        merge(load_merge_config(config.merge, [f"parameters.lambda={value}"]), model)
        measured = evaluate(
            EvaluateConfig(
                models={"m": model}, tasks="tasks.yaml", split="development", max_new_tokens=2
            ),
            tmp_path / f"evaluation-{value}",
            executor="local",
        )
        average = measured["models"]["m"]["groups"]["average"]
        assert trial["values"] == {"average": average["value"]}
        assert trial["stderr"] == {"average": average["stderr"]}
    best = max(result["trials"], key=lambda trial: trial["values"]["average"])
    assert result["best"].items() >= best.items()
    chosen = load_yaml(tmp_path / "out" / "merge.yaml")
    assert chosen["parameters"]["lambda"] == best["parameters"]["parameters.lambda"]
    written = read_record(tmp_path / "out" / "best")
    by_hand = read_record(tmp_path / f"by-hand-{chosen['parameters']['lambda']}")
    assert written is not None and by_hand is not None
    assert written["weights"] == by_hand["weights"]
    stamp = (tmp_path / "out" / "sweep.json").stat().st_mtime_ns
    assert search(plan_study(config), tmp_path / "out") == result  # read, not done again
    assert (tmp_path / "out" / "sweep.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="exists already"):
        search(plan_study(config_of(inputs, seed=5)), tmp_path / "out")


LETTERS = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"validation": "words-development.jsonl"}},
    "validation_split": "validation",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt[0].content}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [], "max_gen_toks": 2},
    "metadata": {"version": 1.0, "grader": {"name": "not_phrase", "phrases": ["yes"]}},
}


@pytest.fixture
def listed(inputs: Path) -> dict[str, object]:
    """The fields of a sweep on a list of tasks."""
    pytest.importorskip("lm_eval")
    (inputs / "listed").mkdir(exist_ok=True)
    (inputs / "listed" / "letters.yaml").write_text(yaml.safe_dump(LETTERS))
    return {
        "tasks": [{"include_path": str(inputs / "listed"), "names": ["letters"]}],
        "groups": {"all": {"members": ["letters.not_phrase"], "scale": 100}},
        "metric": "all",
    }


@pytest.mark.parametrize("metric", ["all", "letters.not_phrase"])
def test_a_list_of_tasks_decides_as_by_hand(
    inputs: Path, tmp_path: Path, listed: dict[str, object], metric: str
) -> None:
    """By a group and by a task's metric, on the development half of a task with one split."""
    config = config_of_list(listed, metric=metric)
    [trial] = search(plan_study(config), tmp_path / "out")["trials"]
    model = tmp_path / "by-hand"
    merge(load_merge_config(config.merge, ["parameters.lambda=0.5"]), model)
    measured = evaluate(
        EvaluateConfig(models={"m": model}, tasks=listed["tasks"], split="development"),
        tmp_path / "evaluation",
        executor="local",
    )
    number = measured["models"]["m"]["tasks"]["letters"]["not_phrase"]
    scale = 100 if metric == "all" else 1
    assert trial["values"] == {metric: scale * number["value"]}
    assert trial["stderr"] == {metric: pytest.approx(scale * number["stderr"])}
    assert 0 < number["n"] < 8


def config_of_list(listed: dict[str, object], **changes: object) -> StudyConfig:
    values = {"merge": "merge.yaml", "search": {"parameters.lambda": [0.5]}, **listed, **changes}
    return check(values, StudyConfig, "sweep.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "average"},
            "objectives: found 'average'; allowed: all, letters, letters.not_phrase, seconds",
        ),
        ({"only": ["letters"]}, "only: has no effect with a list of tasks"),
        (
            {"groups": {"all": {"members": ["lettres"]}}},
            "found 'lettres'; allowed: a group, a task",
        ),
    ],
)
def test_mistakes_in_lists_of_tasks(
    inputs: Path, listed: dict[str, object], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_study(config_of_list(listed, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "speed"}, "found 'speed'; allowed: helpfulness, average"),
        ({"search": {"parameters.lamda": [1.0]}}, "lamda: unknown parameter"),
        ({"merge": "none.yaml"}, "none.yaml: no such file"),
    ],
)
def test_mistakes_are_found_before_the_first_trial(
    inputs: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search(plan_study(config_of(inputs, **changes)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"parameters.lambda": []}}, "the list is empty"),
        ({"split": "test"}, "found test, choose_on: development; allowed: development for both"),
        ({"num_samples": 3}, "num_samples: has no effect when every search is a list"),
        (
            {"search": {"parameters.lambda": {"uniform": [1, 0]}}, "num_samples": 1},
            "expected low < high",
        ),
        ({"search": {"parameters.lambda": {"uniform": [0, 1]}}}, "num_samples: required"),
    ],
)
def test_searches_that_make_no_sense_are_refused(
    inputs: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        config_of(inputs, **changes)


def test_every_value_is_looked_at_before_the_first_trial(inputs: Path) -> None:
    for values in ([0.5, "much"], {"uniform": [0.5, 1.0]}):
        changes = {"search": {"parameters.lambda": values}}
        if isinstance(values, list):
            with pytest.raises(InputError, match="lambda: found 'much'; allowed"):
                plan_study(config_of(inputs, **changes))
        else:
            plan_study(config_of(inputs, **changes, num_samples=1))


def test_changed_weights_are_another_sweep(inputs: Path, tmp_path: Path) -> None:
    before = plan_study(config_of(inputs)).key
    weights = inputs / "tuned" / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    assert plan_study(config_of(inputs)).key != before
