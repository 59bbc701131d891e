"""A made-up run whose table, tax and choice are known by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

TASKS = ("operations", "format", "known", "unknown", "harmful", "benign")
# helpfulness, honesty, harmlessness; every standard error of a strength is 3.0.
VALUES = {
    "base": ("base", (0.0, 3.0, 0.0), ()),
    "sft": ("sft", (50.0, 60.0, 40.0), ("base",)),
    "dpo-helpful": ("aligned", (80.0, 30.0, 10.0), ("sft",)),
    "dpo-honest": ("aligned", (47.0, 90.0, 46.0), ("sft",)),
    "dpo-harmless": ("aligned", (44.0, 61.0, 90.0), ("sft",)),
    "dpo-mixture": ("aligned", (65.0, 75.0, 70.0), ("sft",)),
    "dpo-mixture-ondare": ("aligned", (68.0, 75.0, 70.0), ("sft",)),
    "linear": ("merge", (60.0, 70.0, 65.0), ("dpo-helpful", "dpo-honest", "dpo-harmless")),
    "task_arithmetic": ("merge", (75.0, 80.0, 85.0), ("dpo-helpful", "dpo-honest")),
    "expo": ("merge", (70.0, 78.0, 74.0), ("dpo-mixture",)),
}
STDERR = 3.0
DELTAS = {"dpo-mixture": 0.42, "dpo-mixture-ondare": 0.46}  # norms; 0.5 of the other models


def _number(value: float, stderr: float) -> dict[str, float]:
    return {"value": value, "stderr": stderr}


def _model(name: str) -> dict[str, Any]:
    kind, values, parents = VALUES[name]
    aligned = kind == "aligned"
    helpfulness, honesty, harmlessness = (_number(value, STDERR) for value in values)
    chosen = {"task_arithmetic": {"lambda": 0.5}, "expo": {"alpha": 0.3}}.get(name, {})
    return {
        "helpfulness": helpfulness,
        "honesty": honesty,
        "harmlessness": harmlessness,
        # The standard error of a mean of three: sqrt(3 * 3^2) / 3 = sqrt(3).
        "average": _number(sum(values) / 3, 3**0.5),
        "tasks": {
            task: {**_number(values[i // 2], STDERR), "n": 240} for i, task in enumerate(TASKS)
        },
        "kind": kind,
        "parents": list(parents),
        "config": "configs/world.yaml" if kind in ("base", "sft") else f"configs/{name}.yaml",
        "chosen": chosen,
        "path": f"models/{name}",
        **({"delta_norm": DELTAS.get(name, 0.5), "update_norm": 0.0123} if aligned else {}),
    }


@pytest.fixture()
def content() -> dict[str, Any]:
    """The content of a results.json, free to be changed by a test."""
    return copy.deepcopy(
        {
            "schema": 1,
            "seed": 7,
            "split": "test",
            "models": {name: _model(name) for name in VALUES},
            "best_merge": "task_arithmetic",
            "timings_s": {"world": 1.25, "train base": 110.5},
            "versions": {"python": "3.11.0", "poise": "0.1.0"},
        }
    )


class RunMaker:
    """Writes run folders below a test's own folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, content: Any) -> Path:
        """A run folder with this results.json and the configs it names."""
        folder = self.root / name
        (folder / "configs").mkdir(parents=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "results.json").write_text(text)
        for config in ("world", "dpo-helpful", "linear"):
            (folder / "configs" / f"{config}.yaml").write_text(f"name: {config} <&>\n")
        return folder


@pytest.fixture()
def make_run(tmp_path: Path) -> RunMaker:
    """Writes a run folder: `make_run(name, content)`."""
    return RunMaker(tmp_path / "runs")


@pytest.fixture()
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the plots, for tests of where files go; other tests draw the real ones."""
    for name in ("plot_matrix", "plot_tradeoff"):
        monkeypatch.setattr(
            f"pipelines.report.files.{name}",
            lambda results, name=name: dict.fromkeys(
                ("png", "svg"), f"{name} of seed {results.seed}".encode()
            ),
        )
