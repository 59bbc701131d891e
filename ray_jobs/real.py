"""`poise real`: a real small model and real data from packages, aligned, merged and measured, with
the same code as the other commands. Every step's config is a file below `OUT/configs/`, made from
configs/real/.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from pipelines.commit import write_atomically
from pipelines.config import apply_overrides, check, load_config, load_yaml
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.store import RESULT_FILE as EVALUATION_FILE
from pipelines.merge import load_merge_config, merge
from pipelines.real_model.config import RealConfig
from pipelines.real_model.convert import convert_model
from pipelines.real_model.data import DATA_FILE, prepare_data
from pipelines.real_model.packages import require_packages
from pipelines.real_model.pairs import write_own_pairs
from pipelines.real_model.sources import Sources, read_sources
from pipelines.report import Settings
from pipelines.storage import resolve_output
from pipelines.train import AlignConfig, align_in_turn
from pipelines.versions import versions
from ray_jobs.report import run_report
from ray_jobs.results import run_results
from ray_jobs.run_files import RunFiles
from ray_jobs.session import ray_session
from ray_jobs.steps import Step, Steps, move_aside

START = "smollm2"
ALIGNED = ("dpo-helpful", "dpo-harmless")
MERGES = ("linear", "task_arithmetic", "ties")
RESULT_FILE = "results.json"
_NAME = "real"


def run_real(out: Path, overrides: list[str], *, force: bool) -> None:
    """Run the unfinished steps in `out`, then print the table and write the page.

    Raises:
        InputError: a package is not installed, a file cannot be read, or `out` holds a run with
            other settings.
    """
    files = RunFiles(resolve_output(out, None), _NAME)
    config = load_real_config(files, overrides)
    require_packages()
    sources = read_sources(config)
    old = files.out.with_name(f".{files.out.name}.old")
    if force:
        move_aside(files.out, old, RESULT_FILE)
    state = Steps(files.out, config.model_dump(mode="json"))
    if not (files.out / RESULT_FILE).is_file():
        with Real(files, config, sources) as run:
            state.run(run.steps())
        _write_results(files, state.seconds)
    _tell(files)
    shutil.rmtree(old, ignore_errors=True)


def load_real_config(files: RunFiles, overrides: list[str]) -> RealConfig:
    """configs/real/real.yaml with overrides."""
    path = files.configs / "real.yaml"
    values: dict[str, Any] = apply_overrides(load_yaml(path), overrides)
    return check(values, RealConfig, str(path))


class Real:
    """The steps of one run; Ray starts with the first step that needs it."""

    def __init__(self, files: RunFiles, config: RealConfig, sources: Sources) -> None:
        self.files, self.config, self.sources = files, config, sources
        self._stack = ExitStack()
        self._ray_runs = False

    def __enter__(self) -> "Real":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def steps(self) -> list[Step]:
        """All steps in order, with their expected seconds on two idle cores."""
        files = self.files
        answered = files.result("samples")
        measured = files.result("evaluation")
        return [
            Step("convert the model", files.model(START), self._convert, 30),
            Step("data", self._data, self._prepare, 5),
            Step("own answers", answered / EVALUATION_FILE, self._answer, 400, keeps=True),
            Step("pairs", self._pairs, self._pair, 2),
            Step("align", files.model(ALIGNED[-1]), self._align, 900, keeps=True),
            *(Step(f"merge {name}", files.model(name), self._merge(name), 10) for name in MERGES),
            Step("evaluate", measured / EVALUATION_FILE, self._evaluate, 1200, keeps=True),
        ]

    @property
    def _data(self) -> Path:
        return self.files.out / "data"

    @property
    def _pairs(self) -> Path:
        return self.files.out / "pairs"

    def _ray(self) -> None:
        if not self._ray_runs:
            self._stack.enter_context(ray_session())
            self._ray_runs = True

    def _write_config(self, name: str) -> Path:
        return self.files.write_config(name, self.config.seed)

    def _convert(self) -> None:
        convert_model(self.files.model(START))

    def _prepare(self) -> None:
        prepare_data(self.config, self.sources, self.files.configs / "tasks", self._data)

    def _answer(self) -> None:
        self._ray()
        config = load_config(self._write_config("samples"), EvaluateConfig)
        _require_whole(evaluate(config, self.files.result("samples")))

    def _pair(self) -> None:
        answers = self.files.result("samples")
        write_own_pairs(self.config, answers, self._data, START, self._pairs)

    def _align(self) -> None:
        self._ray()
        align_in_turn(
            [
                (
                    load_config(self._write_config(f"align/{name}"), AlignConfig),
                    self.files.model(name),
                )
                for name in ALIGNED
            ]
        )

    def _merge(self, name: str) -> Callable[[], None]:
        def run() -> None:
            config = load_merge_config(self._write_config(f"merge/{name}"))
            merge(config, self.files.model(name))

        return run

    def _evaluate(self) -> None:
        self._ray()
        path = self._write_config("evaluate")
        comment, text = path.read_text().split("\n", 1)
        values = yaml.safe_load(text)
        values["groups"] = groups_of(values["groups"], self._measured())
        write_atomically(path, f"{comment}\n{yaml.safe_dump(values, sort_keys=False)}")
        config = load_config(path, EvaluateConfig)
        _require_whole(evaluate(config, self.files.result("evaluation")))

    def _measured(self) -> set[str]:
        """The tasks that there are data for."""
        return set(json.loads((self._data / DATA_FILE).read_text())["measured"])


def groups_of(groups: dict[str, Any], tasks: set[str]) -> dict[str, Any]:
    """Groups without the members of tasks that are not measured."""
    return {
        name: {**group, "members": [m for m in group["members"] if m.split(".")[0] in tasks]}
        for name, group in groups.items()
    }


def _require_whole(summary: dict[str, Any]) -> None:
    """Raise RuntimeError for an evaluation of which a part could not be measured."""
    for failure in summary["failed"]:
        raise RuntimeError(f"could not be measured: {failure}")


def _write_results(files: RunFiles, seconds: dict[str, float]) -> None:
    """Collect what the run was and what it gave in `results.json`."""
    measured = json.loads((files.result("evaluation") / EVALUATION_FILE).read_text())
    pairs = {
        path.stem: len(path.read_text().splitlines()) for path in (files.out / "pairs").iterdir()
    }
    results = {
        "schema": 1,
        "data": json.loads((files.out / "data" / DATA_FILE).read_text()),
        "pairs": dict(sorted(pairs.items())),
        "models": {
            name: {"tasks": entry["tasks"], "groups": entry["groups"]}
            for name, entry in measured["models"].items()
        },
        "timings_s": seconds,
        "versions": versions(),
    }
    write_atomically(files.out / RESULT_FILE, json.dumps(results, indent=2) + "\n")


def _tell(files: RunFiles) -> None:
    """Print the table and write the page with its pictures."""
    results = json.loads((files.out / RESULT_FILE).read_text())
    evaluation = files.result("evaluation")
    run_results([str(evaluation)], models=(), tasks=(), compare=None, form="table", harness=None)
    settings = Settings(axes=("helpful", "harmless"))
    run_report([evaluation], files.out, force=True, settings=settings)
    told = ", ".join(f"{count} {name}" for name, count in results["pairs"].items())
    print(f"pairs: {told}", file=sys.stderr)
    for task, why in results["data"]["left_out"].items():
        print(f"{task}: left out: {why}", file=sys.stderr)
