"""The results of a demo's run, `results.json`, from the outputs of its stages."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from pipelines.commit import write_atomically
from pipelines.config import Config
from pipelines.evaluate import best_model, percentages
from pipelines.evaluate.results import Evaluation
from pipelines.pipeline.run import CONFIGS
from pipelines.pipeline.state import FOLDER, State
from pipelines.provenance import read_record
from pipelines.report.results import COLUMNS
from pipelines.train.files import METRICS_FILE
from pipelines.versions import versions

PIPELINE = "pipeline"  # the name of the demo's pipeline
SINGLE = ("helpful", "honest", "harmless")
MIXTURES = ("dpo-mixture", "dpo-mixture-ondare", "dpo-mixture-onties")
ALIGNED = (*(f"dpo-{name}" for name in SINGLE), *MIXTURES)
SWEPT = ("task_arithmetic", "expo")
MERGES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "expo")
SPLITS = ("development", "test")


class ResultsConfig(Config):
    """A demo's run."""

    run: Path = Field(description="the storage of the demo's pipeline")
    seed: int = 0


def write_results(run: Path, out: Path, seed: int) -> None:
    """Collect the stages' results in `out`."""
    measured = {
        split: json.loads((run / "results" / f"evaluation-{split}/evaluation.json").read_text())
        for split in SPLITS
    }
    models = {}
    for name in measured["test"]["models"]:
        kind, parents = _origin(run, name)
        models[name] = {
            **percentages(measured["test"], name),
            "kind": kind,
            "parents": parents,
            "config": f"{FOLDER}/{PIPELINE}/{CONFIGS}/{name}.yaml",
            "chosen": {key.split(".")[-1]: v for key, v in _chosen(run, name).items()},
            "path": f"models/{name}",
            **(_lengths(run / "models" / name) if kind == "aligned" else {}),
        }
    stages = State(str(run), PIPELINE).stages
    results = {
        "schema": 1,
        "seed": seed,
        "split": "test",
        "models": models,
        "best_merge": best_model(measured["development"], MERGES),
        "paired_stderrs": _paired(run / "results" / "evaluation-test", list(models)),
        "timings_s": {n: each.seconds for n, each in stages.items() if each.seconds is not None},
        "versions": versions(),
    }
    write_atomically(out, json.dumps(results, indent=2) + "\n")


def _chosen(run: Path, merge_name: str) -> dict[str, Any]:
    """The parameters that a sweep chose for a merge on development; empty for other merges."""
    path = run / "results" / f"sweep-{merge_name}" / "sweep.json"
    return json.loads(path.read_text())["best"]["parameters"] if path.is_file() else {}


def _paired(place: Path, models: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Standard errors of differences, paired by prompt: column -> model -> each later model."""
    columns = Evaluation(place).columns(models, COLUMNS)
    return {
        name: {
            first: {
                second: float(found.difference(first, second).stderr)
                for second in models[place + 1 :]
            }
            for place, first in enumerate(models)
        }
        for name, found in columns.items()
    }


def _lengths(model: Path) -> dict[str, float]:
    """The norm of an aligned model's delta, and the mean norm of its measured updates; nothing for
    models of earlier versions.
    """
    lines = [json.loads(line) for line in (model / METRICS_FILE).read_text().splitlines()]
    updates = [line["update_norm"] for line in lines if "update_norm" in line]
    delta = (read_record(model) or {}).get("delta")
    if delta is None or not updates:
        return {}
    return {"delta_norm": delta["delta_norm"], "update_norm": fmean(updates)}


def _origin(run: Path, name: str) -> tuple[str, list[str]]:
    """Kind and parents of a model of the demo."""
    if name in ("base", "sft"):
        return name, [] if name == "base" else ["base"]
    if name in ALIGNED:
        return "aligned", ["sft"]
    record = read_record(run / "models" / name)
    assert record is not None  # of a stage that stands
    return "merge", [Path(entry["model"]).name for entry in record["config"]["models"]]
