"""Candidates in memory: numbers, samples and cells.

Oracle: `evaluate` of the same merge, written by `merge`.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.plan import plan_evaluation
from pipelines.evaluate.store import Store
from pipelines.merge import MergeConfig, merge
from pipelines.search import Bound, Measurer, Objective, Race
from tests.pipelines.rewards.reward_models import save_reward_model
from tests.pipelines.search.conftest import DIMENSIONS, NUM_ROWS, evaluation_of, ties
from tests.tiny_models import WORDS, save_tiny_llama


def test_a_candidate_has_the_numbers_and_the_cells_of_its_written_merge(
    measurer: Measurer, tasks: Path, models: list[Path], tmp_path: Path
) -> None:
    candidate = ties(models, weight=2.0)
    written = Path(merge(MergeConfig.model_validate(candidate), tmp_path / "merged"))
    config = evaluation_of(tasks, written)
    plan = plan_evaluation(config, tmp_path / "out")
    summary = evaluate(config, tmp_path / "out", executor="local")
    found = measurer.measure(candidate)
    entry = summary["models"]["candidate"]
    assert found.digest == entry["digest"]
    assert entry["groups"].keys() == {*DIMENSIONS.values(), "average"}
    for name, each in entry["groups"].items():
        assert (found.values[name], found.stderr[name]) == (each["value"], each["stderr"])
    cells = measurer.cells(candidate)
    for (_, task), cell in plan.cells.items():
        [(metric, number)] = entry["tasks"][task].items()
        assert found.values[task] == found.values[f"{task}.{metric}"] == number["value"]
        assert found.stderr[task] == number["stderr"]
        assert (cells[task].key, cells[task].num_documents) == (cell.key, NUM_ROWS[task])
        samples = [
            s for block in range(cell.num_blocks) for s in Store(plan.out).read(cell, block)[0]
        ]
        assert found.samples[f"{task}.{metric}"] == [s.values[metric] for s in samples]
        assert found.clusters[task] == [s.cluster for s in samples]
        assert found.documents[task] == [*range(NUM_ROWS[task])]
        assert 0 < found.values[task] < 1
    assert found.seconds.keys() == {"checks", "merge", "swap", "answering"}
    assert not found.stopped


def test_the_store_of_a_search_is_one_of_evaluation(
    tasks: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, folder = ties(models, weight=1.5), tmp_path / "out"
    written = Path(merge(MergeConfig.model_validate(candidate), tmp_path / "merged"))
    config = evaluation_of(tasks, written)
    first = Measurer(config, store=str(folder)).measure(candidate)
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}
    assert len(files) == 4  # 300 rows are two blocks
    evaluate(config, folder, executor="local")
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("00*.parquet")} == files
    again = Measurer(config, store=str(folder))
    monkeypatch.setattr("pipelines.evaluate.graded.GradedTask.prompts", lambda *_: [])
    second = again.measure(candidate)
    for field in ("values", "stderr", "samples", "clusters", "documents", "digest"):
        assert asdict(second)[field] == asdict(first)[field]


def test_some_documents_alone_have_the_same_answers(measurer: Measurer, models: list[Path]) -> None:
    candidate = ties(models, weight=2.0)
    whole = measurer.measure(candidate)
    places = {"third": [1, 2, 7, 20], "first": [0, 299]}
    part = measurer.measure(candidate, places)
    assert part.documents == places
    for name, scores in part.samples.items():
        task = name.split(".")[0]
        assert scores == [whole.samples[name][place] for place in places[task]]
    assert "average" not in part.values


def test_a_race_stops_a_hopeless_candidate_and_lets_the_others_through(
    measurer: Measurer, models: list[Path]
) -> None:
    whole = measurer.measure(ties(models, weight=2.0))
    series = {name: (name.split(".")[0], len(of)) for name, of in whole.samples.items()}
    objective = Objective("first", {next(iter(series)): 1.0})
    race = Race(series, (objective,), seed=1)
    through = measurer.measure(ties(models, weight=2.0), race=race)
    assert (through.samples, through.stopped) == (whole.samples, False)
    assert through.values == whole.values
    race = Race(series, (objective,), (Bound(objective, 2.0),), seed=1)  # a share is 1 at most
    stopped = measurer.measure(ties(models, weight=2.0), race=race)
    assert stopped.stopped
    assert stopped.documents == race.answered(0)
    for name, scores in stopped.samples.items():
        places = stopped.documents[series[name][0]]
        assert scores == [whole.samples[name][place] for place in places]


def test_a_store_with_one_writer_is_refused(measurer: Measurer) -> None:
    with pytest.raises(InputError, match=r"^store: found 's3://bucket/cells'; allowed: a folder"):
        Measurer(measurer._config, store="s3://bucket/cells")


def test_bad_candidates_are_named_and_the_next_one_is_measured(
    measurer: Measurer, models: list[Path], tmp_path: Path
) -> None:
    good = measurer.measure(ties(models, weight=0.5), {"third": [0]})
    wide = save_tiny_llama(tmp_path / "wide", 0, intermediate_size=64)
    for candidate, documents, message in (
        (ties(models, densty=0.5), None, "densty: unknown parameter"),
        ({**ties(models), "models": [{"model": str(tmp_path / "none")}]}, None, "none"),
        (
            {
                "merge_method": "linear",
                "models": [{"model": str(wide), "parameters": {"weight": 1}}],
            },
            None,
            "swap: merge by linear: .*found shape",
        ),
        (ties(models), {"fourth": [0]}, "documents: found the task 'fourth'; allowed: first, s"),
    ):
        with pytest.raises(InputError, match=message):
            measurer.measure(candidate, documents)
        again = measurer.measure(ties(models, weight=0.5), {"third": [0]})
        assert (again.digest, again.samples) == (good.digest, good.samples)


def test_rewards_are_values_of_a_candidate(models: list[Path], tmp_path: Path) -> None:
    """As an evaluation of the written merge has them; answers that two models value are one."""
    pairs = itertools.pairwise(WORDS)
    rows = [{"prompt": f"{a} {b}", "id": f"{a}{b}"} for a, b in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorers = [save_reward_model(tmp_path / f"reward-{seed}", seed) for seed in (5, 6)]
    entries = [
        {
            "reward": str(path),
            "name": path.name,
            "data": {"development": str(tmp_path / "rows.jsonl")},
            "max_new_tokens": 4,
        }
        for path in scorers
    ]
    config = EvaluateConfig(
        models={"m": tmp_path / "written"},
        tasks=entries,
        split="development",
        groups={"both": {"members": ["reward-5.reward", "reward-6.reward"]}},
    )
    merge(MergeConfig.model_validate(ties(models, weight=0.7)), tmp_path / "written")
    written = evaluate(config, tmp_path / "evaluation", executor="local")["models"]["m"]
    measurer = Measurer(config.model_copy(update={"models": {"m": models[0]}}))
    found = measurer.measure(ties(models, weight=0.7))
    some = measurer.measure(ties(models, weight=0.7), {"reward-5": [1, 4]})
    measurer.close()
    for path in scorers:
        number = written["tasks"][path.name]["reward"]
        assert found.values[f"{path.name}.reward"] == pytest.approx(number["value"], rel=1e-6)
        assert found.stderr[f"{path.name}.reward"] == pytest.approx(number["stderr"], rel=1e-6)
    assert found.values["both"] == pytest.approx(written["groups"]["both"]["value"], rel=1e-6)
    whole = found.samples["reward-5.reward"]
    assert some.samples["reward-5.reward"] == pytest.approx([whole[1], whole[4]], rel=1e-5)
    with pytest.raises(InputError, match="store: reward-5 is scored; allowed with it: other tasks"):
        Measurer(config, store=str(tmp_path / "store"))
