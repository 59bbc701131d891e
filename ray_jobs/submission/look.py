"""A look at the cluster before a job is submitted: could it ever run there, and would it be
understood?
"""

import json
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import InputError
from pipelines.versions import versions
from ray_jobs.submission import on_head
from ray_jobs.submission.head import Head, tell

LOOKS = "poise-look-"
LOOK_S = 120.0
POLL_S = 0.3
LAST_LINES = 3

# The shell's parent is a process of Ray: the program of its environment is next to Ray's library,
# even where the head was started with an environment that is not on the path.
RAYS_PYTHON = (
    r"python=$(sed -n 's|^[^/]* \(/.*/\)lib/python3[^/]*/.*/ray/_raylet\.so$|\1bin/python|p' "
    '/proc/$PPID/maps | head -n 1); exec "${python:-python}" -c '
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of node that the autoscaler may add, up to `most` of them."""

    resources: Mapping[str, float]
    most: int


@dataclass(frozen=True, slots=True)
class Look:
    """What the head says of itself.

    Args:
        version: of the Poise that a job would run; None without one.
        commands: of that Poise; None if it cannot be asked.
        sent: whether that Poise is the working directory's own.
        ray: version.
        nodes: resources of each living node.
        kinds: what the autoscaler may add, by name; None if unknown, empty if it adds none.
        scripts: the folder of Ray's Python on the head.
        path: PATH of a job there.
        script: whether `poise` is on that path or in that folder.
    """

    version: str | None
    commands: tuple[str, ...] | None
    sent: bool
    ray: str
    nodes: tuple[Mapping[str, float], ...]
    kinds: Mapping[str, Kind] | None
    scripts: str = ""
    path: str = ""
    script: bool = True


@dataclass(frozen=True, slots=True)
class Asked:
    """The resources that the command itself reserves; what it starts on workers comes on top."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)

    def by_name(self) -> dict[str, float]:
        """Resources above zero as Ray names them, memory in bytes."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gb * 1e9, **self.others}
        return {name: amount for name, amount in named.items() if amount > 0}

    def settings(self) -> dict[str, object]:
        """The same for Ray's `submit_job`."""
        named: dict[str, object] = {
            "entrypoint_num_cpus": self.cpus or None,
            "entrypoint_num_gpus": self.gpus or None,
            "entrypoint_memory": int(self.memory_gb * 1e9) or None,
            "entrypoint_resources": dict(self.others) or None,
        }
        return {name: value for name, value in named.items() if value is not None}


def look(head: Head, environment: dict[str, object]) -> Look:
    """Run `on_head` as a job in the environment of the job to come.

    `poise jobs` does not show it. (Ray makes an entry without a beginning of a job that is deleted
    as soon as it has ended.)

    Raises:
        InputError: it cannot run there; with its last lines.
        UnreachableError: the head does not answer any more.
    """
    job = f"{LOOKS}{secrets.token_hex(6)}"
    source = Path(on_head.__file__).read_text()
    head.submit(job, entrypoint=RAYS_PYTHON + shlex.quote(source), runtime_env=environment)
    try:
        deadline = time.monotonic() + LOOK_S
        while not (details := head.details(job)).status.is_terminal():
            if time.monotonic() > deadline:
                head.stop(job)
                raise InputError(f"{head.address}: a small job has not ended in {LOOK_S:.0f} s")
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        head.stop(job)
        raise
    lines = head.logs(job).splitlines()
    found = [line for line in lines if line.startswith(on_head.MARK)]
    if not found:
        said = " | ".join([*lines, details.message or ""][-LAST_LINES:])
        raise InputError(f"{head.address}: the head cannot run a small job: {said[:500]}")
    return parse(found[-1].removeprefix(on_head.MARK))


def parse(text: str) -> Look:
    """What `on_head` printed."""
    found = json.loads(text)
    kinds, poise = found["autoscaler"], found["poise"]
    return Look(
        version=poise["version"],
        commands=None if poise["commands"] is None else tuple(poise["commands"]),
        sent=poise["sent"],
        ray=found["ray"],
        nodes=tuple(found["nodes"]),
        kinds=None
        if kinds is None
        else {name: Kind(kind["resources"], kind["most"]) for name, kind in kinds.items()},
        scripts=found["scripts"],
        path=found["path"],
        script=found["script"],
    )


def check_room(asked: Asked, found: Look, *, wait: bool) -> str | None:
    """What to tell the user before a job waits for a place; None if a node can take it.

    Raises:
        InputError: no node that is there or may come can ever run it (`wait` submits it all the
            same).
    """
    wanted = asked.by_name()
    if not wanted or any(not missing(wanted, node) for node in found.nodes):
        return None
    there = "; ".join(_shown(node, wanted) for node in found.nodes) or "none"
    if found.kinds is None:
        if wait:
            return "no node that is there has room; waiting for one"
        raise InputError(
            f"resources: found {_shown(wanted, wanted)}, more than any node there has ({there}); "
            "what the autoscaler may add cannot be read on this head; allowed: --wait, to wait "
            "for a node"
        )
    comes = [name for name, kind in found.kinds.items() if kind.most > 0 and _may(wanted, kind)]
    if comes or wait:
        return f"waiting for a node of kind {' or '.join(comes)}" if comes else "waiting for a node"
    kinds = "; ".join(
        f"{name} (up to {kind.most}): {_shown(kind.resources, wanted)}"
        for name, kind in found.kinds.items()
    )
    sizes = [*found.nodes, *(kind.resources for kind in found.kinds.values() if kind.most > 0)]
    lack = min((missing(wanted, size) for size in sizes), key=_how_much, default=wanted)
    raise InputError(
        f"resources: found {_shown(wanted, wanted)}; missing on every node: {_shown(lack, lack)}; "
        f"nodes there: {there}; nodes that may come: {kinds or 'none'}; allowed: less, or --wait "
        "for a node that you add yourself"
    )


def check_workers(wanted: Mapping[str, int], found: Look, *, wait: bool) -> None:
    """Check what the command's workers need together.

    Raises:
        InputError: the cluster can never have that much, or that cannot be read (`wait` submits
            the command all the same).
    """
    there = {name: sum(node.get(name, 0.0) for node in found.nodes) for name in wanted}
    lack = missing(wanted, there)
    if not lack or wait:
        return
    if found.kinds is None:
        raise InputError(
            f"--workers: found {_shown(wanted, wanted)}; the cluster has {_shown(there, wanted)}, "
            "and what its autoscaler may add cannot be read on this head; allowed: --wait, to "
            "wait for nodes"
        )
    kinds = found.kinds.values()
    open_ended = any(kind.most > 0 and not kind.resources for kind in kinds)
    most = {n: sum(kind.most * kind.resources.get(n, 0.0) for kind in kinds) for n in wanted}
    grown = {name: there[name] + most[name] for name in wanted}
    if missing(wanted, grown) and not open_ended:
        raise InputError(
            f"--workers: found {_shown(wanted, wanted)}; allowed: up to {_shown(grown, wanted)}, "
            "which the cluster has or may add, or --wait for nodes that you add yourself"
        )


def missing(wanted: Mapping[str, float], node: Mapping[str, float]) -> dict[str, float]:
    """What a node of its own lacks of the resources that are wanted."""
    lacks = {name: amount - node.get(name, 0.0) for name, amount in wanted.items()}
    return {name: amount for name, amount in lacks.items() if amount > 0}


def _may(wanted: Mapping[str, float], kind: Kind) -> bool:
    """Whether a new node may hold what is wanted: what its kind does not name, a cloud's machine
    may yet have, unless it is of the user's own making.
    """
    if not kind.resources:
        return True
    open_ends = {"memory"} - set(kind.resources)
    return not missing({n: a for n, a in wanted.items() if n not in open_ends}, kind.resources)


def _how_much(lack: Mapping[str, float]) -> tuple[int, float]:
    return len(lack), sum(lack.values())


def _shown(resources: Mapping[str, float], names: Mapping[str, float]) -> str:
    """Resources of these names, as `CPU 4, memory 8 GB`."""

    def one(name: str) -> str:
        amount = resources.get(name, 0.0)
        return f"{name} {amount / 1e9:g} GB" if name == "memory" else f"{name} {amount:g}"

    return ", ".join(map(one, names))


def check_command(command: list[str], found: Look) -> None:
    """Compare the versions of Poise here and there, and the command with those it has there.

    Differences that may be harmless are told.

    Raises:
        InputError: `poise` without a Poise there, or a command that the one there does not know.
    """
    here = versions()
    if here["ray"] != found.ray:
        tell(f"Ray is {here['ray']} here and {found.ray} on the cluster")
    if found.version is not None and found.version != here.get("poise"):
        tell(f"Poise is {here.get('poise')} here and {found.version} on the cluster, which runs")
    if command[0] != "poise":
        return
    if found.commands is None:
        raise InputError(
            "command: found poise; the cluster has no Poise that can be imported; allowed: install "
            "it there, or submit from its source folder"
        )
    name = next((word for word in command[1:] if not word.startswith("-")), None)
    if name is not None and name not in found.commands:
        raise InputError(
            f"command: found poise {name}, which Poise {found.version} on the cluster does not "
            f"know; allowed: {', '.join(found.commands)}"
        )


def as_run_there(command: list[str], found: Look) -> tuple[str, dict[str, str]]:
    """The shell's line for a command, and the variables with which its programs are found."""
    if command[0] == "poise" and not found.script:
        command = ["python", "-m", "ray_jobs.cli", *command[1:]]
    on_path = found.scripts in found.path.split(":")
    return shlex.join(command), {} if on_path else {"PATH": f"{found.scripts}:{found.path}"}
