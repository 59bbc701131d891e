"""Steps: each is done once, and an interrupted run goes on.

Oracle: the list of steps that were called.
"""

import json
from pathlib import Path

import pytest

from pipelines.errors import InputError
from ray_jobs.steps import Step, Steps


def make_steps(out: Path, done: list[str], fails: str = "") -> list[Step]:
    """Three steps that write a file each; the one named `fails` raises instead."""

    def run(name: str) -> None:
        if name == fails:
            raise RuntimeError(name)
        done.append(name)
        (out / name).write_text(name)

    return [Step(name, out / name, lambda name=name: run(name), 1.0) for name in "abc"]


def test_an_interrupted_run_goes_on_from_the_last_finished_step(tmp_path: Path) -> None:
    out, done = tmp_path / "run", []
    with pytest.raises(RuntimeError):
        Steps(out, {"seed": 0}).run(make_steps(out, done, fails="b"))
    assert done == ["a"]
    state = Steps(out, {"seed": 0})
    state.run(make_steps(out, done))
    assert done == ["a", "b", "c"]
    Steps(out, {"seed": 0}).run(make_steps(out, done))
    assert done == ["a", "b", "c"]
    assert set(state.seconds) == {"a", "b", "c"}


def test_a_lost_output_is_made_again(tmp_path: Path) -> None:
    out, done = tmp_path / "run", []
    Steps(out, {}).run(make_steps(out, done))
    (out / "b").unlink()
    Steps(out, {}).run(make_steps(out, done))
    assert done == ["a", "b", "c", "b"]


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    Steps(out, {"seed": 0})
    with pytest.raises(InputError, match="holds a run with seed=0"):
        Steps(out, {"seed": 1})
    assert json.loads((out / "steps.json").read_text())["settings"] == {"seed": 0}


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="no run of this command"):
        Steps(tmp_path, {"seed": 0})
