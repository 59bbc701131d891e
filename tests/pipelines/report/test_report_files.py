"""Plots, the page and where they are written.

Oracle: the numbers of the made-up run, read back from the page, and pixels that change with them.
"""

import io
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.report import load_results, make_report, write_reports

FILES = {"matrix.png", "tradeoff.png", "report.html"}


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}


def test_same_results_same_bytes_and_no_global_state(make_run, content) -> None:
    folder = make_run("a", content)
    results = load_results(folder)
    before = dict(matplotlib.rcParams)
    first = make_report(folder, results)
    assert first == make_report(folder, results)
    assert set(first) == FILES
    assert dict(matplotlib.rcParams) == before


def test_plots_are_pictures_that_follow_the_numbers(make_run, content) -> None:
    folder = make_run("a", content)
    first = make_report(folder, load_results(folder))
    for name in ("matrix.png", "tradeoff.png"):
        image = Image.open(io.BytesIO(first[name]))
        assert image.width > 1200
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn
        assert "Software" not in image.info
    content["models"]["expo"]["honesty"]["value"] += 3.0
    content["models"]["expo"]["average"]["value"] += 1.0
    second = make_report(folder, load_results(make_run("b", content)))
    assert second["matrix.png"] != first["matrix.png"]
    assert second["tradeoff.png"] != first["tradeoff.png"]


class PageChecker(HTMLParser):
    """Collects text and references; fails on tags that are not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def test_the_page_holds_everything_and_needs_nothing(make_run, content) -> None:
    folder = make_run("a", content)
    page = make_report(folder, load_results(folder))["report.html"].decode()
    checker = PageChecker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.references) == 2
    assert all(ref.startswith("data:image/png;base64,") for ref in checker.references)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "prefers-color-scheme: dark" in page
    for text in ("task_arithmetic", "lambda=0.5", "±3.0", "-30.0", "n = 240", "110.5", "111.8"):
        assert text in checker.text
    assert "name: linear <&>" in checker.text  # the config's text, escaped
    assert "not in the run's folder" in checker.text  # configs that are gone


def test_names_in_results_cannot_write_html(quick_plots, make_run, content) -> None:
    content["models"]["expo"]["chosen"] = {"alpha": "<script>alert(1)</script>"}
    content["versions"]["<b>"] = "<img src=x>"
    folder = make_run("a", content)
    page = make_report(folder, load_results(folder))["report.html"].decode()
    assert "<script" not in page
    assert "<img src=x>" not in page


def test_a_config_that_links_out_of_the_folder_is_not_shown(
    quick_plots, make_run, content, tmp_path
) -> None:
    folder = make_run("a", content)
    (tmp_path / "secret").write_text("a secret")
    (folder / "configs" / "expo.yaml").symlink_to(tmp_path / "secret")
    page = make_report(folder, load_results(folder))["report.html"].decode()
    assert "a secret" not in page


def test_into_the_run_folder_and_again(quick_plots, make_run, content) -> None:
    folder = make_run("a", content)
    runs = [(folder, load_results(folder))]
    assert write_reports(runs, None) == [folder / "report.html"]
    assert set(written(folder)) == FILES
    stamp = (folder / "report.html").stat().st_mtime_ns
    write_reports(runs, None)
    assert (folder / "report.html").stat().st_mtime_ns == stamp
    (folder / "report.html").write_text("old")
    write_reports(runs, None)
    assert written(folder) == make_report(*runs[0])
    assert not list(folder.glob(".*"))


def test_an_out_with_other_things_needs_force(quick_plots, make_run, content, tmp_path) -> None:
    folder, out = make_run("a", content), tmp_path / "out"
    runs = [(folder, load_results(folder))]
    write_reports(runs, out)
    write_reports(runs, out)  # what stands there is this very report
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes\.txt'"):
        write_reports(runs, out)
    write_reports(runs, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "matrix.png").write_bytes(b"another run's")
    with pytest.raises(InputError, match=r"holds 'matrix\.png'"):
        write_reports(runs, out)
    assert (out / "matrix.png").read_bytes() == b"another run's"
    with pytest.raises(InputError, match="is a file"):
        write_reports(runs, out / "matrix.png", force=True)


def test_several_runs_get_a_folder_each(quick_plots, make_run, content, tmp_path) -> None:
    folders = [make_run("a", content), make_run("b", content)]
    runs = [(folder, load_results(folder)) for folder in folders]
    write_reports(runs, tmp_path / "out")
    assert set(written(tmp_path / "out" / "a")) == FILES
    assert set(written(tmp_path / "out" / "b")) == FILES
    same_name = make_run("more/a", content)
    runs = [(folder, load_results(folder)) for folder in (folders[0], same_name)]
    with pytest.raises(InputError, match="same name"):
        write_reports(runs, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    twice = [runs[0], (folders[0] / ".." / "a", runs[0][1])]
    with pytest.raises(InputError, match="given twice"):
        write_reports(twice, None)
