"""Storages that cannot be used are found before the work.

Oracle: folders that the system itself makes read-only, a store on loopback, and nodes whose folders
are others.
"""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.evaluate import places
from pipelines.pipeline.probe import NodeProbe, check_storage, on_ray_nodes


def on_two(first: NodeProbe | None, second: NodeProbe | None) -> Callable[..., dict[str, str]]:
    """Two nodes; None sees the driver's storage."""

    def called(probe: NodeProbe) -> dict[str, str]:
        nodes = {"10.0.0.1-0": first, "10.0.0.2-1": second}
        return {name: (own or probe)(name) for name, own in nodes.items()}

    return called


def test_a_good_folder_is_left_as_it_was(tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    storage.mkdir()
    check_storage(str(storage))
    check_storage(str(storage), on_two(None, None))
    assert list(storage.iterdir()) == []


def test_an_address_is_used_and_left_as_it_was(bucket: str) -> None:
    import fsspec

    check_storage(f"{bucket}/runs", on_two(None, None))
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    assert store.find(bucket) == []


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(InputError, match=r"storage s3://no-such/x: cannot be written to \(s3://no"):
        check_storage("s3://no-such/x")


def test_a_read_only_storage() -> None:
    """/sys takes no files from anybody."""
    with pytest.raises(InputError, match=r"storage /sys/kernel: .*read-only|no folder can be made"):
        check_storage("/sys/kernel")


def test_a_full_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(places, "write_atomically", full)
    with pytest.raises(InputError) as error:
        check_storage(str(tmp_path))
    assert str(error.value) == (
        f"storage {tmp_path}: is full (No space left on device); choose another storage"
    )


@pytest.mark.parametrize("other", ["first", "second"])
def test_a_storage_that_a_node_has_for_itself(tmp_path: Path, other: str) -> None:
    """The node sees a folder of the same name, but not the driver's."""
    own = NodeProbe(str(tmp_path / "of-node" / ".poise-probe-1"))
    nodes = on_two(own, None) if other == "first" else on_two(None, own)
    with pytest.raises(InputError) as error:
        check_storage(str(tmp_path / "runs"), nodes)
    node = "10.0.0.1-0" if other == "first" else "10.0.0.2-1"
    assert f"on node {node}: is not the driver's: a file that one has written" in str(error.value)
    assert not list(tmp_path.rglob("*probe*"))


def test_a_node_that_only_reads(tmp_path: Path) -> None:
    nodes = on_two(None, NodeProbe("/sys/kernel/.poise-probe-1"))
    with pytest.raises(InputError, match=r"on node 10\.0\.0\.2-1: (is read-only|cannot be)"):
        check_storage(str(tmp_path), nodes)


@pytest.mark.ray
def test_each_node_of_a_ray_answers(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    found = on_ray_nodes(NodeProbe(str(tmp_path / "probe")))
    assert len(found) == len(ray.nodes())
    assert all("is not the driver" in problem for problem in found.values())
    check_storage(str(tmp_path), on_ray_nodes)
