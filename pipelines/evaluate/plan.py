"""The config of `poise evaluate`, and its plan: all inputs are checked before anything runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.adapter import is_adapter
from pipelines.checkpoints.digests import DigestMemory, ModelDigest
from pipelines.checkpoints.hub import folder_of
from pipelines.commit import partial_path
from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.evaluate.cells import Cell
from pipelines.evaluate.tasks import Split, Task, load_rows, load_tasks
from pipelines.fingerprint import (
    fingerprint,
    fingerprint_directory,
    fingerprint_file,
    fingerprint_work,
)

MODELS_FILE = "models.json"  # beside an evaluation's numbers: the models' files and digests
# The files of a model's key in versions without digests.
_FILES_OF_VERSION_1 = ("*.safetensors", "*.json", "*.jinja", "*.model")


class EvaluateConfig(Config):
    """The models, the tasks, and the settings of generation."""

    models: dict[str, Path] = Field(
        min_length=1, description="name -> checkpoint, or name on the hub"
    )
    tasks: Path = Field(description="a tasks.yaml")
    only: list[str] | None = Field(None, description="names of the tasks to run; default all")
    split: Split = "test"
    max_new_tokens: int = Field(32, ge=1, le=8192)
    batch_size: int = Field(256, ge=1)
    limit: int | None = Field(
        None, ge=1, description="use only this many prompts of each task, from the first on"
    )
    num_workers: int = Field(2, ge=1, description="Ray Data actors, one model in memory each")
    storage: Path | None = Field(None, description="where relative outputs live")

    @field_validator("models")
    @classmethod
    def _plain_names(cls, models: dict[str, Path]) -> dict[str, Path]:
        for name in models:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"model name {name!r}: must be a plain file name")
        return models


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """An evaluation, ready to run.

    Attributes:
        digests: of the models, by their names in the config.
        memory: holds these digests together with the identity of their files.
    """

    config: EvaluateConfig
    out: Path
    tasks: list[Task]
    digests: dict[str, ModelDigest]
    cells: list[Cell]
    memory: DigestMemory

    @property
    def fingerprint(self) -> str:
        """The fingerprint of everything that the numbers depend on."""
        return fingerprint(sorted(cell.fingerprint for cell in self.cells))

    def fingerprint_of_version_1(self) -> str:
        """The fingerprint of versions without digests; it reads all files of the models."""
        models = {
            name: fingerprint_directory(path, _FILES_OF_VERSION_1)
            for name, path in self.config.models.items()
        }
        return fingerprint(sorted(_keys(self.config, self.tasks, models).values()))


def plan_evaluation(
    config: EvaluateConfig, out: str | Path, memory: DigestMemory | None = None
) -> EvaluationPlan:
    """Check every input and list the cells of the matrix, model by model.

    Args:
        out: the output; an earlier, perhaps unfinished run may have left known digests there.
        memory: known digests of models; new digests are added to it.

    Raises:
        InputError: a model or task that cannot be read.
    """
    out, memory = Path(out), memory or DigestMemory()
    for folder in (partial_path(out), out):
        memory.load(folder / MODELS_FILE)
    tasks = _selected_tasks(config)
    for task in tasks:
        load_rows(task, config.split)
    folders = {name: folder_of(path) for name, path in config.models.items()}
    config = config.model_copy(update={"models": folders})
    checkpoints = {name: _opened(name, path) for name, path in config.models.items()}
    digests = {name: memory.digest(checkpoint) for name, checkpoint in checkpoints.items()}
    keys = _keys(config, tasks, {name: asdict(digest) for name, digest in digests.items()})
    cells = [
        Cell(
            model=name,
            path=str(path.absolute()),
            task=task.model_dump_json(),
            split=config.split,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            limit=config.limit,
            weights=digests[name].weights,
            fingerprint=keys[name, task.name],
        )
        for name, path in config.models.items()
        for task in tasks
    ]
    return EvaluationPlan(config, out, tasks, digests, cells, memory)


def _selected_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks the config asks for."""
    tasks = load_tasks(config.tasks)
    names = [task.name for task in tasks]
    for name in config.only or ():
        if name not in names:
            raise InputError(f"{config.tasks}: only: unknown task {name!r}; allowed: {names}")
    return [task for task in tasks if config.only is None or task.name in config.only]


def _opened(name: str, path: Path) -> Checkpoint:
    """A model's headers; damaged files are found here."""
    if not (path / "config.json").is_file():
        raise InputError(f"models.{name}: {path}: no Hugging Face checkpoint there")
    if is_adapter(path):  # transformers would silently apply it when it loads the model
        raise InputError(
            f"models.{name}: {path}: holds an adapter beside the model; allowed: one of them "
            "(poise merge makes a model of both)"
        )
    return Checkpoint.open(path)


def _keys(
    config: EvaluateConfig, tasks: list[Task], models: Mapping[str, Any]
) -> dict[tuple[str, str], str]:
    """The fingerprint of each cell, by model and task.

    Args:
        models: for each model, the value that identifies it.
    """
    settings = (config.max_new_tokens, config.batch_size, config.limit)
    files = {task.name: fingerprint_file(task.files[config.split]) for task in tasks}
    return {
        (name, task.name): fingerprint_work(
            [model, files[task.name], task.grader.model_dump(), task.prompt, settings], "evaluate"
        )
        for name, model in models.items()
        for task in tasks
    }
