"""`poise results` on several models at once. Oracle: made-up answers, whose numbers, order and
errors follow by hand.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluate.groups import Group
from pipelines.evaluate.interface import Sample
from tests.pipelines.report.made_up_evaluation import save_evaluation
from tests.ray_jobs.command_line import poise

N = 200
# Shares of right answers: by model, of the tasks behind two goals.
SHARES = {
    "start": (0.50, 0.50),
    "kind": (0.90, 0.20),
    "true": (0.25, 0.85),
    "average": (0.60, 0.60),
    "merge": (0.80, 0.70),
}
GOALS = ("kindness", "truth")


def answers(model: str) -> np.ndarray:
    """(2, N) right or not; the first ones are right."""
    return np.array([np.arange(N) < share * N for share in SHARES[model]], dtype=float)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation, whose last model failed on a task."""
    samples = {
        model: {
            f"{goal} task": [
                Sample(i, str(i), str(i), [], [], {"acc": float(value)})
                for i, value in enumerate(own)
            ]
            for goal, own in zip(GOALS, answers(model), strict=True)
        }
        for model in SHARES
    }
    task = f"{GOALS[0]} task"
    samples["broken"] = {task: samples["start"][task]}
    groups = {goal: Group(members=[f"{goal} task"], scale=100) for goal in GOALS}
    return save_evaluation(tmp_path_factory.mktemp("matrix") / "out", samples, groups)


@pytest.fixture
def results(
    evaluation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `poise results` on it; gives the exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = poise(monkeypatch, "results", evaluation, *arguments)
        return status, *capsys.readouterr()

    return run


def test_undominated(results: Any) -> None:
    status, out, errors = results("--undominated", "kindness,truth", "--form", "json")
    assert status == 0
    assert errors.strip() == "left out, as a group lacks a member: broken"
    found = {each["model"]: each for each in json.loads(out)}
    assert {name for name, each in found.items() if each["undominated"]} == {
        "kind",
        "true",
        "merge",
    }
    assert found["kind"]["groups"]["kindness"]["value"] == pytest.approx(90)
    share = answers("kind")[0]
    error = 100 * share.std(ddof=1) / N**0.5
    assert found["kind"]["groups"]["kindness"]["stderr"] == pytest.approx(error)
    supports = {name: each["support"] for name, each in found.items()}
    assert supports["start"] == supports["average"] == 0  # right wherever `merge` is, and less
    assert supports["kind"] > 0.99 and supports["true"] > 0.99 and supports["merge"] > 0.99
    status, out, _ = results(
        "--undominated", "kindness,truth", "--model", "start", "--model", "kind"
    )
    assert status == 0 and out.count("yes") == 2 and "merge" not in out


def test_a_merge_beside_its_baselines(results: Any) -> None:
    arguments = ("--baselines", "merge=kind,true", "--others", "average")
    status, out, _ = results(*arguments, "--form", "json")
    assert status == 0
    found = {(each["group"], each["baseline"]): each for each in json.loads(out)}
    merge, kind, true = (answers(name) for name in ("merge", "kind", "true"))
    by_hand = {
        ("kindness", "best single"): merge[0] - kind[0],
        ("kindness", "mean of singles"): merge[0] - (kind[0] + true[0]) / 2,
        ("kindness", "average"): merge[0] - answers("average")[0],
        ("truth", "best single"): merge[1] - true[1],
        ("truth", "mean of singles"): merge[1] - (kind[1] + true[1]) / 2,
        ("truth", "average"): merge[1] - answers("average")[1],
    }
    assert found.keys() == by_hand.keys()
    for key, delta in by_hand.items():
        gain, error = 100 * delta.mean(), 100 * delta.std(ddof=1) / N**0.5
        assert found[key]["gain"]["value"] == pytest.approx(gain)
        assert found[key]["gain"]["stderr"] == pytest.approx(error)
        assert found[key]["gain"]["clear"] == (abs(gain) > 2 * error)
    assert found["kindness", "best single"]["model"] == "kind"
    assert found["truth", "best single"]["model"] == "true"
    assert "merge - baseline" in results(*arguments)[1]


def test_goals_that_conflict(results: Any) -> None:
    arguments = ("--relations", "start", "--trained", "kind=kindness", "--trained", "true=truth")
    status, out, _ = results(*arguments, "--form", "json")
    assert status == 0
    found = json.loads(out)
    changes = {(each["model"], each["measured"]): each["value"] for each in found["effects"]}
    assert changes == pytest.approx(
        {
            ("kind", "kindness"): 40,
            ("kind", "truth"): -30,
            ("true", "kindness"): -25,
            ("true", "truth"): 35,
        }
    )
    [pair] = found["relations"]
    assert (pair["goals"], pair["verdict"]) == (["kindness", "truth"], "conflict")
    # Ranks by kindness: 2, 5, 1, 3, 4; by truth: 2, 1, 5, 3, 4. 1 - 6 * 32 / (5 * 24).
    assert pair["rank_correlation"] == pytest.approx(-0.6)
    shown = results(*arguments)[1]
    assert "changes against start" in shown and "conflict" in shown and "-0.60" in shown


def test_evaluations_of_one_name_are_told_apart(
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By their whole addresses; one that is named twice is a mistake, and so is a file."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "out").symlink_to(evaluation)
    monkeypatch.chdir(tmp_path)
    assert poise(monkeypatch, "results", "x/out", "y/out", "--form", "csv") == 0
    models = {line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert {"x/out/merge", "y/out/merge"} <= models and len(models) == 2 * (len(SHARES) + 1)
    assert poise(monkeypatch, "results", "x/out", "./x/out") == 2
    assert capsys.readouterr().err == "poise: x/out: is there twice; evaluations must differ\n"
    (tmp_path / "file").write_text("")
    assert poise(monkeypatch, "results", "file") == 2
    assert capsys.readouterr().err == "poise: file: is a file; allowed: a folder, or an address\n"
    for option in ("--undominated", "--baselines"):
        assert poise(monkeypatch, "results", "x/out", "y/out", option, "truth") == 2
        assert f"{option}: found 2 folders; allowed: one folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--undominated", "x"], "unknown group 'x'; found: kindness, truth"),
        (["--undominated", "kindness,kindness"], "allowed: different names, as a,b"),
        (
            ["--undominated", "truth", "--compare", "a,b"],
            "--compare: found beside --undominated; a",
        ),
        (
            ["--undominated", "truth", "--form", "csv"],
            "--form: found csv; allowed with --undominat",
        ),
        (
            ["--undominated", "truth", "--task", "truth"],
            "--undominated: found --task; allowed: one",
        ),
        (["--baselines", "merge"], "--baselines: found 'merge'; allowed: MERGE=MODEL,MODEL"),
        (["--baselines", "merge=merge"], "expected the models merged to 'merge'"),
        (["--baselines", "merge=kind,x"], "unknown model 'x'; found: start, kind"),
        (["--others", "kind"], "--others: has no effect without --baselines"),
        (["--trained", "kind=truth"], "--trained: has no effect without --relations"),
        (["--relations", "start"], "--relations: needs --trained MODEL=GROUP for each training"),
        (["--relations", "start", "--trained", "kind"], "--trained: found 'kind'; allowed: MODEL="),
        (["--relations", "start", "--trained", "kind=truth"], "found the group truth alone"),
    ],
)
def test_mistakes_are_one_line(results: Any, arguments: list[str], message: str) -> None:
    status, out, errors = results(*arguments)
    assert status == 2 and not out
    assert message in errors and len(errors.strip().splitlines()) == 1
