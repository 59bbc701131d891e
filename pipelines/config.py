"""Configs: YAML files checked by pydantic, with `key.sub=value` overrides from the command line."""

import copy
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from pipelines.errors import InputError


class Config(BaseModel):
    """Base of every config: unknown keys are errors and instances do not change.

    Renamed fields and values still work under their old names, with a line on stderr that gives the
    new name. Instances and fingerprints contain only the new names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    section: ClassVar[str] = ""  # prefix of the fields' names in messages, such as "optimizer."
    old_fields: ClassVar[Mapping[str, str]] = {}  # old name: new name
    old_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # field: old value: new value
    other_names: ClassVar[Mapping[str, str]] = {}  # what other tools call a field: its name here

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for old, new in cls.old_fields.items():
            if old in values:
                if new in values:
                    raise ValueError(
                        f"{cls.section}{old}: is called {cls.section}{new} now; found both"
                    )
                values[new] = values.pop(old)
                tell_once(f"{cls.section}{old}: is called {cls.section}{new} now")
        for field, renamed in cls.old_values.items():
            old = values.get(field)
            if isinstance(old, str) and old in renamed:
                values[field] = renamed[old]
                tell_once(f"{cls.section}{field}: {old} is called {renamed[old]} now")
        return values


@cache
def tell_once(line: str) -> None:
    """Print a line on stderr, once in a process."""
    print(f"  {line}", file=sys.stderr)


class NamedIn:
    """An annotation of a `str` field: the value must be a name in the table. Names that are added
    to the table later are allowed too.
    """

    def __init__(self, table: Collection[str]) -> None:
        self._table = table

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self._table:
            return value
        *others, last = map(repr, self._table)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": expected}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self._table)}


ConfigT = TypeVar("ConfigT", bound=BaseModel)
_TYPE_NAME = re.compile(
    r"[A-Z]\w*|str|int|float|bool|none|(list|dict|tuple|literal|function|lax-or-strict)\W.*"
)


class _Loader(yaml.SafeLoader):
    """YAML that also reads 1e-5 as a number, as in YAML 1.2, and in which a mapping has each key
    once: of two, one would have no effect.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping; keys that are taken over from another one (`<<`) may be there again."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if key.value in seen:
                problem = f"found the key {key.value!r} twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+$"), None
)


def parse_yaml(text: str) -> Any:
    """The only document of a text."""
    return yaml.load(text, _Loader)


def parse_documents(text: str) -> list[Any]:
    """The documents of a text."""
    return list(yaml.load_all(text, _Loader))


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        InputError: the file is missing, not text or not YAML; the message has file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}:{line} not valid YAML: {problem}") from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with `key.sub=value` overrides applied; values are read as YAML.

    An index into a list is a number: `models.0.parameters.weight=0.5`.

    Raises:
        InputError: an override without `=`, or one whose path does not lead into a mapping or list.
    """
    result = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"override {override!r}: expected key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise InputError(f"override {override!r}: the value is not valid YAML") from None
        _set(result, key.split("."), value, override)
    return result


def apply_values(values: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """As `apply_overrides`, for values by `key.sub` that have been read.

    Raises:
        InputError: a key whose path does not lead into a mapping or list.
    """
    result = copy.deepcopy(values)
    for key, value in fields.items():
        _set(result, key.split("."), value, key)
    return result


def _set(target: Any, keys: list[str], value: Any, override: str) -> None:
    """Put `value` at the path `keys` inside nested dictionaries and lists."""
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(target, dict):
            if last:
                target[key] = value
            else:
                target = target.setdefault(key, {})
        elif isinstance(target, list) and key.isdigit() and int(key) < len(target):
            if last:
                target[int(key)] = value
            else:
                target = target[int(key)]
        else:
            where = ".".join(keys[:depth])
            raise InputError(f"override {override!r}: {where!r} has no field {key!r}")


def check(values: Any, model: type[ConfigT], source: str) -> ConfigT:
    """`values` as an instance of `model`.

    Raises:
        InputError: the first wrong field, as `source: field: found ...; allowed: ...`.
    """
    if not isinstance(values, Mapping):
        kind = "nothing" if values is None else type(values).__name__
        raise InputError(f"{source}: expected a mapping of fields, found {kind}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{source}: {describe(error, model, values)}") from None


def describe(error: ValidationError, model: type[BaseModel], values: Any = None) -> str:
    """The first problem of a pydantic error in one line: field, what was found, what is allowed.

    Args:
        values: what was checked, by which fields are told from names of types.
    """
    problems = error.errors(include_url=False)
    # A misspelt required field is both unknown and missing: show the misspelt name.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    places = {id(problem): _written(problem["loc"], values) for problem in problems}
    top = places[id(problems[0])]
    # Of a field with several forms, each one that does not fit is a problem: the deepest says most,
    # and of equally deep ones our own line, whose form fits but for what it says.
    same = [p for p in problems if places[id(p)][: len(top)] == top]
    first = max(same, key=lambda p: (len(places[id(p)]), p["type"] == "value_error"))
    parts = places[id(first)]
    field = ".".join(parts)
    others = [p for p in problems if parts[: len(places[id(p)])] != places[id(p)]]
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, parts[:-1])
        elsewhere = {} if parts[:-1] else getattr(model, "other_names", {})
        near = elsewhere.get(field) or next(iter(get_close_matches(parts[-1], known, 1)), None)
        hint = f"; did you mean {near}?" if near else ""
        return f"{field}: unknown field; allowed: {', '.join(known)}{hint}{more}"
    if first["type"] == "missing":
        return f"{field}: required, not given{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not field:  # a problem of several fields; the message names them
        return f"{message}{more}"
    if isinstance(first["input"], Mapping | list) and len(str(first["input"])) > 60:
        return f"{field}: {message}{more}"
    allowed = message.removeprefix("Input should be ")
    found = f"found {first['input']!r}"
    separated = f"{found}: {message}" if allowed == message else f"{found}; allowed: {allowed}"
    return f"{field}: {separated}{more}"


def _written(place: tuple[int | str, ...], values: Any) -> list[str]:
    """A problem's place as the user wrote it: where a field has several forms, pydantic puts the
    name of the form's type behind the field.
    """
    parts: list[str] = []
    for part in place:
        is_entry = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_entry or (isinstance(values, Mapping) and part in values):
            values = values[part]
        elif _TYPE_NAME.fullmatch(str(part)):
            continue
        else:
            values = None
        parts.append(str(part))
    return parts


def _fields_at(model: type[BaseModel], place: Iterable[str]) -> list[str]:
    """The fields that are known at a place of a config; numbers and names of entries lead on."""
    models = {model}
    for part in place:
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        models = {own for field in fields for own in _models_in(field.annotation)} or models
    return sorted({name for each in models for name in each.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configs that a field may hold, in lists and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def load_config(path: str | Path, model: type[ConfigT], overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML config, apply overrides and check it against `model`.

    Relative paths inside a config are relative to the working directory, as in mergekit. So the
    same file works on a laptop and in a Ray job that uploads its working directory.

    Raises:
        InputError: missing file, bad YAML, unknown key, wrong type or value out of range.
    """
    values = load_yaml(path)
    if not isinstance(values, Mapping):
        return check(values, model, str(path))
    return check(apply_overrides(dict(values), overrides), model, str(path))
