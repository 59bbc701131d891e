"""A pipeline as planned: kinds, names, outputs and dependencies are checked before the work."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.checkpoints.hub import hub_name
from pipelines.config import apply_values, check, load_yaml
from pipelines.errors import InputError
from pipelines.pipeline.config import PipelineConfig, StageConfig
from pipelines.pipeline.references import (
    has_references,
    is_inside,
    known_stage,
    read_outputs,
    whole_place,
    with_outputs,
)
from pipelines.storage import is_address, output_place

_NO_INPUTS = {"out", "storage", "cache"}  # fields with paths that need not be there


def paths_in(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """The paths in a config's fields, without those of outputs, with their fields."""
    for field, value in config:
        if field in _NO_INPUTS:
            continue
        items: Iterable[tuple[Any, Any]] = [(None, value)]
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, each in items:
            name = f"{prefix}{field}" if key is None else f"{prefix}{field}.{key}"
            if isinstance(each, Path):
                yield name, each
            elif isinstance(each, BaseModel):
                yield from paths_in(each, f"{name}.")


@dataclass(frozen=True, slots=True)
class Job:
    """A stage that is to run: its checked config, its output and what it reads of other stages.

    Attributes:
        out: an absolute path or an address.
        force: replace another result there.
    """

    name: str
    config: Any
    out: str
    inputs: Mapping[str, str]
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A command as a kind of stage.

    Attributes:
        config: the command's config.
        run: makes the outputs of jobs, several at once only where they belong together.
        stands: whether the output is the finished result of config and inputs; None where the
            command does not know, and the pipeline keeps a fingerprint of both.
        need: what it takes of the cluster while it runs, by names of Ray's resources.
        group: jobs with equal values run in one call; None: alone.
        check: raises InputError for mistakes in what it reads, if all of that is there.
        read: reads a file of the config.
        reads: the paths that a config reads, with their fields.
        nested: fields that name another config, whose paths are read as well.
        writes: further outputs, of fields of the config.
        makes_output: whether a job leaves something at its output.
        always_replaces: another result at its output is replaced without being asked.
        to_addresses: it can write to an object store.
        on_ray: whether it needs a running Ray.
    """

    config: type[BaseModel]
    run: Callable[[Sequence[Job]], object]
    stands: Callable[[Any, str], bool] | None = None
    need: Callable[[Any, dict[str, float]], dict[str, float]] = lambda config, cluster: {"CPU": 1.0}
    group: Callable[[Any], Hashable] = lambda config: None
    check: Callable[[Any], object] = lambda config: None
    read: Callable[[Path], Any] = load_yaml
    reads: Callable[[Any], Iterable[tuple[str, Path]]] = paths_in
    nested: tuple[str, ...] = ()
    writes: Callable[[Mapping[str, Any]], Iterable[str]] = lambda values: ()
    makes_output: Callable[[Any], bool] = lambda config: True
    always_replaces: bool = False
    to_addresses: bool = False
    on_ray: Callable[[Any], bool] = lambda config: False


@dataclass(frozen=True)
class Stage:
    """A stage, and what comes before it.

    Attributes:
        source: its place, for messages.
        after: names of the stages that come first.
        outputs: of all stages, by name.
    """

    name: str
    settings: StageConfig
    kind: Kind
    source: str
    out: str
    after: tuple[str, ...]
    outputs: Mapping[str, str]

    @property
    def is_known(self) -> bool:
        """Whether its config is there before the run, as no other stage makes it."""
        config = self.settings.config
        if not isinstance(config, Path):
            return True
        return not read_outputs(with_outputs(str(config), self.outputs, self.source), self.outputs)

    @cached_property
    def config(self) -> Any:
        """Its checked config, with the outputs of other stages. Where another stage makes it, that
        one must stand.

        Raises:
            InputError: it cannot be read, or is wrong.
        """
        return check(self.values, self.kind.config, self.source)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The fields of its config."""
        return _values(self.settings, self.kind, self.outputs, self.source)

    def job(self, force: bool = False) -> Job:
        """The stage as work."""
        inputs = {name: self.outputs[name] for name in self.after}
        return Job(self.name, self.config, self.out, inputs, force)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Stages in the config's order; `storage` is an absolute path or an address."""

    name: str
    storage: str
    stages: Mapping[str, Stage]

    def ordered(self) -> list[Stage]:
        """The stages, each behind those that it needs."""
        order = TopologicalSorter({name: stage.after for name, stage in self.stages.items()})
        return [self.stages[name] for name in order.static_order()]

    def nearest(self, stage: Stage) -> list[str]:
        """The stages before one, without those that are before another one of them."""
        above = {name for each in stage.after for name in self._before(each)}
        return [name for name in stage.after if name not in above]

    def _before(self, name: str) -> set[str]:
        found: set[str] = set()
        for each in self.stages[name].after:
            found |= {each} | self._before(each)
        return found


def plan_pipeline(config: PipelineConfig, kinds: Mapping[str, Kind], source: str) -> PipelinePlan:
    """Find every mistake that can be found before the first stage.

    Args:
        kinds: by name.
        source: the pipeline's file.

    Raises:
        InputError: the first mistake: an unknown kind or stage, a cycle, two stages with one
            output, a config that is wrong, an input that is nowhere.
    """
    storage = str(output_place(config.storage, None))
    outputs = {
        name: whole_place(str(output_place(stage.out or name, storage)))
        for name, stage in config.stages.items()
    }
    stages = {}
    for name, settings in config.stages.items():
        where = f"{source}: stages.{name}"
        kind = _kind_of(settings.kind, kinds, where)
        if is_address(outputs[name]) and not kind.to_addresses:
            able = ", ".join(each for each in kinds if kinds[each].to_addresses)
            raise InputError(
                f"{where}.out: found the address {outputs[name]}; allowed: a folder ({able} alone "
                "write to addresses)"
            )
        after = _after(settings, kind, name, outputs, where)
        stages[name] = Stage(name, settings, kind, where, outputs[name], after, outputs)
    _check_outputs(stages, source)
    _check_order(stages, source)
    if further := _further_outputs(stages):
        stages = {n: _behind(s, further) if s.is_known else s for n, s in stages.items()}
        _check_order(stages, source)
    for stage in stages.values():
        if stage.is_known:
            _check_inputs(stage, [*outputs.values(), *further])
    return PipelinePlan(Path(source).stem, storage, stages)


def _kind_of(name: str, kinds: Mapping[str, Kind], where: str) -> Kind:
    if name not in kinds:
        near = get_close_matches(name, kinds, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{where}.kind: found {name!r}; allowed: {', '.join(kinds)}{hint}")
    return kinds[name]


def _after(
    settings: StageConfig, kind: Kind, name: str, outputs: Mapping[str, str], where: str
) -> tuple[str, ...]:
    """The stages that come before one: those in `after`, and those whose outputs it names."""
    for other in settings.after:
        known_stage(other, outputs, f"{where}.after")
    found = set(settings.after)
    if isinstance(settings.config, Path):
        place = with_outputs(str(settings.config), outputs, f"{where}.config")
        found |= read_outputs(place, outputs)
    if isinstance(settings.config, dict) or not read_outputs(place, outputs):
        values = _values(settings, kind, outputs, where)
        found |= read_outputs(values, outputs)
        for field in kind.nested:
            found |= _after_nested(values.get(field), kind, outputs, f"{where}: {field}")
    else:  # what the file says is known when the other stage has made it
        found |= read_outputs(with_outputs(settings.overrides, outputs, where), outputs)
    return tuple(each for each in outputs if each in found - {name})


def _after_nested(path: Any, kind: Kind, outputs: Mapping[str, str], where: str) -> set[str]:
    """The stages whose outputs are named in a file that a config names."""
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return set()
    values = kind.read(Path(path))
    if has_references(values):
        raise InputError(
            f"{where}: {path}: found ${{stages.NAME}}; allowed: paths, as the command reads this "
            "file itself"
        )
    return read_outputs(values, outputs)


def _values(
    settings: StageConfig, kind: Kind, outputs: Mapping[str, str], where: str
) -> dict[str, Any]:
    """The fields of a stage's config."""
    values: Any = settings.config
    if isinstance(values, Path):
        path = Path(with_outputs(str(values), outputs, f"{where}.config"))
        values = kind.read(path)
        if not isinstance(values, Mapping):
            raise InputError(f"{path}: expected a mapping of fields")
    values = apply_values(dict(values), settings.overrides)
    replaced: dict[str, Any] = with_outputs(values, outputs, f"{where}")
    return replaced


def _check_outputs(stages: Mapping[str, Stage], source: str) -> None:
    """Raise InputError if an output is, or lies in, another one."""
    for name, stage in stages.items():
        for other in stages.values():
            if other is not stage and is_inside(stage.out, other.out):
                raise InputError(
                    f"{source}: stages.{name}.out: found {stage.out}, which is or lies in the "
                    f"output of stage {other.name}; allowed: an output of its own"
                )


def _further_outputs(stages: Mapping[str, Stage]) -> dict[str, str]:
    """What stages write beside their outputs: the stage's name by place."""
    return {
        whole_place(place): stage.name
        for stage in stages.values()
        if stage.is_known
        for place in stage.kind.writes(stage.values)
    }


def _behind(stage: Stage, further: Mapping[str, str]) -> Stage:
    """A stage, also behind those that write a further output which it reads."""
    places = read_outputs(stage.values, {place: place for place in further})
    more = {further[place] for place in places} | {*stage.after}
    after = tuple(each for each in stage.outputs if each in more - {stage.name})
    return replace(stage, after=after)


def _check_order(stages: Mapping[str, Stage], source: str) -> None:
    """Raise InputError for stages that wait for each other."""
    try:
        TopologicalSorter({name: stage.after for name, stage in stages.items()}).prepare()
    except CycleError as error:
        raise InputError(
            f"{source}: stages: a cycle, in which each waits for the one before it: "
            f"{' -> '.join(error.args[1])}"
        ) from None


def _check_inputs(stage: Stage, written: Sequence[str]) -> None:
    """Raise InputError for a wrong config, or for an input that is not there and that is not
    written by a stage.
    """
    for field, path in stage.kind.reads(stage.config):
        for part in [path] if path.exists() else map(Path, str(path).split("+")):
            is_made = any(is_inside(str(part), place) for place in written)
            if not is_made and not part.exists() and hub_name(part) is None:
                raise InputError(
                    f"{stage.source}: {field}: {part}: no such file, and no stage makes it"
                )
    if not stage.after:
        stage.kind.check(stage.config)
