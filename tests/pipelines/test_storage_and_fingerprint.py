"""Where outputs live, and how unchanged inputs are recognised.

Oracle: paths written by hand; equal content has equal fingerprints, other content has others.
"""

from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_directory
from pipelines.storage import JOB_VARIABLE, resolve_output


def test_storage_takes_relative_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_output("a", None) == tmp_path / "a"
    assert resolve_output("a", tmp_path / "store") == tmp_path / "store" / "a"
    assert resolve_output(tmp_path / "b", tmp_path / "store") == tmp_path / "b"


def test_a_relative_output_in_a_job_without_storage_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(InputError, match="storage"):
        resolve_output("a", None)
    assert resolve_output("a", tmp_path) == tmp_path / "a"


def test_fingerprints_follow_content_and_not_order(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    (tmp_path / "x.json").write_text("1")
    first = fingerprint_directory(tmp_path, ["*.json"])
    (tmp_path / "y.txt").write_text("1")
    assert fingerprint_directory(tmp_path, ["*.json"]) == first
    (tmp_path / "x.json").write_text("2")
    assert fingerprint_directory(tmp_path, ["*.json"]) != first
