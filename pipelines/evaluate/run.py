"""The matrix (models x tasks): its cells run in Ray Data actors or in this process."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from operators.statistics import mean_of_means
from pipelines.checkpoints.digests import DigestMemory
from pipelines.checkpoints.hub import recorded
from pipelines.commit import staged_directory, write_atomically
from pipelines.engines import EngineConfig
from pipelines.evaluate.cells import Cell, CellResult, CellWorker, finished_cell
from pipelines.evaluate.plan import MODELS_FILE, EvaluateConfig, EvaluationPlan, plan_evaluation
from pipelines.evaluate.tasks import DIMENSIONS, Task
from pipelines.hub.offline import is_offline
from pipelines.progress import Progress

RESULT_FILE = "evaluation.json"
ExecutorName = Literal["ray", "local"]


def evaluate(
    config: EvaluateConfig,
    out: str | Path,
    *,
    force: bool = False,
    executor: ExecutorName = "ray",
) -> dict[str, Any]:
    """Measure every model on every task and write `out/evaluation.json`.

    Finished cells of an interrupted run are not measured again. A finished `out` with the same
    inputs is only read. Digests identify a model, so a copy in other shards keeps its numbers;
    `out/models.json` holds the digests and the identity of the files.

    Returns:
        the content of `evaluation.json`: percentages, standard errors and numbers of prompts by
        model.

    Raises:
        InputError: a model or task that cannot be read; or `out` holds another result and `force`
            is false.
    """
    return evaluate_together([(config, out)], force=force, executor=executor)[0]


def evaluate_together(
    runs: Sequence[tuple[EvaluateConfig, str | Path]],
    *,
    force: bool = False,
    executor: ExecutorName = "ray",
) -> list[dict[str, Any]]:
    """As `evaluate`, for several evaluations (for example of both splits). Workers start once and
    load each model once for all of them. `num_workers` is taken from the first config.
    """
    memory = DigestMemory()
    plans = [plan_evaluation(config, out, memory) for config, out in runs]
    return evaluate_planned(plans, force=force, executor=executor)


def evaluate_planned(
    plans: Sequence[EvaluationPlan], *, force: bool = False, executor: ExecutorName = "ray"
) -> list[dict[str, Any]]:
    """As `evaluate_together`, for plans."""
    with ExitStack() as stack:
        runs = [_OpenRun(plan, force, stack) for plan in plans]
        missing = [(cell, run.folder) for run in runs for cell in run.missing]
        by_folder = {str(run.folder.absolute()): run for run in runs if run.missing}
        for folder, result in _measure(missing, plans[0].config.num_workers, executor):
            by_folder[folder].results.append(result)
        return [run.summary() for run in runs]


class _OpenRun:
    """A running evaluation: its results, its missing cells, and its folder.

    Its output gets its final name when `stack` closes.
    """

    def __init__(self, plan: EvaluationPlan, force: bool, stack: ExitStack) -> None:
        self._plan = plan
        self._finished = None if force else _finished_summary(plan)
        self.results: list[CellResult] = []
        self.missing: list[Cell] = []
        if self._finished is not None:
            return
        self.folder = stack.enter_context(staged_directory(plan.out, force=force))
        plan.memory.save(self.folder / MODELS_FILE, plan.config.models.values())
        for cell in plan.cells:
            name = json.loads(cell.task)["name"]
            done = finished_cell(self.folder, cell.model, name, cell.fingerprint)
            if done is None:
                self.missing.append(cell)
            else:
                self.results.append(done)

    def summary(self) -> dict[str, Any]:
        """The content of `evaluation.json`; writes the file unless it is there."""
        if self._finished is not None:
            return self._finished
        plan = self._plan
        models = {name: summarise(name, plan.tasks, self.results) for name in plan.config.models}
        summary = {
            "schema": 1,
            "split": plan.config.split,
            "fingerprint": plan.fingerprint,
            "digests": {name: asdict(digest) for name, digest in plan.digests.items()},
            "models": models,
            **self._hub(),
        }
        write_atomically(self.folder / RESULT_FILE, json.dumps(summary, indent=2) + "\n")
        return summary

    def _hub(self) -> dict[str, Any]:
        """The commits of the hub's models, by their names in the config."""
        found = {name: recorded([path]) for name, path in self._plan.config.models.items()}
        commits = {name: each["hub"][0] for name, each in found.items() if each}
        return {"hub": commits} if commits else {}


def _finished_summary(plan: EvaluationPlan) -> dict[str, Any] | None:
    """The summary of an earlier run on the same inputs, if there is one."""
    path = plan.out / RESULT_FILE
    if not path.is_file():
        return None
    finished = json.loads(path.read_text())
    old = "digests" not in finished
    key = plan.fingerprint_of_version_1() if old else plan.fingerprint
    return finished if finished["fingerprint"] == key else None


def _measure(
    cells: Sequence[tuple[Cell, Path]], num_workers: int, executor: ExecutorName
) -> Iterator[tuple[str, CellResult]]:
    """The results of cells with their folders, in the order in which they finish."""
    if not cells:
        return
    # All cells of a model together, so that a worker loads each model once.
    ordered = sorted(cells, key=lambda item: item[0].path)
    rows = [
        {"cell": json.dumps(asdict(cell)), "folder": str(folder.absolute())}
        for cell, folder in ordered
    ]
    num_models = len({cell.path for cell, _ in cells})
    found = _in_ray(rows, num_models, num_workers) if executor == "ray" else _here(rows)
    with Progress(len(cells), "cells") as progress:
        for row in found:
            result = CellResult(**json.loads(row["result"]))
            progress.advance(note=f"{result.model} on {result.task}: {result.value:.1f}")
            yield row["folder"], result


def _here(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Measure cells in this process."""
    import torch

    worker = CellWorker(num_threads=torch.get_num_threads())
    for row in rows:
        yield worker(row)


def _in_ray(
    rows: list[dict[str, str]], num_models: int, num_workers: int
) -> Iterable[dict[str, str]]:
    """Measure cells in Ray Data actors; only descriptions and numbers pass through Ray.

    Each actor has what its engine needs, so on GPUs each has one to itself.
    """
    import ray

    cluster = ray.cluster_resources()
    need = EngineConfig().need(cluster)
    size = min(num_workers, num_models)
    dataset = ray.data.from_items(rows, override_num_blocks=num_models)
    return dataset.map(
        CellWorker,  # type: ignore[arg-type] # Ray takes classes too
        fn_constructor_kwargs={"offline": is_offline()},
        compute=ray.data.ActorPoolStrategy(
            size=min(size, need.most(cluster)) if need.num_gpus else size
        ),
        **need.options,
    ).iter_rows()


def summarise(model: str, tasks: list[Task], results: list[CellResult]) -> dict[str, Any]:
    """One model's numbers: per task, per H (the mean of its tasks), and the average of the H's."""
    of_model = {result.task: result for result in results if result.model == model}
    summary: dict[str, Any] = {}
    parts = []
    for dimension in DIMENSIONS:
        names = [task.name for task in tasks if task.dimension == dimension]
        if names:
            part = mean_of_means([(of_model[n].value, of_model[n].stderr) for n in names])
            summary[dimension] = {"value": part[0], "stderr": part[1]}
            parts.append(part)
    if parts:
        value, stderr = mean_of_means(parts)
        summary["average"] = {"value": value, "stderr": stderr}
    summary["tasks"] = {
        task.name: {
            "value": of_model[task.name].value,
            "stderr": of_model[task.name].stderr,
            "n": of_model[task.name].n,
        }
        for task in tasks
    }
    return summary


def best_model(summary: dict[str, Any], names: Iterable[str]) -> str:
    """The name with the highest average of the H's; the first one in a tie."""
    return max(names, key=lambda name: summary["models"][name]["average"]["value"])
