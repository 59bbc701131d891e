"""A command's look before Ray starts is its only one. Oracle: counted calls and reads."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.checkpoints import Checkpoint
from ray_jobs import cli
from tests.tiny_models import save_tiny_llama

LOOKS = ("pipelines.merge.plan._plan", "pipelines.evaluate.opened.load_tasks")
LOOKS += ("pipelines.checkpoints.digests.tensor_digests",)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often this process looks at inputs: by function, and checkpoints opened by folder."""
    found: Counter[str] = Counter()

    def counted(target: str) -> None:
        module, name = target.rsplit(".", 1)
        plain = getattr(sys.modules[module], name)

        def counting(*arguments: Any, **settings: Any) -> Any:
            found[target] += 1
            return plain(*arguments, **settings)

        monkeypatch.setattr(target, counting)

    import pipelines.search  # noqa: F401

    for target in LOOKS:
        counted(target)
    plain = Checkpoint.open.__func__

    def opened(kind: type[Checkpoint], path: Path) -> Checkpoint:
        found[Path(path).name] += 1
        return plain(kind, path)

    monkeypatch.setattr(Checkpoint, "open", classmethod(opened))
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and the configs of a merge, an evaluation and a sweep."""
    for seed in (0, 1):
        save_tiny_llama(tmp_path / f"m{seed}", seed)
    rows = [{"id": str(i), "prompt": "a b", "cluster": str(i)} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grader = {"name": "not_phrase", "phrases": ["yes"]}
    task = {"name": "words", "dimension": "honesty", "prompt": "text", "grader": grader}
    files = {"development": "rows.jsonl", "test": "rows.jsonl"}
    configs: dict[str, Any] = {
        "tasks": [task | {"files": files}],
        "merge": {
            "merge_method": "linear",
            "models": [{"model": "m0"}, {"model": "soup"}],
            "merges": {
                "soup": {
                    "merge_method": "linear",
                    "models": [{"model": "m0"}, {"model": "m1"}],
                    "out": str(tmp_path / "soup"),
                }
            },
        },
        "evaluate": {"models": {"a": "m0", "b": "m1"}, "tasks": "tasks.yaml", "max_new_tokens": 2},
        "sweep": {
            "merge": "plain.yaml",
            "space": {"seed": [0]},
            "sampler": {"name": "grid"},
            "evaluation": {"tasks": "tasks.yaml", "max_new_tokens": 2},
            "baselines": False,
        },
        "plain": {"merge_method": "linear", "models": [{"model": "m0"}, {"model": "m1"}]},
    }
    for name, content in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def poise(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["poise", *map(str, arguments)])
    cli.main()


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_merge(
    executor: str,
    world: Path,
    counts: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A plan for the merge and one for the named merge, which is written as well; a model of both
    is looked at once.
    """
    if executor == "ray":
        request.getfixturevalue("ray_cluster")
    poise(monkeypatch, "merge", "merge.yaml", "out", f"executor={executor}")
    assert (world / "soup" / "poise.json").is_file()
    assert (world / "out" / "poise.json").is_file()
    assert counts == {"pipelines.merge.plan._plan": 2, "m0": 1, "m1": 1}


@pytest.mark.ray
def test_evaluate(
    ray_cluster: None, world: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poise(monkeypatch, "evaluate", "evaluate.yaml", "--out", "out")
    num_tensors = sum(len(Checkpoint.open(world / name).tensors) for name in ("m0", "m1"))
    assert counts == {
        "pipelines.evaluate.opened.load_tasks": 1,
        "pipelines.checkpoints.digests.tensor_digests": num_tensors,
        "m0": 2,
        "m1": 2,  # once more by this test
    }


def test_sweep(world: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    poise(monkeypatch, "sweep", "sweep.yaml", "--out", "out")
    assert counts == {
        "pipelines.evaluate.opened.load_tasks": 4,  # of both splits, here and where is measured
        "pipelines.merge.plan._plan": 4,  # the study, the winner, and the trial on both splits
        "m0": 4,
        "m1": 4,
    }
