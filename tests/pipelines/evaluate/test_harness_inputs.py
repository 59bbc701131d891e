"""What tasks of lm-evaluation-harness are made from: names, data of the hub, bad input.

Oracles: the exact lines; the library's own index; a hub on loopback.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.engines import Engine
from pipelines.errors import InputError
from pipelines.evaluate.harness import (
    chat_template_of,
    load_tasks,
    measure_tasks,
)
from pipelines.hub.offline import ASKED_OFFLINE
from tests.hub_stub import Stub
from tests.pipelines.evaluate.made_up_tasks import (
    TASKS,
    load,
    made,
    rows,
    save_task,
)

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")


def broken(place: Path, text: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "bad.yaml").write_text(text)
    return place


def test_unknown_names_come_with_the_nearest(made_up_tasks: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(made_up_tasks, "choice_shot")
    assert str(caught.value).startswith(
        f"tasks: unknown task 'choice_shot' in {made_up_tasks}; nearest: "
    )
    assert "choice_shots" in str(caught.value)


def test_functions_are_refused_by_name(made_up_tasks: Path, tmp_path: Path) -> None:
    place = made(made_up_tasks, tmp_path)
    (place / "base").write_text("doc_to_text: !function code.text\n")
    (place / "code.py").write_text("def text(doc):\n    return 'a ' + doc['words']\n")
    text = (place / "odd.yaml").read_text().replace("doc_to_text: '{{words}}'\n", "")
    (place / "odd.yaml").write_text(f"include: base\n{text}")
    with pytest.raises(InputError, match=r"names functions, which are code: code.text \(the first"):
        load(place, "odd")
    task = load(place, "odd", allow_code=True)
    assert task.requests(0, 1)[0].context == f"a {rows('test')[0]['words']}"
    before = task.fingerprint
    with (place / "code.py").open("a") as file:
        file.write("# what the function may call has changed\n")
    assert load(place, "odd", allow_code=True).fingerprint != before


def test_templates_cannot_reach_python(made_up_tasks: Path, tmp_path: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"task odd: .*access to attribute '__class__'.*unsafe"):
        load(made(made_up_tasks, tmp_path, doc_to_text=reach), "odd")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"doc_to_txt": "a"}, "task odd: unknown field 'doc_to_txt'; did you mean doc_to_text?"),
        ({"doc_to_image": "a"}, "task odd: doc_to_image: needs a model that takes images"),
        ({"unsafe_code": True}, "task odd: unsafe_code: the library would run the model's"),
        ({"metric_list": [{"metric": "acc_nrm"}]}, "task odd: metric 'acc_nrm': is none of the"),
        (
            {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
            "task odd: metric 'acc': is none of the library's",
        ),
        ({"doc_to_text": "{{wrds}}"}, "task odd: UndefinedError: 'wrds' is undefined"),
        ({"test_split": "tst"}, "task odd: test_split: found 'tst', which its data set has not"),
        ({"metric_list": ["acc"]}, "task odd: metric_list: found 'acc'; allowed: metric: acc"),
        ({"metadata": {"chat": "no"}}, "task odd: metadata.chat: found 'no'; allowed: true, false"),
        (
            {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}},
            "task odd: data file none.jsonl: not in ",
        ),
        ({"test_split": None, "validation_split": None}, "task odd: .*must have valid or test doc"),
        ({"metadata": {"cluster": "topics"}}, "task odd: metadata.cluster: found 'topics'; allow"),
        ({"metadata": {"grader": {"name": "exact"}}}, "task odd: metadata.grader: has no effect "),
        (
            {"output_type": "generate_until", "metadata": {"grader": {"name": "exakt"}}},
            "task odd: metadata.grader: unknown grader 'exakt'; allowed: exact",
        ),
        (
            {**TASKS["generation"], "generation_kwargs": {"num_beams": 2, "until": []}},
            "task odd: generation_kwargs: unknown setting 'num_beams'",
        ),
    ],
)
def test_bad_tasks_are_one_line(
    made_up_tasks: Path, tmp_path: Path, fields: dict[str, Any], line: str
) -> None:
    place = made(made_up_tasks, tmp_path, **fields)
    with pytest.raises(InputError, match=line) as caught:
        load(place, "odd")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("task: [", r"bad.yaml: line 1: not valid YAML"),
        ("- a", "bad.yaml: expected the fields of a task, found list"),
        ("include: other.yaml\ntask: a", "other.yaml: cannot be read"),
        ("include: bad.yaml\ntask: a", "bad.yaml: includes itself"),
        ("task: choice", "two tasks are named 'choice': "),
        pytest.param(
            "group: g\ntask: [choise]",
            "group g: unknown member 'choise'; nearest: choice",
            marks=pytest.mark.slow,  # it may be one of the library's own
        ),
    ],
)
def test_bad_folders_are_one_line(
    made_up_tasks: Path, tmp_path: Path, text: str, line: str
) -> None:
    place = tmp_path / "tasks"
    place.mkdir()
    for file in made_up_tasks.iterdir():
        (place / file.name).symlink_to(file)
    with pytest.raises(InputError, match=line):
        load(broken(place, text), "g" if text.startswith("group") else "choice")


def test_other_bad_input_is_one_line(made_up_tasks: Path, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="include_path: nowhere: no such folder"):
        load(Path("nowhere"), "a")
    with pytest.raises(InputError, match=r"include_path: .*: holds no YAML file with a task"):
        load(tmp_path, "a")
    with pytest.raises(InputError, match="tasks: choice is there twice; names must differ"):
        load_tasks([{"include_path": made_up_tasks, "names": ["choice", "rolling", "choice"]}])
    with pytest.raises(InputError, match=r"tasks.0: .*names: required without include_path"):
        load_tasks([{"num_fewshot": 1}])
    with pytest.raises(InputError, match="generation_kwargs: has no effect with multiple_choice"):
        load(made_up_tasks, "choice", generation_kwargs={"temperature": 1.0})
    place = made(made_up_tasks, tmp_path / "damaged")
    (place / "test.jsonl").unlink()
    (place / "test.jsonl").write_text('{"words": "a"}\n{"words": \n')
    with pytest.raises(InputError, match=r"task odd: .*JSON"):
        load(place, "odd")
    with pytest.raises(InputError, match="fewshot_as_multiturn: has no effect without chat"):
        load(made_up_tasks, "choice", fewshot_as_multiturn=False)
    with pytest.raises(InputError, match="limit: found 0; allowed: 1 or more"):
        load(made_up_tasks, "choice", limit=0)
    with pytest.raises(InputError, match="split: found 'dev'; allowed: development, test"):
        load(made_up_tasks, "choice", "dev")
    place = made(made_up_tasks, tmp_path, num_fewshot=0)
    with pytest.raises(InputError, match="task odd: num_fewshot: found 2; allowed: 0, as the task"):
        load(place, "odd", num_fewshot=2)
    with pytest.raises(InputError, match=r"task choice_shots: document 0: .*[Ss]ample larger"):
        load(made_up_tasks, "choice_shots", num_fewshot=40).requests(0, 1)
    [long] = load_tasks(
        [
            {
                "include_path": made_up_tasks,
                "names": ["generation"],
                "generation_kwargs": {"max_gen_toks": 128},
            }
        ]
    )
    with pytest.raises(InputError, match="max_gen_toks: found 128; allowed: up to 127, as the mod"):
        measure_tasks(engine, [long])


def test_a_model_without_a_chat_template_is_one_line(
    made_up_tasks: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.text.tokenizer, "chat_template", None)
    line = "task choice: chat: model .*: its tokenizer has no chat template; allowed: a model with"
    with pytest.raises(InputError, match=line):
        measure_tasks(engine, [load(made_up_tasks, "choice", chat=True)])


def test_metadata_may_ask_for_a_chat(made_up_tasks: Path, engine: Engine, tmp_path: Path) -> None:
    place = made(made_up_tasks, tmp_path, metadata={"chat": True})
    render = chat_template_of(engine.text.tokenizer)
    context = load(place, "odd").requests(0, 1, render)[0].context
    assert context == f"<s><user>{rows('test')[0]['words']}<assistant>"
    assert load(place, "odd", chat=False).requests(0, 1)[0].context == rows("test")[0]["words"]


# Names and data of the library


def test_the_librarys_own_tasks_say_how_to_bring_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv(ASKED_OFFLINE, "1")
    with pytest.raises(InputError) as caught:
        load_tasks(["arc_easy"])
    assert str(caught.value) == (
        "task arc_easy: its data set allenai/ai2_arc is not in the cache of datasets, and the hub "
        "is not to be asked (HF_HUB_OFFLINE); bring it where the hub can be reached, with "
        'HF_HUB_OFFLINE unset: python -c "import datasets; '
        "datasets.load_dataset('allenai/ai2_arc', 'ARC-Easy')\""
    )


def test_data_of_the_hub_are_fetched_once_and_then_from_the_cache(
    hub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub import constants

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("validation", "test"):
        table = pyarrow.Table.from_pylist(rows(split))
        target = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, target)
    hub.add("made/up", tmp_path / "set")
    hub.kinds["made/up"] = "datasets"
    (tmp_path / "tasks").mkdir()
    own = {"dataset_path": "made/up", "dataset_kwargs": None, "training_split": None}
    save_task(tmp_path / "tasks", "odd", **{**TASKS["choice"], **own})
    save_task(tmp_path / "tasks", "other", **{**TASKS["choice"], **own, "dataset_path": "no/set"})
    task = load(tmp_path / "tasks", "odd")
    assert [dict(task.document(i)) for i in range(len(task))] == rows("test")
    with pytest.raises(InputError, match="task other: Dataset 'no/set' doesn't exist on the Hub"):
        load(tmp_path / "tasks", "other")
    asked = len(hub.asked)
    assert asked > 0
    monkeypatch.setenv(ASKED_OFFLINE, "1")
    again = load(tmp_path / "tasks", "odd")
    assert again.fingerprint == task.fingerprint and len(hub.asked) == asked
    with pytest.raises(InputError, match="task other: its data set no/set is not in the cache of"):
        load(tmp_path / "tasks", "other")
    assert len(hub.asked) == asked


def test_groups_and_tags_stand_for_their_tasks(made_up_tasks: Path, tmp_path: Path) -> None:
    place = tmp_path / "tasks"
    place.mkdir()
    for file in made_up_tasks.iterdir():
        (place / file.name).symlink_to(file)
    save_task(place, "tagged", **TASKS["choice"], tag="letters")
    (place / "all.yaml").write_text("group: all\ntask: [inner, letters]\n")
    members = "[{task: choice_shots, num_fewshot: 5}, rolling]"
    (place / "inner.yaml").write_text(f"group: inner\ntask: {members}\n")
    tasks = load_tasks([{"include_path": place, "names": ["all"]}])
    assert [(task.name, task.num_fewshot) for task in tasks] == [
        ("choice_shots", 5),
        ("rolling", 0),
        ("tagged", 0),
    ]
    [tagged] = load_tasks([{"include_path": place, "names": ["letters"]}])
    assert tagged.name == "tagged"
    everything = load_tasks([{"include_path": place}], limit=1)
    assert {task.name for task in everything} == {*TASKS, "tagged"}
    with pytest.raises(InputError, match="tasks: rolling is there twice; names must differ"):
        load_tasks([{"include_path": place, "names": ["rolling", "inner"]}])


@pytest.mark.slow
def test_names_lead_where_the_librarys_own_index_leads() -> None:
    from lm_eval.tasks import TaskManager

    from pipelines.evaluate.harness.names import _own_files, own_task, own_tasks

    theirs = TaskManager().task_index
    ours = own_tasks()
    assert ours.keys() == theirs.keys() and len(ours) > 10_000
    for name, entry in theirs.items():
        mine = ours[name]
        assert (mine.kind, mine.yaml_path, mine.tags) == (entry.kind, entry.yaml_path, entry.tags)
    stems = sorted({path.stem for path in _own_files()})[::40]
    for name in stems:
        found = own_task(name)
        assert found is None or found[name].yaml_path == theirs[name].yaml_path
    with pytest.raises(InputError, match=r"unknown task 'arc_eazy' in lm-.*; nearest: arc_easy"):
        load_tasks(["arc_eazy"])


def test_numbers_are_finite(made_up_tasks: Path, engine: Engine) -> None:
    found = measure_tasks(engine, [load(made_up_tasks, "rolling", limit=2)])["rolling"].metrics
    assert all(math.isfinite(metric.value) for metric in found.values())
