"""An evaluation as planned: every input is checked before an engine starts."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.adapter import is_adapter
from pipelines.checkpoints.digests import DigestMemory, ModelDigest
from pipelines.checkpoints.hub import folder_of
from pipelines.engines import EngineConfig
from pipelines.engines.models import check_kind
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.groups import Group, resolve_groups
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.opened import open_all
from pipelines.evaluate.places import Folder, Place, open_place
from pipelines.evaluate.scoring import ScoredTask
from pipelines.evaluate.store import Cell, cell_key
from pipelines.evaluate.workers import Model
from pipelines.fingerprint import fingerprint
from pipelines.robustness.task import AttackedTask
from pipelines.versions import versions

MODELS_FILE = "models.json"  # in the output: the models' files and digests


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """An evaluation, ready to run.

    Attributes:
        models: by name; with the digests of their weights.
        headers: of the models' files.
        groups: averages by name.
        cells: by names of model and task.
        answers: of tasks with a scorer, the cells of the answers, by the same names.
        memory: holds the digests together with the identity of the models' files.
    """

    config: EvaluateConfig
    out: Place
    tasks: Sequence[EvaluationTask]
    models: dict[str, Model]
    headers: dict[str, CheckpointWeights]
    groups: dict[str, Group]
    cells: dict[tuple[str, str], Cell]
    answers: dict[tuple[str, str], Cell]
    memory: DigestMemory

    @property
    def fingerprint(self) -> str:
        """The fingerprint of everything that the numbers depend on."""
        return fingerprint(sorted(cell.key for cell in self.cells.values()))


def plan_evaluation(
    config: EvaluateConfig, out: str | Path, memory: DigestMemory | None = None
) -> EvaluationPlan:
    """Check every input, and name the cells.

    Args:
        out: a folder or an address; an earlier, perhaps unfinished run may have left known digests
            there.
        memory: known digests of models; new ones are added to it.

    Raises:
        InputError: a model or task that cannot be read.
    """
    place, memory = open_place(out), memory or DigestMemory()
    if MODELS_FILE in place.names():
        memory.load(place.read(MODELS_FILE))
    tasks, groups = open_all(config)
    _check_groups(groups, [task.name for task in tasks])
    _check_place(place, tasks)
    folders = {name: folder_of(path) for name, path in config.models.items()}
    config = config.model_copy(update={"models": folders})
    headers = {name: _opened(name, path, config.engine) for name, path in folders.items()}
    digests = {name: memory.digest(each.checkpoint) for name, each in headers.items()}
    models = {
        name: Model(name, str(path.absolute()), digests[name].weights)
        for name, path in folders.items()
    }
    cells: dict[tuple[str, str], Cell] = {}
    answers: dict[tuple[str, str], Cell] = {}
    for name, task in itertools.product(models, tasks):
        if isinstance(task, ScoredTask):
            answers[name, task.name] = cell_of(config, name, digests[name], task.answered)
            cells[name, task.name] = scored_cell(answers[name, task.name], task)
        else:
            cells[name, task.name] = cell_of(config, name, digests[name], task)
    return EvaluationPlan(config, place, tasks, models, headers, groups, cells, answers, memory)


def _check_place(place: Place, tasks: Sequence[EvaluationTask]) -> None:
    """Raise InputError for a scorer that needs a folder where there is none."""
    if isinstance(place, Folder):
        return
    for task in tasks:
        if isinstance(task, ScoredTask) and task.scorer.needs_folder:
            raise InputError(
                f"{place.address}: cannot keep the replies of {task.name} as they come, as an "
                "object store adds nothing to a file; choose a folder as output"
            )


def _check_groups(groups: Mapping[str, Group], tasks: Sequence[str]) -> None:
    """Raise InputError for unknown members and cycles. Which metrics a task has is known when it
    is measured.
    """

    def without_metric(member: str) -> str:
        if member in groups or member in tasks:
            return member
        owners = [task for task in tasks if member.startswith(f"{task}.")]
        return max(owners, key=len) if owners else member

    whole = {
        name: group.model_copy(
            update={"members": list(dict.fromkeys(map(without_metric, group.members)))}
        )
        for name, group in groups.items()
    }
    resolve_groups(whole, {task: ["its metric"] for task in tasks})


def cell_of(config: EvaluateConfig, name: str, digest: ModelDigest, task: EvaluationTask) -> Cell:
    """The cell of a model and a task.

    Args:
        name: the model's in the config.
        digest: the model's, be it written or in memory.
    """
    engine = config.engine.identity
    key = cell_key(asdict(digest), task.fingerprint, engine)
    described: dict[str, Any] = {
        "model": name,
        "digest": asdict(digest),
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "documents": task.num_documents,
        "split": config.split,
        "limit": config.limit,
        "engine": engine,
        "versions": versions(),
    }
    if isinstance(task, AttackedTask):
        described["attack"] = task.described
    return Cell(task.name, key, task.num_documents, described)


def scored_cell(answers: Cell, task: ScoredTask) -> Cell:
    """The cell of the scores of a cell of answers."""
    key = fingerprint([answers.key, task.scorer.fingerprint])
    described = answers.described | {
        "task": task.name,
        "task_fingerprint": task.fingerprint,
        "answers": [answers.task, answers.key],
        "scorer": task.scorer.described,
    }
    return Cell(task.name, key, answers.num_documents, described)


def _opened(name: str, path: Path, engine: EngineConfig) -> CheckpointWeights:
    """A model's headers; damaged files and models that no engine runs are found here."""
    if not (path / "config.json").is_file():
        raise InputError(f"models.{name}: {path}: no Hugging Face checkpoint there")
    if is_adapter(path):  # transformers would silently apply it when it loads the model
        raise InputError(
            f"models.{name}: {path}: holds an adapter beside the model; allowed: one of them "
            "(poise merge makes a model of both)"
        )
    headers = CheckpointWeights(Checkpoint.open(path))
    check_kind(headers, engine)
    return headers
