"""Which model a number is of. Oracle: counted reads."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pipelines.checkpoints import plan_layout
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, evaluate_together, plan_evaluation
from pipelines.fingerprint import MEANING
from pipelines.search import Measurer, StudyConfig, plan_study
from tests.pipelines.checkpoints.digest_definition import blake2, described
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model.safetensors"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two tiny models and a task of two prompts, on both splits."""
    for seed in (0, 1):
        save_tiny_llama(tmp_path / f"model-{seed}", seed)
    rows = [{"id": str(i), "prompt": "a b", "cluster": str(i)} for i in range(2)]
    files = {}
    for split in ("development", "test"):
        files[split] = f"{split}.jsonl"
        (tmp_path / files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    grader = {"name": "not_phrase", "phrases": ["yes"]}
    task = {"name": "words", "dimension": "honesty", "prompt": "text", "grader": grader}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump([task | {"files": files}]))
    return tmp_path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read for a digest alone, by folder and name."""
    from pipelines.checkpoints import digests

    names: list[str] = []
    plain = digests.tensor_digests

    def counting(checkpoint: Any, name: str) -> Any:
        names.append(f"{checkpoint.path.name}/{name}")
        return plain(checkpoint, name)

    monkeypatch.setattr(digests, "tensor_digests", counting)
    return names


def config_of(world: Path, **changes: Any) -> EvaluateConfig:
    models = {"first": world / "model-0", "second": world / "model-1"}
    values = {"models": models, "tasks": world / "tasks.yaml", "max_new_tokens": 2}
    return EvaluateConfig(**{**values, **changes})


def test_each_model_is_read_once(world: Path, read: list[str]) -> None:
    """For two splits, and never again while its files stay as they are."""
    configs = [config_of(world, split=split) for split in ("development", "test")]
    runs = [(config, world / config.split) for config in configs]
    summaries = evaluate_together(runs, executor="local")
    assert len(read) == len(set(read)) == 2 * len(load_file(world / "model-0" / WEIGHTS))
    for number, name in enumerate(("first", "second")):
        tensors = load_file(world / f"model-{number}" / WEIGHTS)
        weights = blake2(described(tensors))
        assert summaries[0]["models"][name]["digest"] == weights
        cells = [json.loads(file.read_text()) for file in (world / "test").rglob("cell.json")]
        assert [cell["digest"]["weights"] for cell in cells if cell["model"] == name] == [weights]
    read.clear()
    assert evaluate_together(runs, executor="local") == summaries
    evaluate(configs[0], world / "development", executor="local", force=True)
    assert read == []
    for number in (0, 1):  # what the second folder knows is older than what was read for the first
        os.utime(world / f"model-{number}" / WEIGHTS, ns=(1, 1))
    assert evaluate_together(runs, executor="local") == summaries
    assert len(read) == len(set(read))


def test_an_interrupted_run_does_not_read_again(world: Path, read: list[str]) -> None:
    config, out = config_of(world), world / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments: Any, **settings: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(TransformersEngine, "generate", stop)
        evaluate(config, out, executor="local")
    assert (out / "models.json").is_file()
    read.clear()
    evaluate(config, out, executor="local")
    assert read == []


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', '{"x": {"weights": "0"}}'])
def test_files_of_others_tell_nothing(world: Path, read: list[str], text: str) -> None:
    """Nor does one that has other lengths or times for a model."""
    out = world / "out"
    out.mkdir()
    (out / "models.json").write_text(text)
    expected = plan_evaluation(config_of(world), world / "nowhere").fingerprint
    read.clear()
    plan = plan_evaluation(config_of(world), world / "out")
    assert plan.fingerprint == expected
    assert read
    (out / "models.json").write_text(plan.memory.dump(plan.config.models.values()))
    known = json.loads((out / "models.json").read_text())
    for entry in known.values():
        entry["weights"] = "of other files"
        entry["files"][WEIGHTS][1] += 1
    (out / "models.json").write_text(json.dumps(known))
    assert plan_evaluation(config_of(world), world / "out").fingerprint == expected


def test_touched_files_are_read_and_changed_ones_measured(
    world: Path, read: list[str], asked: list[int]
) -> None:
    config, out, file = config_of(world), world / "out", world / "model-1" / WEIGHTS
    summary = evaluate(config, out, executor="local")
    tensors = load_file(file)
    asked.clear()
    os.utime(file, ns=(1, 1))
    read.clear()
    assert evaluate(config, out, executor="local") == summary
    assert {name.split("/")[0] for name in read} == {"model-1"}
    assert asked == []
    size = file.stat().st_size
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, file, {"format": "pt"})
    assert file.stat().st_size == size
    changed = evaluate(config, out, executor="local")
    assert changed["models"]["first"] == summary["models"]["first"]
    assert changed["models"]["second"]["digest"] != summary["models"]["second"]["digest"]
    assert asked == [2]


def test_a_copy_in_other_shards_keeps_its_numbers(world: Path, asked: list[int]) -> None:
    config, out, model = config_of(world), world / "out", world / "model-1"
    summary = evaluate(config, out, executor="local")
    asked.clear()
    tensors = dict(reversed(load_file(model / WEIGHTS).items()))
    layout = plan_layout({k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, 20_000)
    (model / WEIGHTS).unlink()
    layout.create(model)
    for name, values in tensors.items():
        layout.write(model, name, 0, values)
    (model / "README.md").write_text("in shards")
    assert len(list(model.glob("*.safetensors"))) > 1
    assert evaluate(config, out, executor="local") == summary
    assert asked == []
    (model / "chat_template.jinja").write_text("{{ messages }}")
    evaluate(config, out, executor="local")
    assert asked == [2]


def test_a_raised_meaning_measures_again(
    world: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of evaluations; a sweep's key follows those of merges and evaluations, too."""
    config, out = config_of(world), world / "out"
    evaluate(config, out, executor="local")
    monkeypatch.setitem(MEANING, "evaluate", MEANING["evaluate"] + 1)
    asked.clear()
    evaluate(config, out, executor="local")
    assert asked == [2, 2]
    swept = sweep_of(world)
    keys = [plan_study(swept).key]
    for kind in ("evaluate", "merge", "sweep"):
        monkeypatch.setitem(MEANING, kind, MEANING[kind] + 1)
        keys.append(plan_study(swept).key)
    assert len(set(keys)) == 4


def sweep_of(world: Path) -> StudyConfig:
    models = [{"model": str(world / f"model-{seed}")} for seed in (0, 1)]
    merge = {"merge_method": "linear", "models": models}
    (world / "merge.yaml").write_text(yaml.safe_dump(merge))
    return StudyConfig(
        merge=world / "merge.yaml",
        search={"seed": [0]},
        tasks=world / "tasks.yaml",
        max_new_tokens=2,
    )


def test_a_trial_reads_no_files_for_a_digest(world: Path, read: list[str]) -> None:
    plan = plan_study(sweep_of(world))
    measurer = Measurer(plan.evaluation)
    found = measurer.measure(plan.candidate({"seed": 0}))
    measurer.close()
    assert {"honesty", "average"} < found.values.keys()
    assert read == []  # neither inputs nor output: both are hashed on their way


def test_an_adapter_beside_a_model_is_refused(world: Path) -> None:
    (world / "model-1" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"^models.second: .*: holds an adapter beside the model"):
        plan_evaluation(config_of(world), world / "out")
