"""One cell of the matrix (models x tasks): generate, grade, average."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from operators.statistics import clustered_mean
from pipelines.checkpoints.hub import bring
from pipelines.commit import write_atomically
from pipelines.evaluate.generate import Generator
from pipelines.evaluate.graders import grade
from pipelines.evaluate.tasks import Split, Task, load_rows


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one task, with everything that its result depends on."""

    model: str
    path: str
    task: str  # the task as JSON
    split: Split
    max_new_tokens: int
    batch_size: int
    limit: int | None
    weights: str  # the digest of the model's weights
    fingerprint: str


@dataclass(frozen=True, slots=True)
class CellResult:
    """A model's percentage of right answers over n prompts, and its standard error."""

    model: str
    task: str
    value: float
    stderr: float
    n: int
    fingerprint: str
    weights: str = ""  # empty in cells of earlier versions


def cell_path(folder: str | Path, model: str, task: str) -> Path:
    """The file with a finished cell's numbers."""
    return Path(folder) / "cells" / model / f"{task}.json"


def finished_cell(folder: str | Path, model: str, task: str, fingerprint: str) -> CellResult | None:
    """The result of a cell from an earlier run on the same inputs, if there is one."""
    path = cell_path(folder, model, task)
    if not path.is_file():
        return None
    result = CellResult(**json.loads(path.read_text()))
    return result if result.fingerprint == fingerprint else None


def run_cell(cell: Cell, generator: Generator, folder: str | Path) -> CellResult:
    """Measure one cell and commit its completions and its numbers below `folder`.

    The completions (`completions/MODEL/TASK.jsonl`) are written first, so a cell with numbers is
    complete. Writing them twice is harmless.
    """
    task = Task.model_validate_json(cell.task)
    rows = load_rows(task, cell.split)[: cell.limit]
    completions = generator.complete(
        [row.prompt for row in rows],
        max_new_tokens=cell.max_new_tokens,
        batch_size=cell.batch_size,
    )
    values = [
        grade(task.grader.name, completion, row.answers, task.grader.parameters)
        for row, completion in zip(rows, completions, strict=True)
    ]
    lines = [
        json.dumps({"id": row.id, "completion": completion, "value": value})
        for row, completion, value in zip(rows, completions, values, strict=True)
    ]
    folder = Path(folder)
    write_atomically(
        folder / "completions" / cell.model / f"{task.name}.jsonl", "\n".join(lines) + "\n"
    )
    mean, error = clustered_mean(values, [row.cluster for row in rows])
    result = CellResult(
        model=cell.model,
        task=task.name,
        value=100 * mean,
        stderr=100 * error,
        n=len(rows),
        fingerprint=cell.fingerprint,
        weights=cell.weights,
    )
    write_atomically(cell_path(folder, cell.model, task.name), json.dumps(asdict(result)))
    return result


class CellWorker:
    """A Ray Data actor that measures cells and keeps the last model it loaded.

    What a node lacks of the hub's models it fetches, unless the user is `offline`.
    """

    def __init__(self, num_threads: int = 1, *, offline: bool = False) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.offline = offline
        self.path = ""
        self.generator: Generator | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Run the cell described by `row["cell"]` (JSON), committed below `row["folder"]`; returns
        the folder and the result (JSON).
        """
        cell = Cell(**json.loads(row["cell"]))
        if self.generator is None or self.path != cell.path:
            self.generator = None  # free the old model before loading the new one
            bring([cell.path], offline=self.offline)
            self.generator, self.path = Generator(cell.path), cell.path
        result = run_cell(cell, self.generator, row["folder"])
        return {"folder": row["folder"], "result": json.dumps(asdict(result))}
