"""Interrupted merges go on, and give the bytes of an undisturbed one.

Oracle: the files of a merge that nobody disturbed.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.commit import lock, partial_path
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, executors, merge
from pipelines.merge.journal import JOURNAL_FILE
from pipelines.provenance import read_record
from tests.pipelines.merge.conftest import Family

# A merge in small items that stands still in the middle of its work, to be killed there.
SCRIPT = """
import itertools, sys, threading
import pipelines.merge.plan, pipelines.merge.tensor, pipelines.merge.journal
from pipelines.merge import load_merge_config, merge
from pipelines.merge.worker import MergeWorker

pipelines.merge.plan.PIECE_ELEMENTS = 500
pipelines.merge.tensor.CHUNK_ELEMENTS = 100
pipelines.merge.journal.SYNC_INTERVAL_S = 0.0
plain, count = MergeWorker.run, itertools.count()
def stopping(self, item):
    if next(count) >= 5:
        threading.Event().wait()
    return plain(self, item)
MergeWorker.run = stopping
merge(load_merge_config(sys.argv[1]), sys.argv[2])
"""


# The same by actors of a Ray of its own, which cannot see what is changed here but by value.
RAY_SCRIPT = """
import sys, time
from pathlib import Path
import pipelines.merge.plan, pipelines.merge.executors, pipelines.merge.journal
from pipelines.merge import load_merge_config, merge
from ray_jobs.session import ray_session

class Slow(pipelines.merge.executors._Actor):
    def __call__(self, row):
        time.sleep(1)
        return super().__call__(row)

pipelines.merge.plan.PIECE_ELEMENTS = 500
pipelines.merge.journal.SYNC_INTERVAL_S = 0.0
pipelines.merge.executors._Actor = Slow
with ray_session():
    merge(load_merge_config(sys.argv[1]), sys.argv[2], executor="ray")
"""


@pytest.fixture
def small_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut this process's merges as the killed one's."""
    monkeypatch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 500)
    monkeypatch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 100)


def wait_for(path: Path, num_lines: int, seconds: float = 60) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + seconds
    while not path.is_file() or len(path.read_text().splitlines()) < num_lines:
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_killed_driver(
    family: Family, tmp_path: Path, small_items: None, files_of, method: str
) -> None:
    fields = {"parameters": {"density": 0.3}} if method == "ties" else {}
    config = family.config(method, out_dtype="bfloat16", **fields)
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump(config))
    checked = MergeConfig.model_validate(config)
    undisturbed = merge(checked, tmp_path / "undisturbed")
    out = tmp_path / "out"
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file), str(out)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    journal = partial_path(out) / JOURNAL_FILE
    try:
        wait_for(journal, 3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    done = len(journal.read_text().splitlines())
    finished: list[int] = []
    worker = "pipelines.merge.worker.MergeWorker.run"
    with pytest.MonkeyPatch.context() as patch:
        from pipelines.merge.worker import MergeWorker

        plain = MergeWorker.run
        patch.setattr(worker, lambda self, item: (finished.append(item), plain(self, item))[1])
        merge(checked, out)
    assert len(finished) > 0
    assert done >= 3
    assert len(set(finished)) == len(finished)
    assert files_of(out) == files_of(undisturbed)  # with the sums of what rounding keeps
    assert read_record(out)["rounding"]["num_exact"] > 0
    assert not partial_path(out).exists()


def end(processes: list[psutil.Process]) -> None:
    """Wait a while for Ray's processes, whose driver is gone, and end those that are left."""
    _, left = psutil.wait_procs(processes, timeout=10)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_driver_of_a_cluster(
    family: Family, tmp_path: Path, ray_cluster: None, small_items: None, files_of
) -> None:
    """It goes on in another cluster."""
    config = family.config("ties", parameters={"density": 0.3})
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    checked = MergeConfig.model_validate(config)
    undisturbed = merge(checked, tmp_path / "undisturbed")
    command = [sys.executable, "-c", RAY_SCRIPT, str(file), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment.pop("RAY_ADDRESS", None)
    journal = partial_path(out) / JOURNAL_FILE
    with subprocess.Popen(command, env=environment) as driver:
        try:
            wait_for(journal, 1, seconds=250)
        finally:
            below = psutil.Process(driver.pid).children(recursive=True)
            names = {process.name() for process in below}
            driver.kill()
            driver.wait()
            end(below)
    assert "raylet" in names
    assert not out.exists()
    assert len(journal.read_text().splitlines()) >= 1
    merge(checked, out, executor="ray")
    assert files_of(out) == files_of(undisturbed)
    assert not partial_path(out).exists()


@pytest.mark.ray
def test_killed_actor(
    family: Family, tmp_path: Path, ray_cluster: None, small_items: None, files_of, monkeypatch
) -> None:
    config = MergeConfig.model_validate(family.config("ties", parameters={"density": 0.3}))
    undisturbed = merge(config, tmp_path / "undisturbed")
    marker = tmp_path / "killed"

    class Dying(executors._Actor):
        """An actor whose process is killed once, before its fifth item."""

        def __call__(self, row):
            if row["item"] == 4 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(row)

    monkeypatch.setattr(executors, "_Actor", Dying)
    out = merge(config, tmp_path / "out", executor="ray")
    assert marker.exists()
    assert files_of(out) == files_of(undisturbed)


def test_a_cut_line_of_the_journal_is_no_item(
    family: Family, tmp_path: Path, small_items: None, files_of
) -> None:
    config = MergeConfig.model_validate(family.config())
    undisturbed = merge(config, tmp_path / "undisturbed")
    out = tmp_path / "out"
    partial = partial_path(out)
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:

        def fail(self, item: int) -> None:
            raise RuntimeError("power cut")

        patch.setattr("pipelines.merge.worker.MergeWorker.run", fail)
        merge(config, out)
    (partial / JOURNAL_FILE).write_text('{"item": 1, "dig')
    merge(config, out)
    assert files_of(out) == files_of(undisturbed)


def test_two_merges_into_one_output(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = partial_path(out)
    partial.mkdir()
    (partial / "of-the-first").touch()
    with lock(partial), pytest.raises(InputError) as caught:
        merge(MergeConfig.model_validate(family.config()), out)
    assert str(caught.value) == f"{partial}: another run is writing this output"
    assert (partial / "of-the-first").exists()
    assert not out.exists()


def test_a_finished_output_is_not_done_again(family: Family, tmp_path: Path) -> None:
    config = MergeConfig.model_validate(family.config())
    out = merge(config, tmp_path / "out")
    before = (out / "model.safetensors").stat()
    merge(config, out)
    merge(config.model_copy(update={"num_workers": 1}), out)
    after = (out / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(InputError, match="exists already"):
        merge(other, out)


def test_remains_of_another_merge_are_not_used(family: Family, tmp_path: Path, files_of) -> None:
    config = MergeConfig.model_validate(family.config())
    undisturbed = merge(config, tmp_path / "undisturbed")
    out = tmp_path / "out"
    partial = partial_path(out)
    partial.mkdir()
    (partial / ".plan.json").write_text('"of another"')
    (partial / JOURNAL_FILE).write_text('{"item": 0, "digests": []}\n')
    (partial / "model.safetensors").write_bytes(b"\1" * 100)
    merge(config, out)
    assert files_of(out) == files_of(undisturbed)
