"""A server before it starts: its models are looked at on disk, named by weights, and grouped."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoints.digests import DigestMemory
from pipelines.checkpoints.reader import Checkpoint
from pipelines.commit import write_atomically
from pipelines.engines.config import computing_dtype
from pipelines.engines.weights import CheckpointWeights, stored_dtype
from pipelines.errors import InputError
from pipelines.provenance import read_record
from pipelines.serve.config import ServeConfig
from pipelines.serve.groups import Group, groups_of, num_cores
from pipelines.serve.keys import DEPLOY_VARIABLE, check_file, keys_in_environment
from pipelines.serve.models import check_servable, engine_device, look_at
from pipelines.serve.names import Meant, Names, Version

DIGESTS = "digests.json"
GIB = 1 << 30
SERVE_CPUS = 1.0  # of Serve's own actors and the gateway
_NEEDED_FREE = 0.95  # share of the free memory that engines may take


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """All that a server is to be.

    Attributes:
        configured: what the names mean by the config.
        meant: what they mean now, as `Names.meant`.
        groups: of models that share engines, by what the names mean now.
        notes: for the user, one line each.
    """

    config: ServeConfig
    configured: dict[str, Version]
    meant: dict[str, Meant]
    groups: list[Group]
    notes: list[str]


def plan_server(config: ServeConfig) -> ServerPlan:
    """Look at all models; nothing of their weights is loaded.

    Raises:
        InputError: a checkpoint that cannot be served, or that does not fit into the memory; an
            engine that is not installed; keys or a state that cannot be read.
    """
    check_file(config.keys_file)
    if config.deploy is not None:
        check_file(config.deploy.keys_file, "deploy.keys_file")
        if config.deploy.keys_file is None and not keys_in_environment(DEPLOY_VARIABLE):
            raise InputError(f"deploy: needs a key; allowed: deploy.keys_file or {DEPLOY_VARIABLE}")
    config = _absolute(config)
    state = Path(config.state)
    looked = {name: look_at(Path(model.path)) for name, model in config.models.items()}
    notes = [
        f"{name}: has no chat template; completions alone are answered"
        for name, model in looked.items()
        if not model.has_template and config.models[name].kind == "generate"
    ]
    memory = _Memory(state)
    configured = {name: Version(memory.weights(m.path), str(m.path)) for name, m in looked.items()}
    memory.write()
    names = Names(configured, state)
    now, tried = names.versions
    if config.engine.name == "vllm":
        looked_at = [look_at(Path(each.path)) for each in [*now.values(), *tried.values()]]
        check_servable(looked_at, engine_device())
    groups = groups_of(config, now, tried, num_cores())
    if not os.environ.get("RAY_ADDRESS"):
        check_memory(groups, available_memory())
    return ServerPlan(config, configured, names.meant, groups, notes)


def _absolute(config: ServeConfig) -> ServeConfig:
    """The config with whole paths, as the server's processes run elsewhere."""

    def whole(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    log = config.log.model_copy(update={"file": whole(config.log.file)})
    paths: dict[str, Any] = {"state": whole(config.state), "keys_file": whole(config.keys_file)}
    if (deploy := config.deploy) is not None:
        own = {"folders": list(map(whole, deploy.folders)), "keys_file": whole(deploy.keys_file)}
        paths["deploy"] = deploy.model_copy(update=own)
    return config.model_copy(update=paths | {"log": log})


def needed_resources(groups: list[Group], spare_engines: int = 0) -> dict[str, float]:
    """The Ray resources that a server needs at least.

    Args:
        spare_engines: further ones, on CPUs alone, that are to have room.
    """
    needs = [(group.replicas.min, group.engine.need()) for group in groups]
    cpus = sum(count * cpus_of(group) for (count, _), group in zip(needs, groups, strict=True))
    gpus = sum(count * need.num_gpus for count, need in needs)
    spare = spare_engines * max(map(cpus_of, groups))
    needed = {"CPU": cpus + SERVE_CPUS + spare}
    return needed | ({"GPU": gpus} if gpus else {})


def cpus_of(group: Group) -> float:
    """What one engine asks Ray for: a little less than its cores, as Ray's own need some."""
    need = group.engine.need()
    return need.num_cpus if need.num_gpus else group.cpus - 0.1


def check_memory(groups: list[Group], free: int) -> None:
    """Raise InputError where the engines' models do not fit together into the free memory.

    Args:
        free: bytes.
    """
    total = 0
    for group in groups:
        if group.engine.need().num_gpus:
            continue  # vLLM and torch look at a GPU themselves, before they read weights
        weights, cache = engine_bytes(group)
        total += group.replicas.min * (weights + cache)
        if total > _NEEDED_FREE * free:
            name = (*group.names, *group.trials)[0]
            raise InputError(
                f"models.{name}: needs {(weights + cache) / GIB:.2f} GiB for each of "
                f"{group.replicas.min} engines ({weights / GIB:.2f} of weights), with the models "
                f"before it {total / GIB:.2f}; allowed: {_NEEDED_FREE * free / GIB:.2f}, "
                "95% of the free memory"
            )


def engine_bytes(group: Group) -> tuple[int, int]:
    """Bytes of one engine's weights and of its key-value cache, on a CPU."""
    weights = CheckpointWeights.open(group.first.path)
    dtype = computing_dtype(group.engine, stored_dtype(weights), "cpu")
    elements = sum(math.prod(shape) for _, shape in weights.tensors.values())
    size = torch.empty(0, dtype=dtype).element_size()
    has_cache = group.engine.name == "vllm" and group.engine.kind == "generate"
    return elements * size, int(group.engine.cache_gib * GIB) if has_cache else 0


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that are free on this machine, or in this container where it has less."""
    found, group = [_meminfo(root / "proc/meminfo")], root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):  # no container, or one without a limit
        used = int((group / "memory.current").read_text())
        words = map(str.split, (group / "memory.stat").read_text().splitlines())
        files = sum(int(w[1]) for w in words if w[0] in ("active_file", "inactive_file"))
        found.append(int((group / "memory.max").read_text()) - used + files)
    return max(0, min(found))


def _meminfo(file: Path) -> int:
    """The bytes that are available, by the system's own count; no limit where it has none."""

    def lines() -> Iterator[str]:
        try:
            yield from file.read_text().splitlines()
        except OSError:
            return

    found = (line.split() for line in lines())
    return next((int(w[1]) << 10 for w in found if w[0] == "MemAvailable:"), 1 << 62)


class _Memory:
    """Digests of weights: those in records, or computed and kept in the state's folder."""

    def __init__(self, state: Path) -> None:
        self._file, self._known, self._computed = state / DIGESTS, DigestMemory(), list[Path]()
        if self._file.is_file():
            self._known.load(self._file.read_bytes())

    def weights(self, folder: Path) -> str:
        """The digest of a checkpoint's weights. A record may be wrong; an engine looks."""
        record = read_record(folder)
        if record is not None and isinstance(record.get("weights"), str):
            return str(record["weights"])
        checkpoint = Checkpoint.open(folder)
        self._computed.append(folder)
        return self._known.digest(checkpoint).weights

    def write(self) -> None:
        """Keep what was computed."""
        if self._computed:
            write_atomically(self._file, self._known.dump(self._computed))
