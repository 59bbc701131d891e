"""Which models share engines: those whose weights can be changed for one another."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.engines import EngineConfig
from pipelines.engines.models import check_kind
from pipelines.engines.text import Text, tokens_key
from pipelines.engines.weights import CheckpointWeights, comparable_config, stored_dtype
from pipelines.fingerprint import fingerprint
from pipelines.serve.config import Replicas, ServeConfig, ServedConfig
from pipelines.serve.names import Version


@dataclass(frozen=True, slots=True)
class Group:
    """Models that share engines.

    Attributes:
        key: of the group; part of the name of its Serve application.
        engine: with the kind of the models, and the label of reward models.
        replicas: bounds of the number of engines.
        cpus: cores of each, where it runs on a CPU.
        first: the weights that engines start with.
        names: of its models.
        trials: names of which a canary has this shape.
    """

    key: str
    engine: EngineConfig
    replicas: Replicas
    cpus: int
    first: Version
    names: tuple[str, ...]
    trials: tuple[str, ...] = ()


def shape_key(version: Version, model: ServedConfig, engine: EngineConfig) -> str:
    """What weights must have in common to be changed for one another: names and shapes of tensors,
    the architecture, the numbers of tokens, the dtype, and what is asked of the model.

    Raises:
        InputError: no checkpoint of this kind.
    """
    weights = CheckpointWeights.open(version.path)
    check_kind(weights, engine)
    shapes = sorted((name, list(shape)) for name, (_, shape) in weights.tensors.items())
    tokens = tokens_key(Text(weights, 1))
    config = comparable_config(weights.config)
    described: list[Any] = [shapes, config, tokens, model.kind, model.head]
    dtype = str(stored_dtype(weights)) if engine.dtype == "auto" else engine.dtype
    return fingerprint([*described, dtype])[:12]


def engine_of(model: ServedConfig, config: ServeConfig) -> EngineConfig:
    """The engine of one model. Rewards are computed in float32 unless the config says otherwise."""
    fields = config.engine.model_dump(exclude_unset=True)
    fields |= {"name": config.engine.name, "kind": model.kind, "head": model.head}
    if model.kind == "reward" and config.engine.dtype == "auto":
        fields["dtype"] = "float32"
    return EngineConfig.model_validate(fields)


def num_cores() -> int:
    """Cores that engines share: of this machine, or one on a cluster, whose machines may differ."""
    return 1 if os.environ.get("RAY_ADDRESS") else len(os.sched_getaffinity(0))


def groups_of(
    config: ServeConfig,
    versions: Mapping[str, Version],
    canaries: Mapping[str, Version],
    cores: int,
) -> list[Group]:
    """The groups of a server's models, in the order of the config.

    Args:
        versions: what each name means now.
        canaries: what is tried on a part of a name's requests.
        cores: of the machine, which engines share equally where the config does not say.
    """
    found: dict[str, Group] = {}
    asked = [(name, versions[name], False) for name in config.models]
    asked += [(name, version, True) for name, version in canaries.items()]
    for name, version, is_trial in asked:
        model = config.models[name]
        names: tuple[str, ...] = () if is_trial else (name,)
        trials: tuple[str, ...] = (name,) if is_trial else ()
        engine = engine_of(model, config)
        key = shape_key(version, model, engine)
        key = key if model.share else fingerprint([key, name])[:12]
        old = found.get(key)
        if old is None:
            bounds, cpus = model.replicas, model.cpus or 0
            found[key] = Group(key, engine, bounds, cpus, version, names, trials)
            continue
        one, other = old.replicas, model.replicas
        bounds = Replicas(min=max(one.min, other.min), max=max(one.max, other.max))
        cpus = max(old.cpus, model.cpus or 0)
        names, trials = (*old.names, *names), (*old.trials, *trials)
        found[key] = Group(key, engine, bounds, cpus, old.first, names, trials)
    num_engines = sum(group.replicas.max for group in found.values())
    share = max(1, cores // num_engines)
    return [replace(group, cpus=group.cpus or share) for group in found.values()]
