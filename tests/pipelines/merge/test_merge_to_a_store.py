"""Merges into an object store: a real S3 protocol server on loopback.

Oracle: the same merge on a disk, and what the server holds.
"""

import json
from pathlib import Path
from tempfile import gettempdir

import pytest

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.merge import MergeConfig, merge
from pipelines.merge.remote import MARKER_FILE, Destination
from tests.pipelines.merge.conftest import Family


def config_of(family: Family, **fields: object) -> MergeConfig:
    fields = {"parameters": {"density": 0.4}, "max_shard_bytes": 20_000} | fields
    return MergeConfig.model_validate(family.config("ties", **fields))


def files_at(url: str) -> dict[str, bytes]:
    there = Destination.open(url)
    return {name: there.store.cat_file(f"{there.folder}/{name}") for name in there.sizes()}


def test_same_files_as_in_a_folder(family: Family, tmp_path: Path, bucket: str, files_of) -> None:
    config = config_of(family)
    local = merge(config, tmp_path / "out")
    url = f"{bucket}/models/out"
    assert merge(config, url) == url
    assert files_at(url) == files_of(local)
    merge(config, url)  # finished: not done again
    with pytest.raises(InputError) as caught:
        merge(config_of(family, seed=1), url)
    assert str(caught.value) == (
        f"{url}: exists already; choose another output, or --force to replace it"
    )
    other = config_of(family, seed=1, max_shard_bytes=1_000_000)
    merge(other, url, force=True)
    assert files_at(url) == files_of(merge(other, tmp_path / "other"))


def test_goes_on_after_the_last_shard(
    family: Family, tmp_path: Path, bucket: str, files_of, monkeypatch
) -> None:
    config = config_of(family)
    url = f"{bucket}/out"
    plain = Destination.put
    sent: list[str] = []

    def break_off(self: Destination, file: Path) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(file.name)
        plain(self, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Destination, "put", break_off)
        merge(config, url)
    left = files_at(url)
    assert set(left) == {MARKER_FILE, *sent}
    assert set(json.loads(left[MARKER_FILE])["shards"]) == set(sent)
    again: list[str] = []
    monkeypatch.setattr(
        Destination, "put", lambda self, file: (again.append(file.name), plain(self, file))[1]
    )
    merge(config, url)
    assert not set(again) & set(sent)
    assert again[-1] == "poise.json"
    assert files_at(url) == files_of(merge(config, tmp_path / "out"))


def test_a_store_that_refuses(family: Family, bucket: str) -> None:
    with pytest.raises(InputError, match=r"^s3://no-such-bucket/out: cannot be used: "):
        merge(config_of(family), "s3://no-such-bucket/out")
    with pytest.raises(InputError, match=r"^nosuch://a/b: cannot be written to: "):
        merge(config_of(family), "nosuch://a/b")


def test_a_folder_as_an_address(family: Family, tmp_path: Path, files_of) -> None:
    """file:// is a store too; what a killed merge left in the scratch folder is not uploaded."""
    url = f"file://{tmp_path}/new/out"
    scratch = Path(gettempdir()) / f"poise-merge-{fingerprint(url)}"
    scratch.mkdir()
    (scratch / "model-00007-of-00009.safetensors").write_bytes(b"old")
    merge(config_of(family), url)
    assert files_of(tmp_path / "new" / "out") == files_of(merge(config_of(family), tmp_path / "o"))
