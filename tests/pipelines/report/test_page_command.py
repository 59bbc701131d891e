"""`poise report` of evaluations, and the commands of docs/page.md as they stand there.

Oracle: how the commands end, files that are there, lines written by hand.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from pipelines.evaluate.groups import Group
from tests.pipelines.report.made_up_evaluation import sample, save_evaluation
from tests.ray_jobs.command_line import poise

GROUPS = {"all": Group(members=["letters.acc"], scale=100)}
NO_MEAN = {("letters", "perplexity"): (12.0, 1.0)}


def evaluate(folder: str, models: dict[str, int], **more) -> None:
    """An evaluation of models, each right on its first so many of 8 documents."""
    samples = {
        name: {
            "letters": [sample(i, "q", "a", acc=float(i < right), perplexity=3.0) for i in range(8)]
        }
        for name, right in models.items()
    }
    save_evaluation(Path(folder), samples, GROUPS, other_numbers=NO_MEAN, **more)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    evaluate("runs/matrix", {"sft": 3, "dpo": 6})
    evaluate("runs/later", {"dpo": 6, "ties": 7})
    return tmp_path


def test_the_commands_of_the_docs(
    runs: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (project_root / "docs" / "page.md").read_text()
    [commands] = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for command in commands.splitlines():
        arguments = ["letters acc,all" if x == "letters,all" else x for x in shlex.split(command)]
        assert poise(monkeypatch, *arguments[1:]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("report: ")
    names = {path.name for path in Path("runs/matrix").iterdir()}
    assert names >= {"report.html", "matrix.png", "matrix.svg", "tradeoff.png", "tradeoff.svg"}
    page = Path("runs/both.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert [row["name"] for row in data["rows"]] == ["sft", "dpo", "ties"]
    assert [data["columns"][c]["name"] for c in data["axes"]] == ["letters acc", "all"]
    assert [column["lower"] for column in data["columns"]] == [False, False, True]
    before = page
    assert poise(monkeypatch, *arguments[1:]) == 0
    assert poise(monkeypatch, *shlex.split(commands.splitlines()[0])[1:]) == 0
    assert Path("runs/both.html").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "runs/matrix runs/later",
            "--out: required for 2 evaluations; give a folder, or page.html",
        ),
        ("runs/matrix runs/matrix --out x.html", "runs/matrix: given twice; each run once"),
        (
            "runs/matrix runs --out x.html",
            "runs/matrix: is an evaluation, and others are not; report them apart (the evaluation "
            "of a demo lies in results/evaluation-test)",
        ),
        (
            "runs/matrix --axes letter,all --out x.html",
            "--axes: found 'letter'; allowed: all, letters acc, letters perplexity",
        ),
        ("s3://bucket/x --out x.html", "s3:/bucket/x: is an address; allowed: folders (poise "
         "results reads others)"),
        ("runs/matrix --axes all --out x.html", "--axes: found 'all'; allowed: two columns, as "
         "helpfulness,honesty"),
        (
            "runs/matrix --lower ppl --out x.html",
            "--lower: found 'ppl'; allowed: all, letters acc, letters perplexity, letters, acc, "
            "perplexity",
        ),
        ("runs/matrix --out runs", "{out}/runs: exists and holds"),
    ],
)  # fmt: skip
def test_bad_input_is_said_in_a_line_and_nothing_written(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    before = sorted(runs.rglob("*"))
    assert poise(monkeypatch, "report", *shlex.split(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"poise: {message.format(out=runs)}") and said.count("\n") == 1
    assert sorted(runs.rglob("*")) == before


def test_damaged_samples_are_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    next(Path("runs/matrix").rglob("00000.parquet")).write_bytes(b"half")
    assert poise(monkeypatch, "report", "runs/matrix", "--out", "x.html") == 2
    assert "run the evaluation again to measure it" in capsys.readouterr().err
    assert not Path("x.html").exists()
