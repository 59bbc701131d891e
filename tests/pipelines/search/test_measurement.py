"""Candidates in memory: numbers, samples and cells.

Oracle: `evaluate` of the same merge, written by `merge`.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.plan import plan_evaluation
from pipelines.evaluate.store import Store
from pipelines.merge import MergeConfig, merge
from pipelines.search import Bound, Measurer, Objective, Race
from tests.tiny_models import WORDS, save_tiny_llama

NUM_ROWS = {"first": 300, "second": 40, "third": 24}
DIMENSIONS = {"first": "helpfulness", "second": "honesty", "third": "harmlessness"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models at some distance from it."""
    folder = tmp_path_factory.mktemp("models")
    found = [save_tiny_llama(folder / "base", 0)]
    for seed in (1, 2):
        other = shutil.copytree(found[0], folder / f"model-{seed}")
        tensors, random = (
            load_file(other / "model.safetensors"),
            torch.Generator().manual_seed(seed),
        )
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.02)
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        found.append(other)
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tasks.yaml of three tasks; most answers that contain one of many words are right."""
    folder = tmp_path_factory.mktemp("tasks")
    random, entries = np.random.default_rng(0), []
    for name, count in NUM_ROWS.items():
        rows = [
            {
                "id": f"{name}-{place}",
                "prompt": [
                    {"role": "user", "content": " ".join(random.choice(WORDS, 1 + place % 5))}
                ],
                "answer": [str(word) for word in random.choice(WORDS, 12, replace=False)],
                "cluster": f"{name}-{place // 2}",
            }
            for place in range(count)
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append(
            {
                "name": name,
                "dimension": DIMENSIONS[name],
                "grader": {"name": "contains"},
                "files": {"development": file.name, "test": file.name},
            }
        )
    (folder / "tasks.yaml").write_text(yaml.safe_dump(entries))
    return folder / "tasks.yaml"


def evaluation_of(tasks: Path, model: Path) -> EvaluateConfig:
    return EvaluateConfig(
        models={"candidate": model}, tasks=tasks, split="development", max_new_tokens=4
    )


def ties(models: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
        "parameters": {"density": 0.5} | parameters,
    }


@pytest.fixture(scope="module")
def measurer(tasks: Path, models: list[Path]) -> Iterator[Measurer]:
    """One that has measured another candidate before."""
    measurer = Measurer(evaluation_of(tasks, models[0]))
    measurer.measure(ties(models, weight=0.1), {"second": [0, 5]})
    yield measurer
    measurer.close()


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
    race = Race(series, (objective,), (Bound(objective, 1.0),), seed=1)  # nobody is always right
    stopped = measurer.measure(ties(models, weight=2.0), race=race)
    assert stopped.stopped
    assert stopped.documents == race.answered(0)
    for name, scores in stopped.samples.items():
        places = stopped.documents[series[name][0]]
        assert scores == [whole.samples[name][place] for place in places]


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
