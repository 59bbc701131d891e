"""`poise report` through its entry point: results on stdout, everything else beside it.

Oracle: the made-up run of conftest.py, whose sentences are known by hand.
"""

import shutil

import pytest

from pipelines.errors import InputError
from ray_jobs.report import run_report


def test_stdout_is_the_same_wherever_the_run_is(quick_plots, make_run, content, capsys) -> None:
    texts = []
    for name in ("first", "second"):
        run_report([make_run(name, content)], None, force=True)
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert captured.err.endswith(f"{name}/report.html\n")
    assert texts[0] == texts[1]
    assert texts[0].startswith("seed 7, test split, percent ±standard error\n")
    assert "Best merge: task_arithmetic" in texts[0]
    assert "\x1b" not in texts[0]


def test_several_runs_end_with_their_means(
    quick_plots, make_run, content, capsys, tmp_path
) -> None:
    folders = [make_run("a", content)]
    content["seed"] = 8
    folders.append(make_run("b", content))
    run_report(folders, tmp_path / "out", force=False)
    text = capsys.readouterr().out
    assert "a, seed 7, test split" in text
    assert "b, seed 8, test split" in text
    assert "Means over 2 runs (seeds 7, 8), test split, percent" in text
    assert "in 2 of 2 runs" in text
    assert (tmp_path / "out" / "b" / "report.html").is_file()


def test_a_bad_run_leaves_nothing_behind(make_run, content, capsys) -> None:
    good, bad = make_run("good", content), make_run("bad", "{}")
    with pytest.raises(InputError, match=r"bad/results\.json: schema: required"):
        run_report([good, bad], None, force=False)
    assert not (good / "report.html").exists()
    assert capsys.readouterr().out == ""
    shutil.rmtree(bad)
    with pytest.raises(InputError, match="no such folder"):
        run_report([bad], None, force=False)


def test_the_same_run_twice(make_run, content) -> None:
    folder = make_run("a", content)
    with pytest.raises(InputError, match="given twice"):
        run_report([folder, folder], None, force=False)
