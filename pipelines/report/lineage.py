"""Where models come from, read from the records (`poise.json`) beside their weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import InputError
from pipelines.provenance import read_record

_DEEPEST = 12  # generations


@dataclass(slots=True, kw_only=True)
class Origin:
    """A model's origin.

    Attributes:
        name: of a row, or of an ancestor that is no row: the end of its path.
        kind: merged, aligned, ...; or what a report says of it; empty: not known.
        how: what made it, in a line: the merge's method, or the training's objective.
        parents: the names of the models that it was made from.
        data: what it was trained on.
        digests: of weights and of config and tokenizer, and the config's fingerprint.
        config: as run, as YAML; or a note why it is not there.
    """

    name: str
    path: str = ""
    kind: str = ""
    how: str = ""
    parents: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""


def origins(
    models: Mapping[str, tuple[str, str]], root: Path | None = None, hidden: Sequence[str] = ()
) -> list[Origin]:
    """The origins of the rows, then of their ancestors that are no rows.

    Args:
        models: row -> (path or name on the hub, digest of weights).
        root: relative paths start there; default the working directory.
        hidden: beginnings of paths that are left out of what is shown.
    """
    found: dict[str, Origin] = {}
    paths = {path: name for name, (path, _) in models.items()}
    weights = {digest: name for name, (_, digest) in models.items() if digest}
    waiting = [(name, path, 0) for name, (path, _) in models.items()]
    while waiting:
        name, path, depth = waiting.pop(0)
        record = _record((root or Path()) / path)
        origin = _origin(name, path, record)
        if name in models and models[name][1]:
            origin.digests = {"weights": models[name][1], **origin.digests}
        found[name] = origin
        for parent, digest in _inputs(record):
            known = weights.get(digest) or paths.get(parent) or _by_end(parent, paths)
            if known is None:
                known = paths[parent] = _free_name(parent, found, models)
                if depth < _DEEPEST:
                    waiting.append((known, parent, depth + 1))
            if known != name and known not in origin.parents:
                origin.parents.append(known)
    for origin in found.values():
        _hide(origin, hidden)
    return list(found.values())


def _record(folder: Path) -> dict[str, Any]:
    """The record in a folder; nothing if there is none, or the model is a name on the hub."""
    try:
        return read_record(folder) or {}
    except (InputError, OSError):
        return {}


def _origin(name: str, path: str, record: Mapping[str, Any]) -> Origin:
    config = record.get("config") or {}
    digests = {key: record[key] for key in ("weights", "companions", "fingerprint")
               if isinstance(record.get(key), str)}  # fmt: skip
    return Origin(
        name=name,
        path=path,
        kind=record.get("kind", ""),
        how=_how(config),
        data=_data(config, record.get("inputs") or {}),
        digests=digests,
        seed=record.get("seed"),
        versions=record.get("versions") or {},
        config=yaml.safe_dump(_without_empty(config), sort_keys=False) if config else "",
    )


def _how(config: Mapping[str, Any]) -> str:
    """What made a model: `ties, density 0.5, lambda 1` or `dpo, beta 0.1; adamw, 4e-05; ...`."""
    if "merge_method" in config:
        return _listed(config["merge_method"], config.get("parameters") or {})
    parts = []
    for key in ("objective", "optimizer"):
        values = config.get(key)
        if isinstance(values, Mapping) and "name" in values:
            name = values["name"]
            kept = ("beta", "learning_rate", "density", "alpha", "sparsifier", "consensus")
            shown = {k: values[k] for k in kept if values.get(k) is not None}
            parts.append(_listed("+".join(name) if isinstance(name, list) else name, shown))
    if config.get("num_steps"):
        parts.append(f"{config['num_steps']} steps of {config.get('global_batch_size')}")
    return "; ".join(parts)


def _listed(name: Any, values: Mapping[str, Any]) -> str:
    return ", ".join([str(name), *(f"{key} {_short(value)}" for key, value in values.items())])


def _short(value: Any) -> str:
    return str(value) if isinstance(value, int | float | str) else json.dumps(value)


def _inputs(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, digest of weights or "") of each model that a model was made from."""
    config, inputs = record.get("config") or {}, record.get("inputs") or {}
    found = [(name, each["weights"]) for name, each in inputs.items()
             if isinstance(each, Mapping) and isinstance(each.get("weights"), str)]  # fmt: skip
    if not found and isinstance(config.get("model"), str) and config.get("init") != "random":
        found = [(config["model"], "")]
    return found


def _data(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """The data that a model was trained on, with their fingerprint."""
    data = config.get("data")
    if data is None:
        return []
    entries = data if isinstance(data, list) else [data]
    names = [
        each if isinstance(each, str) else json.dumps(_without_empty(each)) for each in entries
    ]
    digest = inputs.get("data")
    return [*names, f"fingerprint {digest}"] if isinstance(digest, str) else names


def _by_end(path: str, paths: Mapping[str, str]) -> str | None:
    """The row whose path ends as this one does: a run that was moved has other beginnings."""
    own = Path(path).parts[-2:]
    same = {
        name for other, name in paths.items() if len(own) == 2 and Path(other).parts[-2:] == own
    }
    return same.pop() if len(same) == 1 else None


def _free_name(path: str, found: Mapping[str, Origin], models: Mapping[str, Any]) -> str:
    """A short name for an ancestor: the end of its path, or all of it if that is taken."""
    name = Path(path).name or path
    return name if name not in found and name not in models else path


def _without_empty(value: Any) -> Any:
    """A config without the fields that say nothing."""
    if isinstance(value, Mapping):
        kept = {key: _without_empty(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if each not in (None, {}, [])}
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def _hide(origin: Origin, hidden: Sequence[str]) -> None:
    for start in hidden:
        origin.path = origin.path.removeprefix(start)
        origin.config = origin.config.replace(start, "")
        origin.data = [each.replace(start, "") for each in origin.data]
