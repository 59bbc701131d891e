"""`poise demo`: the whole workflow on the tiny world, step by step, with the same code as the other
commands. Every step's config is a file below `OUT/configs/`, made from configs/demo/.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pipelines.commit import write_atomically
from pipelines.config import apply_overrides, load_config, load_yaml
from pipelines.evaluate import EvaluateConfig, best_model, evaluate_together, percentages
from pipelines.merge import load_merge_config, merge
from pipelines.provenance import read_record
from pipelines.search import StudyConfig, plan_study, search
from pipelines.storage import resolve_output
from pipelines.tiny_world import SIZES, build_world
from pipelines.train import AlignConfig, align, align_in_turn
from pipelines.train.files import METRICS_FILE
from pipelines.versions import versions
from ray_jobs.report import run_report
from ray_jobs.session import PROJECT_ROOT, ray_session
from ray_jobs.steps import STATE_FILE, Step, Steps

SINGLE = ("helpful", "honest", "harmless")
MIXTURES = ("dpo-mixture", "dpo-mixture-ondare", "dpo-mixture-onties")
ALIGNED = (*(f"dpo-{name}" for name in SINGLE), *MIXTURES)
SWEPT = ("task_arithmetic", "expo")
MERGES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "expo")
SPLITS = ("development", "test")
RESULT_FILE = "results.json"
_GPUS = "CUDA_VISIBLE_DEVICES"


def run_demo(out: Path, *, seed: int, size: str, force: bool) -> None:
    """Run the unfinished steps of the demo in `out`, then print the table and write the report.

    Raises:
        InputError: `out` holds a run with another seed or size, or other files.
    """
    out = resolve_output(out, None)
    old = out.with_name(f".{out.name}.old")
    if force:
        _move_aside(out, old)
    settings = {"seed": seed, "size": size}
    state = Steps(out, settings)
    if not (out / RESULT_FILE).is_file():
        with _without_gpus(), Demo(out, seed, size) as run:
            state.run(run.steps())
        write_results(out, seed, state.seconds)
    run_report([out], None, force=True)
    shutil.rmtree(old, ignore_errors=True)
    _last_lines(out)


@contextmanager
def _without_gpus() -> Iterator[None]:
    """In the block, this process and what it starts see no GPU. The demo's two workers would need
    two; and so its bytes are the same on every machine.
    """
    before = os.environ.get(_GPUS)
    os.environ[_GPUS] = ""
    try:
        yield
    finally:
        os.environ.pop(_GPUS)
        if before is not None:
            os.environ[_GPUS] = before


def _move_aside(out: Path, old: Path) -> None:
    """Make room for a new run; the last finished run stays at `old` until the new one finishes."""
    if not (out / STATE_FILE).is_file():
        return  # no run: a new one begins here, or `Steps` refuses the other files
    if old.exists() and not (out / RESULT_FILE).is_file():
        shutil.rmtree(out)  # a new run that was never finished
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)


@dataclass(frozen=True, slots=True)
class _Paths:
    """The paths of the demo's files."""

    out: Path

    @property
    def world(self) -> Path:
        return self.out / "world"

    def model(self, name: str) -> Path:
        return self.out / "models" / name

    def config(self, name: str) -> Path:
        return self.out / "configs" / f"{name}.yaml"

    def result(self, name: str) -> Path:
        return self.out / "results" / name


class Demo:
    """The steps of one run; Ray starts with the first step that needs it."""

    def __init__(self, out: Path, seed: int, size: str) -> None:
        self.paths, self.seed, self.size = _Paths(out), seed, size
        self._stack = ExitStack()
        self._ray_runs = False

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def steps(self) -> list[Step]:
        """All steps in order, with their expected seconds on two idle cores."""
        paths = self.paths
        base_s = 60 if self.size == "smoke" else 110
        steps = [
            Step("world", paths.world, self._world, 3),
            Step("train base", paths.model("base"), self._base, base_s, keeps=True),
            Step("train sft", paths.model("sft"), self._sft, 25, keeps=True),
            Step("align", paths.model(ALIGNED[-1]), self._align, 80, keeps=True),
        ]
        for name in SWEPT:
            steps.append(
                Step(f"sweep {name}", paths.result(f"sweep-{name}"), self._sweep(name), 20)
            )
        for name in MERGES:
            steps.append(Step(f"merge {name}", paths.model(name), self._merge(name), 4))
        last = paths.result(f"evaluation-{SPLITS[-1]}")
        steps.append(Step("evaluate", last, self._evaluate, 30, keeps=True))
        return steps

    def _ray(self) -> None:
        if not self._ray_runs:
            self._stack.enter_context(ray_session())
            self._ray_runs = True

    def _write_config(self, name: str, overrides: Sequence[str] = ()) -> Path:
        """Write a step's config: a file of configs/demo/ with this run's folder and seed."""
        text = (demo_configs() / f"{name}.yaml").read_text()
        comment = text.splitlines()[0]
        places = {"configs/demo/": f"{self.paths.out}/configs/", "runs/demo": str(self.paths.out)}
        text = re.sub("|".join(places), lambda found: places[found[0]], text)
        values = yaml.safe_load(text)
        if "seed" in values:
            values["seed"] = self.seed
        values = apply_overrides(values, overrides)
        path = self.paths.config(name)
        write_atomically(path, f"{comment}\n{yaml.safe_dump(values, sort_keys=False)}")
        return path

    def _world(self) -> None:
        settings = {"seed": self.seed, "size": self.size}
        write_atomically(self.paths.config("world"), yaml.safe_dump(settings))
        build_world(self.paths.world, self.seed, self.size)

    def _base(self) -> None:
        size = SIZES[self.size]
        self._train("base", size.base_steps, size.base_learning_rate)

    def _sft(self) -> None:
        size = SIZES[self.size]
        self._train("sft", size.sft_steps, size.sft_learning_rate)

    def _train(self, name: str, steps: int, rate: float) -> None:
        self._ray()
        overrides = [f"num_steps={steps}", f"optimizer.learning_rate={rate}"]
        config = load_config(self._write_config(f"align/{name}", overrides), AlignConfig)
        align(config, self.paths.model(name))

    def _align(self) -> None:
        self._ray()
        runs = []
        for name in ALIGNED:
            config = load_config(self._write_config(f"align/{name}"), AlignConfig)
            runs.append((config, self.paths.model(name)))
        align_in_turn(runs)

    def _sweep(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self._write_config(f"merge/{name}")
            config = load_config(self._write_config(f"sweep/{name}"), StudyConfig)
            search(plan_study(config), self.paths.result(f"sweep-{name}"))

        return run

    def _merge(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self._ray()
            overrides = [f"{k}={json.dumps(v)}" for k, v in chosen(self.paths.out, name).items()]
            config = load_merge_config(self._write_config(f"merge/{name}", overrides))
            merge(config, self.paths.model(name), executor="ray")

        return run

    def _evaluate(self) -> None:
        self._ray()
        runs = []
        for split in SPLITS:
            config = load_config(self._write_config(f"evaluate-{split}"), EvaluateConfig)
            runs.append((config, self.paths.result(f"evaluation-{split}")))
        evaluate_together(runs)


def demo_configs() -> Path:
    """The folder configs/demo/: in this package if installed, else at the top of the checkout."""
    installed = Path(__file__).with_name("configs")
    return (installed if installed.is_dir() else PROJECT_ROOT / "configs") / "demo"


def chosen(out: Path, merge_name: str) -> dict[str, Any]:
    """The parameters that a sweep chose for a merge on development; empty for other merges."""
    path = _Paths(out).result(f"sweep-{merge_name}") / "sweep.json"
    return json.loads(path.read_text())["best"]["parameters"] if path.is_file() else {}


def write_results(out: Path, seed: int, seconds: dict[str, float]) -> None:
    """Collect the steps' results in `results.json`."""
    paths = _Paths(out)
    measured = {
        split: json.loads((paths.result(f"evaluation-{split}") / "evaluation.json").read_text())
        for split in SPLITS
    }
    models = {}
    for name in measured["test"]["models"]:
        kind, parents, config = _origin(out, name)
        models[name] = {
            **percentages(measured["test"], name),
            "kind": kind,
            "parents": parents,
            "config": config,
            "chosen": {key.split(".")[-1]: v for key, v in chosen(out, name).items()},
            "path": f"models/{name}",
            **(_lengths(paths.model(name)) if kind == "aligned" else {}),
        }
    results = {
        "schema": 1,
        "seed": seed,
        "split": "test",
        "models": models,
        "best_merge": best_model(measured["development"], MERGES),
        "timings_s": seconds,
        "versions": versions(),
    }
    write_atomically(out / RESULT_FILE, json.dumps(results, indent=2) + "\n")


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


def _origin(out: Path, name: str) -> tuple[str, list[str], str]:
    """Kind, parents and config (relative to `out`) of a model of the demo."""
    if name == "base":
        return "base", [], "configs/align/base.yaml"
    if name == "sft":
        return "sft", ["base"], "configs/align/sft.yaml"
    if name in ALIGNED:
        return "aligned", ["sft"], f"configs/align/{name}.yaml"
    config = f"configs/merge/{name}.yaml"
    entries = load_yaml(out / config)["models"]
    return "merge", [Path(entry["model"]).name for entry in entries], config


def _last_lines(out: Path) -> None:
    """Print how to talk to the best merge."""
    best = json.loads((out / RESULT_FILE).read_text())["best_merge"]
    body = json.dumps({"model": best, "messages": [{"role": "user", "content": "reverse b d a"}]})
    print(
        f"\nTalk to the best merge:  poise chat {out / 'models' / best}\n"
        f"or serve it:             poise serve {out / 'models' / best}\n"
        "and, in another terminal:\n"
        "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'",
        file=sys.stderr,
    )
