"""`poise status`: what a storage holds, in a folder and in an object store; what prune takes.

Oracle: files that are written here, and the lines and states they have to give.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.pipeline import StageRecord, State
from pipelines.status import Storage, items_of, pipelines_of
from tests.ray_jobs.command_line import poise

OLD = time.time() - 30 * 86400

FILES = {
    "models/sft/poise.json": {"kind": "aligned"},
    "models/sft/model.safetensors": "x" * 1000,
    "models/sft/adapter/poise.json": {"kind": "aligned"},
    "models/.dpo.partial/run.json": {"config": {"num_steps": 40}},
    "models/.dpo.partial/metrics.jsonl": "{}\n" * 12,
    "models/.kto.partial/run.json": {"config": {}},
    "models/.kto.partial/failure.json": {"kind": "diverged", "message": "loss is nan at step 3"},
    "models/.poise-cache/tokens/tokens.arrow": "y" * 500,
    "ties/.poise-merge.json": {"shards": {"a": [], "b": []}},
    "ties/a.safetensors": "z",
    ".soup.partial/.plan.json": "key",
    ".soup.partial/.journal": "{}\n{}\n{}\n",
    "test/store.json": {},
    "test/evaluation.json": {
        "models": {"a": {"tasks": {"t": {}}}},
        "failed": [{"model": "a", "task": "u", "reason": "out of memory"}],
    },
    "test/samples/t/key/00000.parquet": "s",
    "matrix/store.json": {},
    "alpha/sweep.json": {"trials": [{}, {}]},
    "beta/journal.jsonl": "{}\n{}\n",
    "notes.txt": "n" * 10,
    ".weights.partial": "half a file",
}
STATES = {
    "models/sft": ("aligned", "stands", ""),
    "models/.dpo.partial": ("alignment", "unfinished", "12 of 40 steps"),
    "models/.kto.partial": ("alignment", "failed", "loss is nan at step 3"),
    "models/.poise-cache": ("tokens", "cache", ""),
    "ties": ("merge", "unfinished", "2 shards are there"),
    ".soup.partial": ("merge", "unfinished", "3 parts are written"),
    "test": ("evaluation", "failed", "a on u: out of memory"),
    "matrix": ("evaluation", "unfinished", "its numbers are not written"),
    "alpha": ("sweep", "stands", "2 trials"),
    "beta": ("sweep", "unfinished", "2 events in its journal"),
    ".weights.partial": ("result", "unfinished", ""),
    "other files": ("", "other", ""),
}
UNFINISHED = {
    name for name, (kind, state, _) in STATES.items() if state in ("unfinished", "failed")
}
OLD_RUNS = UNFINISHED - {"test", "matrix"}  # stores keep their numbers


def content(value: Any) -> bytes:
    return (value if isinstance(value, str) else json.dumps(value)).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A storage that has not changed for a month."""
    for name, value in FILES.items():
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(value))
        os.utime(path, (OLD, OLD))
    return tmp_path / "runs"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock on a path, as another process has it."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def states(address: object) -> dict[str, tuple[str, str, str]]:
    storage = Storage(str(address))
    return {
        each.name: (each.kind, each.state, each.note) for each in items_of(storage, storage.files())
    }


def test_a_folder(folder: Path) -> None:
    assert states(folder) == STATES
    sizes = {
        each.name: each.size
        for each in items_of(Storage(str(folder)), Storage(str(folder)).files())
    }
    assert sizes["models/sft"] == 1000 + 2 * len(content({"kind": "aligned"}))
    assert sizes["other files"] == 10
    assert sum(sizes.values()) == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_an_object_store(folder: Path, bucket: str) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    for name, value in FILES.items():
        store.pipe_file(f"{bucket}/runs/{name}", content(value))
    assert states(f"{bucket}/runs/") == STATES
    with pytest.MonkeyPatch.context() as patch:  # it has just been written
        assert poise(patch, "status", f"{bucket}/runs", "--prune", "--yes") == 0
        assert states(f"{bucket}/runs") == STATES
        assert poise(patch, "status", f"{bucket}/runs", "--prune", "--yes", "--days", 0) == 0
    assert states(f"{bucket}/runs").keys() == STATES.keys() - OLD_RUNS


@pytest.mark.parametrize("lock", ["models/.dpo.partial", ".soup.partial"])
def test_what_runs_holds_its_lock(folder: Path, lock: str) -> None:
    with held(folder / lock):
        assert states(folder)[lock][1] == "running"
    assert states(folder)[lock][1] == "unfinished"


def test_what_a_command_or_an_evaluation_writes_is_locked_beside(folder: Path) -> None:
    (folder / ".weights.lock").touch()
    (folder / "matrix" / "samples").mkdir()
    (folder / "matrix" / "samples" / ".00000.lock").touch()
    with held(folder / ".weights.lock"), held(folder / "matrix" / "samples" / ".00000.lock"):
        found = states(folder)
    assert (found[".weights.partial"][1], found["matrix"][1]) == ("running", "running")


def test_the_command_prints_and_prunes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert poise(monkeypatch, "status", folder) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in STATES)
    assert "loss is nan at step 3" in told
    assert poise(monkeypatch, "status", folder, "--prune") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in OLD_RUNS)
    assert "would go; --yes removes them" in told
    assert states(folder) == STATES
    with held(folder / ".soup.partial"):
        assert poise(monkeypatch, "status", folder, "--prune", "--yes") == 0
    assert "soup" not in capsys.readouterr().out  # it is no old run, it runs
    assert states(folder).keys() == STATES.keys() - OLD_RUNS | {".soup.partial"}
    assert poise(monkeypatch, "status", folder, "--prune", "--yes", "--days", 40) == 0
    assert "no unfinished run is older than 40 days" in capsys.readouterr().out


def test_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert poise(monkeypatch, "status", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["items"]} == STATES.keys()
    assert found["bytes"] == sum(len(content(value)) for value in FILES.values())
    assert poise(monkeypatch, "status", folder, "--json", "--prune", "--yes") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["old"]) == set(found["removed"]) == OLD_RUNS


def test_pipelines_run_or_are_interrupted(tmp_path: Path, bucket: str) -> None:
    for place in (str(tmp_path), f"{bucket}/runs"):
        state = State(place, "line")
        with state.writing():
            state.set("a", StageRecord("merge", "/a", "done", seconds=2.0))
            state.set("b", StageRecord("merge", "/b", "running"))
            storage = Storage(place)
            [running] = pipelines_of(storage, storage.files())
        [ended] = pipelines_of(storage, storage.files())
        assert running.is_running is (True if place == str(tmp_path) else None)
        assert ended.is_running is False
        assert (running.name, running.stages["b"]["state"]) == ("line", "running")
        assert (ended.stages["a"]["state"], ended.stages["b"]["state"]) == ("done", "interrupted")


def test_what_was_written_before_a_kill_is_done(tmp_path: Path) -> None:
    """Of stages in one call, which end together in the state."""
    state = State(str(tmp_path), "line")
    for name in ("a", "b", "c"):
        state.set(name, StageRecord("align", str(tmp_path / name), "running"))
    for name, age in (("a", 0), ("b", 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "poise.json").write_text("{}")
        then = time.time() - age + 1
        os.utime(tmp_path / name / "poise.json", (then, then))
    storage = Storage(str(tmp_path))
    [found] = pipelines_of(storage, storage.files())
    assert [each["state"] for each in found.stages.values()] == [
        "done",
        "interrupted",
        "interrupted",
    ]


def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, line in (
        (["none"], "none: no such folder"),
        ([str(tmp_path), "--yes"], "--yes: has no effect without --prune"),
    ):
        assert poise(monkeypatch, "status", *arguments) == 2
        assert capsys.readouterr().err == f"poise: {line}\n"
