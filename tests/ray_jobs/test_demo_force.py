"""`poise demo --force`: nothing but a run is moved aside, and a finished one never too early.

Oracle: the files of a run, looked at after each start.
"""

from pathlib import Path

from ray_jobs.demo import RESULT_FILE, _config_of, _move_aside


def run_in(folder: Path, *, finished: bool) -> Path:
    _config_of(folder).parent.mkdir(parents=True)
    _config_of(folder).write_text("{}")
    if finished:
        (folder / RESULT_FILE).write_text(folder.name)
    return folder


def test_what_is_no_run_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    _move_aside(tmp_path / "thesis", tmp_path / ".thesis.old")
    assert (tmp_path / "thesis" / "chapter").is_file()


def test_a_finished_run_outlives_a_forced_one_that_never_stood(tmp_path: Path) -> None:
    out, old = run_in(tmp_path / "run", finished=True), tmp_path / ".run.old"
    _move_aside(out, old)
    assert (old / RESULT_FILE).is_file()
    run_in(out, finished=False)
    _move_aside(out, old)
    assert (old / RESULT_FILE).is_file()
    assert not out.exists()
