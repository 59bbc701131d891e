"""Studies whose trials are trainings: groups, failures, what is kept, what goes on after a kill.

Oracle: a made-up training whose model's numbers are known, and a record of who trained what.
(`test_search_docs.py` trains for real, with `poise align` as its oracle.)
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import check, load_config
from pipelines.errors import InputError
from pipelines.search import Measurement, StudyConfig, StudyPlan, plan_study, search, trainings
from pipelines.search import run as running
from pipelines.search.trainings import TrainingPool, model_of
from pipelines.train import AlignConfig
from pipelines.train.errors import DivergenceError, TrainingError
from pipelines.train.evaluation import Bounds, Evaluations
from tests.pipelines.search.test_study_run import measured
from tests.tiny_models import WORDS

RATE = "optimizer.learning_rate"
RATES = [0.1, 0.2, 0.3, 0.4, 0.5]


class Reader:
    """A measurer whose models have `rate` of helpfulness, and the model at the start none."""

    size = 1

    def start(self, worker: int, candidate: Any, documents: Any = None, race: Any = None) -> None:
        self._model = Path(candidate.models[0].model)

    def finished(self) -> tuple[int, Measurement]:
        rate = self._model / "rate"
        return 0, measured(float(rate.read_text()) if rate.exists() else 0.0)

    def close(self) -> None:
        pass


class MadeUpTraining:
    """In the place of `align_in_turn`.

    Args:
        fails: is called before each training with its rate, and may raise.
    """

    def __init__(self, fails: Callable[[float], None]) -> None:
        self.groups: list[list[float]] = []
        self.trained: list[float] = []
        self._fails = fails

    def __call__(
        self, runs: Sequence[tuple[AlignConfig, Path]], bounds: Mapping[Path, Bounds]
    ) -> None:
        self.groups.append([config.optimizer.learning_rate for config, _ in runs])
        for config, out in runs:
            if out.exists():
                continue
            self._fails(config.optimizer.learning_rate)
            self.trained.append(config.optimizer.learning_rate)
            out.mkdir(parents=True)
            (out / "rate").write_text(str(config.optimizer.learning_rate))
            told = self._curve(config, bounds.get(out), out / "metrics.jsonl")
            (out / "poise.json").write_text(json.dumps({"weights": "w", "evaluation": told}))

    def _curve(
        self, config: AlignConfig, bounds: Bounds | None, metrics: Path
    ) -> dict[str, Any] | None:
        """Three steps, whose held-out loss is 1 less the rate, up to where it is behind."""
        evaluation = config.evaluation
        told = None
        if evaluation is not None:
            told = Evaluations(evaluation, Path("none"), 0, bounds)
        lines: list[dict[str, float]] = [{"step": 0}]
        for step in (1, 2, 3):
            loss = {"eval_loss": 1 - config.optimizer.learning_rate}
            lines.append({"step": step, "seconds": 0.5, "tokens_per_s": 200.0, **loss})
            if told is not None:
                told.add(step, loss)
                if told.is_over:
                    break
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return None if told is None else told.told(3)


@pytest.fixture
def config(models: list[Path], tasks: Path, tmp_path: Path) -> dict[str, Any]:
    """A study of the learning rate."""
    data = tmp_path / "pairs.jsonl"
    pairs = itertools.pairwise(WORDS)
    rows = [{"prompt": a, "chosen": f" {b}", "rejected": " no"} for a, b in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    align = {
        "model": str(models[0]),
        "data": str(data),
        "optimizer": {"learning_rate": 1e-3},
        "num_steps": 6,
        "strategy": "single",
        "num_workers": 1,
    }
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(align))
    return {
        "align": str(tmp_path / "align.yaml"),
        "space": {RATE: RATES},
        "sampler": {"name": "grid"},
        "objectives": ["helpfulness"],
        "evaluation": {"tasks": str(tasks), "max_new_tokens": 2},
    }


def plan_of(config: dict[str, Any], **changes: Any) -> StudyPlan:
    return plan_study(check(config | changes, StudyConfig, "study.yaml"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], MadeUpTraining]]:
    """Run a study with made-up trainings."""
    monkeypatch.setattr(running, "check_workers", lambda configs: None)
    monkeypatch.setattr(running, "_measurers", lambda *_: Reader())

    def run(
        plan: StudyPlan, out: Path, fails: Callable[[float], None] = lambda rate: None, **more: Any
    ) -> tuple[dict[str, Any], MadeUpTraining]:
        training = MadeUpTraining(fails)
        monkeypatch.setattr(trainings, "align_in_turn", training)
        return search(plan, out, **more), training

    return run


def test_trials_train_in_one_group_and_the_best_is_kept(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any], models: list[Path]
) -> None:
    out = tmp_path / "out"
    result, training = run(plan_of(config), out)
    assert training.groups == [RATES]
    assert [t["parameters"][RATE] for t in result["trials"]] == RATES
    assert result["best"]["number"] == 4
    assert [path.name for path in (out / "models").glob("0*")] == ["000004"]
    assert (out / "best" / "rate").read_text() == "0.5"
    assert load_config(out / "align.yaml", AlignConfig).optimizer.learning_rate == 0.5
    assert list(result["baselines"]) == [models[0].name]
    assert result["test"]["values"] == result["best"]["values"]
    assert all(t["seconds"] == 1.5 + 1 for t in result["trials"])  # its steps, and the measurement
    again, training = run(plan_of(config), out)
    assert (again, training.groups) == (result, [])
    other, _ = run(plan_of(config, space={RATE: [0.2]}), out, force=True)
    assert (out / "best" / "rate").read_text() == "0.2"
    assert len(other["trials"]) == 1


def test_the_models_of_a_front_are_kept(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """More helpful is less honest; tokens are the same for all."""
    plan = plan_of(
        config,
        objectives=["helpfulness", "honesty", {"metric": "tokens", "mode": "min"}],
        constraints=[{"metric": "honesty", "at_least": 60}],
    )
    result, _ = run(plan, tmp_path / "out")
    assert result["front"] == [0, 1, 2, 3]
    kept = sorted(path.name for path in (tmp_path / "out" / "models").glob("0*"))
    assert kept == ["000000", "000001", "000002", "000003"]
    assert {t["values"]["tokens"] for t in result["trials"]} == {300.0}


def test_the_one_that_failed_is_set_aside(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """One failure passes, one comes again, and one is a mistake of the config."""
    lost = []

    def fails(rate: float) -> None:
        if rate == 0.2 and not lost:
            lost.append(rate)
            raise TrainingError("worker 0: lost")
        if rate == 0.4:
            raise DivergenceError("loss is NaN at step 3")

    space = {RATE: RATES, "warmup_steps": [2, 50]}
    result, training = run(plan_of(config, space=space), tmp_path / "out", fails)
    by_state: dict[str, list[Any]] = {}
    for trial in result["trials"]:
        by_state.setdefault(trial["state"], []).append(list(trial["parameters"].values()))
    assert by_state["complete"] == [[rate, 2] for rate in RATES if rate != 0.4]
    assert sorted(training.trained) == [0.1, 0.2, 0.3, 0.5]  # each once
    reasons = [trial["reason"] for trial in result["trials"] if trial["state"] == "failed"]
    assert sum(reason == "loss is NaN at step 3" for reason in reasons) == 1
    assert sum("warm" in reason for reason in reasons) == 5


def test_a_killed_study_trains_nothing_again(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    trained: list[float] = []

    def killed(rate: float) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(rate)

    with pytest.raises(KeyboardInterrupt):
        run(plan_of(config), tmp_path / "out", killed)
    result, training = run(plan_of(config), tmp_path / "out")
    assert trained + training.trained == RATES
    whole, _ = run(plan_of(config), tmp_path / "whole")
    assert result["trials"] == whole["trials"]


def test_trainings_that_are_behind_stop(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """The lower the rate, the higher the loss; one in two goes on at steps 1 and 2."""
    align = yaml.safe_load(Path(config["align"]).read_text())
    Path(config["align"]).write_text(
        yaml.safe_dump(align | {"evaluation": {"share": 0.1, "every": 1}})
    )
    rates = [0.4, 0.3, 0.5, 0.2, 0.6]
    stopping = {"name": "asha", "min_steps": 1, "reduction": 2}
    plan = plan_of(config, space={RATE: rates}, stopping=stopping)
    plan_of(config, stopping={"name": "asha", "min_steps": 5})
    with pytest.raises(InputError, match="min_steps: found 6; allowed: less than the 6 steps"):
        plan_of(config, stopping={"name": "asha", "min_steps": 6})
    study = check(
        config | {"stopping": {"name": "asha", "min_steps": 600}}, StudyConfig, "study.yaml"
    )
    plan_study(study, smoke=True)
    result, training = run(plan, tmp_path / "out")
    assert training.groups == [[rate] for rate in rates]  # each knows of those before it
    states = [trial["state"] for trial in result["trials"]]
    assert states == ["complete", "stopped", "complete", "stopped", "complete"]
    seconds = [trial["seconds"] for trial in result["trials"]]
    assert seconds == [2.5, 1.5, 2.5, 1.5, 2.5]
    assert result["front"] == [4] and result["evaluations"] == 5
    again, training = run(plan, tmp_path / "out")
    assert (again, training.groups) == (result, [])


def test_groups_are_as_large_as_asked_where_points_depend_on_results(
    config: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> None:
    pytest.importorskip("optuna")
    changes = {
        "space": {RATE: {"low": 0.1, "high": 0.9}},
        "sampler": {"name": "tpe", "num_startup": 2},
        "num_trials": 6,
    }
    _, training = run(plan_of(config, **changes, max_concurrent_trials=2), tmp_path / "two")
    assert [len(group) for group in training.groups] == [2, 2, 2]
    _, training = run(plan_of(config, **changes), tmp_path / "one")
    assert [len(group) for group in training.groups] == [1] * 6


def test_other_workers_are_another_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = MadeUpTraining(lambda rate: None)
    monkeypatch.setattr(trainings, "align_in_turn", training)
    monkeypatch.setattr(trainings, "plan_alignment", lambda config, cache: None)
    pool = TrainingPool(Reader(), 3)  # type: ignore[arg-type]
    for number, workers in enumerate((1, 2, 1)):
        settings = {"model": "m", "data": "d", "num_steps": 1, "num_workers": workers}
        rate = {"learning_rate": RATES[number]}
        align = AlignConfig(**settings, optimizer=rate, global_batch_size=2)  # type: ignore[arg-type]
        pool.start(number, trainings.Training(align, model_of(tmp_path, number)))
    assert [pool.finished()[0] for _ in range(3)] == [0, 2, 1]
    assert training.groups == [[0.1, 0.3], [0.2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": "merge.yaml"}, "merge, align: give exactly one of them"),
        ({"align": None}, "merge, align: give exactly one of them"),
        ({"stopping": {"name": "asha", "min_steps": 2}}, "stopping: needs held-out rows; .*align"),
        ({"racing": True}, "racing: has no effect with align"),
        ({"max_concurrent_trials": "auto"}, "found auto; allowed with align: a number"),
        ({"space": {"optimizer.learning_rat": [1]}}, "learning_rat: unknown.*learning_rate"),
        ({"space": {RATE: [0.1, -1]}}, "learning_rate"),
        ({"space": {"objective.name": ["dpo", "reward"]}}, "found reward, whose model does not"),
        ({"space": {"lora": [{"save": "adapter"}]}}, "lora.save: found adapter; allowed in a"),
        ({"space": {"model": ["none"]}}, "none"),
        ({"objectives": ["reward"]}, "found 'reward'; allowed: .*seconds, tokens"),
        ({"constraints": [{"metric": "honesty", "not_below": "sft"}]}, "allowed: base"),
    ],
)
def test_mistakes_are_found_before_the_first_training(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(config, **changes)


def test_a_trial_that_never_fits_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    plan = plan_of(config, space={"num_workers": [1, 8], "strategy": ["fsdp2"]})
    with pytest.raises(InputError, match="num_workers: found 8; allowed: up to 2"):
        search(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
