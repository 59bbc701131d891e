"""Align a model under Ray Train: check everything, train, commit an ordinary checkpoint."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Checkpoint, CheckpointDelta, lock_directory
from pipelines.commit import commit_directory, partial_path, refuse_existing, write_atomically
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory, fingerprint_file
from pipelines.progress import Progress
from pipelines.train.config import AlignConfig
from pipelines.train.data import num_steps_of, prepare_pairs
from pipelines.train.loop import METRICS_FILE, MODEL_FOLDER, train_worker
from pipelines.versions import versions

PROVENANCE_FILE = "poise.json"
CHECKPOINT_FILES = ("*.safetensors", "*.json")
POLL_S = 0.5


def align(config: AlignConfig, out: str | Path, *, force: bool = False) -> Path:
    """Train as the config says and write the aligned model to `out`; Ray is up already.

    `out` becomes a Hugging Face checkpoint with `metrics.jsonl` (one line a step) and `poise.json`
    (config, fingerprints, versions). A run that was interrupted goes on from its last checkpoint;
    a finished `out` of the same config and inputs is left as it is.

    Raises:
        InputError: config, model or data that cannot be used; `out` or its unfinished run belongs
            to another config and `force` is false.
    """
    out = Path(out).absolute()
    plan = plan_alignment(config)
    if _finished(out, plan["fingerprint"]) and not force:
        return out
    refuse_existing(out, force=force)
    folder = partial_path(out)
    with _unfinished_run(folder, plan["fingerprint"], force=force):
        _train(config, folder, plan["num_steps"])
        provenance = {
            "kind": "aligned",
            "config": config.model_dump(mode="json", exclude={"storage"}),
            "inputs": plan["inputs"],
            "fingerprint": plan["fingerprint"],
            "versions": versions(),
        }
        model = folder / MODEL_FOLDER
        write_atomically(model / PROVENANCE_FILE, json.dumps(provenance, indent=2) + "\n")
        (folder / METRICS_FILE).replace(model / METRICS_FILE)
        commit_directory(model, out, force=force)
    shutil.rmtree(folder)
    return out


def plan_alignment(config: AlignConfig) -> dict[str, Any]:
    """Look at every input, and say what the run will do.

    Returns:
        numbers of parameters, pairs, steps and tokens; fingerprints of the inputs and of the run.
    """
    checkpoint = Checkpoint.open(config.model)
    pairs, _ = prepare_pairs(config)
    inputs = {
        "model": fingerprint_directory(config.model, CHECKPOINT_FILES),
        "data": fingerprint_file(config.data),
    }
    if config.optimizer.reference is not None:
        reference = config.optimizer.reference
        _check_delta(checkpoint, CheckpointDelta(reference.base, reference.tuned))
        for name in ("base", "tuned"):
            path = getattr(reference, name)
            inputs[f"optimizer.reference.{name}"] = fingerprint_directory(path, CHECKPOINT_FILES)
    num_steps = config.num_steps or num_steps_of(
        config.num_epochs, len(pairs), config.global_batch_size
    )
    lengths = [2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    mean_tokens = sum(lengths) / len(lengths)
    settings = config.model_dump(mode="json", exclude={"storage", "max_failures"})
    return {
        "num_parameters": checkpoint.num_elements,
        "num_pairs": len(pairs),
        "num_steps": num_steps,
        "num_tokens": round(mean_tokens * config.global_batch_size * num_steps),
        "inputs": inputs,
        "fingerprint": fingerprint([settings, inputs]),
    }


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
def _unfinished_run(folder: Path, key: str, *, force: bool) -> Iterator[None]:
    """Hold the folder of an unfinished run: a new one, or one of the same config to go on with."""
    record = folder / "run.json"
    if record.is_file() and json.loads(record.read_text()) != key:
        if not force:
            raise InputError(
                f"{folder}: holds an unfinished run of another config or other inputs; "
                "remove it, choose another output, or --force to begin anew"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_directory(folder):
        write_atomically(record, json.dumps(key))
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        yield


def _train(config: AlignConfig, folder: Path, num_steps: int) -> None:
    """Run the workers; lost ones are started again and go on from the last checkpoint."""
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = torch.cuda.is_available()
    resources = {"GPU": 1.0} if on_gpu else {"CPU": 0.9}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump_json(), "folder": str(folder)},
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
    with _watched(folder / METRICS_FILE, num_steps):
        trainer.fit()


@contextmanager
def _watched(metrics: Path, num_steps: int) -> Iterator[None]:
    """Progress of a run, read from the metrics that rank 0 writes."""
    stop = threading.Event()

    def follow(progress: Progress) -> None:
        while not stop.wait(POLL_S):
            lines = metrics.read_text().splitlines() if metrics.is_file() else []
            if lines:
                last = _parsed(lines)
                note = f"loss {last['loss']:.3f}, accuracy {last['accuracy']:.2f}"
                progress.update(last["step"], note)

    with Progress(num_steps, "steps") as progress:
        thread = threading.Thread(target=follow, args=(progress,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _parsed(lines: list[str]) -> dict[str, Any]:
    """The last whole line; the very last one may be half written."""
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        return json.loads(lines[-2]) if len(lines) > 1 else {"step": 0, "loss": 0, "accuracy": 0}
