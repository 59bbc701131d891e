"""Commit or nothing. Oracle: the files in the folder before and after."""

from pathlib import Path
from threading import Thread

import pytest

from pipelines.commit import lock, partial_path, staged_directory, write_atomically
from pipelines.errors import InputError


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "result"
    with staged_directory(final) as folder:
        (folder / "a.txt").write_text("a")
        assert not final.exists()
    assert (final / "a.txt").read_text() == "a"
    assert not partial_path(final).exists()


def test_a_failed_attempt_leaves_its_part_for_the_next(tmp_path: Path) -> None:
    final = tmp_path / "result"
    with pytest.raises(RuntimeError), staged_directory(final) as folder:
        (folder / "a.txt").write_text("a")
        raise RuntimeError
    assert not final.exists()
    with staged_directory(final) as folder:
        assert (folder / "a.txt").read_text() == "a"


def test_an_existing_result_stands_until_the_forced_one_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "result"
    final.mkdir()
    (final / "old.txt").write_text("old")
    with pytest.raises(InputError, match="exists already"), staged_directory(final):
        pass
    with staged_directory(final, force=True) as folder:
        (folder / "new.txt").write_text("new")
        assert (final / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new.txt", "result"]


def test_a_small_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.json"
    write_atomically(path, "1")
    write_atomically(path, b"2")
    assert path.read_text() == "2"
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_lock_is_one_at_a_time(tmp_path: Path) -> None:
    """Of a directory, or of a file, which is made."""
    for path in (tmp_path, tmp_path / "file.lock"):
        with lock(path):
            with pytest.raises(InputError) as caught, lock(path):
                pass
            assert str(caught.value) == f"{path}: another run is writing this output"
        with lock(path):
            pass


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        order.append("asks")
        with lock(tmp_path, wait=True):
            order.append("has it")

    with lock(tmp_path):
        thread = Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        order.append("first lets go")
    thread.join(30)
    assert order == ["asks", "first lets go", "has it"]


def test_a_result_has_one_writer(tmp_path: Path) -> None:
    final = tmp_path / "result"
    with staged_directory(final) as folder:
        (folder / "a.txt").write_text("a")
        with pytest.raises(InputError, match="another run is writing"), staged_directory(final):
            pass
    assert (final / "a.txt").read_text() == "a"
