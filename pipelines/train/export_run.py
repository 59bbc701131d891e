"""A model from a checkpoint of a run that is still going on, or was given up."""

import contextlib
import io
import json
from pathlib import Path

import torch
from torch import Tensor

from operators.optim import ShardLayout
from pipelines.commit import partial_path, refuse_existing, staged_directory, write_atomically
from pipelines.errors import InputError
from pipelines.train.checkpoints import saved_steps, step_folder
from pipelines.train.config import ZERO_STAGES, AlignConfig
from pipelines.train.export import Owner, export_model
from pipelines.train.strategies import build_strategy
from pipelines.versions import versions

RUN_FILE = "run.json"


def export_checkpoint(
    run: str | Path, out: str | Path, *, step: int | None = None, force: bool = False
) -> Path:
    """Write the model of a training checkpoint as an ordinary Hugging Face checkpoint.

    Args:
        run: where the run's output will be, or the hidden folder beside it.
        out: where the model goes.
        step: which of the kept checkpoints; the newest unless given.
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
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{folder}: has no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"step: found {step}; allowed: {', '.join(map(str, steps))}")
    owner = _owner(config, step_folder(folder, step), step)
    with staged_directory(out, force=force) as partial:
        export_model(owner, config.model, partial)
        provenance = {
            "kind": "aligned",
            "step": step,
            "config": record["config"],
            "fingerprint_of_run": record["fingerprint"],
            "versions": versions(),
        }
        write_atomically(partial / "poise.json", json.dumps(provenance, indent=2) + "\n")
    return Path(out)


def _owner(config: AlignConfig, checkpoint: Path, step: int) -> Owner:
    """The weights of a checkpoint, in this process alone."""
    if config.strategy in ZERO_STAGES:
        gap = config.optimizer.merge_every
        if step % gap:
            raise InputError(f"step: found {step}; allowed: a multiple of merge_every ({gap})")
        return _ZeroWeights(checkpoint)
    here = config.model_copy(update={"strategy": "single", "num_workers": 1, "cpu_offload": False})
    strategy = build_strategy(here, torch.device("cpu"))
    strategy.load(checkpoint)
    strategy.merge_pending()
    return strategy


class _ZeroWeights:
    """Master weights put together from DeepSpeed's checkpoint files."""

    def __init__(self, checkpoint: Path) -> None:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it reads
            self._state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="state")
        self.parameter_names = frozenset(self._state)

    def owned(self) -> list[tuple[ShardLayout, Tensor]]:
        """All of them, whole."""
        return [
            (ShardLayout(name, tuple(value.shape), 0, value.numel()), value.reshape(-1))
            for name, value in self._state.items()
        ]
