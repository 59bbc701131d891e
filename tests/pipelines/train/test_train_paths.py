"""Configs name their files relative to the working directory; workers run in another one.

Oracle: paths written by hand.
"""

import json
from pathlib import Path

import pytest
from training_files import align_config

from pipelines.train import plan_alignment
from pipelines.train.run import worker_settings


def test_workers_are_told_whole_paths(
    tiny_llama: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "rows.jsonl").symlink_to(preferences)
    tau = {"base": "model", "tuned": "model"}
    optimizer = {
        "name": "ondare",
        "learning_rate": 1e-3,
        "density": 0.5,
        "alpha": 0.1,
        "tau": tau,
    }
    config = align_config(Path("model"), Path("rows.jsonl"), optimizer=optimizer)
    plan = plan_alignment(config, tmp_path / "cache")
    told = json.loads(worker_settings(config, plan, tmp_path, tmp_path)["config"])
    assert told["model"] == str(tmp_path / "model")
    assert told["data"] == str(tmp_path / "rows.jsonl")
    assert told["optimizer"]["tau"] == {
        "base": str(tmp_path / "model"),
        "tuned": str(tmp_path / "model"),
    }
