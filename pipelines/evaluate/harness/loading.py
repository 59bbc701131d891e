"""From what a config names to tasks that are ready: `load_tasks`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pipelines.config import Config, check
from pipelines.errors import InputError
from pipelines.evaluate.graders import require_code
from pipelines.evaluate.groups import Group
from pipelines.evaluate.harness.averages import averages_of
from pipelines.evaluate.harness.library import built, require_library
from pipelines.evaluate.harness.names import folder_tasks, own_task, own_tasks, unknown
from pipelines.evaluate.harness.requests import sampling_of
from pipelines.evaluate.harness.splits import SPLITS, Split, documents_of
from pipelines.evaluate.harness.tasks import Chat, Task

if TYPE_CHECKING:
    from lm_eval.api.group import Group as LibraryGroup
    from lm_eval.api.task import Task as LibraryTask
    from lm_eval.tasks._index import Entry

LIBRARY_SEED = 1234  # the library's own default for few-shot examples


class TaskSet(Config):
    """Tasks by name, with what holds for all of them."""

    section = "tasks."

    names: list[str] | None = Field(
        None, min_length=1, description="tasks, groups, tags; default: all tasks of include_path"
    )
    include_path: Path | None = Field(
        None, description="a folder of YAML files; default: the library's own tasks"
    )
    num_fewshot: int | None = Field(None, ge=0, description="default: as each task says, else 0")
    chat: bool | None = Field(
        None, description="use the chat template; default: metadata.chat of each task, else false"
    )
    system_instruction: str | None = Field(None, description="before all other messages")
    fewshot_as_multiturn: bool = Field(True, description="examples as turns of the conversation")
    generation_kwargs: dict[str, Any] | None = Field(None, description="over those of each task")

    @model_validator(mode="after")
    def _names_something(self) -> "TaskSet":
        if self.names is None and self.include_path is None:
            raise ValueError("names: required without include_path")
        return self


def load_tasks(
    specs: Sequence[str | Mapping[str, Any] | TaskSet],
    split: Split = "test",
    *,
    limit: int | None = None,
    seed: int = LIBRARY_SEED,
    allow_code: bool = False,
) -> list[Task]:
    """The tasks that names, or mappings of `TaskSet`, stand for, each with its documents.

    Raises:
        InputError: as `load_tasks_and_averages`.
    """
    tasks, _ = load_tasks_and_averages(specs, split, limit=limit, seed=seed, allow_code=allow_code)
    return tasks


def load_tasks_and_averages(
    specs: Sequence[str | Mapping[str, Any] | TaskSet],
    split: Split = "test",
    *,
    limit: int | None = None,
    seed: int = LIBRARY_SEED,
    allow_code: bool = False,
) -> tuple[list[Task], dict[str, Group]]:
    """As `load_tasks`, and the averages that the library's groups among the names define.

    Args:
        split: a task with one split alone is halved.
        limit: only so many documents of each task, from the first on.
        seed: of few-shot examples, halves, and sampled answers.
        allow_code: functions and metrics that are code may be run, and programs that models write.

    Raises:
        InputError: an unknown name, a task that is there twice, code that is not allowed, data that
            cannot be had, a config that does not fit its data.
    """
    if split not in SPLITS:
        raise InputError(f"split: found {split!r}; allowed: {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: found {limit}; allowed: 1 or more")
    require_library()
    sets = [_as_set(spec, place) for place, spec in enumerate(specs)]
    found = [(each, *_libraries(each, allow_code)) for each in sets]
    tasks = [
        _ready(library, each, split, limit, seed, allow_code)
        for each, libraries, _ in found
        for library in libraries
    ]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tasks: {name} is there twice; names must differ")
    return tasks, averages_of([group for _, _, groups in found for group in groups], tasks)


def _as_set(spec: str | Mapping[str, Any] | TaskSet, place: int) -> TaskSet:
    """One entry of a config's tasks."""
    if isinstance(spec, TaskSet):
        return spec
    return check({"names": [spec]} if isinstance(spec, str) else spec, TaskSet, f"tasks.{place}")


def _libraries(chosen: TaskSet, allow_code: bool) -> "tuple[list[LibraryTask], list[LibraryGroup]]":
    """The library's tasks of a set, and the groups that they were named by."""
    tasks: list[LibraryTask] = []
    groups: list[LibraryGroup] = []

    def add(entry: "Entry", registry: "dict[str, Entry]", inside: Path | None) -> None:
        own, above = built(entry, registry, allow_code, inside)
        tasks.extend(own)
        groups.extend(above)

    if chosen.include_path is None:
        for name in chosen.names or []:
            index = own_task(name) or own_tasks()
            if name not in index:
                raise unknown(name, index, "lm-evaluation-harness")
            add(index[name], index, None)
        return tasks, groups
    folder = folder_tasks(chosen.include_path, allow_code=allow_code)
    registry = _with_members(folder)
    for name in chosen.names or [name for name, entry in folder.items() if _is_task(entry)]:
        if name not in folder:
            raise unknown(name, folder, str(chosen.include_path))
        add(registry[name], registry, chosen.include_path)
    return tasks, groups


def _is_task(entry: "Entry") -> bool:
    return entry.kind.name in ("TASK", "PY_TASK")


def _with_members(folder: "dict[str, Entry]") -> "dict[str, Entry]":
    """A folder's index, with the library's own tasks that its groups name."""
    groups = [entry.cfg for entry in folder.values() if entry.kind.name == "GROUP"]
    found: dict[str, Entry] = {}
    for name in sorted({name for each in groups if each for name in _members(each)} - set(folder)):
        one = own_task(name)
        if one is None:
            return {**own_tasks(), **folder}
        found |= one
    return {**found, **folder}


def _members(group: Mapping[str, Any]) -> Iterator[str]:
    """The names in a group's list."""
    members = group.get("task")
    for each in members if isinstance(members, list) else []:
        yield str(each.get("group", each.get("task")) if isinstance(each, dict) else each)


def _may_grade(task: str, grader: str, allow_code: bool) -> None:
    """Make sure that a task's grader may run, and can."""
    try:
        require_code(grader, allow_code)
    except InputError as error:
        raise InputError(f"task {task}: metadata.grader: {error}") from None


def _ready(
    library: "LibraryTask",
    chosen: TaskSet,
    split: Split,
    limit: int | None,
    seed: int,
    allow_code: bool,
) -> Task:
    """A task with the settings of its set and the documents of its split."""
    name = library.task_name
    if chosen.generation_kwargs is not None:
        if library.OUTPUT_TYPE != "generate_until":
            raise InputError(
                f"task {name}: generation_kwargs: has no effect with {library.OUTPUT_TYPE}"
            )
        library.set_config("generation_kwargs", chosen.generation_kwargs, update=True)
    if library.OUTPUT_TYPE == "generate_until" and library.config.generation_kwargs is not None:
        sampling_of(name, library.config.generation_kwargs)
    task = Task(
        library=library,
        documents=documents_of(library, split, seed),
        split=split,
        limit=limit,
        seed=seed,
        num_fewshot=_num_fewshot(library, chosen.num_fewshot),
        chat=_chat(library, chosen),
    )
    if len(task) == 0:
        raise InputError(f"task {name}: {task.remark or split}: holds no documents")
    if task.grading is not None:  # a bad grader is found before anything runs
        _may_grade(name, task.grading.name, allow_code)
    return task


def _chat(library: "LibraryTask", chosen: TaskSet) -> Chat:
    """How a task's prompts become conversations.

    Raises:
        InputError: `metadata.chat` is no truth value, or turns are said without a conversation.
    """
    metadata = library.config.metadata
    wanted = metadata.get("chat", False) if isinstance(metadata, dict) else False
    if not isinstance(wanted, bool):
        raise InputError(
            f"task {library.task_name}: metadata.chat: found {wanted!r}; allowed: true, false"
        )
    wanted = wanted if chosen.chat is None else chosen.chat
    if not (wanted or chosen.fewshot_as_multiturn):
        raise InputError(
            f"task {library.task_name}: fewshot_as_multiturn: has no effect without chat"
        )
    return Chat(wanted, chosen.system_instruction, chosen.fewshot_as_multiturn)


def _num_fewshot(library: "LibraryTask", wanted: int | None) -> int:
    """The number of examples; a task that is without them by its config stays so.

    Raises:
        InputError: it is, and others are wanted.
    """
    own = library.config.num_fewshot
    if wanted is None:
        wanted = own or 0
    elif own == 0 and wanted > 0:
        raise InputError(
            f"task {library.task_name}: num_fewshot: found {wanted}; allowed: 0, as the task says"
        )
    library.set_config("num_fewshot", wanted)
    return wanted
