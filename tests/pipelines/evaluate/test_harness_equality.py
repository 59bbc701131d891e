"""A dozen made-up tasks on our engine.

Oracle: lm-evaluation-harness's own evaluation with its own model of transformers, in this process
and as its command, on the same weights in float32.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipelines.engines import Engine
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, plan_evaluation
from pipelines.evaluate.groups import Group
from pipelines.evaluate.harness import TaskResult, load_tasks, measure_tasks
from tests.pipelines.evaluate.made_up_tasks import SEED, TASKS, save_task

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")
NO_EXAMPLES = {"training_split": None}


@pytest.fixture(scope="module")
def library_model(chatty_model: Path, engine: Engine) -> Any:
    from lm_eval.models.huggingface import HFLM

    loaded = AutoModelForCausalLM.from_pretrained(chatty_model, dtype=torch.float32)
    return HFLM(pretrained=loaded, tokenizer=engine.text.tokenizer, batch_size=8)


def library_results(lm: Any, folder: Path, names: Sequence[Any], **options: Any) -> dict[str, Any]:
    """The library's own evaluation."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=lm,
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
        fewshot_random_seed=SEED,
        **options,
    )
    assert found is not None
    return found


def assert_equal(ours: dict[str, TaskResult], theirs: dict[str, Any]) -> None:
    """All metrics, and all samples' metrics, answers and prompts."""
    assert ours.keys() == theirs["results"].keys()
    for name, result in ours.items():
        own = theirs["results"][name]
        named = {key for key in own if "," in key and "_stderr," not in key}
        assert result.metrics.keys() == named, name
        for key, metric in result.metrics.items():
            assert metric.value == pytest.approx(own[key], abs=1e-6, rel=1e-6), (name, key)
        assert result.task.remark or not result.task.documents.is_halved
        prompts = {(r.document, r.number): r for r in result.requests if r.draw == 0}
        for sample in theirs["samples"][name]:
            place = result.task.ids.index(sample["doc_id"])
            for number, arguments in enumerate(sample["arguments"]):
                request = prompts[place, number]
                shown = request.continuation if request.kind == "rolling" else request.context
                assert shown == arguments[0], (name, place)


def test_averages_of_the_librarys_groups(
    made_up_tasks: Path,
    chatty_model: Path,
    library_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weighted by documents and not, after filters, of nested groups, and where a task lacks the
    metric.
    """
    place = tmp_path / "tasks"
    place.mkdir()
    for file in made_up_tasks.iterdir():
        (place / file.name).symlink_to(file)
    fewer = {"data_files": {"validation": "test.jsonl", "test": "validation.jsonl"}}
    save_task(place, "fewer", **TASKS["choice"] | {"dataset_kwargs": fewer, **NO_EXAMPLES})
    save_task(place, "short", **TASKS["generation"] | {"dataset_kwargs": fewer, **NO_EXAMPLES})
    groups = {
        "all": {
            "task": ["inner", "choice_shots"],
            "aggregate_metric_list": [
                {"metric": "acc"},
                {"metric": "acc_norm", "weight_by_size": False},
                {"metric": "exact_match", "filter_list": ["first"]},
            ],
        },
        "inner": {
            "task": ["choice", "fewer", "generation", "short"],
            "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": False}],
        },
    }
    for name, values in groups.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, **values}))
    monkeypatch.chdir(place)  # the library looks for data there
    theirs = library_results(library_model, place, ["all"])["groups"]
    expected = {
        f"{group}.{key}".removesuffix(",none"): value
        for group, found in theirs.items()
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
    config = EvaluateConfig(
        models={"m": chatty_model},
        tasks=[{"include_path": place, "names": ["all"]}],
        groups={"mine": {"members": ["all.acc", "inner.exact_match,last"]}},
        seed=SEED,
    )
    ours = evaluate(config, tmp_path / "out", executor="local")["models"]["m"]
    values = {name: each["value"] for name, each in ours["groups"].items() if name != "mine"}
    assert values == pytest.approx(expected, abs=1e-6)
    assert set(values) == {
        *("all.acc", "all.acc_norm", "all.exact_match,first"),
        *("inner.exact_match,first", "inner.exact_match,last"),
    }
    own = [ours["tasks"][task]["acc"] for task in ("choice", "fewer", "choice_shots")]
    assert [each["n"] for each in own] == [14, 10, 14]
    pooled = sum(each["n"] * each["value"] for each in own) / 38
    assert values["all.acc"] == pytest.approx(pooled)
    both = (values["all.acc"] + values["inner.exact_match,last"]) / 2
    assert ours["groups"]["mine"]["value"] == pytest.approx(both)
    clash = config.model_copy(update={"groups": {"all.acc": Group(members=["choice.acc"])}})
    with pytest.raises(InputError, match=r"groups\.all\.acc: is an average of the task's own gro"):
        plan_evaluation(clash, tmp_path / "none")


CHAT = {"system_instruction": "b c", "chat": True}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(CHAT, id="chat", marks=pytest.mark.slow),
        pytest.param({**CHAT, "fewshot_as_multiturn": False}, id="one", marks=pytest.mark.slow),
    ],
)
def test_all_tasks_have_the_librarys_numbers(
    options: dict[str, Any],
    engine: Engine,
    library_model: Any,
    made_up_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for name in TASKS if name != "one_split"]
    tasks = load_tasks([{"include_path": made_up_tasks, "names": names, **options}], seed=SEED)
    ours = measure_tasks(engine, tasks)
    monkeypatch.chdir(made_up_tasks)
    chat = bool(options.get("chat"))
    theirs = library_results(
        library_model,
        made_up_tasks,
        names,
        apply_chat_template=chat,
        system_instruction=options.get("system_instruction"),
        fewshot_as_multiturn=chat and options.get("fewshot_as_multiturn", True),
    )
    assert_equal(ours, theirs)
    assert ours["too_long"].num_cut > 0 and ours["choice"].num_cut == 0


@pytest.mark.slow
def test_development_and_halves_are_the_librarys_numbers_on_these_documents(
    engine: Engine, library_model: Any, made_up_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library evaluates on the validation split where its config says so, and on documents
    that are chosen by their numbers.
    """
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(made_up_tasks)
    names = ["choice_shots", "choice_delimiter", "generation_corpus"]
    spec = {"include_path": made_up_tasks, "names": names}
    ours = measure_tasks(engine, load_tasks([spec], "development", seed=SEED))
    loaded = TaskManager(include_path=str(made_up_tasks), include_defaults=False)
    configs = [
        {**loaded.task_index[name].cfg, "test_split": "validation"}  # type: ignore[dict-item]
        for name in names
    ]
    assert_equal(ours, library_results(library_model, made_up_tasks, configs))
    for split in ("development", "test"):
        half = {"include_path": made_up_tasks, "names": ["one_split"]}
        found = measure_tasks(engine, load_tasks([half], split, seed=SEED))
        chosen = {"one_split": list(found["one_split"].task.ids)}
        theirs = library_results(library_model, made_up_tasks, ["one_split"], samples=chosen)
        assert_equal(found, theirs)


@pytest.mark.slow
def test_the_librarys_command_has_the_same_numbers(
    engine: Engine, chatty_model: Path, made_up_tasks: Path, own_cache: Path, tmp_path: Path
) -> None:
    # The command draws 100,000 bootstraps of F1, which takes minutes.
    names = [name for name in TASKS if name not in ("one_split", "choice_shots")]
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"),
        f"pretrained={chatty_model},dtype=float32",
        *("--tasks", *names, "--include_path", str(made_up_tasks), "--device", "cpu"),
        *("--batch_size", "16", "--seed", f"0,0,0,{SEED}", "--output_path", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DISABLE_MULTIPROC": "1"}
    environment |= {"HF_DATASETS_CACHE": str(own_cache)}
    subprocess.run(command, cwd=made_up_tasks, check=True, capture_output=True, env=environment)
    [file] = tmp_path.glob("*/results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for name, result in measure_tasks(
        engine, load_tasks([{"include_path": made_up_tasks, "names": names}], seed=SEED)
    ).items():
        for key, metric in result.metrics.items():
            expected = pytest.approx(theirs[name][key], abs=1e-6, rel=1e-6)
            assert metric.value == expected, (name, key)
