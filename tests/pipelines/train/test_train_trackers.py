"""Trackers: a real offline W&B run and a real MLflow folder, read back.

Oracle: the trackers' own readers, beside metrics.jsonl.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from training_files import (
    align_config,
    metrics,
    run_here,
    stop_at_the_fourth_step,
)

from pipelines.errors import InputError
from pipelines.train import check_inputs

BLOCK, HEADER = 32768, 7


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, which is a LevelDB log after a header of its own."""
    data, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_history(place: Path) -> dict[str, list[dict[str, float]]]:
    """For each run its rows, in the order of their files."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(place.glob("wandb/offline-run-*/*.wandb")):
        rows = found.setdefault(path.stem.removeprefix("run-"), [])
        for data in wandb_records(path):
            items = Record.FromString(data).history.item
            if items:
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a developer has set decides where the numbers go."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def interrupted_run(
    tracker: str, model: Path, data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, float]]:
    """A run of six steps, stopped after the third and begun again at the second's checkpoint."""
    config = align_config(model, data, trackers=[tracker])
    stop_at_the_fourth_step(config, place / ".helpful.partial", monkeypatch)
    return metrics(run_here(config, place / ".helpful.partial"))


def test_wandb(
    offline: None,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run, resumed under its name; its rows are the lines of metrics.jsonl."""
    pytest.importorskip("wandb")
    lines = interrupted_run("wandb", tiny_llama, preferences, tmp_path, monkeypatch)
    ((_, rows),) = wandb_history(tmp_path).items()
    assert [row["_step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6]
    for line, row in zip(lines, rows[:2] + rows[3:], strict=True):
        assert {name: row[name] for name in line if name != "step"} == {
            name: value for name, value in line.items() if name != "step"
        }


def test_mlflow(
    offline: None,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One run with a point for each step, its settings, its name and its end."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    lines = interrupted_run("mlflow", tiny_llama, preferences, tmp_path, monkeypatch)
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("poise").experiment_id])
    assert (run.info.run_name, run.info.status) == ("helpful", "FINISHED")
    assert run.data.params["global_batch_size"] == "8"
    for name in ("loss", "gradient_norm", "margin"):
        points = sorted(client.get_metric_history(run.info.run_id, name), key=lambda p: p.step)
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        assert [point.value for point in points] == [line[name] for line in lines]


def test_a_tracker_that_is_not_installed(
    tiny_llama: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says how to get it, before anything starts; a name twice is a mistake."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = align_config(tiny_llama, preferences, trackers=["mlflow"])
    with pytest.raises(InputError, match=r"mlflow is not installed; pip install 'poise\[tracking"):
        check_inputs(config)
    with pytest.raises(ValidationError, match="allowed: each once"):
        align_config(tiny_llama, preferences, trackers=["wandb", "wandb"])
