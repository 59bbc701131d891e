"""The matrix of models x tasks: cells through Ray Data actors, or in this process."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from operators.statistics import mean_of_means
from pipelines.commit import staged_directory, write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.cells import Cell, CellResult, CellWorker, finished_cell
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.tasks import DIMENSIONS, Task, load_rows, load_tasks
from pipelines.fingerprint import fingerprint, fingerprint_directory, fingerprint_file
from pipelines.progress import Progress

RESULT_FILE = "evaluation.json"
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def evaluate(
    config: EvaluateConfig,
    out: str | Path,
    *,
    force: bool = False,
    executor: Literal["ray", "local"] = "ray",
) -> dict[str, Any]:
    """Measure every model on every task and write `out/evaluation.json`.

    Cells that an interrupted run had finished are not measured again. A finished `out` with the
    same inputs is read, not done again.

    Returns:
        the content of `evaluation.json`: percent, standard errors and numbers of prompts per model.

    Raises:
        InputError: a model or task that cannot be read; `out` holds something else and `force`
            is false.
    """
    out = Path(out)
    cells = plan_cells(config)
    key = fingerprint(sorted(cell.fingerprint for cell in cells))
    if (out / RESULT_FILE).is_file() and not force:
        finished = json.loads((out / RESULT_FILE).read_text())
        if finished["fingerprint"] == key:
            return finished
    with staged_directory(out, force=force) as folder:
        results = list(_measure(cells, folder, config.num_workers, executor))
        tasks = _selected_tasks(config)
        summary = {
            "schema": 1,
            "split": config.split,
            "fingerprint": key,
            "models": {name: summarise(name, tasks, results) for name in config.models},
        }
        write_atomically(folder / RESULT_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _selected_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks the config asks for."""
    tasks = load_tasks(config.tasks)
    names = [task.name for task in tasks]
    for name in config.only or ():
        if name not in names:
            raise InputError(f"{config.tasks}: only: unknown task {name!r}; allowed: {names}")
    return [task for task in tasks if config.only is None or task.name in config.only]


def plan_cells(config: EvaluateConfig) -> list[Cell]:
    """All cells of the matrix, those of one model together; every input is looked at first."""
    tasks = _selected_tasks(config)
    for task in tasks:
        load_rows(task, config.split)
    cells = []
    for name, path in config.models.items():
        if not (path / "config.json").is_file():
            raise InputError(f"models.{name}: {path}: no Hugging Face checkpoint there")
        model_key = fingerprint_directory(path, MODEL_FILES)
        settings = (config.max_new_tokens, config.batch_size, config.limit)
        for task in tasks:
            task_key = fingerprint_file(task.files[config.split])
            definition = task.model_dump_json()
            key = fingerprint(
                [model_key, task_key, task.grader.model_dump(), task.prompt, settings]
            )
            cells.append(Cell(name, str(path.absolute()), definition, config.split, *settings, key))
    return cells


def _measure(
    cells: list[Cell], folder: Path, num_workers: int, executor: str
) -> Iterator[CellResult]:
    """Results of all cells: those already finished first, then the others as they come."""
    missing = []
    for cell in cells:
        done = finished_cell(folder, cell.model, json.loads(cell.task)["name"], cell.fingerprint)
        if done is None:
            missing.append(cell)
        else:
            yield done
    if not missing:
        return
    run = _in_ray if executor == "ray" else _in_this_process
    with Progress(len(missing), "cells") as progress:
        for row in run(missing, folder, num_workers):
            result = CellResult(**row)
            progress.advance(note=f"{result.model} on {result.task}: {result.value:.1f}")
            yield result


def _in_this_process(cells: list[Cell], folder: Path, _: int) -> Iterator[dict[str, Any]]:
    import torch

    worker = CellWorker(str(folder), num_threads=torch.get_num_threads())
    for cell in cells:
        yield worker({"cell": json.dumps(asdict(cell))})


def _in_ray(cells: list[Cell], folder: Path, num_workers: int) -> Iterable[dict[str, Any]]:
    """Cells through a pool of Ray Data actors; only descriptions and numbers pass through Ray."""
    import ray

    size = min(num_workers, len({cell.path for cell in cells}))
    # A block is all cells of one model, so that an actor loads each model once.
    blocks = len({cell.path for cell in cells})
    rows = [{"cell": json.dumps(asdict(cell))} for cell in cells]
    dataset = ray.data.from_items(rows, override_num_blocks=blocks)
    return dataset.map(
        CellWorker,
        fn_constructor_args=(str(folder.absolute()),),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=0.9,
    ).iter_rows()


def summarise(model: str, tasks: list[Task], results: list[CellResult]) -> dict[str, Any]:
    """Per-task numbers of one model, the three H's (means of their tasks) and their average."""
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
    """The name with the highest average of the H's; the first of equals."""
    return max(names, key=lambda name: summary["models"][name]["average"]["value"])
