"""mergekit's other ways to write the same config, put into the one form that is checked.

- a model as a mapping, `{model: {path: ...}, lora: {path: ...}}`, becomes a text;
- switches written as numbers, `normalize: 1.0`, become true and false;
- `random_seed` is `seed`;
- one folder spelled in two ways, `./in/a` and `in/a`, gets the spelling that comes first.

What has a wrong shape is left as it is, for the check to name.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from operators.merging import METHODS
from pipelines.checkpoints.hub import hub_name

_SWITCHES = {"rescale"}  # those of mergekit that are words here


def plain_forms(values: Mapping[str, Any]) -> dict[str, Any]:
    """A merge's fields in the one form.

    Raises:
        ValueError: a seed given twice, or a part of a model's long form that is not known here.
    """
    result = dict(values)
    if "random_seed" in result:
        if "seed" in result:
            raise ValueError("random_seed: is called seed here; found both")
        seed = result.pop("random_seed")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"random_seed: found {seed!r}; allowed: a whole number")
        result["seed"] = seed
    result = with_models(result, plain_model)
    spellings: dict[str, str] = {}
    named = result.get("merges")
    for name in named if isinstance(named, Mapping) else ():
        spellings[str(name)] = str(name)
    result = with_models(result, lambda name, _: _one_spelling(name, spellings))
    method = METHODS.get(str(result.get("merge_method")))
    if method is not None:
        switches = {n for n, p in method.parameters.items() if isinstance(p.default, bool)}
        known = switches | (_SWITCHES & method.parameters.keys())
        result = _with_scopes(result, lambda scope: _switched(scope, known))
    return result


def plain_model(value: Any, field: str) -> Any:
    """A model's name: a text, or mergekit's long form made one.

    Raises:
        ValueError: a part of the long form that is not known here.
    """
    if not isinstance(value, Mapping):
        return value
    parts = dict(value)
    if "path" in parts:
        return _path(parts, field)
    model = parts.pop("model", None)
    lora = parts.pop("lora", None)
    for name, found in parts.items():
        if found is not None:
            raise ValueError(
                f"{field}: {name}: found {found!r}; allowed: a folder, CHECKPOINT+ADAPTER, or "
                "{model: {path: ...}, lora: {path: ...}}"
            )
    path = _path(model, f"{field}.model")
    return path if lora is None else f"{path}+{_path(lora, f'{field}.lora')}"


def _path(value: Any, field: str) -> str:
    """The path of a long form."""
    if isinstance(value, str):
        return value
    parts = dict(value) if isinstance(value, Mapping) else {}
    path = parts.pop("path", None)
    if not isinstance(path, str):
        raise ValueError(f"{field}: found {value!r}; allowed: a folder, or {{path: FOLDER}}")
    if (found := hub_name(path)) is not None and found.revision == "main":
        revision = parts.pop("revision", None)
        path = path if revision is None else f"{path}@{revision}"
    for name, found in parts.items():
        if found is not None:
            raise ValueError(
                f"{field}: {name}: found {found!r}; allowed: path alone, and revision of a model "
                "on the hub"
            )
    return path


def _one_spelling(name: Any, spellings: dict[str, str]) -> Any:
    """The first spelling of a place; names of merges and of nothing that exists are no places."""
    if not isinstance(name, str) or name in spellings.values():
        return name
    return spellings.setdefault(place_of(name), name)


def place_of(name: str) -> str:
    """Where a model is, whatever its spelling and the links on the way: a folder, or an adapter's
    after a `+`. A name of no folder is its own place.
    """
    if Path(name).is_dir():
        return str(Path(name).resolve())
    parts = name.split("+")
    if len(parts) == 2 and all(part and Path(part).is_dir() for part in parts):
        return "+".join(str(Path(part).resolve()) for part in parts)
    return name


def with_models(values: dict[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The fields of a merge with every model's name changed, the base's first.

    Args:
        change: of a name, or a long form, and its field.
    """
    result = dict(values)
    if "base_model" in result:
        result["base_model"] = change(result["base_model"], "base_model")
    result |= _recipe(result, "", change)
    modules = result.get("modules")
    if isinstance(modules, Mapping):
        result["modules"] = {
            name: {**each, **_recipe(each, f"modules.{name}.", change)}
            if isinstance(each, Mapping)
            else each
            for name, each in modules.items()
        }
    if "tokenizer_source" in result:
        result["tokenizer_source"] = change(result["tokenizer_source"], "tokenizer_source")
    tokenizer = result.get("tokenizer")
    if isinstance(tokenizer, str):
        result["tokenizer"] = change(tokenizer, "tokenizer")
    elif isinstance(tokenizer, Mapping):
        result["tokenizer"] = _tokenizer(dict(tokenizer), change)
    return result


def _recipe(
    values: Mapping[str, Any], place: str, change: Callable[[Any, str], Any]
) -> dict[str, Any]:
    """`models` and `slices` of a merge or a module, with every model's name changed."""
    result: dict[str, Any] = {}
    if isinstance(models := values.get("models"), list):
        result["models"] = _entries(models, f"{place}models", change)
    if isinstance(slices := values.get("slices"), list):
        result["slices"] = [
            {**e, "sources": _entries(e["sources"], f"{place}slices.{n}.sources", change)}
            if isinstance(e, Mapping) and isinstance(e.get("sources"), list)
            else e
            for n, e in enumerate(slices)
        ]
    return result


def _tokenizer(settings: dict[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """mergekit's long form of `tokenizer` with every model's name changed."""
    if "source" in settings:
        settings["source"] = change(settings["source"], "tokenizer.source")
    tokens = settings.get("tokens")
    if not isinstance(tokens, Mapping):
        return settings
    settings["tokens"] = changed = dict(tokens)
    for token, each in tokens.items():
        source = each.get("source") if isinstance(each, Mapping) else None
        place = f"tokenizer.tokens.{token}.source"
        if isinstance(source, Mapping) and "kind" in source:
            if "model" in source:
                source = {**source, "model": change(source["model"], f"{place}.model")}
            changed[token] = {**each, "source": source}
        elif source is not None:
            changed[token] = {**each, "source": change(source, place)}
    return settings


def _entries(entries: list[Any], place: str, change: Callable[[Any, str], Any]) -> list[Any]:
    """Entries with their models' names changed."""
    return [
        {**each, "model": change(each["model"], f"{place}.{number}.model")}
        if isinstance(each, Mapping) and "model" in each
        else each
        for number, each in enumerate(entries)
    ]


def _with_scopes(values: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The fields with every `parameters` changed: the merge's, the modules', the slices', the
    models'.
    """
    result = {k: change(v) if k == "parameters" else v for k, v in values.items()}
    for field in ("models", "slices", "sources"):
        if isinstance(result.get(field), list):
            result[field] = [
                _with_scopes(dict(e), change) if isinstance(e, Mapping) else e
                for e in result[field]
            ]
    modules = result.get("modules")
    if isinstance(modules, Mapping):
        result["modules"] = {
            name: _with_scopes(dict(e), change) if isinstance(e, Mapping) else e
            for name, e in modules.items()
        }
    return result


def _switched(scope: Any, switches: set[str]) -> Any:
    """Parameters with the numbers 0 and 1 of switches as false and true, in every form of value."""
    if not isinstance(scope, Mapping):
        return scope
    return {k: _as_switch(v) if k in switches else v for k, v in scope.items()}


def _as_switch(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_switch(each) for each in value]
    if isinstance(value, Mapping):
        return {k: _as_switch(v) if k == "value" else v for k, v in value.items()}
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return value
