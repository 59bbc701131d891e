"""The matrix: graders, cells, resumption, and what is wrong with tasks.

Oracle: the models' recorded answers, from which every score is known by hand.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.engines import Sampling, open_engine
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from pipelines.evaluate import (
    EvaluateConfig,
    best_model,
    evaluate,
    evaluate_planned,
    percentages,
    plan_evaluation,
)
from pipelines.evaluate.graders import grade
from pipelines.evaluate.store import Cell, Store
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
    engine = open_engine(root / "model-0")
    says = [answer.text for answer in engine.generate(prompts, Sampling(max_tokens=4))]
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
        "engine": {"batch_size": 2},
    }
    return EvaluateConfig(**{**values, **changes})


def test_a_model_is_right_about_what_it_says_itself(world: Path, tmp_path: Path) -> None:
    summary = evaluate(config_of(world), tmp_path / "out", executor="local")
    first, second = summary["models"]["first"], summary["models"]["second"]
    assert first["tasks"]["echo"] == {"exact": {"value": 1.0, "stderr": 0.0, "n": 3}}
    assert second["tasks"]["echo"]["exact"]["value"] < 1
    assert first["groups"]["average"] == {"value": 100.0, "stderr": 0.0}
    assert "harmlessness" not in first["groups"]
    shown = percentages(summary, "first")
    assert shown["tasks"]["quiet"] == {"value": 100.0, "stderr": 0.0, "n": 2}
    assert shown["average"] == first["groups"]["average"]
    assert best_model(summary, ["second", "first"]) == "first"
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == summary


def test_ray_gives_what_one_process_gives(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    torch.set_num_threads(1)
    local = evaluate(config_of(world), tmp_path / "local", executor="local")
    assert evaluate(config_of(world), tmp_path / "ray") == local


def test_a_grown_matrix_measures_what_is_new(world: Path, tmp_path: Path, asked: list[int]) -> None:
    """By model and by task; fewer models or tasks measure nothing, and a limit is another cell."""
    out = tmp_path / "out"
    small = config_of(world, only=["quiet"], models={"first": world / "model-0"})
    evaluate(small, out, executor="local")
    assert asked == [2]
    whole = evaluate(config_of(world), out, executor="local")
    assert asked == [2, 3, 2, 3]  # the model with more to do comes first
    assert whole == evaluate(config_of(world), tmp_path / "other", executor="local")
    asked.clear()
    assert list(evaluate(small, out, executor="local")["models"]["first"]["tasks"]) == ["quiet"]
    assert evaluate(config_of(world), out, executor="local") == whole
    assert asked == []
    limited = evaluate(config_of(world, limit=1), out, executor="local")
    assert limited["models"]["first"]["tasks"]["echo"]["exact"]["n"] == 1
    assert asked == [1, 1, 1, 1]
    assert evaluate(config_of(world), out, executor="local") == whole
    evaluate(config_of(world), out, executor="local", force=True)
    assert sorted(asked[4:]) == [2, 2, 3, 3]


def test_what_is_no_store_is_left_alone(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files; choose a new or empty folder$"):
        evaluate(config_of(world), tmp_path, executor="local")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="holds an evaluation of an earlier version; choose"):
        evaluate(config_of(world), tmp_path / "old", executor="local")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["evaluation.json"]


def test_a_damaged_block_is_measured_again(
    world: Path, tmp_path: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is cut, has a changed byte, or is another block; the bytes are as before."""
    out = tmp_path / "out"
    whole = evaluate(config_of(world), out, executor="local")
    files = sorted(out.rglob("00000.parquet"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 4
    files[0].write_bytes(before[0][:-50])
    place = before[1].index(b"model" if b"model" in before[1] else b"PAR1") + 40
    files[1].write_bytes(before[1][:place] + bytes([before[1][place] ^ 1]) + before[1][place + 1 :])
    files[2].write_bytes(before[3])
    asked.clear()
    assert evaluate(config_of(world), out, executor="local") == whole
    assert [file.read_bytes() for file in files] == before
    assert len(asked) == 3
    assert capsys.readouterr().err.count("damaged, measured again: ") == 3


def test_a_block_that_is_damaged_again_and_again_fails_its_cell(
    world: Path, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that keeps nothing at one place: three tries, and the other cells go on."""
    plain, out = Store.write, tmp_path / "out"

    def half(self: Store, cell: Cell, block: int, *rest: Any) -> None:
        plain(self, cell, block, *rest)
        if cell.task == "echo" and cell.described["model"] == "first":
            path = out / self.name(cell, block)
            path.write_bytes(path.read_bytes()[:-50])

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", half)
        summary = evaluate(config_of(world), out, executor="local")
    [failed] = summary["failed"]
    assert (failed["model"], failed["task"]) == ("first", "echo")
    assert failed["reason"].startswith(f"damaged 3 times: {out}/samples/echo/")
    assert sorted(asked) == [2, 2, 3, 3, 3, 3]
    assert list(summary["models"]["first"]["tasks"]) == ["quiet"]
    assert evaluate(config_of(world), out, executor="local")["failed"] == []


def test_a_smaller_batch_where_memory_runs_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is measured again whole, its file says so, and the answers are the same."""
    whole = evaluate(config_of(world), tmp_path / "whole", executor="local")
    plain = TransformersEngine.generate

    def poor(self: TransformersEngine, prompts: Any, *rest: Any) -> Any:
        if self.config.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return plain(self, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", poor)
    config = config_of(world, engine={"batch_size": 4})
    plan = plan_evaluation(config, tmp_path / "out")
    [summary] = evaluate_planned([plan], executor="local")
    assert summary["models"] == whole["models"]
    cell = plan.cells["first", "echo"]
    assert Store(tmp_path / "out").read(cell, 0)[1] == {"batch_size": 1}


def test_a_model_that_fails_leaves_the_others(world: Path, tmp_path: Path) -> None:
    """NaN is found when weights are loaded, a missing template when the task is asked."""
    broken = save_tiny_llama(tmp_path / "broken", 2)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    mute = save_tiny_llama(tmp_path / "mute", 3)
    (mute / "chat_template.jinja").unlink()
    models = {"broken": broken, "first": world / "model-0", "mute": mute}
    summary = evaluate(config_of(world, models=models), tmp_path / "out", executor="local")
    first = evaluate(config_of(world), tmp_path / "alone", executor="local")["models"]["first"]
    assert summary["models"]["first"] == first
    assert {(each["model"], each["task"]) for each in summary["failed"]} == {
        ("broken", "echo"),
        ("broken", "quiet"),
        ("mute", "echo"),
    }
    reasons = {each["model"]: each["reason"] for each in summary["failed"]}
    assert "model.norm.weight: holds NaN or Inf" in reasons["broken"]
    assert reasons["mute"].endswith("its tokenizer has no chat template")
    groups = summary["models"]["mute"]["groups"]
    assert groups["honesty"] == {"value": 100.0, "stderr": 0.0}
    assert groups["average"] == {"value": None, "stderr": None, "missing": ["echo.exact"]}


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
    """By its file, and nothing is left."""
    model = save_tiny_llama(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = EvaluateConfig(models={"cut": model}, tasks=world / "tasks.yaml", split="test")
    with pytest.raises(InputError, match=str(weights)):
        evaluate(config, tmp_path / "out", executor="local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


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
