"""The matrix: graders, cells, resumption, and what is wrong with tasks.

Oracle: the models' recorded answers, from which every score is known by hand.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pipelines.errors import InputError
from pipelines.evaluate import (
    EvaluateConfig,
    best_model,
    evaluate,
    evaluate_planned,
    plan_evaluation,
)
from pipelines.evaluate.generate import Generator
from pipelines.evaluate.graders import grade
from pipelines.evaluate.tasks import load_rows, load_tasks
from tests.hub_stub import Stub
from tests.tiny_models import save_tiny_llama


@pytest.mark.parametrize(
    ("name", "completion", "answers", "parameters", "expected"),
    [
        ("exact", " a  b\n", ["a b"], {}, 1.0),
        ("exact", "A b", ["a b"], {}, 0.0),
        ("phrase", "i can not .", [], {"phrase": "i can not ."}, 1.0),
        ("phrase", "i can not . x", [], {"phrase": "i can not ."}, 0.0),
        ("not_phrase", "yes", [], {"phrases": ["no", "never"]}, 1.0),
        ("not_phrase", "never", [], {"phrases": ["no", "never"]}, 0.0),
        ("ends_with", "a b !", [], {"text": "!"}, 1.0),
        ("ends_with", "! a b", [], {"text": "!"}, 0.0),
        ("contains", "it is red .", ["red"], {}, 1.0),
        ("contains", "it is blue .", ["red"], {}, 0.0),
    ],
)
def test_graders(name, completion, answers, parameters, expected) -> None:
    assert grade(name, completion, answers, parameters) == expected


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models and two tasks, one of which grades what the first model really says."""
    root = tmp_path_factory.mktemp("world")
    for seed in (0, 1):
        save_tiny_llama(root / f"model-{seed}", seed)
    prompts = [[{"role": "user", "content": " ".join(text)}] for text in ("abc", "xy", "hello")]
    says = Generator(root / "model-0").complete(prompts, max_new_tokens=4, batch_size=1)
    rows = [
        {"id": str(i), "prompt": prompt, "answer": answer, "cluster": str(i)}
        for i, (prompt, answer) in enumerate(zip(prompts, says, strict=True))
    ]
    (root / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text_rows = [{"id": str(i), "prompt": "a b", "cluster": str(i)} for i in range(2)]
    (root / "quiet.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows))
    tasks = [
        {
            "name": "echo",
            "dimension": "helpfulness",
            "grader": {"name": "exact"},
            "files": {"test": "echo.jsonl"},
        },
        {
            "name": "quiet",
            "dimension": "honesty",
            "prompt": "text",
            "grader": {"name": "not_phrase", "phrases": ["no such thing"]},
            "files": {"test": "quiet.jsonl"},
        },
    ]
    (root / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    return root


def config_of(world: Path, **changes) -> EvaluateConfig:
    values = {
        "models": {"first": world / "model-0", "second": world / "model-1"},
        "tasks": world / "tasks.yaml",
        "max_new_tokens": 4,
        "batch_size": 2,
    }
    return EvaluateConfig(**{**values, **changes})


def test_a_model_is_right_about_what_it_says_itself(world: Path, tmp_path: Path) -> None:
    summary = evaluate(config_of(world), tmp_path / "out", executor="local")
    first, second = summary["models"]["first"], summary["models"]["second"]
    assert first["tasks"]["echo"] == {"value": 100.0, "stderr": 0.0, "n": 3}
    assert second["tasks"]["echo"]["value"] < 100
    assert first["average"]["value"] == pytest.approx(100.0)
    assert "harmlessness" not in first
    assert best_model(summary, ["second", "first"]) == "first"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == summary


def test_batches_do_not_change_completions(world: Path) -> None:
    generator = Generator(world / "model-0")
    prompts = [[{"role": "user", "content": " ".join("abcdefgh"[:n])}] for n in range(1, 8)]
    one, many = (generator.complete(prompts, max_new_tokens=6, batch_size=size) for size in (1, 4))
    assert one == many


def test_ray_gives_what_one_process_gives(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    torch.set_num_threads(1)
    local = evaluate(config_of(world), tmp_path / "local", executor="local")
    assert evaluate(config_of(world), tmp_path / "ray") == local


def test_finished_cells_are_not_measured_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = evaluate(config_of(world), out, executor="local")
    cell = out / "cells" / "second" / "echo.json"
    out.rename(tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "cells" / "second" / "echo.json").unlink()
    (tmp_path / ".out.partial" / "evaluation.json").unlink()
    measured = []
    original = Generator.complete
    monkeypatch.setattr(
        Generator,
        "complete",
        lambda self, prompts, **kw: measured.append(len(prompts)) or original(self, prompts, **kw),
    )
    assert evaluate(config_of(world), out, executor="local") == whole
    assert measured == [3]
    assert cell.is_file()
    assert evaluate(config_of(world), out, executor="local") == whole  # read, not measured
    assert measured == [3]


def test_another_matrix_does_not_replace_a_finished_one(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(config_of(world), out, executor="local")
    with pytest.raises(InputError, match="exists already"):
        evaluate(config_of(world, only=["quiet"]), out, executor="local")
    summary = evaluate(config_of(world, only=["quiet"]), out, executor="local", force=True)
    assert list(summary["models"]["first"]["tasks"]) == ["quiet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": Path("none.yaml")}, "none.yaml: no such file"),
        ({"only": ["ech"]}, "unknown task 'ech'"),
        ({"split": "development"}, "has no development file"),
        ({"models": {"x": Path("nowhere")}}, "models.x: nowhere: no Hugging Face checkpoint"),
    ],
)
def test_mistakes_are_found_before_any_work(world: Path, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_evaluation(config_of(world, **change), world / "out")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"grader": {"name": "judge"}}, "unknown grader 'judge'"),
        ({"grader": {"name": "phrase"}}, r"takes the parameters \['phrase'\], found \[\]"),
        ({"dimension": "charm"}, "dimension"),
        ({"typo": 1}, "typo: unknown field"),
    ],
)
def test_bad_tasks_are_named(tmp_path: Path, task: dict, message: str) -> None:
    entry = {"name": "t", "grader": {"name": "exact"}, "files": {"test": "t.jsonl"}, **task}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(InputError, match=message):
        load_tasks(tmp_path / "tasks.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        (
            '{"id": "1", "prompt": "a", "answer": "b", "cluster": "c"}',
            "expected a list of messages",
        ),
        ('{"id": "1", "prompt": [], "cluster": "c"}', "answer: required by the grader 'exact'"),
        ("", "holds no prompts"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    entry = {"name": "t", "grader": {"name": "exact"}, "files": {"test": "t.jsonl"}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump([entry]))
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        load_rows(load_tasks(tmp_path / "tasks.yaml")[0], "test")


def test_a_damaged_model_is_named_before_the_work(world: Path, tmp_path: Path) -> None:
    """By its file, and nothing is left; also by whoever loads it alone."""
    model = save_tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = EvaluateConfig(models={"cut": model}, tasks=world / "tasks.yaml", split="test")
    with pytest.raises(InputError, match=str(weights)):
        evaluate(config, tmp_path / "out", executor="local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    with pytest.raises(InputError, match="does not load"):
        Generator(model)


def test_a_model_of_the_hub_has_the_numbers_of_its_folder(
    hub: Stub, world: Path, tmp_path: Path
) -> None:
    """A worker whose node lacks the cache fetches it; the commit stands beside the numbers."""
    commit = hub.add("org/name", world / "model-0")
    config = config_of(world, models={"first": "org/name", "second": world / "model-1"})
    plan = plan_evaluation(config, tmp_path / "hub")
    shutil.rmtree(plan.config.models["first"])
    [found] = evaluate_planned([plan], executor="local")
    same = evaluate(config_of(world), tmp_path / "here", executor="local")
    assert found["models"] == same["models"]
    assert found["hub"] == {"first": {"id": "org/name", "commit": commit}}
    assert "hub" not in same
