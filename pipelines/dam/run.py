"""Learn DAM's coefficients under Ray Train, and merge by them: check, train, merge, commit."""

import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import ModelDigest
from pipelines.checkpoints.hub import described, folder_of, hub_ids, recorded
from pipelines.commit import (
    commit_directory,
    lock,
    make_folder,
    partial_path,
    refuse_existing,
    write_atomically,
)
from pipelines.dam.config import DamConfig, Expert
from pipelines.dam.loop import dam_worker
from pipelines.dam.model import merged_parameters
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_directory, fingerprint_file, fingerprint_work
from pipelines.hub.offline import is_offline
from pipelines.merge import MergeConfig, MergePlan, merge_planned, plan_merge
from pipelines.merge.coefficients import FILE, Role
from pipelines.provenance import Provenance, read_record
from pipelines.rounding import rounding_text
from pipelines.train.data import (
    DataSet,
    SetTable,
    TokenSettings,
    TokenTable,
    joined_table,
    num_steps_of,
    source_files,
    split_table,
    token_table,
)
from pipelines.train.data.hub import data_folder
from pipelines.train.evaluation_config import evaluation_text
from pipelines.train.files import EXPORTED_FILE, METRICS_FILE, MODEL_FOLDER, TENSORBOARD_FOLDER
from pipelines.train.inputs import check_vocabulary
from pipelines.train.run import CACHE_FOLDER, CHECKPOINT_FILES, asked_threads
from pipelines.train.strategies.loading import empty_model
from pipelines.train.trackers import check_trackers
from pipelines.train.workers import Job, run_workers

COEFFICIENTS_FOLDER = "coefficients"  # of the result: beside its weights, others would load them
# Settings that may change while a run stays the same run.
IMMATERIAL = {
    *("storage", "cache", "max_failures", "checkpoint_every", "keep_checkpoints"),
    *("tensorboard", "trackers", "gradient_checkpointing"),
}
# Fields of config.json that do not change what a model computes from its weights.
_BOOKKEEPING = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"),
}


@dataclass(frozen=True)
class Plan:
    """The plan of a run, after all inputs were checked; rows by the position of their expert."""

    config: DamConfig
    roles: dict[str, tuple[str, Role]]
    num_steps: int
    tables: dict[int, TokenTable]
    held_out: dict[int, TokenTable]
    data_keys: dict[int, str]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of everything that the run reads; computing them reads every byte."""
        paths = {"base_model": self.config.base_model}
        paths |= {f"models.{i}": each.model for i, each in enumerate(self.config.models)}
        keys = {name: fingerprint_directory(path, CHECKPOINT_FILES) for name, path in paths.items()}
        return keys | {f"data.{place}": key for place, key in self.data_keys.items()}

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of everything that determines the run's result."""
        same = self.config.model_dump(mode="json", exclude=IMMATERIAL)
        del same["base_model"], same["models"], same["base_data"]  # their content is in the inputs
        names = [data.title for data in self.config.sets.values()]
        return fingerprint_work([same, names, self.inputs], "dam", "merge")


def dam(config: DamConfig, out: str | Path, *, force: bool = False) -> Path:
    """Learn coefficients by the config and write the merge to `out`; Ray must be running.

    `out` becomes a Hugging Face checkpoint with `coefficients/dam.safetensors`, `metrics.jsonl`
    (one line per step), `poise.json` and a model card. An interrupted run continues from its last
    checkpoint; a finished `out` with the same config and inputs is kept.

    Raises:
        InputError: config, models or data that cannot be used; `out` or its unfinished run belongs
            to another config and `force` is false.
        TrainingError: the run failed; the message is one line with the reason.
    """
    out = Path(out).absolute()
    cache = (config.cache or out.parent / CACHE_FOLDER).absolute()
    plan = plan_dam(config, cache)
    record = read_record(out) if out.exists() else None
    if record is not None and record.get("fingerprint") == plan.fingerprint and not force:
        return out
    refuse_existing(out, force=force)
    folder = partial_path(out)
    with _unfinished_run(folder, plan, force=force):
        settings = worker_settings(plan, folder)
        job = Job(out.name, settings, partial(_commit, plan, out, force=force))
        run_workers(plan.config, [job], dam_worker)
    return out


def plan_dam(config: DamConfig, cache: Path | None = None) -> Plan:
    """Check every input and plan the run.

    Args:
        cache: the folder for tokens. If neither this nor the config names one, a temporary folder
            is used, which is removed together with the plan's tables.

    Raises:
        InputError: config, models or data that cannot be used.
    """
    cache = cache or config.cache
    if cache is None:
        cache = Path(tempfile.mkdtemp(prefix="poise-"))
        try:
            plan = plan_dam(config, cache)
        except BaseException:
            shutil.rmtree(cache, ignore_errors=True)
            raise
        weakref.finalize(plan, shutil.rmtree, cache, ignore_errors=True)
        return plan
    config, roles = check_dam(config)
    tables, held_out, keys = {}, {}, {}
    for place, data in config.sets.items():
        tables[place], keys[place] = _table_of(config, data, cache)
        check_vocabulary(Checkpoint.open(config.base_model), tables[place])
        if (evaluation := config.evaluation) is not None:
            assert evaluation.share is not None  # the config requires it
            (tables[place], keys[place]), (held_out[place], _) = split_table(
                tables[place], keys[place], evaluation.share, config.seed, cache
            )
    num_steps = config.num_steps
    if num_steps is None:
        most = max(table.num_rows for table in tables.values())
        num_steps = num_steps_of(config.num_epochs, most, config.rows_per_set)
    return Plan(config, roles, num_steps, tables, held_out, keys)


def check_dam(config: DamConfig) -> tuple[DamConfig, dict[str, tuple[str, Role]]]:
    """Check everything that needs no rows and no weights; returns the config with folders, and the
    model's parameters with roles.

    Raises:
        InputError: packages, models or files that are missing or do not match.
    """
    check_trackers(config.trackers)
    config = with_folders(config)
    for data in config.sets.values():
        source_files(data.path, data.split)
    return config, _check_models(config)


def with_folders(config: DamConfig) -> DamConfig:
    """The config with absolute folders for models and data, those of the hub fetched if need be.

    Raises:
        InputError: one that is neither in the hub's cache nor can be fetched.
    """

    def placed(data: DataSet | None) -> DataSet | None:
        path = data and data_folder(data.path, data.split).absolute()
        return data and data.model_copy(update={"path": path, "name": data.title})

    experts = [
        Expert(model=folder_of(each.model).absolute(), data=placed(each.data))
        for each in config.models
    ]
    base = {"base_model": folder_of(config.base_model).absolute()}
    changes = {"models": experts, "base_data": placed(config.base_data), **base}
    return config.model_copy(update=changes)


def _check_models(config: DamConfig) -> dict[str, tuple[str, Role]]:
    """The parameters with roles; raises InputError unless the experts fit the base."""
    plan_merge(_merge_config(config, "linear"))  # names, shapes, vocabularies
    model, base = empty_model(config.base_model, attention=config.attention)
    own = Checkpoint.open(config.base_model).config
    for each in config.models:
        other = Checkpoint.open(each.model).config
        for key in sorted((own.keys() | other.keys()) - _BOOKKEEPING):
            if own.get(key) != other.get(key):
                raise InputError(
                    f"{each.model}: config.json: {key}: found {other.get(key)!r}; allowed: "
                    f"{own.get(key)!r}, as in {config.base_model}"
                )
    roles = merged_parameters(model, base)
    has_head = any(role.kind == "head" for _, role in roles.values())
    if config.lm_head and "lm_head" in config.model_fields_set and not has_head:
        raise InputError(
            f"lm_head: found true, but {config.base_model} has no head of its own; allowed: false, "
            "or embeddings: true, which a tied head follows"
        )
    return roles


def _merge_config(config: DamConfig, method: str, **fields: Any) -> MergeConfig:
    """The merge of the experts into the base."""
    values = {
        "merge_method": method,
        "base_model": described(config.base_model),
        "models": [{"model": described(each.model)} for each in config.models],
        "dtype": config.dtype,
        **fields,
    }
    if method == "linear":
        values["parameters"] = {"weight": 1.0}
    return MergeConfig.model_validate({k: v for k, v in values.items() if v is not None})


def _table_of(config: DamConfig, data: DataSet, cache: Path) -> tuple[TokenTable, str]:
    """One data set as tokens of the base's tokenizer, and their fingerprint."""
    settings = TokenSettings(
        str(config.base_model),
        "texts",
        config.max_length,
        config.too_long,
        reading=data.reading(config.seed),
    )
    table, key = token_table(
        data.path, data.split, settings, cache, max_bad_share=config.max_bad_share
    )
    return joined_table([SetTable(data, table, key)], config.seed, cache)


def worker_settings(plan: Plan, folder: Path) -> dict[str, Any]:
    """The settings of a run for `dam_worker`."""
    return {
        "config": plan.config.model_dump_json(exclude_unset=True),
        "folder": str(folder),
        "tables": {str(place): str(table.folder) for place, table in plan.tables.items()},
        "held_out": {str(place): str(table.folder) for place, table in plan.held_out.items()},
        "num_steps": plan.num_steps,
        "num_threads": asked_threads(),
        "offline": is_offline(),
    }


def _commit(plan: Plan, out: Path, *, force: bool) -> None:
    """Merge by a finished run's coefficients, and move the result to `out`."""
    folder, config = partial_path(out), plan.config
    told = json.loads((folder / EXPORTED_FILE).read_text())["evaluation"]
    if told:
        print(f"  {out.name}: {evaluation_text(told)}", file=sys.stderr)
    model, file = folder / MODEL_FOLDER, folder / FILE
    planned = plan_merge(_merge_config(config, "dam", coefficients=str(file)))
    shutil.rmtree(model, ignore_errors=True)
    merge_planned(planned, model)
    _tell(plan, planned, model, out / COEFFICIENTS_FOLDER / FILE, told)
    (model / COEFFICIENTS_FOLDER).mkdir()
    # Copied, not moved: the originals are needed if this process is killed here.
    shutil.copyfile(file, model / COEFFICIENTS_FOLDER / FILE)
    shutil.copyfile(folder / METRICS_FILE, model / METRICS_FILE)
    if config.tensorboard:
        shutil.copytree(folder / TENSORBOARD_FOLDER, model / TENSORBOARD_FOLDER)
    commit_directory(model, out, force=force)
    shutil.rmtree(folder)


def _tell(plan: Plan, planned: MergePlan, model: Path, file: Path, told: Any) -> None:
    """Write record and card of a merge again, with its training, and with the coefficients where
    they will be, so that the merge can be made again from them.
    """
    config, merged = plan.config, read_record(model)
    assert merged is not None  # the merge wrote it
    experts = [config.base_model, *(each.model for each in config.models)]
    data = [each.path for each in config.sets.values()]
    settings = config.model_dump(mode="json", exclude={"storage", "cache"}, exclude_unset=True)
    rounding = merged["rounding"]
    Provenance(
        kind="merged",
        digest=ModelDigest(merged["weights"], merged["companions"]),
        fingerprint=plan.fingerprint,
        config={**planned.settings, "coefficients": str(file)},
        inputs={name: ModelDigest(**digests) for name, digests in merged["inputs"].items()},
        seed=config.seed,
        details={
            "rounding": rounding,
            "coefficients": {str(file): fingerprint_file(planned.config.coefficient_files[0])},
            "training": {
                "config": settings,
                "inputs": plan.inputs,
                "num_steps": told["written_step"] if told else plan.num_steps,
                "evaluation": told,
            },
            **recorded([*experts, *data]),
        },
        title="Differentiable adaptive merge",
        base_models=list(dict.fromkeys(i for e in experts for i in hub_ids(described(e)))),
        tags=["merge"],
        summary=(
            f"Made with Poise: {planned.config.method.summary}.\n\n"
            f"- base: `{described(config.base_model)}`\n"
            f"- models: {', '.join(f'`{described(each)}`' for each in experts[1:])}\n"
            f"- data: {', '.join(f'`{described(each)}`' for each in data)}\n"
            f"- loss: {config.loss}, {plan.num_steps:,} steps of {config.rows_per_set} row(s) of "
            f"each set" + ("" if rounding is None else f"\n\n{rounding_text(rounding)}")
        ),
    ).write(model)


@contextmanager
def _unfinished_run(folder: Path, plan: Plan, *, force: bool) -> Iterator[None]:
    """Lock the folder of an unfinished run: a new one, or one of the same plan to continue.

    Raises:
        InputError: the folder holds another run.
    """
    path = folder / "run.json"
    found = json.loads(path.read_text()) if path.is_file() else {"fingerprint": plan.fingerprint}
    if found["fingerprint"] != plan.fingerprint:
        if not force:
            raise InputError(
                f"{folder}: holds an unfinished run of another config or other inputs; "
                "remove it, choose another output, or --force to begin anew"
            )
        shutil.rmtree(folder)
    make_folder(folder)
    with lock(folder):
        write_atomically(path, json.dumps({"fingerprint": plan.fingerprint, "inputs": plan.inputs}))
        yield
