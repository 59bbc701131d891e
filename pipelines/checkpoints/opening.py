"""Opening what a config calls a model: a checkpoint, an adapter, or both with a `+` between."""

from pathlib import Path

from pipelines.checkpoints.lora import ADAPTER_CONFIG, AdaptedCheckpoint, is_adapter
from pipelines.checkpoints.reader import Checkpoint, read_json
from pipelines.checkpoints.source import Source
from pipelines.errors import InputError


def open_model(name: str, base: str | None = None) -> Source:
    """Open a model by its name in a config.

    Args:
        name: a checkpoint's folder; an adapter's folder; or `CHECKPOINT+ADAPTER`.
        base: the checkpoint of an adapter that names none that exists.

    Raises:
        InputError: nothing there, or nothing that can be merged.
    """
    folder, plus, adapter = name.partition("+")
    if plus and not Path(name).exists():
        return AdaptedCheckpoint.open(adapter, Checkpoint.open(folder))
    path = Path(name)
    if not is_adapter(path):
        return Checkpoint.open(path)
    own = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    candidates = [str(own)] if own and Path(own).is_dir() else []
    if base is not None and base != name:
        candidates.append(base)
    if not candidates:
        raise InputError(
            f"adapter {path}: its base {own!r} is no folder here; allowed: base_model, or a model "
            f"written as CHECKPOINT+{path}"
        )
    return AdaptedCheckpoint.open(path, Checkpoint.open(candidates[0]))
