"""A model from a checkpoint of an unfinished run."""

import json
from pathlib import Path

import torch

from operators.optim.layout import layout_of
from pipelines.checkpoints.hub import bring
from pipelines.commit import partial_path, refuse_existing, staged_directory
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.hub.offline import is_offline
from pipelines.train.checkpoints import saved_steps, step_folder
from pipelines.train.config import AlignConfig, SavedDtype, SaveSettings
from pipelines.train.export import export_result, provenance
from pipelines.train.models import model_paths
from pipelines.train.random_start import with_start
from pipelines.train.strategies import Strategy, build_strategy
from pipelines.train.strategies.zero_layout import Layouts
from pipelines.train.strategies.zero_resume import SavedShards, load_shards

RUN_FILE = "run.json"


def export_checkpoint(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: SavedDtype | None = None,
    force: bool = False,
) -> Path:
    """Write the model of a training checkpoint as an ordinary Hugging Face checkpoint.

    Args:
        run: the future output of the run, or the hidden folder beside it.
        out: the model's folder.
        step: which of the kept checkpoints; the newest unless given.
        dtype: of the weights; `save.dtype` of the run unless given.
        force: replace an existing `out`.

    Raises:
        InputError: no unfinished run there, no such checkpoint, or `out` exists.
    """
    refuse_existing(out, force=force)
    folder = Path(run) if (Path(run) / RUN_FILE).is_file() else partial_path(Path(run))
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{run}: holds no unfinished run; a finished one is a checkpoint already")
    record = json.loads((folder / RUN_FILE).read_text())
    config = AlignConfig.model_validate(record["config"])
    bring(model_paths(config).values(), offline=is_offline())
    if dtype is not None:
        if config.lora is not None and config.lora.save == "adapter":
            raise InputError("--dtype: has no effect with lora.save: adapter")
        config = config.model_copy(update={"save": SaveSettings(dtype=dtype)})
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{folder}: has no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"step: found {step}; allowed: {', '.join(map(str, steps))}")
    started = with_start(config, folder)
    strategy = _strategy(started, step_folder(folder, step))
    with staged_directory(out, force=force) as partial:
        saved = export_result(strategy, started, partial)
        assert saved is not None  # this process is alone
        provenance(
            config,
            "exported",
            saved.digest,
            key=fingerprint([record["fingerprint"], step] + ([dtype] if dtype else [])),
            inputs=record.get("inputs", {}),
            num_steps=step,
            details={
                "step": step,
                "fingerprint_of_run": record["fingerprint"],
                "rounding": saved.rounding,
            },
        ).write(partial)
    return Path(out)


def _strategy(config: AlignConfig, checkpoint: Path) -> Strategy:
    """The model of a checkpoint in this single process, with what the end of a run does to it."""
    here = config.model_copy(update={"strategy": "single", "num_workers": 1, "cpu_offload": False})
    strategy = build_strategy(here, torch.device("cpu"))
    if config.traits.zero_stage:
        parameters = dict(strategy.model.named_parameters())
        layouts: Layouts = {
            values: [layout_of(name, values)] for name, values in parameters.items()
        }
        load_shards(SavedShards(checkpoint), layouts, strategy.optimizer)
    else:
        strategy.load(checkpoint)
    strategy.finish()
    return strategy
