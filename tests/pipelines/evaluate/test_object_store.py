"""An evaluation in an object store has one writer. Oracle: the bytes of the same evaluation in a
folder, a real S3 protocol server, and writers that are really killed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, writer
from pipelines.evaluate.places import ObjectFolder, open_place
from pipelines.evaluate.results import Evaluation
from tests.pipelines.evaluate.made_up_tasks import save_letters
from tests.tiny_models import save_tiny_llama

NUM_BLOCKS = 3


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    """A folder of a store in memory, whose writers are quick."""
    monkeypatch.setattr(writer, "BEAT_S", 0.02)
    monkeypatch.setattr(writer, "DEAD_AFTER_S", 0.3)
    found = open_place(f"memory://{request.node.name}/out")
    assert isinstance(found, ObjectFolder)
    return found


def left_behind(place: ObjectFolder, **changes: object) -> None:
    """The object of a writer that has not said that it ended."""
    about = {"id": "x", "host": "far", "pid": 1, "machine": "another", "released": False}
    place.write("writers/00007.json", json.dumps(about | changes))


def test_of_many_that_start_at_once_one_writes(place: ObjectFolder) -> None:
    start, end, refused = threading.Barrier(8), threading.Event(), []
    entered: list[int] = []

    def run(number: int) -> None:
        start.wait()
        try:
            with place.writing() as check:
                entered.append(number)
                end.wait(20)
                check()
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 20
    while len(refused) < 7 and time.monotonic() < limit:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert len(entered) == 1 and len(refused) == 7
    assert all(
        f"process {os.getpid()} on " in line
        and line.endswith("one writer; wait for its end, or choose another output")
        for line in refused
    )
    with place.writing():  # the first one has ended
        pass


def test_a_writer_without_a_sign_of_life_is_followed(
    place: ObjectFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    left_behind(place)
    began = time.monotonic()
    with place.writing():
        assert place.names("writers") == {"00008.json"}
    assert time.monotonic() - began >= 0.3
    assert "waiting up to 0 s for a sign of life of its last writer, process 1 on far" in (
        capsys.readouterr().err
    )


def test_a_writer_that_lives_elsewhere_is_not_followed(place: ObjectFolder) -> None:
    left_behind(place)
    beats = threading.Timer(0.1, left_behind, (place,), {"beats": 1})
    beats.start()
    with (
        pytest.raises(InputError, match="process 1 on far, since unknown, is writing there"),
        place.writing(),
    ):
        pass
    assert place.names("writers") == {"00007.json"}


def test_a_writer_that_slept_finds_another_one(place: ObjectFolder) -> None:
    with place.writing() as check:
        check()
        left_behind(place)  # another one took it for dead
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            try:
                check()
            except InputError as error:
                assert "process 1 on far, since unknown, writes there now" in str(error)
                break
            time.sleep(0.01)
        else:
            pytest.fail("not noticed")
    assert not json.loads(place.read("writers/00007.json"))["released"]


SCRIPT = """
import os, sys, time
from pathlib import Path
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.workers import Worker

root, out, log = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
plain = Worker._samples

def logged(self, block):
    with log.open("a") as file:
        file.write(f"{block.number}\\n")
    time.sleep(float(sys.argv[4]))
    return plain(self, block)

Worker._samples = logged
config = EvaluateConfig(models={"a": root / "a"}, tasks=root / "tasks.yaml", max_new_tokens=2)
evaluate(config, out, executor="local")
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "a", 0)
    save_letters(tmp_path, NUM_BLOCKS)
    return tmp_path


def files_at(address: str) -> dict[str, bytes]:
    place, found = open_place(address), {}
    folders = [""]
    while folders:
        folder = folders.pop()
        for name in place.names(folder):
            path = f"{folder}/{name}".lstrip("/")
            try:
                found[path] = place.read(path)
            except OSError:  # a folder
                folders.append(path)
    return {path: content for path, content in found.items() if not path.startswith("writers/")}


@pytest.mark.slow
def test_killed_and_taken_over(
    world: Path, bucket: str, project_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one writes, a second is refused. After -9 the next one goes on at once, measures at
    most one block again, and the objects are the files of a folder.
    """
    config = EvaluateConfig(models={"a": world / "a"}, tasks=world / "tasks.yaml", max_new_tokens=2)
    summary = evaluate(config, world / "whole", executor="local")
    out, log = f"{bucket}/runs/matrix", world / "log"

    def started(pause: float) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", SCRIPT, str(world), out, str(log), str(pause)]
        environment = os.environ | {"PYTHONPATH": str(project_root), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, cwd=project_root, env=environment)

    first = started(30)
    try:
        while not log.is_file():
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(InputError) as caught:
            evaluate(config, out, executor="local")
        assert f"{out}: process {first.pid} on " in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    began = time.monotonic()
    second = started(0)
    try:
        assert second.wait(200) == 0
    finally:
        second.kill()
        second.wait()
    assert time.monotonic() - began < writer.DEAD_AFTER_S
    measured = Counter(log.read_text().split())
    assert set(measured) == {str(number) for number in range(NUM_BLOCKS)}
    assert sum(measured.values()) <= NUM_BLOCKS + 1
    whole = world / "whole"
    expected = {
        str(path.relative_to(whole)): path.read_bytes()
        for path in whole.rglob("*")
        if path.is_file()
    }
    assert files_at(out) == expected
    found = Evaluation(out)
    assert found.summary == summary
    assert found.samples("a", "words") == Evaluation(whole).samples("a", "words")
    assert evaluate(config, out, executor="local") == summary


@pytest.mark.slow
def test_an_address_that_cannot_be_used(world: Path, bucket: str) -> None:
    config = EvaluateConfig(models={"a": world / "a"}, tasks=world / "tasks.yaml")
    with pytest.raises(InputError, match=r"^s3://no-such-bucket/out: cannot be used: "):
        evaluate(config, "s3://no-such-bucket/out", executor="local")
    with pytest.raises(InputError, match=r"^nosuch://a/b: cannot be used: "):
        evaluate(config, "nosuch://a/b", executor="local")
    with pytest.raises(InputError, match=r"evaluation\.json: .*no finished evaluation there$"):
        Evaluation(f"{bucket}/none")
    open_place(f"{bucket}/mine").write("notes.txt", "mine")
    with pytest.raises(InputError, match=r"mine: holds other files; choose a new or empty"):
        evaluate(config, f"{bucket}/mine", executor="local")
    assert files_at(f"{bucket}/mine") == {"notes.txt": b"mine"}
