"""The library, lm-evaluation-harness, made to load tasks without code of others and without a word
to the hub that the user did not allow.

A task's config passes `CheckedFactory`, whatever named it: its own file, a group, a tag. There what
we cannot do is refused, and relative data files are looked for beside the file that names them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from pipelines.errors import InputError
from pipelines.hub.offline import is_offline

if TYPE_CHECKING:
    from lm_eval.api.group import Group as LibraryGroup
    from lm_eval.api.task import Task as LibraryTask
    from lm_eval.tasks._index import Entry

# What a task, its data or its templates raise: any code of the library may meet a user's values.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
)
_DATA_FOLDER_KEYS = ("data_files", "data_dir")


def require_library() -> None:
    """Import the library, with templates in a sandbox: those of the library's own environment could
    call anything in Python.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval.utils as utils
    except ModuleNotFoundError as error:
        raise InputError(
            f"tasks: lm-evaluation-harness is not installed ({error.name} is missing); install it "
            "with: pip install 'poise[evaluation]'"
        ) from None
    if not isinstance(utils.env, Templates):
        old = utils.env
        utils.env = Templates(
            loader=old.loader,
            undefined=old.undefined,
            keep_trailing_newline=old.keep_trailing_newline,
        )
        utils.env.filters.update(old.filters)


class Templates(SandboxedEnvironment):
    """Templates in a sandbox, each compiled once; the library compiles them for each document."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._compiled: dict[str, Template] = {}

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> Template:
        """As jinja2's."""
        if not isinstance(source, str) or globals is not None or template_class is not None:
            return super().from_string(source, globals, template_class)
        if source not in self._compiled:
            self._compiled[source] = super().from_string(source)
        return self._compiled[source]


def built(
    entry: "Entry", registry: "dict[str, Entry]", allow_code: bool, inside: Path | None
) -> "tuple[list[LibraryTask], list[LibraryGroup]]":
    """The tasks that a name stands for, with their data: itself, or the members of a group or tag;
    and the group with all groups below it.

    Args:
        registry: the index that groups and tags choose their members from.
        inside: the user's folder, if the name is from there.

    Raises:
        InputError: a task that cannot be built, or its data cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from lm_eval.api.group import Group

    factory = _checked_factory(allow_code, registry, inside)
    with _as_the_user_said(), _quiet():
        try:
            found = factory.build(entry, overrides=None, registry=registry)
        except InputError:
            raise
        except (*FAILURES, DatasetsError) as error:
            raise _failed(entry.name, factory.last, error) from None
    if isinstance(found, Group):
        return list(found.get_all_tasks()), [found, *found.get_all_groups()]
    return (found if isinstance(found, list) else [found]), []


def first_line(error: BaseException) -> str:
    """The first line of an error; its type where that alone says what happened."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # it says only that a data file cannot be read
    line = (str(error).strip().splitlines() or [""])[0]
    told = isinstance(error, OSError | ValueError | RuntimeError) and line
    return line if told else f"{type(error).__name__}: {line}".removesuffix(": ")


@dataclass
class _Config:
    """The task whose config was looked at last, for messages."""

    name: str
    values: Mapping[str, Any]


def _checked_factory(allow_code: bool, registry: "Mapping[str, Entry]", inside: Path | None) -> Any:
    """The library's factory, whose configs are checked."""
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import Kind

    class CheckedFactory(TaskFactory):
        last: _Config | None = None

        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if entry.kind is Kind.GROUP:
                if inside is not None:
                    _check_members(entry.name, config.get("task"), registry)
                return config
            self.last = _Config(config["task"], config)
            if entry.kind is Kind.TASK:
                _check(config["task"], config, allow_code)
                if inside is not None and entry.yaml_path is not None:
                    _find_data(config, entry.yaml_path.parent)
            return config

    return CheckedFactory()


def _check_members(group: str, members: Any, registry: "Mapping[str, Entry]") -> None:
    """Raise InputError for members of a user's group that are no names: the library would build
    them from what stands in the group, unchecked.
    """
    for member in members if isinstance(members, list) else []:
        name = member.get("group", member.get("task")) if isinstance(member, dict) else member
        if name not in registry:
            near = get_close_matches(str(name), registry, n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"group {group}: unknown member {name!r}{hint}")


def _check(name: str, config: Mapping[str, Any], allow_code: bool) -> None:
    """Raise InputError for what a task must not have."""
    from lm_eval.config.task import TaskConfig

    known = [each.name for each in fields(TaskConfig)]
    for key in config.keys() - {*known, "tag", "group", "task_list"}:
        near = get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"task {name}: unknown field {key!r}{hint}")
    for key, what in (("doc_to_image", "images"), ("doc_to_audio", "sounds")):
        if config.get(key) is not None:
            raise InputError(f"task {name}: {key}: needs a model that takes {what}; allowed: texts")
    if config.get("unsafe_code"):
        raise InputError(
            f"task {name}: unsafe_code: the library would run the model's answers as code, outside "
            "of any sandbox; allowed: tasks without it"
        )
    _check_metrics(name, config, allow_code)


def _check_metrics(name: str, config: Mapping[str, Any], allow_code: bool) -> None:
    """Raise InputError for metrics that would be fetched from the hub, as code."""
    from lm_eval.api.registry import get_metric, metric_registry

    get_metric("acc")  # fills the registry
    if config.get("process_results") is not None:
        return  # a function gives all metrics; the names say how they are aggregated
    for each in config.get("metric_list") or []:
        if not isinstance(each, dict):
            raise InputError(f"task {name}: metric_list: found {each!r}; allowed: metric: {each}")
        metric = each.get("metric")
        if callable(metric) or (metric in metric_registry and not each.get("hf_evaluate")):
            continue
        near = get_close_matches(str(metric), metric_registry, n=3)
        if not (allow_code and each.get("hf_evaluate")):
            raise InputError(
                f"task {name}: metric {metric!r}: is none of the library's"
                f"{'; nearest: ' + ', '.join(near) if near else ''} (those of the package evaluate "
                "are code from the hub: hf_evaluate: true, and allow_code: true if you trust it)"
            )


def _find_data(config: dict[str, Any], folder: Path) -> None:
    """Make relative data files absolute: beside the YAML file, or as the library has them, in the
    current folder.

    Raises:
        InputError: a file that is not there, or in both places.
    """
    settings = config.get("dataset_kwargs")
    if not isinstance(settings, dict):
        return
    settings = dict(settings)
    for key in _DATA_FOLDER_KEYS:
        if key in settings:
            settings[key] = _placed(
                settings[key], lambda path: _place(config["task"], path, folder)
            )
    config["dataset_kwargs"] = settings


def _placed(value: Any, place: Callable[[str], str]) -> Any:
    """The paths in a text, list or mapping, changed."""
    if isinstance(value, dict):
        return {key: _placed(each, place) for key, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, place) for each in value]
    return place(value) if isinstance(value, str) else value


def _place(task: str, path: str, folder: Path) -> str:
    """Where a data file, or a pattern of names, is."""
    if "://" in path:
        return path
    places = {
        (base / path).resolve(): str(base.absolute() / path)
        for base in (folder, Path.cwd())
        if any(base.glob(path) if not Path(path).is_absolute() else Path("/").glob(path[1:]))
    }
    if not places:
        raise InputError(f"task {task}: data file {path}: not in {folder}, nor in {Path.cwd()}")
    if len(places) > 1:
        raise InputError(
            f"task {task}: data file {path}: is in {folder} and in {Path.cwd()}; allowed: one"
        )
    return next(iter(places.values()))


def _failed(name: str, last: _Config | None, error: BaseException) -> InputError:
    """The error for a task that could not be built."""
    if last is None:
        return InputError(f"task {name}: {first_line(error)}")
    path = last.values.get("dataset_path")
    local = bool((last.values.get("dataset_kwargs") or {}).get("data_files"))
    if _is_unreachable(error) and isinstance(path, str) and not local:
        arguments = ", ".join(repr(a) for a in (path, last.values.get("dataset_name")) if a)
        unset = ", with HF_HUB_OFFLINE unset" if is_offline() else ""
        return InputError(
            f"task {last.name}: its data set {path} is not in the cache of datasets, and the hub "
            f"{'is not to be asked (HF_HUB_OFFLINE)' if is_offline() else 'cannot be reached'}; "
            f'bring it where the hub can be reached{unset}: python -c "import datasets; '
            f'datasets.load_dataset({arguments})"'
        )
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if isinstance(error, KeyError) and last.values.get(key) == error.args[0]:
            return InputError(
                f"task {last.name}: {key}: found {error.args[0]!r}, which its data set has not"
            )
    return InputError(f"task {last.name}: {first_line(error)}")


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a hub that cannot be asked."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, ConnectionError | OfflineModeIsEnabled | httpx2.TransportError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _as_the_user_said() -> Iterator[None]:
    """Data sets of the hub are asked for unless the user said not to. The commands take all
    libraries offline, which have read the variables by now.
    """
    import datasets
    from huggingface_hub import constants

    offline = is_offline()
    old = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = old


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on defaults, and without progress bars."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [each.level for each in loggers]
    bars = datasets.are_progress_bars_disabled()
    for each in loggers:
        each.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
