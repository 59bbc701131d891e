"""Tasks: prompts in JSONL files, a grader, and the dimension (one of the three H's)."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config, check, load_yaml
from pipelines.errors import InputError
from pipelines.evaluate.graders import GRADERS

Dimension = Literal["helpfulness", "honesty", "harmlessness"]
Split = Literal["development", "test"]
DIMENSIONS: tuple[Dimension, ...] = ("helpfulness", "honesty", "harmlessness")


class GraderConfig(Config):
    """The grader's name; its parameters are further fields."""

    model_config = Config.model_config | {"extra": "allow"}
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The grader's parameters."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "GraderConfig":
        if self.name not in GRADERS:
            raise ValueError(f"unknown grader {self.name!r}; allowed: {', '.join(GRADERS)}")
        entry = GRADERS[self.name]
        allowed = set(entry.parameters.model_fields)
        if not entry.needed <= set(self.parameters) <= allowed:
            found, known = sorted(self.parameters), sorted(allowed)
            raise ValueError(f"grader {self.name!r} takes the parameters {known}, found {found}")
        try:
            check(self.parameters, entry.parameters, f"grader {self.name!r}")
        except InputError as error:
            raise ValueError(str(error)) from None
        return self


class Task(Config):
    """One task of `tasks.yaml`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    dimension: Dimension | None = Field(None, description="the H it counts for; none: shown only")
    grader: GraderConfig
    prompt: Literal["chat", "text"] = "chat"
    files: dict[Split, Path] = Field(description="JSONL files, relative to tasks.yaml")
    description: str = ""

    @model_validator(mode="after")
    def _without_code(self) -> "Task":
        if GRADERS[self.grader.name].runs_code:
            raise ValueError(
                f"grader {self.grader.name!r}: runs programs; allowed only where allow_code is"
            )
        return self


class Row(Config):
    """One prompt of a task's file."""

    id: str
    prompt: str | list[dict[str, str]]
    answer: str | list[str] | None = None
    cluster: str = Field(description="prompts of one cluster are not independent")

    @property
    def answers(self) -> list[str]:
        """The accepted answers, as a list."""
        if self.answer is None:
            return []
        return [self.answer] if isinstance(self.answer, str) else list(self.answer)


def load_tasks(path: str | Path) -> list[Task]:
    """The tasks of a `tasks.yaml`, with absolute paths of their files.

    Raises:
        InputError: the file is missing or bad, or two tasks have the same name.
    """
    path = Path(path)
    entries = load_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of tasks")
    tasks = [check(entry, Task, f"{path}: task {i}") for i, entry in enumerate(entries)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: two tasks are named {twice!r}; names must differ")
    folder = path.absolute().parent
    return [
        task.model_copy(update={"files": {k: folder / v for k, v in task.files.items()}})
        for task in tasks
    ]


def load_rows(task: Task, split: Split) -> list[Row]:
    """The prompts of one split of a task.

    Raises:
        InputError: the task has no such split, or a line of its file is not a row.
    """
    if split not in task.files:
        raise InputError(f"task {task.name!r}: has no {split} file; found: {sorted(task.files)}")
    path = task.files[split]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"task {task.name!r}: {path}: {error.strerror}") from None
    rows = [_row(line, task, f"{path} line {i + 1}") for i, line in enumerate(lines) if line]
    if not rows:
        raise InputError(f"task {task.name!r}: {path}: holds no prompts")
    return rows


def _row(line: str, task: Task, source: str) -> Row:
    """One line of a task's file, checked against the task."""
    try:
        row = check(json.loads(line), Row, source)
    except json.JSONDecodeError:
        raise InputError(f"{source}: not JSON") from None
    wanted = str if task.prompt == "text" else list
    if not isinstance(row.prompt, wanted):
        expected = "a text" if wanted is str else "a list of messages"
        raise InputError(f"{source}: prompt: expected {expected} in a {task.prompt} task")
    if GRADERS[task.grader.name].needs_answers and not row.answers:
        raise InputError(f"{source}: answer: required by the grader {task.grader.name!r}")
    return row
