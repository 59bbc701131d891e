"""Which file describes a task: names of lm-evaluation-harness's own tasks, and of a user's folder.

The library's index parses its 14,000 YAML files, which takes many seconds. Here a task is first
looked for in the files of its name. For all other names the few top-level keys that name things are
read from all files by a pattern, and a file is parsed only where its keys are lists. A user's
folder is small: all of its files are parsed, and what is wrong there is said.
"""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.errors import InputError

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

_KEYS = "task|group|tag|include|class"
_NAMING = re.compile(rf"""^["']?({_KEYS})["']?[ \t]*:[ \t]*(.*?)[ \t\r]*$""", re.MULTILINE)
_PLAIN = re.compile(r"""(["']?)([^\s"'\[\]{}|>&*!#,][^"'\[\]{}#]*?)\1(?:\s+#.*)?""")


@cache
def own_tasks() -> "dict[str, Entry]":
    """The index of the library's own tasks, groups and tags, as `TaskManager` has it."""
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Entry] = {}
    for path in _own_files():
        keys = _naming_keys(path)
        name = _name(keys)
        if isinstance(name, str) and name not in index:
            TaskIndex.process_cfg(keys, path, index)
    return index


def own_task(name: str) -> "dict[str, Entry] | None":
    """An index with one of the library's tasks alone, if a file has its name: most have."""
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Entry] = {}
    for path in _own_files():
        if path.stem == name and _name(_naming_keys(path)) == name:
            TaskIndex.process_cfg(_naming_keys(path), path, index)
            return index if index[name].kind.name in ("TASK", "PY_TASK") else None
    return None


def folder_tasks(folder: Path, *, allow_code: bool) -> "dict[str, Entry]":
    """The index of a folder's tasks, groups and tags. YAML files without a task or group, such as
    those that others include, are passed over.

    Raises:
        InputError: no such folder, no task in it, bad YAML, two tasks of one name, or functions
            that are not allowed.
    """
    from lm_eval.tasks._index import TaskIndex

    if not folder.is_dir():
        raise InputError(f"include_path: {folder}: no such folder")
    index: dict[str, Entry] = {}
    functions: dict[str, Path] = {}
    for path in _yaml_files(folder):
        values, found = _merged(path, ())
        functions |= {name: path for name in found if name not in functions}
        name = _name(values)
        if name is None:
            continue
        if name in index and index[name].yaml_path is not None:
            raise InputError(
                f"include_path: {folder}: two tasks are named {name!r}: {index[name].yaml_path}, "
                f"{path}; names must differ"
            )
        TaskIndex.process_cfg(values, path, index)
    if functions and not allow_code:
        name, path = next(iter(functions.items()))
        raise InputError(
            f"include_path: {folder}: names functions, which are code: {', '.join(functions)} (the "
            f"first in {path}); allowed: tasks without functions, or allow_code: true if you trust "
            "them"
        )
    if not index:
        raise InputError(f"include_path: {folder}: holds no YAML file with a task")
    return index


def unknown(name: str, index: "dict[str, Entry]", where: str) -> InputError:
    """The error for a name that nothing has, with the nearest ones that exist."""
    near = get_close_matches(name, index, n=3, cutoff=0.6)
    if not near and len(index) <= 20:
        near = sorted(index)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return InputError(f"tasks: unknown task {name!r} in {where}{hint}")


@cache
def _own_files() -> tuple[Path, ...]:
    """The YAML files of the library's own tasks."""
    import lm_eval.tasks

    return tuple(_yaml_files(Path(lm_eval.tasks.__file__).parent))


def _yaml_files(folder: Path) -> Iterator[Path]:
    """As the library finds them: sorted, without the caches of Python and Jupyter."""
    left_out = {"__pycache__", ".ipynb_checkpoints"}
    found = (path for path in folder.rglob("*.yaml") if left_out.isdisjoint(path.parts))
    return iter(sorted(found, key=Path.as_posix))


def _name(values: Mapping[str, Any]) -> Any:
    """What a file describes: a task, or a group, which may list its tasks."""
    return values.get("task" if "class" in values else "group" if "group" in values else "task")


@cache
def _naming_keys(path: Path) -> dict[str, Any]:
    """The keys of one of the library's files that name things, its own and the included ones'."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = dict(_NAMING.findall(path.read_text(encoding="utf-8")))
        plain = {key: _PLAIN.fullmatch(value) for key, value in found.items()}
        if "group" in found and "class" not in found:
            plain.pop("task", None)  # a list of members, which are looked at when it is built
        if all(plain.values()):
            keys: dict[str, Any] = {key: match[2] for key, match in plain.items() if match}
        else:
            values = load_yaml(path, resolve_func=False, recursive=False)
            keys = {key: values[key] for key in found if key in values}
        if "group" in found and "class" not in found:
            keys["task"] = []
        included = keys.pop("include", [])
        merged: dict[str, Any] = {}
        for other in included if isinstance(included, list) else [included]:
            merged |= _naming_keys(Path(os.path.normpath(path.parent / other)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # as in the library's index, such a file is no task
    return merged | keys


class _Named(str):
    """The name of a function in a YAML file."""


class _Loader(yaml.SafeLoader):
    """YAML in which `!function` is a name, not a function."""


def _named(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> _Named:
    return _Named(loader.construct_scalar(node))


_Loader.add_constructor("!function", _named)


def _merged(path: Path, within: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """A file's values with those that it includes, and the functions that it names.

    Raises:
        InputError: it cannot be read, is no mapping, or includes itself.
    """
    path = path.resolve()
    if path in within:
        raise InputError(f"{path}: includes itself")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}:{line} not valid YAML: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected the fields of a task, found {type(values).__name__}")
    functions = list(_functions(values))
    merged: dict[str, Any] = {}
    included = values.pop("include", [])
    for other in included if isinstance(included, list) else [included]:
        found, more = _merged(path.parent / str(other), (*within, path))
        merged |= found
        functions += more
    return merged | values, functions


def _functions(value: Any) -> Iterator[str]:
    """The functions that are named anywhere in a value."""
    if isinstance(value, _Named):
        yield str(value)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _functions(each)
    elif isinstance(value, list):
        for each in value:
            yield from _functions(each)
