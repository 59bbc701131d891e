"""Models by their names in a config: a checkpoint, a LoRA adapter (PEFT), or both with a `+`
between, each a folder, or a name on the hub.
"""

from pathlib import Path

from pipelines.checkpoints.adapter import ADAPTER_CONFIG, is_adapter
from pipelines.checkpoints.hub import folder_of, hub_name, pinned
from pipelines.checkpoints.lora import AdaptedCheckpoint
from pipelines.checkpoints.reader import Checkpoint, read_json
from pipelines.checkpoints.source import Source
from pipelines.errors import InputError


def open_model(name: str, base: str | None = None) -> Source:
    """Open a model by its name in a config.

    Args:
        name: a checkpoint's folder; an adapter's folder; or `CHECKPOINT+ADAPTER`. Instead of a
            folder, the name of a model on the hub.
        base: the base checkpoint, for an adapter that does not name an existing one.

    Raises:
        InputError: there is nothing, or nothing that can be merged.
    """
    folder, plus, adapter = name.partition("+")
    if plus and not Path(name).exists():
        return AdaptedCheckpoint.open(folder_of(adapter), Checkpoint.open(folder_of(folder)))
    path = folder_of(name)
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
    return AdaptedCheckpoint.open(path, Checkpoint.open(folder_of(candidates[0])))


def pinned_model(name: str, base: str | None = None) -> str:
    """A model's name that stays the same model: names of the hub get their commit, and an adapter
    that names a base on the hub becomes `CHECKPOINT+ADAPTER`, unless `base` is the one to take.

    Args:
        name, base: as for `open_model`.

    Raises:
        InputError: a model of the hub that is neither in its cache nor can be fetched.
    """
    if "+" in name and not Path(name).exists():
        return "+".join(pinned(part) for part in name.split("+"))
    result = pinned(name)
    path = folder_of(result)
    if not is_adapter(path):
        return result
    settings = read_json(path / ADAPTER_CONFIG)
    own = str(settings.get("base_model_name_or_path"))
    known = hub_name(own)
    if known is None:
        return result
    if base is not None and ((given := hub_name(base)) is None or given.id == known.id):
        return result
    revision = settings.get("revision")
    return f"{pinned(f'{own}@{revision}' if revision else own)}+{result}"


def unadapted(source: Source, name: str) -> Source | None:
    """The base of an adapter that changes this tensor and keeps its shape; else None."""
    if not isinstance(source, AdaptedCheckpoint) or source.stored(name) is not None:
        return None
    own, found = source.find(name), source.base.find(name)
    is_like = own is not None and found is not None and own.shape == found.shape
    return source.base if is_like else None
