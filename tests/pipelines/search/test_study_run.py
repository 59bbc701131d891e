"""Studies as they run: what is done again after a kill, failures, races, fronts, the choice.

Oracle: an undisturbed run; a made-up measurement whose values are known.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as csv
import pyarrow.parquet as parquet
import pytest

from pipelines.config import check
from pipelines.errors import InputError
from pipelines.search import Measurement, StudyConfig, StudyPlan, plan_study, search
from pipelines.search import run as running
from pipelines.search.pool import Failed
from tests.pipelines.search.conftest import NUM_ROWS

FIELD = "parameters.density"


class MadeUp:
    """A pool whose candidates of density d score `d` on the first task and `1 - d` on the second
    one, by prompts that are right.

    Args:
        seen: gets the density of each try.
    """

    size = 1

    def __init__(self, seen: list[float], fails: Callable[[int], Failed | None]) -> None:
        self._seen, self._fails = seen, fails

    def start(self, worker: int, candidate: Any, documents: Any = None, race: Any = None) -> None:
        self._density = candidate.parameters.get("density", 0.5)

    def finished(self) -> tuple[int, Measurement | Failed]:
        self._seen.append(self._density)
        failed = self._fails(len(self._seen))
        return 0, failed or measured(self._density)

    def close(self) -> None:
        pass


def measured(density: float) -> Measurement:
    shares = {"first": density, "second": 1 - density, "third": 0.5}
    samples = {
        f"{task}.score": [float(place < share * count) for place in range(count)]
        for (task, count), share in zip(NUM_ROWS.items(), shares.values(), strict=True)
    }
    means = {name: float(np.mean(scores)) for name, scores in samples.items()}
    values = means | {name.split(".")[0]: mean for name, mean in means.items()}
    hs = zip(("helpfulness", "honesty", "harmlessness"), means.values(), strict=True)
    values |= {name: 100 * mean for name, mean in hs}
    values["average"] = 100 * float(np.mean(list(means.values())))
    return Measurement(
        values=values,
        stderr={
            name: 0.05 * (100 if name in values and values[name] > 1 else 1) for name in values
        },
        samples=samples,
        seconds={"answering": 1.0},
        digest=f"{density}",
        clusters={task: [str(i) for i in range(count)] for task, count in NUM_ROWS.items()},
    )


def never(number: int) -> None:
    return None


@pytest.fixture
def config(models: list[Path], tasks: Path, tmp_path: Path) -> dict[str, Any]:
    """A study of TIES' density."""
    merge = tmp_path / "merge.yaml"
    merge.write_text(
        json.dumps(
            {
                "merge_method": "ties",
                "base_model": str(models[0]),
                "models": [{"model": str(model)} for model in models[1:]],
                "parameters": {"density": 0.5, "weight": 1.0},
            }
        )
    )
    return {
        "merge": str(merge),
        "space": {FIELD: {"low": 0.1, "high": 0.9}},
        "sampler": {"name": "tpe", "num_startup": 4},
        "num_trials": 12,
        "objectives": ["helpfulness"],
        "evaluation": {"tasks": str(tasks), "max_new_tokens": 2},
        "seed": 5,
    }


def plan_of(config: dict[str, Any], **changes: Any) -> StudyPlan:
    pytest.importorskip("optuna")
    return plan_study(check(config | changes, StudyConfig, "study.yaml"))


@pytest.fixture
def run_made_up(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[dict[str, Any], list[float]]]:
    """Run a study with made-up measurements; returns its result and the tries' densities."""

    def run(
        plan: StudyPlan, out: Path, fails: Callable[[int], Any] = never, **more: Any
    ) -> tuple[dict[str, Any], list[float]]:
        seen: list[float] = []
        monkeypatch.setattr(running, "_pool", lambda *_: MadeUp(seen, fails))
        return search(plan, out, **more), seen

    return run


def test_a_study_has_its_table_its_winner_and_its_test(
    config: dict[str, Any], tmp_path: Path, run_made_up: Callable[..., Any]
) -> None:
    plan, out = plan_of(config), tmp_path / "out"
    result, seen = run_made_up(plan, out)
    assert (result["schema"], result["evaluations"], len(result["trials"])) == (2, 12, 12)
    assert list(result["baselines"]) == ["model-1", "model-2", "average", "task_arithmetic"]
    assert len(seen) == 4 + 12 + 4 + 1  # baselines, trials, and once more on test with the best
    densities = [trial["parameters"][FIELD] for trial in result["trials"]]
    assert seen[4:16] == densities
    values = [trial["values"]["helpfulness"] for trial in result["trials"]]
    assert result["best"]["number"] == int(np.argmax(values))
    assert values == [measured(d).values["helpfulness"] for d in densities]
    assert result["test"]["number"] == result["best"]["number"]
    assert result["test"]["candidates"] == 1
    assert result["expected_best_of_equals"]["helpfulness"] > np.mean(values)
    assert json.loads((out / "sweep.json").read_text()) == result
    record = json.loads((out / "best" / "poise.json").read_text())
    assert record["config"]["parameters"]["density"] == result["best"]["parameters"][FIELD]
    for table in (csv.read_csv(out / "trials.csv"), parquet.read_table(out / "trials.parquet")):
        assert table[FIELD].to_pylist() == densities
        assert table["helpfulness"].to_pylist() == values
    again, seen = run_made_up(plan, out)
    assert (again, seen) == (result, [])
    longer, seen = run_made_up(plan, out, more=3)
    assert longer["trials"][:12] == result["trials"]
    assert (len(longer["trials"]), len(seen)) == (15, 3 + (longer["best"] != result["best"]))
    whole, _ = run_made_up(plan_of(config, num_trials=15), tmp_path / "whole")
    assert whole["trials"] == longer["trials"]
    with pytest.raises(InputError, match="exists already and holds another study"):
        run_made_up(plan_of(config, seed=6), out)
    other, _ = run_made_up(plan_of(config, seed=6), out, force=True)
    assert json.loads((out / "sweep.json").read_text()) == other != longer


SCRIPT = """
import os, signal, sys
from pathlib import Path
from pipelines.config import load_config
from pipelines.search import StudyConfig, plan_study, search
from pipelines.search import run as running
from tests.pipelines.search.test_study_run import MadeUp

config, out, *kills = sys.argv[1:]
# A measurement is a line here; the file stays when the process does not.
Path(out + ".seen").touch()
plan = plan_study(load_config(config, StudyConfig))

def run(kill):
    class Killed(MadeUp):
        def at(self, place):
            if kill == f"{place}{len(self._seen)}":
                os.kill(os.getpid(), signal.SIGKILL)
        def start(self, *arguments):
            self.at("before")
            super().start(*arguments)
        def finished(self):
            self.at("in")
            found = super().finished()
            with open(out + ".seen", "a") as file:
                file.write(f"{self._seen[-1]}\\n")
            return found
    running._pool = lambda *_: Killed([], lambda number: None)
    search(plan, out)

for kill in kills:
    child = os.fork()
    if not child:
        run(kill)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if kill != "no" else 0), (kill, status)
    if kill != "no":
        with open(out + "/journal.jsonl", "ab") as file:
            file.write(b'{"event":"finis')
"""


@pytest.mark.slow
def test_a_killed_study_goes_on_as_an_undisturbed_one(
    config: dict[str, Any], tmp_path: Path, run_made_up: Callable[..., Any], project_root: Path
) -> None:
    """Killed ten times between and in measurements, each time with half a line in its journal."""
    (tmp_path / "study.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    kills = "in0 before1 before0 in2 in0 before3 in1 before2 in3 before4 no".split()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "study.yaml"), str(out), *kills]
    paths = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=project_root, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result, seen = run_made_up(plan_of(config), tmp_path / "whole")
    assert json.loads((out / "sweep.json").read_text())["trials"] == result["trials"]
    tried = (tmp_path / "out.seen").read_text().split()
    assert tried == [str(each) for each in seen]  # nothing that was finished is done again


def test_failures_are_tried_again_then_set_aside(
    config: dict[str, Any], tmp_path: Path, run_made_up: Callable[..., Any]
) -> None:
    bad = {6: "failed", 9: "failed", 10: "failed", 11: "refused"}

    def fails(number: int) -> Failed | None:
        return Failed(bad[number], f"reason {number}") if number in bad else None  # type: ignore[arg-type]

    plan = plan_of(config, retries=1)
    result, seen = run_made_up(plan, tmp_path / "out", fails)
    states = [trial["state"] for trial in result["trials"]]
    assert states == [*["complete"] * 3, "failed", "failed", *["complete"] * 7]
    assert seen[5] == seen[6] and seen[8] == seen[9]
    reasons = [trial.get("reason") for trial in result["trials"]]
    assert reasons[3:5] == ["reason 10", "reason 11"]
    assert result["evaluations"] == 10
    with pytest.raises(InputError, match="no trial could be measured: broken"):
        run_made_up(plan, tmp_path / "none", lambda number: Failed("refused", "broken"))


def test_a_front_with_a_constraint(
    config: dict[str, Any], tmp_path: Path, run_made_up: Callable[..., Any], models: list[Path]
) -> None:
    """More helpful is less honest, so every feasible candidate is on the front."""
    plan = plan_of(
        config,
        space={FIELD: {"low": 0.1, "high": 0.9, "step": 0.1}},
        sampler={"name": "grid"},
        num_trials=None,
        objectives=["helpfulness", {"metric": "honesty", "name": "truth"}],
        constraints=[{"metric": "honesty", "not_below": "sft", "standard_errors": 4}],
        references={"sft": str(models[0])},
        choose_by={"helpfulness": 2, "truth": 1},
    )
    result, _ = run_made_up(plan, tmp_path / "out")
    least = 50 - 4 * 5  # honesty of the made-up reference, less four of its errors
    assert result["constraints"] == [{"name": "honesty", "at_least": least}]
    feasible = [t["number"] for t in result["trials"] if t["values"]["truth"] >= least]
    assert result["front"] == feasible == list(range(7))
    assert [t["meets_constraints"] for t in result["trials"]] == [True] * 7 + [False] * 2
    assert result["best"]["parameters"][FIELD] == 0.7
    assert result["undominated"].keys() == set(map(str, feasible))
    assert all(0.5 < share <= 1 for share in result["undominated"].values())
    strict = plan_of(config, constraints=[{"metric": "honesty", "at_least": 95.0}])
    none, _ = run_made_up(strict, tmp_path / "strict")
    assert (none["best"], none["front"], none["test"]) == (None, [], None)
    assert not (tmp_path / "strict" / "best").exists()


def test_a_race_gets_what_has_finished(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    races = []

    class Racing(MadeUp):
        def start(
            self, worker: int, candidate: Any, documents: Any = None, race: Any = None
        ) -> None:
            super().start(worker, candidate)
            races.append(race)

        def finished(self) -> tuple[int, Measurement | Failed]:
            found = super().finished()[1]
            assert isinstance(found, Measurement)
            race = races[-1]
            stops = race is not None and race.front is not None and self._density < 0.3
            return 0, replace(found, stopped=stops)

    monkeypatch.setattr(running, "_pool", lambda *_: Racing([], never))
    result = search(plan_of(config, racing=True), tmp_path / "out")
    assert races[:4] == [None] * 4 and races[-5:] == [None] * 5
    best = -1.0
    for race, trial in zip(races[4:16], result["trials"], strict=True):
        assert (race.front is None) == (best < 0)
        if race.front is not None:
            assert race.front.values.max() == pytest.approx(best)
        if trial["state"] == "complete":
            best = max(best, trial["values"]["helpfulness"])
        else:
            assert trial["state"] == "stopped"
    assert "stopped" in {trial["state"] for trial in result["trials"]}
    assert result["best"]["state"] == "complete"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"parameters.densty": [1.0]}},
            "densty: unknown parameter.*did you mean density",
        ),
        ({"space": {FIELD: {"low": 0, "high": 1}}}, "density: found 0.0; allowed"),
        ({"space": {FIELD: {"low": 1, "high": 0.5}}}, "expected low < high"),
        ({"space": {"w": {"simplex": ["models.0.parameters.weight"]}}}, "one share is 1"),
        ({"objectives": ["speed"]}, "objectives: found 'speed'; allowed: helpfulness, honesty"),
        ({"constraints": [{"metric": "x", "at_least": 1}]}, "constraints: found 'x'; allowed"),
        (
            {"constraints": [{"metric": "honesty", "not_below": "sft"}]},
            "not_below: found 'sft'; allowed: model-1, model-2, average, task_arithmetic",
        ),
        ({"constraints": [{"metric": "honesty"}]}, "give exactly one of them"),
        ({"references": {"average": "x"}}, "references.average: is a baseline's name"),
        ({"references": {"../a": "x"}}, "references: name '../a': must be a plain file name"),
        ({"choose_by": {"honesty": 1}}, "choose_by: found 'honesty'; allowed: helpfulness"),
        ({"num_trials": None}, "num_trials: required with tpe"),
        ({"sampler": {"name": "grid"}}, "num_trials: has no effect with grid"),
        ({"choose_on": "test", "evaluation": {"split": "development"}}, "split: found development"),
        ({"evaluation": {"split": "test"}}, "split: found test, choose_on: development; allowed"),
        ({"evaluation": {"models": {}}}, "evaluation.models: has no effect"),
        ({"racing": True, "baselines": False}, "racing: needs baselines or references"),
        ({"stopping": {"name": "asha", "min_steps": 1}}, "stopping: has no effect with merge"),
        ({"max_concurrent_trials": 0}, "max_concurrent_trials: allowed: auto, or 1 or more"),
        ({"tasks": "x", "search": {"a": [1]}}, "are of two forms of this config"),
    ],
)
def test_mistakes_are_found_before_the_first_trial(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(config, **changes)


def test_outputs_that_cannot_be_are_refused(
    config: dict[str, Any], tmp_path: Path, run_made_up: Callable[..., Any], models: list[Path]
) -> None:
    plan = plan_of(config)
    for out in (models[1], models[1].parent, tmp_path):
        with pytest.raises(InputError, match="is or holds an input of the sweep"):
            run_made_up(plan, out)
    with pytest.raises(InputError, match="holds no study"):
        run_made_up(plan, tmp_path / "new", more=2)
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists already; choose another output"):
        run_made_up(plan, tmp_path / "full")
    (tmp_path / "begun").mkdir()
    running.Study(tmp_path / "begun", plan.key)
    with pytest.raises(InputError, match="the study is not finished: 0 of 12 trials"):
        run_made_up(plan, tmp_path / "begun", more=2)


def test_optuna_reads_a_copy_of_the_trials(
    config: dict[str, Any],
    tmp_path: Path,
    run_made_up: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a run that was killed after a trial was in the journal and not in the storage."""
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    changes: dict[str, Any] = {
        "objectives": ["helpfulness", {"metric": "seconds", "mode": "min"}],
        "constraints": [{"metric": "honesty", "at_least": 50}],
        "num_trials": 6,
        "optuna_storage": url,
    }
    plan = plan_of(config, **changes)
    real = running.Mirror.update
    calls: list[None] = []

    def killed(self: Any, *arguments: Any) -> None:
        calls.append(None)
        if len(calls) == 8:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(running.Mirror, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run_made_up(plan, tmp_path / "out")
    monkeypatch.setattr(running.Mirror, "update", real)
    result, _ = run_made_up(plan, tmp_path / "out")
    copy = optuna.load_study(study_name="out", storage=url)
    assert copy.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection(1)]
    assert len(copy.trials) == 6
    for own, trial in zip(copy.trials, result["trials"], strict=True):
        assert own.params[FIELD] == trial["parameters"][FIELD]
        assert own.values == list(trial["values"].values())
        assert own.user_attrs["number"] == trial["number"]
    feasible = {trial["number"] for trial in result["trials"] if trial["meets_constraints"]}
    assert {trial.user_attrs["number"] for trial in copy.best_trials} <= feasible
    with pytest.raises(InputError, match="optuna_storage: holds another study 'out'"):
        run_made_up(plan_of(config, **changes, seed=9), tmp_path / "other" / "out")
    with pytest.raises(InputError, match="optuna_storage: cannot be opened"):
        changes["optuna_storage"] = "nothing://user:secret@host/db"
        run_made_up(plan_of(config, **changes), tmp_path / "bad")
