"""Merges on a disk that fails now and then. Oracle: the bytes of a merge on one that does not."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.merge import MergeConfig, merge
from pipelines.storage import with_retries
from tests.pipelines.merge.conftest import Family


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.PAUSES_S", (0.0, 0.0, 0.0))


def fail_each(monkeypatch: pytest.MonkeyPatch, name: str, number: int, every: int) -> list[int]:
    """Let a function of os fail each so many calls, after it did a part; returns the failures."""
    plain, calls, failures = getattr(os, name), [0], []

    def failing(descriptor: int, data: Any, place: int) -> int:
        calls[0] += 1
        if calls[0] % every == 0:
            if name == "pwrite":
                plain(descriptor, b"\xff" * min(8, len(data)), place)
            failures.append(number)
            raise OSError(number, os.strerror(number))
        return plain(descriptor, data, place)

    monkeypatch.setattr(os, name, failing)
    return failures


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_what_may_pass_is_tried_again(
    family: Family, tmp_path: Path, files_of, monkeypatch, name: str, number: int
) -> None:
    config = MergeConfig.model_validate(family.config("ties", parameters={"density": 0.3}))
    undisturbed = merge(config, tmp_path / "undisturbed")
    failures = fail_each(monkeypatch, name, number, every=3)
    out = merge(config, tmp_path / "out")
    assert failures
    assert files_of(out) == files_of(undisturbed)


def test_what_stays_or_will_come_again_ends_the_merge(
    family: Family, tmp_path: Path, monkeypatch
) -> None:
    config = MergeConfig.model_validate(family.config(num_workers=1))
    for number, tries in ((errno.EIO, 4), (errno.EACCES, 1)):
        with monkeypatch.context() as patch:
            failures = fail_each(patch, "preadv", number, every=1)
            with pytest.raises(OSError, match=os.strerror(number)):
                merge(config, tmp_path / "out")
        assert len(failures) == tries
        assert not (tmp_path / "out").exists()


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("pipelines.storage.PAUSES_S", (0.1, 1.0))
    monkeypatch.setattr("pipelines.storage.time.sleep", waited.append)

    def stale() -> None:
        raise OSError(errno.ESTALE, "stale")

    with pytest.raises(OSError, match="stale"):
        with_retries(stale)
    assert waited == [0.1, 1.0]
