"""Trainings as candidates: a trial is a run of `poise align`, whose model is then measured.

Trials of a group train in turn on the same workers, with the same tokens and reference
log-probabilities, into `OUT/models/NUMBER`. Models that are not on the front are removed.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.commit import partial_path
from pipelines.config import check, load_config
from pipelines.errors import InputError
from pipelines.evaluate.workers import error_line
from pipelines.fingerprint import fingerprint_directory, fingerprint_file
from pipelines.merge import MergeConfig
from pipelines.provenance import read_record
from pipelines.search.measurement import Measurement
from pipelines.search.pool import Failed, LocalPool, MeasurerPool
from pipelines.search.stopping import StoppingConfig
from pipelines.train import AlignConfig, align_in_turn, check_inputs, plan_alignment
from pipelines.train.data import source_files
from pipelines.train.errors import DivergenceError, TrainingError
from pipelines.train.evaluation import Bounds
from pipelines.train.files import METRICS_FILE
from pipelines.train.material import material
from pipelines.train.models import model_paths, with_folders
from pipelines.train.run import CACHE_FOLDER, CHECKPOINT_FILES
from pipelines.train.workers import check_cluster

MODELS = "models"
LARGEST_GROUP = 16  # of trials whose points do not depend on results
SMOKE_STEPS = 8
_SMOKE = [f"num_steps={SMOKE_STEPS}", "num_epochs=null", "warmup_steps=null"]


@dataclass(frozen=True)
class Training:
    """What a trial trains.

    Attributes:
        out: the folder of its model.
        bounds: where it ends if it is behind the trials before it.
    """

    config: AlignConfig
    out: Path
    bounds: Bounds | None = None


def load_training(path: Path, fields: Mapping[str, Any], *, smoke: bool = False) -> AlignConfig:
    """The config of a training at a point of the space.

    Args:
        smoke: with a few steps.

    Raises:
        InputError: fields that do not go together, or a model that could not be measured.
    """
    overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    config = load_config(path, AlignConfig, [*overrides, *(_SMOKE if smoke else [])])
    if config.head is not None:
        raise InputError(
            f"{path}: objective: found {config.objective.label}, whose model does not answer; "
            "allowed in a study: others"
        )
    if config.lora is not None and config.lora.save == "adapter":
        raise InputError(f"{path}: lora.save: found adapter; allowed in a study: merged, both")
    return config


def identities_of(config: AlignConfig) -> dict[str, Any]:
    """What identifies a training's models and data, which are checked.

    Raises:
        InputError: as `check_inputs`.
    """
    check_inputs(config)
    config = with_folders(config)
    models = {
        name: fingerprint_directory(path, CHECKPOINT_FILES)
        for name, path in model_paths(config).items()
    }
    files = [
        fingerprint_file(file)
        for data in (*config.sets, *config.held_out_sets)
        for file in source_files(data.path, data.split)
    ]
    return {"models": models, "data": files, "config": material(config)}


def check_stopping(
    path: Path, stopping: StoppingConfig, runs: Sequence[AlignConfig], *, smoke: bool
) -> None:
    """Raise InputError for trainings that can never stop early, which short ones to try may."""
    for run in runs:
        if run.evaluation is None:
            raise InputError(
                f"stopping: needs held-out rows; {path} has none: give it evaluation, with every"
            )
        short = run.num_steps is not None and stopping.min_steps >= run.num_steps
        if short and not smoke:
            raise InputError(
                f"stopping.min_steps: found {stopping.min_steps}; allowed: less than the "
                f"{run.num_steps} steps of a training"
            )


def as_it_is(model: Path) -> MergeConfig:
    """A model as a candidate."""
    fields = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    return check(fields, MergeConfig, str(model))


class TrainingPool:
    """Trains several candidates in turn on one group of workers, then measures each.

    Args:
        measurer: measures models, one at a time.
        size: the most candidates of a group.
    """

    def __init__(self, measurer: LocalPool | MeasurerPool, size: int) -> None:
        self.size, self._measurer = size, measurer
        self._waiting: dict[int, Training] = {}  # by worker, as they came
        self._ready: deque[tuple[int, MergeConfig | Failed, Path | None]] = deque()

    def start(self, worker: int, candidate: Any, documents: Any = None, race: Any = None) -> None:
        """Give an idle worker a training, or a model to be measured as it is."""
        if isinstance(candidate, Training):
            self._waiting[worker] = candidate
        else:
            self._ready.append((worker, candidate, None))

    def finished(self) -> tuple[int, Measurement | Failed]:
        """The next one that is measured; trains those that wait when no other is ready."""
        if not self._ready:
            self._ready.extend(self._trained())
        worker, candidate, folder = self._ready.popleft()
        if isinstance(candidate, Failed):
            return worker, candidate
        self._measurer.start(0, candidate)
        _, measured = self._measurer.finished()
        if isinstance(measured, Measurement):
            measured = _with_training(measured, folder)
        return worker, measured

    def close(self) -> None:
        """Free the engine."""
        self._measurer.close()

    def _trained(self) -> Iterator[tuple[int, MergeConfig | Failed, Path | None]]:
        """Train the next group. What is behind a failure waits for the next one."""
        group = {}
        for worker, training in self._group().items():
            try:  # each by itself, so that a mistake is told of the right one
                plan_alignment(training.config, _cache(training))
                group[worker] = training
            except InputError as error:
                del self._waiting[worker]
                yield worker, Failed("refused", str(error)), None
        if isinstance(self._measurer, MeasurerPool):
            self._measurer.close()  # training may need its place
        failed = _train(group.values()) if group else None
        for worker, training in group.items():
            if read_record(training.out) is not None:
                del self._waiting[worker]
                yield worker, as_it_is(training.out), training.out
            elif failed is not None:
                del self._waiting[worker]
                yield worker, failed, None
                return

    def _group(self) -> dict[int, Training]:
        """Those that wait and need the same workers as the first one."""
        first = next(iter(self._waiting.values())).config
        return {
            worker: training
            for worker, training in self._waiting.items()
            if (training.config.num_workers, training.config.max_failures)
            == (first.num_workers, first.max_failures)
        }


def _train(group: Collection[Training]) -> Failed | None:
    """Train in turn; returns the first failure, with which it ends."""
    try:
        bounds = {each.out: each.bounds for each in group if each.bounds is not None}
        align_in_turn([(each.config, each.out) for each in group], bounds=bounds)
    except (InputError, DivergenceError) as error:  # which would come again
        return Failed("refused", str(error))
    except TrainingError as error:
        return Failed("failed", str(error))
    except Exception as error:  # whatever a library raises: the other trials go on
        return Failed("failed", error_line(error))
    return None


def _cache(training: Training) -> Path:
    """Where `align_in_turn` keeps the tokens, for all trials of a study."""
    return (training.config.cache or training.out.parent / CACHE_FOLDER).absolute()


def _with_training(measured: Measurement, folder: Path | None) -> Measurement:
    """A measurement with the seconds of a training's steps, its tokens as a metric, and its curve.

    Args:
        folder: of its model; None of a model that is not trained here.
    """
    text = "" if folder is None else (folder / METRICS_FILE).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if "seconds" in line]
    tokens = sum(round(line["tokens_per_s"] * line["seconds"]) for line in steps)
    told = (read_record(folder) or {}).get("evaluation") if folder is not None else None
    metric = None if told is None else told["metric"]
    return replace(
        measured,
        values=measured.values | {"tokens": float(tokens)},
        stderr=measured.stderr | {"tokens": 0.0},
        seconds=measured.seconds | {"training": sum(line["seconds"] for line in steps)},
        stopped=told is not None and told.get("behind", False),
        curve={line["step"]: line[metric] for line in steps if metric in line},
    )


def check_workers(configs: Collection[AlignConfig]) -> None:
    """Check that each training can ever have its workers; Ray must be running.

    Raises:
        InputError: it cannot; with what is needed.
    """
    for config in {each.num_workers: each for each in configs}.values():
        check_cluster(config)


def keep_models(folder: Path, wanted: Collection[int], num_trials: int) -> None:
    """Remove the models, finished or not, of all trials but some.

    Args:
        folder: of the study.
    """
    for number in {*range(num_trials)} - {*wanted}:
        model = model_of(folder, number)
        for path in (model, partial_path(model)):
            if path.is_dir():
                shutil.rmtree(path)


def model_of(folder: Path, number: int) -> Path:
    """Where a trial's model is."""
    return folder / MODELS / f"{number:06d}"


def publish(model: Path, out: Path) -> None:
    """Give a trained model another place beside its own, with links where the disk has them."""
    part = partial_path(out)
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part, copy_function=_link)
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)


def _link(source: str, place: str) -> str:
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)
    return place
