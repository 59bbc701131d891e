"""Align a model under Ray Train: check everything, train, commit an ordinary checkpoint."""

import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.checkpoints.digests import ModelDigest
from pipelines.commit import (
    commit_directory,
    lock,
    make_folder,
    partial_path,
    refuse_existing,
    write_atomically,
)
from pipelines.errors import InputError
from pipelines.fingerprint import (
    CHECKPOINT_FILES,
    MEANING,
    fingerprint,
    fingerprint_directory,
    fingerprint_work,
)
from pipelines.hub.offline import is_offline
from pipelines.provenance import read_record
from pipelines.train.config import AlignConfig
from pipelines.train.data import (
    DataSet,
    SetTable,
    TokenSettings,
    TokenTable,
    joined_table,
    num_steps_of,
    prompts_of,
    split_table,
    token_table,
)
from pipelines.train.evaluation import Bounds
from pipelines.train.evaluation_config import evaluation_text
from pipelines.train.export import provenance
from pipelines.train.files import (
    EXPORTED_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    TENSORBOARD_FOLDER,
)
from pipelines.train.inputs import check_inputs, check_vocabulary, remarks
from pipelines.train.interfaces import OnWorkers
from pipelines.train.material import material, material_of
from pipelines.train.models import model_paths, with_data, with_folders, with_models
from pipelines.train.random_start import with_start
from pipelines.train.workers import Job, check_cluster, run_workers

CACHE_FOLDER = ".poise-cache"


@dataclass(frozen=True)
class Plan:
    """The plan of a run, after all inputs were checked."""

    config: AlignConfig
    num_parameters: int
    num_steps: int
    num_tokens: int
    table: TokenTable
    data_key: str
    tables: list[SetTable] = field(default_factory=list)
    held_out: TokenTable | None = None
    held_out_key: str = ""

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of everything that the run reads; computing them reads every byte."""
        paths = model_paths(self.config)
        keys = {name: fingerprint_directory(path, CHECKPOINT_FILES) for name, path in paths.items()}
        held_out = {"evaluation.data": self.held_out_key} if self.held_out_key else {}
        return keys | {"data": self.data_key} | held_out

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of everything that determines the run's result."""
        return fingerprint_work([material_of(self.config), self.inputs], "align")

    def remarks(self) -> Iterator[str]:
        """A line if a step takes rows more than once, and one if held-out rows are no new ones."""
        size, num_rows = self.config.global_batch_size, self.table.num_rows
        if size > num_rows:
            yield (
                f"global_batch_size: a step of {size} rows takes some of the {num_rows} rows of "
                "the data more than once"
            )
        if self.held_out is not None:
            trained = np.isin(prompts_of(self.held_out), prompts_of(self.table))
            if trained.any():
                yield (
                    f"evaluation.data: {trained.sum()} of {len(trained)} held-out rows have a "
                    "prompt of the training rows"
                )


def align(config: AlignConfig, out: str | Path, *, force: bool = False) -> Path:
    """Train by the config and write the aligned model to `out`; Ray must be running.

    `out` becomes a Hugging Face checkpoint with `metrics.jsonl` (one line per step), `poise.json`
    (config, digests, versions) and a model card. An interrupted run continues from its last
    checkpoint; a finished `out` with the same config and inputs is kept.

    Raises:
        InputError: config, model or data that cannot be used; `out` or its unfinished run belongs
            to another config and `force` is false.
        TrainingError: the run failed; the message is one line with the reason.
    """
    return align_in_turn([(config, out)], force=force)[0]


def align_in_turn(
    runs: Sequence[tuple[AlignConfig, str | Path]],
    *,
    force: bool = False,
    bounds: Mapping[Path, Bounds] | None = None,
) -> list[Path]:
    """As `align`, for several configs in turn on the same workers (starting workers takes longer
    than training a small model). Each output has the same bytes as from `align`.

    Each output gets its name as soon as it is finished.

    Args:
        bounds: by output, where a run ends if it is behind others.

    Raises:
        InputError, TrainingError: as `align`; or the configs need different workers.
    """
    check_same_workers([config for config, _ in runs])
    runs = [(with_folders(config), out) for config, out in runs]
    outs, jobs = [Path(out).absolute() for _, out in runs], []
    with ExitStack() as stack:
        for (config, _), out in zip(runs, outs, strict=True):
            cache = _cache_of(config, out)
            is_new = not out.exists()
            if is_new:
                check_cluster(config)  # early, before all data are read
            plan = plan_alignment(config, cache)
            if _finished(out, plan) and not force:
                continue
            refuse_existing(out, force=force)
            if not is_new:
                check_cluster(config)
            found = filter(None, [plan.table.counts.remarks(), *plan.remarks()])
            for line in [*found, *remarks(config)]:
                print(f"  {line}", file=sys.stderr)
            folder = partial_path(out)
            stack.enter_context(_unfinished_run(folder, plan, force=force))
            settings = worker_settings(config, plan, folder, cache)
            settings["bounds"] = (bounds or {}).get(out)
            jobs.append(Job(out.name, settings, partial(_commit, config, plan, out, force=force)))
        if jobs:
            run_workers(runs[0][0], jobs)
    return outs


def is_aligned(config: AlignConfig, out: str | Path) -> bool:
    """Whether `out` is the finished result of a config and its inputs, which are read.

    Raises:
        InputError: as `align`.
    """
    out = Path(out).absolute()
    if read_record(out) is None:
        return False
    return _finished(out, plan_alignment(with_folders(config), _cache_of(config, out)))


def _cache_of(config: AlignConfig, out: Path) -> Path:
    """The folder for tokens of a run."""
    return (config.cache or out.parent / CACHE_FOLDER).absolute()


def check_same_workers(configs: Sequence[OnWorkers]) -> None:
    """Raise InputError if the configs cannot share workers."""
    for name in ("num_workers", "max_failures"):
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            found = " and ".join(str(value) for value in sorted(values))
            raise InputError(f"{name}: found {found}; allowed: one value for runs on one group")


def _commit(config: AlignConfig, plan: Plan, out: Path, *, force: bool) -> None:
    """Move a finished run's model to `out`, with its provenance and metrics."""
    folder = partial_path(out)
    exported = json.loads((folder / EXPORTED_FILE).read_text())
    if path := exported["optimizer_path"]:
        print(f"  {out.name}: {config.optimizer.name} took the {path} path", file=sys.stderr)
    details = {
        "optimizer_path": path,
        "rounding": exported.get("rounding"),
        "delta": exported.get("delta"),
    }
    if told := exported.get("evaluation"):
        print(f"  {out.name}: {evaluation_text(told)}", file=sys.stderr)
        details["evaluation"] = told
    model = folder / MODEL_FOLDER
    provenance(
        config,
        "aligned",
        ModelDigest(exported["weights"], exported["companions"]),
        key=plan.fingerprint,
        inputs=plan.inputs,
        num_steps=told["written_step"] if told else plan.num_steps,
        details=details,
    ).write(model)
    # Copied, not moved: the originals are needed if this process is killed here.
    shutil.copyfile(folder / METRICS_FILE, model / METRICS_FILE)
    if config.tensorboard:
        shutil.copytree(folder / TENSORBOARD_FOLDER, model / TENSORBOARD_FOLDER)
    commit_directory(model, out, force=force)
    shutil.rmtree(folder)


def plan_alignment(config: AlignConfig, cache: Path | None = None) -> Plan:
    """Check every input and plan the run.

    Args:
        cache: the folder for tokens. If neither this nor the config names one, a temporary folder
            is used, which is removed together with the plan's table.

    Raises:
        InputError: config, model or data that cannot be used.
    """
    config = with_folders(config)
    cache = cache or config.cache
    if cache is None:
        cache = Path(tempfile.mkdtemp(prefix="poise-"))
        try:
            plan = plan_alignment(config, cache)
        except BaseException:
            shutil.rmtree(cache, ignore_errors=True)
            raise
        weakref.finalize(plan.table, shutil.rmtree, cache, ignore_errors=True)
        return plan
    checkpoint = check_inputs(config)
    tables = [_table_of(config, data, cache) for data in config.sets]
    table, data_key = joined_table(tables, config.seed, cache)
    check_vocabulary(checkpoint, table)
    held_out, held_out_key = None, ""
    if (evaluation := config.evaluation) is not None:
        if evaluation.share is not None:
            (table, data_key), (held_out, held_out_key) = split_table(
                table, data_key, evaluation.share, config.seed, cache
            )
        else:
            others = [_table_of(config, data, cache) for data in evaluation.sets]
            held_out, held_out_key = joined_table(others, config.seed, cache)
            check_vocabulary(checkpoint, held_out)
        evaluation.check_set_of_metric({each.name: each.rows for each in held_out.sets})
    num_steps = config.num_steps
    if num_steps is None:
        assert config.num_epochs is not None
        num_steps = num_steps_of(config.num_epochs, table.num_rows, config.global_batch_size)
    config.schedule_settings.check(config.warm_up(num_steps), num_steps)
    mean_tokens = float(table.lengths.sum(axis=1).mean())
    return Plan(
        config=config,
        num_parameters=checkpoint.num_elements,
        num_steps=num_steps,
        num_tokens=round(mean_tokens * config.global_batch_size * num_steps),
        table=table,
        data_key=data_key,
        tables=tables,
        held_out=held_out,
        held_out_key=held_out_key,
    )


def _table_of(config: AlignConfig, data: DataSet, cache: Path) -> SetTable:
    """One data set as tokens."""
    settings = TokenSettings(
        str(config.model),
        config.objective.definition.rows,
        config.max_length,
        config.too_long,
        keep_equal=config.objective.learns_equal_pairs,
        reading=data.reading(config.seed),
    )
    table, key = token_table(
        data.path, data.split, settings, cache, max_bad_share=config.max_bad_share
    )
    return SetTable(data, table, key)


def with_absolute_paths(config: AlignConfig) -> AlignConfig:
    """The config for workers, which Ray Train starts in another working directory."""
    return with_data(with_models(config, Path.absolute), lambda data: data.path.absolute())


def worker_settings(config: AlignConfig, plan: Plan, folder: Path, cache: Path) -> dict[str, Any]:
    """The settings of one run for `train_worker`; a random start is made if it is not there."""
    config = with_start(config, folder)
    return {
        "config": with_absolute_paths(config).model_dump_json(),
        "folder": str(folder),
        "cache": str(cache),
        "tokens": str(plan.table.folder),
        "data_key": plan.data_key,
        "held_out": plan.held_out
        and {"tokens": str(plan.held_out.folder), "key": plan.held_out_key},
        "reference_key": plan.inputs.get("reference_model", plan.inputs["model"]),
        "num_steps": plan.num_steps,
        "num_threads": asked_threads(),
        "offline": is_offline(),
    }


def asked_threads() -> int | None:
    """The user's OMP_NUM_THREADS. It is read here, because Ray overwrites it in the workers."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdigit() and int(first) else None


def _finished(out: Path, plan: Plan) -> bool:
    """Whether `out` is the finished result of this plan."""
    record = read_record(out)
    return record is not None and _is_of(record, plan)


def _is_of(record: dict[str, Any], plan: Plan) -> bool:
    """Whether a record is of this plan, written by this version or an earlier one."""
    found = record.get("fingerprint")
    if found in (plan.fingerprint, fingerprint_with_data_paths(plan)):
        return True
    return MEANING["align"] == 1 and found == fingerprint_by_old_names(plan)


def fingerprint_with_data_paths(plan: Plan) -> str:
    """The plan's fingerprint in versions where data in another place were others."""
    same = material_of(plan.config, with_data_paths=True)
    return fingerprint_work([same, plan.inputs], "align")


def fingerprint_by_old_names(plan: Plan) -> str:
    """The plan's fingerprint in the version where `tau` and `eager` were called `reference`."""
    config, inputs = plan.config, {"data": plan.data_key}
    same = material(config, with_data_paths=True)
    optimizer = same["optimizer"]
    for name in ("sparsifier", "consensus", "sparsifier_parameters"):
        del optimizer[name]  # that version did not have this field
    optimizer["reference"] = optimizer.pop("tau")
    if optimizer["implementation"] == "eager":
        optimizer["implementation"] = "reference"
    for name, path in model_paths(config).items():
        old = name.replace(".tau.", ".reference.")
        inputs[old] = fingerprint_directory(path, CHECKPOINT_FILES)
    return fingerprint([same, inputs])


@contextmanager
def _unfinished_run(folder: Path, plan: Plan, *, force: bool) -> Iterator[None]:
    """Lock the folder of an unfinished run: a new one, or one of the same plan to continue.

    Raises:
        InputError: the folder holds another run.
    """
    path = folder / "run.json"
    record = {
        "fingerprint": plan.fingerprint,
        "config": with_absolute_paths(plan.config).model_dump(mode="json"),
        "inputs": plan.inputs,
    }
    found = json.loads(path.read_text()) if path.is_file() else record
    if not _is_of(found, plan):
        if not force:
            raise InputError(
                f"{folder}: holds an unfinished run of another config or other inputs; "
                "remove it, choose another output, or --force to begin anew"
            )
        shutil.rmtree(folder)
    make_folder(folder)
    with lock(folder):
        write_atomically(path, json.dumps(record))
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        yield
