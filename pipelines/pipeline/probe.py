"""Whether a storage is usable before the work: each node of the cluster writes into it and reads
what the driver has written.
"""

import errno
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from uuid import uuid4

from pipelines.errors import InputError
from pipelines.evaluate.places import Folder, Place, open_place

PROBE_BYTES = 1 << 20
_DRIVER = "driver"


def check_storage(
    storage: str, on_nodes: Callable[[Callable[[str], str]], Mapping[str, str]] | None = None
) -> None:
    """Write and read probes in a storage, from here and from each node; they go afterwards.

    Args:
        storage: a folder or an address.
        on_nodes: calls a function on each node with the node's name; gives what it returned, by
            node. Default: this process alone.

    Raises:
        InputError: the storage is read-only, full or unreachable, or a node sees another one.
    """
    folder = f"{storage}/.poise-probe-{uuid4().hex}"
    place = open_place(folder)
    names = [_DRIVER]
    try:
        if problem := _written(place, _DRIVER):
            raise InputError(f"storage {storage}: {problem}; choose another storage")
        if on_nodes is None:
            return
        found = on_nodes(NodeProbe(folder))
        names += found
        for node, problem in found.items():
            if problem:
                raise InputError(f"storage {storage}: on node {node}: {problem}")
            if node not in place.names():
                raise InputError(
                    f"storage {storage}: on node {node}: {_NOT_SHARED}; choose a storage that all "
                    "nodes share, or an address"
                )
    finally:
        _remove(place, names)


_NOT_SHARED = "is not the driver's: a file that one has written, the other does not see"


class NodeProbe:
    """What a node does: it writes its probe and reads the driver's."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self, node: str) -> str:
        """The problem of a node, in words; empty if there is none."""
        place = open_place(self._folder)
        if problem := _written(place, node):
            return problem
        try:
            content = place.read(_DRIVER)
        except (OSError, InputError):
            content = b""
        if content == _content(_DRIVER):
            return ""
        _remove(place, [node])
        return _NOT_SHARED


def _written(place: Place, name: str) -> str:
    """Write a probe and read it again; the problem in words, or nothing."""
    try:
        place.write(name, _content(name))
        if place.read(name) != _content(name):
            return "does not give back what is written to it"
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"is full ({error.strerror})"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"is read-only here ({error.strerror})"
        return f"cannot be used ({error.strerror or error})"
    except InputError as error:
        return f"cannot be written to ({error})"
    return ""


def _remove(place: Place, names: Iterable[str]) -> None:
    """Remove probes, and their folder."""
    for name in names:
        with suppress(OSError, InputError):
            place.remove(name)
    if isinstance(place, Folder):
        with suppress(OSError):
            place.path.rmdir()


def _content(name: str) -> bytes:
    """A probe's bytes: large enough that a full disk refuses them."""
    return name.encode().ljust(PROBE_BYTES, b".")


def on_ray_nodes(probe: Callable[[str], str]) -> dict[str, str]:
    """Call a function once on each node of the running Ray that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=2)(_called)
    waiting = {}
    for number, (node, address) in enumerate(nodes.items()):
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        name = f"{address}-{number}"
        waiting[name] = task.options(scheduling_strategy=strategy).remote(probe, name)
    found = {}
    for name, result in waiting.items():
        try:
            found[name] = ray.get(result)
        except ray.exceptions.RayError as error:  # of a node that has gone meanwhile
            if isinstance(error, ray.exceptions.RayTaskError):
                raise
    return found


def _called(probe: Callable[[str], str], name: str) -> str:
    return probe(name)
