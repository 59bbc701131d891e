"""Plots, the page and where they are written.

Oracle: the numbers of the made-up run, read back from the page, and pixels that change with them.
"""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InputError
from pipelines.report import load_results, make_report, write_reports
from pipelines.report.plots import plot_matrix, plot_tradeoff
from pipelines.report.results import COLUMNS

FILES = {"matrix.png", "matrix.svg", "tradeoff.png", "tradeoff.svg", "report.html"}


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}


def test_pictures_follow_the_numbers_and_equal_numbers_give_equal_bytes(make_run, content) -> None:
    folder = make_run("a", content)
    results = load_results(folder)
    before = dict(matplotlib.rcParams)
    first = make_report(folder, results)
    assert first == make_report(folder, results)
    assert set(first) == FILES
    assert dict(matplotlib.rcParams) == before  # no global state
    for name in ("matrix.png", "tradeoff.png"):
        image = Image.open(io.BytesIO(first[name]))
        assert image.width > 1200
        assert np.asarray(image.convert("L")).std() > 5  # something is drawn
        assert "Software" not in image.info
        svg = first[name.replace("png", "svg")].decode()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "<dc:date>" not in svg
    content["models"]["expo"]["honesty"]["value"] += 3.0
    content["models"]["expo"]["average"]["value"] += 1.0
    changed = load_results(make_run("b", content))
    for name, plot in (("matrix", plot_matrix), ("tradeoff", plot_tradeoff)):
        assert plot(changed)["png"] != first[f"{name}.png"]


def data_of(page: str) -> dict[str, Any]:
    """What the page's scripts read."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


def test_the_page_holds_everything_and_needs_nothing(quick_plots, make_run, content) -> None:
    folder = make_run("a", content)
    page = make_report(folder, load_results(folder))["report.html"].decode()
    assert not re.search(r"@import|url\(|<script src|<img|import\(|fetch\(|innerHTML", page)
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    data = data_of(page)
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == list(content["models"])
    assert rows["task_arithmetic"]["notes"] == ["lambda=0.5"]
    assert rows["task_arithmetic"]["mark"] == "the merge that is best on development"
    assert data["reference"] == list(rows).index("sft")
    values = np.frombuffer(base64.b64decode(data["values"]), "<f4").reshape(len(rows), -1)
    for row, name in zip(values, rows, strict=True):
        entry = content["models"][name]
        measured = [entry[column]["value"] for column in COLUMNS]
        measured += [task["value"] for task in entry["tasks"].values()]
        assert np.allclose(row, measured)
    assert ["world", 1.25] in data["timings"] and ["python", "3.11.0"] in data["versions"]
    configs = {each["path"]: each["text"] for each in data["configs"]}
    assert configs["configs/linear.yaml"] == "name: linear <&>\n"
    assert configs["configs/expo.yaml"] is None  # gone
    assert len(data["findings"]) == 10


def test_texts_in_results_cannot_end_the_data(quick_plots, make_run, content) -> None:
    hostile = "</script><script>alert(1)</script><!--"
    content["models"]["expo"]["chosen"] = {"alpha": hostile}
    content["versions"]["<b>"] = "\u2028<img src=x>"
    folder = make_run("a", content)
    page = make_report(folder, load_results(folder))["report.html"].decode()
    assert page.count("</script>") == 2
    assert "<img" not in page and "<!--" not in page and "\u2028" not in page
    data = data_of(page)
    assert data["rows"][-1]["notes"] == [f'alpha="{hostile}"']
    assert ["<b>", "\u2028<img src=x>"] in data["versions"]


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


def test_an_out_that_is_a_page_gets_the_page_alone(
    quick_plots, make_run, content, tmp_path
) -> None:
    folder, page = make_run("a", content), tmp_path / "new" / "page.html"
    runs = [(folder, load_results(folder))]
    assert write_reports(runs, page) == [page]
    assert page.read_bytes() == make_report(*runs[0])["report.html"]
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    write_reports(runs, page)
    page.write_text("mine")
    with pytest.raises(InputError, match="exists and differs"):
        write_reports(runs, page)
    assert page.read_text() == "mine"
    write_reports(runs, page, force=True)
    assert page.read_bytes() == make_report(*runs[0])["report.html"]


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
    with pytest.raises(InputError, match="for 2 runs of `poise demo`; allowed: a folder"):
        write_reports(runs, tmp_path / "page.html")
    twice = [runs[0], (folders[0] / ".." / "a", runs[0][1])]
    with pytest.raises(InputError, match="given twice"):
        write_reports(twice, None)
