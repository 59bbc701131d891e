"""Align a model under Ray Train: check everything, train, commit an ordinary checkpoint."""

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Checkpoint, CheckpointDelta, lock_directory
from pipelines.commit import commit_directory, partial_path, refuse_existing, write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory
from pipelines.progress import Progress
from pipelines.train.config import ZERO_STAGES, AlignConfig
from pipelines.train.data import TokenSettings, TokenTable, num_steps_of, token_table
from pipelines.train.errors import forget_failure, raise_failure
from pipelines.versions import versions

PROVENANCE_FILE, METRICS_FILE, MODEL_FOLDER = "poise.json", "metrics.jsonl", "model"
TENSORBOARD_FOLDER = "tensorboard"
CACHE_FOLDER = ".poise-cache"
CHECKPOINT_FILES = ("*.safetensors", "*.json")
POLL_S = 0.5
# Settings under which a run is still the same run.
IMMATERIAL = {
    "storage",
    "cache",
    "max_failures",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "num_workers",
    "micro_batch_size",
    "gradient_checkpointing",
    "cpu_offload",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, once every input has been looked at."""

    num_parameters: int
    num_steps: int
    num_tokens: int
    table: TokenTable
    data_key: str
    inputs: dict[str, str]
    fingerprint: str


def align(config: AlignConfig, out: str | Path, *, force: bool = False) -> Path:
    """Train as the config says and write the aligned model to `out`; Ray is up already.

    `out` becomes a Hugging Face checkpoint with `metrics.jsonl` (one line a step) and `poise.json`
    (config, fingerprints, versions). A run that was interrupted goes on from its last checkpoint;
    a finished `out` of the same config and inputs is left as it is.

    Raises:
        InputError: config, model or data that cannot be used; `out` or its unfinished run belongs
            to another config and `force` is false.
        TrainingError: the run failed; one line says why.
    """
    out = Path(out).absolute()
    cache = (config.cache or out.parent / CACHE_FOLDER).absolute()
    plan = plan_alignment(config, cache)
    if _finished(out, plan.fingerprint) and not force:
        return out
    refuse_existing(out, force=force)
    if remarks := plan.table.counts.remarks():
        print(f"  {remarks}", file=sys.stderr)
    folder = partial_path(out)
    with _unfinished_run(folder, plan.fingerprint, config, force=force):
        _train(config, worker_settings(config, plan, folder, cache), plan.num_steps)
        provenance = {
            "kind": "aligned",
            "config": config.model_dump(mode="json", exclude={"storage", "cache"}),
            "inputs": plan.inputs,
            "fingerprint": plan.fingerprint,
            "versions": versions(),
        }
        model = folder / MODEL_FOLDER
        write_atomically(model / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
        # Copied: the originals are needed again should this process be killed right here.
        shutil.copyfile(folder / METRICS_FILE, model / METRICS_FILE)
        if config.tensorboard:
            shutil.copytree(folder / TENSORBOARD_FOLDER, model / TENSORBOARD_FOLDER)
        commit_directory(model, out, force=force)
    shutil.rmtree(folder)
    return out


def plan_alignment(config: AlignConfig, cache: Path | None = None) -> Plan:
    """Look at every input, and say what the run will do.

    Args:
        cache: where tokens are kept; without it they are made and thrown away.

    Raises:
        InputError: config, model or data that cannot be used.
    """
    if cache is None and config.cache is None:
        with tempfile.TemporaryDirectory() as folder:
            return plan_alignment(config, Path(folder))
    checkpoint = Checkpoint.open(config.model)
    settings = TokenSettings(
        str(config.model),
        config.objective.definition.rows,
        config.max_length,
        config.too_long,
    )
    table, data_key = token_table(
        config.data,
        config.split,
        settings,
        cache or config.cache,
        max_bad_share=config.max_bad_share,
    )
    _check_vocabulary(checkpoint, table)
    inputs = {"model": fingerprint_directory(config.model, CHECKPOINT_FILES), "data": data_key}
    if config.reference_model is not None:
        _check_reference(checkpoint, Checkpoint.open(config.reference_model))
        inputs["reference_model"] = fingerprint_directory(config.reference_model, CHECKPOINT_FILES)
    if config.optimizer.reference is not None:
        reference = config.optimizer.reference
        _check_delta(checkpoint, CheckpointDelta(reference.base, reference.tuned))
        for name in ("base", "tuned"):
            path = getattr(reference, name)
            inputs[f"optimizer.reference.{name}"] = fingerprint_directory(path, CHECKPOINT_FILES)
    num_steps = config.num_steps or num_steps_of(
        config.num_epochs, table.num_rows, config.global_batch_size
    )
    same = config.model_dump(mode="json", exclude=IMMATERIAL)
    same["strategy"] = config.strategy if config.strategy in ZERO_STAGES else "native"
    mean_tokens = float(table.lengths.sum(axis=1).mean())
    return Plan(
        num_parameters=checkpoint.num_elements,
        num_steps=num_steps,
        num_tokens=round(mean_tokens * config.global_batch_size * num_steps),
        table=table,
        data_key=data_key,
        inputs=inputs,
        fingerprint=fingerprint([same, inputs]),
    )


def with_absolute_paths(config: AlignConfig) -> AlignConfig:
    """The config for workers, which Ray Train starts in another working directory."""
    paths = {"model": config.model.absolute(), "data": config.data.absolute()}
    if config.reference_model is not None:
        paths["reference_model"] = config.reference_model.absolute()
    reference = config.optimizer.reference
    if reference is not None:
        places = {"base": reference.base.absolute(), "tuned": reference.tuned.absolute()}
        update = {"reference": reference.model_copy(update=places)}
        paths["optimizer"] = config.optimizer.model_copy(update=update)
    return config.model_copy(update=paths)


def worker_settings(config: AlignConfig, plan: Plan, folder: Path, cache: Path) -> dict[str, Any]:
    """What `train_worker` is told."""
    return {
        "config": with_absolute_paths(config).model_dump_json(),
        "folder": str(folder),
        "cache": str(cache),
        "tokens": str(plan.table.folder),
        "data_key": plan.data_key,
        "reference_key": plan.inputs.get("reference_model", plan.inputs["model"]),
        "num_steps": plan.num_steps,
    }


def _check_vocabulary(model: Checkpoint, table: TokenTable) -> None:
    """Raise InputError where the tokenizer knows tokens that the model does not."""
    size = model.config.get("vocab_size")
    if size is not None and table.largest_id() >= size:
        raise InputError(
            f"model {model.path}: its tokenizer gives token {table.largest_id()}; its vocabulary "
            f"has {size} tokens"
        )


def _check_reference(model: Checkpoint, reference: Checkpoint) -> None:
    """Raise InputError where the reference model's tokens are not the model's."""
    needed, found = (c.config.get("vocab_size") for c in (model, reference))
    if needed != found:
        raise InputError(
            f"reference_model: {reference.path}: found a vocabulary of {found} tokens; the model's "
            f"has {needed}"
        )


def _check_room(config: AlignConfig, resources: dict[str, float]) -> None:
    """Raise InputError where a Ray of this machine alone can never run so many workers."""
    import ray

    ((kind, share),) = resources.items()
    found = ray.cluster_resources().get(kind, 0.0)
    if not os.environ.get("RAY_ADDRESS") and share * config.num_workers > found:
        raise InputError(
            f"num_workers: found {config.num_workers}; allowed: up to {int(found / share)}, for "
            f"which this machine has {kind}s"
        )


def _check_delta(model: Checkpoint, delta: CheckpointDelta) -> None:
    """Raise InputError unless the reference delta fits the model's tensors."""
    for name, tensor in model.tensors.items():
        shape = delta.shape(name)
        if shape != tensor.shape:
            found = "no such tensor" if shape is None else f"shape {list(shape)}"
            raise InputError(
                f"optimizer.reference: {name}: found {found}; the model's is {list(tensor.shape)}"
            )


def _finished(out: Path, key: str) -> bool:
    """Whether `out` is what this run would make."""
    path = out / PROVENANCE_FILE
    return path.is_file() and json.loads(path.read_text()).get("fingerprint") == key


@contextmanager
def _unfinished_run(folder: Path, key: str, config: AlignConfig, *, force: bool) -> Iterator[None]:
    """Hold the folder of an unfinished run: a new one, or one of the same config to go on with.

    Raises:
        InputError: the folder holds another run, or one whose checkpoints need as many workers as
            wrote them.
    """
    path = folder / "run.json"
    record = {
        "fingerprint": key,
        "num_workers": config.num_workers,
        "config": with_absolute_paths(config).model_dump(mode="json"),
    }
    found = json.loads(path.read_text()) if path.is_file() else record
    if any(found.get(name) != record[name] for name in ("fingerprint", "num_workers")):
        same_run = found.get("fingerprint") == key
        if same_run and config.strategy in ZERO_STAGES and not force:
            raise InputError(
                f"num_workers: found {config.num_workers}; {folder} holds an unfinished run with "
                f"strategy {config.strategy}, which goes on with {found['num_workers']}"
            )
        if not same_run and not force:
            raise InputError(
                f"{folder}: holds an unfinished run of another config or other inputs; "
                "remove it, choose another output, or --force to begin anew"
            )
        if not same_run or force:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_directory(folder):
        write_atomically(path, json.dumps(record))
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        yield


def _train(config: AlignConfig, settings: dict[str, Any], num_steps: int) -> None:
    """Run the workers; lost ones are started again and go on from the last checkpoint."""
    # The controller looks at its workers this often, and the run's end waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.train.loop import train_worker

    folder = Path(settings["folder"])
    on_gpu = torch.cuda.is_available()
    resources = {"GPU": 1.0} if on_gpu else {"CPU": 0.9}
    _check_room(config, resources)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    forget_failure(folder)
    with _watched(folder / METRICS_FILE, num_steps):
        try:
            with _usual_interrupt():
                trainer.fit()
        except TrainingFailedError as error:
            raise_failure(folder, error)
    raise_failure(folder)


@contextmanager
def _usual_interrupt() -> Iterator[None]:
    """Ctrl-C in the block is a KeyboardInterrupt, and after it what it was before.

    Ray Train answers Ctrl-C by leaving the program with status 0 or 1, and goes on doing so when
    its run is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _watched(metrics: Path, num_steps: int) -> Iterator[None]:
    """Progress of a run, read from the metrics that rank 0 writes."""
    stop = threading.Event()

    def follow(progress: Progress) -> None:
        while not stop.wait(POLL_S):
            last = _last_record(metrics)
            if last is not None:
                note = f"loss {last['loss']:.3f}"
                if "accuracy" in last:
                    note += f", accuracy {last['accuracy']:.2f}"
                progress.update(last["step"], note)

    with Progress(num_steps, "steps") as progress:
        thread = threading.Thread(target=follow, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """The last whole line; the very last one may be half written."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for line in reversed(lines[-2:]):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None
