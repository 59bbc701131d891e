"""Weights & Biases and MLflow: they get the numbers of metrics.jsonl if the config asks for it."""

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.train.interfaces import Tracked

PROJECT = "poise"
RUNS_FILE = "trackers.json"  # in the run's folder: each tracker's id of this run


class Tracker(Protocol):
    """A service, or a local folder, that keeps runs."""

    run_id: str

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step's numbers."""
        ...

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""
        ...


class WandbTracker:
    """Weights & Biases: offline, into `wandb/`, unless WANDB_MODE or an API key says otherwise."""

    def __init__(self, config: Tracked, name: str, place: Path, run_id: str | None) -> None:
        import wandb

        online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run_id,
            name=name,
            resume="allow",
            dir=place,
            mode=os.environ.get("WANDB_MODE", online),  # type: ignore[arg-type] # wandb judges it
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one row to the run's history."""
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until all is written."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """MLflow: into the folder `mlruns/`, unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, config: Tracked, name: str, place: Path, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        local = (place / "mlruns").absolute().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        self._last_step = 0
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            history = self._client.get_metric_history(run_id, "loss")
            self._last_step = max((metric.step for metric in history), default=0)
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        key = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.run_id = self._client.create_run(key, run_name=name).info.run_id
        settings = config.model_dump(mode="json").items()
        self._client.log_batch(self.run_id, params=[Param(k, str(v)) for k, v in settings])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve; steps that are repeated after a resumption are skipped."""
        from mlflow.entities import Metric

        if step > self._last_step:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Tracked, str, Path, str | None], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError unless all trackers are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed; pip install 'poise[tracking]'")


def open_trackers(config: Tracked, folder: Path) -> list[Tracker]:
    """The trackers of a config; each continues this run's record if there is one.

    Local trackers write beside the output, for all runs there together.

    Args:
        folder: of the unfinished run, `.NAME.partial`.
    """
    check_trackers(config.trackers)
    path = folder / RUNS_FILE
    runs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    run_name = folder.name.removeprefix(".").removesuffix(".partial")
    trackers = []
    for name in config.trackers:
        tracker = TRACKERS[name](config, run_name, folder.parent, runs.get(name))
        write_atomically(path, json.dumps(runs := runs | {name: tracker.run_id}))
        trackers.append(tracker)
    return trackers
