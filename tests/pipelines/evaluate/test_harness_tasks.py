"""Tasks of lm-evaluation-harness in pieces: names, splits, ranges, graders, files, bad input.

Oracles: lm-evaluation-harness's own index, its own requests and evaluation on chosen documents; a
task done whole against the same task in ranges; definitions written out.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engines import Engine, EngineConfig, Sampling, open_engine
from pipelines.errors import InputError
from pipelines.evaluate.harness import (
    Answer,
    Score,
    Task,
    answered,
    chat_template_of,
    evaluate,
    load_tasks,
    write_harness_json,
)
from pipelines.evaluate.harness.requests import sampling_of
from pipelines.evaluate.harness.splits import half
from pipelines.hub.offline import ASKED_OFFLINE
from tests.hub_stub import Stub
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.evaluate.made_up_tasks import SIZES, TASKS, rows, save_task, save_tasks
from tests.tiny_models import tiny_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")

SEED = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tasks(tmp_path_factory.mktemp("tasks") / "tasks")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = save_chatty(tmp_path_factory.mktemp("model") / "m", 5, max_position_embeddings=128)
    engine = open_engine(path, EngineConfig(batch_size=16))
    yield engine
    engine.close()


def load(folder: Path, name: str, split: str = "test", **options: Any) -> Task:
    keys = ("limit", "seed", "allow_code")
    settings = {key: options.pop(key) for key in keys if key in options}
    spec = {"include_path": folder, "names": [name], **options}
    [task] = load_tasks([spec], split, **{"seed": SEED, **settings})
    return task


def made(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    """A folder with one task, `odd`, on the data of `folder`."""
    place = tmp_path / "odd"
    place.mkdir(parents=True)
    for split in SIZES:
        (place / f"{split}.jsonl").symlink_to(folder / f"{split}.jsonl")
    save_task(place, "odd", **{**TASKS["choice"], **fields})
    return place


# Splits


def test_validation_is_development_and_test_is_test(folder: Path) -> None:
    for split, own in (("development", "validation"), ("test", "test")):
        task = load(folder, "choice", split)
        assert [dict(task.document(i)) for i in range(len(task))] == rows(own)
        assert task.remark == own and task.ids == tuple(range(SIZES[own]))


def test_one_split_is_halved_by_clusters_and_says_so(folder: Path) -> None:
    parts = {split: load(folder, "one_split", split) for split in ("development", "test")}
    ids = {split: set(task.ids) for split, task in parts.items()}
    assert not ids["development"] & ids["test"]
    assert ids["development"] | ids["test"] == set(range(SIZES["validation"]))
    topics = {split: set(task.clusters) for split, task in parts.items()}
    assert not topics["development"] & topics["test"]
    assert parts["test"].remark == "half of validation, by a hash of clusters with seed 77"
    other = load(folder, "one_split", "test", seed=1)
    assert set(other.ids) != ids["test"]  # five clusters: one seed in ten would give the same


def test_the_same_split_twice_is_one(folder: Path, tmp_path: Path) -> None:
    place = made(folder, tmp_path, validation_split="test")
    assert load(place, "odd").documents.is_halved


@given(
    clusters=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=30),
    seed=st.integers(0, 99),
)
def test_halves_are_a_partition_into_whole_clusters(clusters: list[str], seed: int) -> None:
    if len(set(clusters)) < 2:
        with pytest.raises(InputError, match="to be halved, with 1 clusters"):
            half("t", clusters, "test", seed)
        return
    parts = [half("t", clusters, split, seed) for split in ("development", "test")]
    assert sorted(parts[0] + parts[1]) == list(range(len(clusters)))
    own = [{clusters[place] for place in part} for part in parts]
    assert not own[0] & own[1] and 0 <= len(own[1]) - len(own[0]) <= 1
    more = [*clusters, clusters[0]]  # a document more in a cluster that is there moves no other
    assert half("t", more, "test", seed)[: len(parts[1])] == parts[1]


def test_on_development_no_document_is_its_own_example(folder: Path, tmp_path: Path) -> None:
    """Without training data examples come from the validation split, which is evaluated here."""
    for number, fields in enumerate(({}, {"fewshot_split": "validation"})):
        place = made(folder, tmp_path / str(number), training_split=None, num_fewshot=8, **fields)
        task = load(place, "odd", "development")
        for request in task.requests(0, len(task)):
            *examples, question = request.context.split("\n\n")
            assert len(examples) == 8
            assert not [each for each in examples if each.startswith(question)]


# Ranges


@pytest.mark.parametrize("name", ["choice_shots", "generation_corpus", "one_split"])
def test_requests_of_ranges_are_those_of_the_whole(folder: Path, name: str) -> None:
    whole = load(folder, name).requests(0, len(load(folder, name)))
    task = load(folder, name)
    size = len(task)
    for cuts in ([0, 3, 4, size], [0, size]):
        ranges = list(pairwise(cuts))
        for order in (ranges, ranges[::-1]):
            parts = {each: task.requests(*each) for each in order}
            assert [request for each in ranges for request in parts[each]] == whole


def test_scores_of_ranges_are_those_of_the_whole(folder: Path, engine: Engine) -> None:
    """Answers and scores pass through JSON, as through any store, in between."""
    for name in ("choice_shots", "rolling", "generation", "generation_votes", "generation_corpus"):
        task = load(folder, name)
        requests = task.requests(0, len(task))
        answers = answered(engine, requests, name)
        whole = task.aggregate(task.score(0, len(task), answers))
        parts: list[Score] = []
        for first, last in ((0, 2), (2, len(task))):
            own = [each for each in answers if first <= each.document < last]
            stored = [Answer(**json.loads(json.dumps(asdict(each)))) for each in own]
            parts += task.score(first, last, stored)
        again = [Score(**json.loads(json.dumps(asdict(each)))) for each in parts]
        fresh = load(folder, name)  # another process would have another object
        assert fresh.aggregate(again) == whole, name


def test_answers_depend_on_the_seed_alone(folder: Path, engine: Engine, tmp_path: Path) -> None:
    drawn = {"temperature": 1.5, "do_sample": True, "max_gen_toks": 8, "until": []}
    fields = {**TASKS["generation_votes"], "doc_to_choice": None, "generation_kwargs": drawn}
    place = made(folder, tmp_path, **fields)
    task = load(place, "odd")
    requests = task.requests(0, 4)
    assert len(requests) == 12 == len({request.seed for request in requests})
    answers = answered(engine, requests, "odd")
    assert answers == [answered(engine, [request], "odd")[0] for request in requests]
    assert len({answer.text for answer in answers[:3]}) > 1
    other = load(place, "odd", seed=SEED + 1).requests(0, 4)
    assert not {r.seed for r in other} & {r.seed for r in requests}


# Fingerprints


def test_fingerprints_know_what_numbers_depend_on(folder: Path, tmp_path: Path) -> None:
    same = save_tasks(tmp_path / "elsewhere")
    base = load(folder, "choice_shots").fingerprint
    assert load(same, "choice_shots").fingerprint == base
    lines = (same / "train.jsonl").read_text()
    (same / "train.jsonl").write_text(lines.replace('"truth": 0', '"truth": 1', 1))
    different = [
        load(same, "choice_shots"),
        load(folder, "choice_shots", "development"),
        load(folder, "choice_shots", limit=3),
        load(folder, "choice_shots", seed=SEED + 1),
        load(folder, "choice_shots", num_fewshot=3),
        load(folder, "choice_shots", chat=True),
        load(folder, "choice_shots", system_instruction="a"),
        load(folder, "choice_delimiter"),
    ]
    assert len({base, *(task.fingerprint for task in different)}) == 1 + len(different)
    assert load(same, "choice").fingerprint == load(folder, "choice").fingerprint  # no examples


# Graders


def test_graders_by_name_are_metrics(folder: Path, tmp_path: Path) -> None:
    fields = {**TASKS["generation"], "doc_to_target": "choices", "filter_list": None}
    fields["doc_to_choice"] = None
    grader = {"grader": {"name": "contains"}}
    place = made(folder, tmp_path, **fields, metadata=grader)
    task = load(place, "odd")
    documents = [task.document(number) for number in range(3)]
    texts = [f"z {documents[0]['choices'][2]} z", "", f" {documents[2]['choices'][0]} "]
    answers = [Answer(number, 0, 0, text=text) for number, text in enumerate(texts)]
    scores = task.score(0, 3, answers)
    assert [score.metrics["contains"] for score in scores] == [1.0, 0.0, 1.0]
    assert "exact_match" in scores[0].metrics  # as metric_list says
    value = task.aggregate(scores)["contains,none"]
    assert value.value == 2 / 3 and value.is_mean and value.higher_is_better
    alone = made(folder, tmp_path / "alone", **{**fields, "metric_list": None}, metadata=grader)
    assert load(alone, "odd").score(0, 3, answers)[0].metrics.keys() == {"contains"}


# Settings of generation


def test_settings_of_generation_as_the_library_reads_them() -> None:
    greedy = {"until": "a", "temperature": 0.7, "do_sample": False, "top_p": 0.9, "max_tokens": 5}
    assert sampling_of("t", greedy) == Sampling(stop=("a",), max_tokens=5)
    drawn = {"until": ["a", ""], "temperature": 0.7, "top_p": 0.9, "top_k": 4}
    found = Sampling(temperature=0.7, top_p=0.9, top_k=4, stop=("a",), max_tokens=256)
    assert sampling_of("t", drawn) == found
    assert sampling_of("t", {"do_sample": True}).temperature == 1.0
    for bad, line in (
        ({"num_beams": 4}, "unknown setting 'num_beams'; allowed: until, max_gen_toks"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample needs a temperature above 0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p: found 2.0; allowed: above 0, up to 1"),
    ):
        with pytest.raises(InputError, match="task t: generation_kwargs: " + line):
            sampling_of("t", bad)


# Prompts


def test_a_template_that_refuses_system_messages_does_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tiny_tokenizer()
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    plain = chat_template_of(tokenizer)(messages[1:])
    tokenizer.chat_template = refusing + str(tokenizer.chat_template)
    render = chat_template_of(tokenizer)
    assert render(messages) == render(messages) == plain == "<s><user>b<assistant>"
    assert capsys.readouterr().err.count("takes no system message") == 1


def test_long_prompts_are_counted_or_refused(folder: Path, engine: Engine) -> None:
    task = load(folder, "too_long")
    found = evaluate(engine, [task])["too_long"]
    length = {place: len(engine.encode(r.context)) for place, r in enumerate(found.requests)}
    room = engine.context - 12
    assert [a.num_cut for a in found.answers] == [max(0, n - room) for n in length.values()]
    assert 0 < found.num_cut < len(task)
    line = f"task too_long: {found.num_cut} of 14 prompts are longer than the context: that of "
    with pytest.raises(InputError, match=line + r"document 0 has 154 tokens; allowed: up to 116,"):
        evaluate(engine, [task], long_prompts="refuse")


# Files


def test_files_are_those_of_the_library(
    folder: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the library's tracker writes what an evaluation by the library gave, whose answers
    are taken from ours.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    names = ["choice", "choice_shots", "rolling", "generation", "generation_votes", "continuation"]
    tasks = load_tasks([{"include_path": folder, "names": names}], seed=SEED, limit=5)
    ours = evaluate(engine, tasks)
    target = write_harness_json(ours, tmp_path / "ours", "runs/a", engine.weights)
    asked: dict[Any, Any] = {}
    for result in ours.values():
        for request, answer in zip(result.requests, result.answers, strict=True):
            response = (answer.value, answer.is_greedy) if answer.text is None else answer.text
            key = (request.context, request.continuation)
            asked[key] = answer.value if request.kind == "rolling" else response

    class Told(LM):
        """Answers what our engine has answered."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            return [asked[each.args] for each in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
            return [asked["", each.args[0]] for each in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[Any]:
            return [asked[each.args[0], ""] for each in requests]

    monkeypatch.chdir(folder)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs = simple_evaluate(
        model=Told(),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=5,
        fewshot_random_seed=SEED,
        bootstrap_iters=2,
        evaluation_tracker=tracker,
    )
    assert theirs is not None
    samples = theirs.pop("samples")
    tracker.general_config_tracker.model_name_sanitized = "runs__a"
    tracker.save_results_aggregated(theirs, samples)
    for name, lines in samples.items():
        tracker.save_results_samples(name, lines)
    [written] = (tmp_path / "theirs" / "runs__a").glob("results_*.json")
    assert target.parent.name == "runs__a"
    own, other = json.loads(target.read_text()), json.loads(written.read_text())
    for key in ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert own[key] == other[key], key
    assert own["task_hashes"] == other["task_hashes"]
    for name in names:
        found, expected = own["results"][name], other["results"][name]
        assert found.keys() == expected.keys()
        for key in expected:
            means = [k for k, m in ours[name].metrics.items() if m.is_mean]
            if "_stderr" not in key or key.replace("_stderr", "") in means:
                same = pytest.approx(expected[key]) if "," in key else expected[key]
                assert found[key] == same, (name, key)
        [mine] = target.parent.glob(f"samples_{name}_2*.jsonl")
        [their] = written.parent.glob(f"samples_{name}_2*.jsonl")
        pairs = zip(read_lines(mine), read_lines(their), strict=True)
        for found, expected in pairs:
            # Arrays of numpy are lists in ours, and their printed form in the library's.
            for line in (found, expected):
                line.pop("brier_score", None)
            assert found == expected, name


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Bad input


def broken(place: Path, text: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "bad.yaml").write_text(text)
    return place


def test_unknown_names_come_with_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, "choice_shot")
    assert str(caught.value).startswith(f"tasks: unknown task 'choice_shot' in {folder}; nearest: ")
    assert "choice_shots" in str(caught.value)


def test_functions_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    place = made(folder, tmp_path)
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


def test_templates_cannot_reach_python(folder: Path, tmp_path: Path) -> None:
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"task odd: .*access to attribute '__class__'.*unsafe"):
        load(made(folder, tmp_path, doc_to_text=reach), "odd")


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
    folder: Path, tmp_path: Path, fields: dict[str, Any], line: str
) -> None:
    place = made(folder, tmp_path, **fields)
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
def test_bad_folders_are_one_line(folder: Path, tmp_path: Path, text: str, line: str) -> None:
    place = tmp_path / "tasks"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    with pytest.raises(InputError, match=line):
        load(broken(place, text), "g" if text.startswith("group") else "choice")


def test_other_bad_input_is_one_line(folder: Path, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="include_path: nowhere: no such folder"):
        load(Path("nowhere"), "a")
    with pytest.raises(InputError, match=r"include_path: .*: holds no YAML file with a task"):
        load(tmp_path, "a")
    with pytest.raises(InputError, match="tasks: choice is there twice; names must differ"):
        load_tasks([{"include_path": folder, "names": ["choice", "rolling", "choice"]}])
    with pytest.raises(InputError, match=r"tasks.0: .*names: required without include_path"):
        load_tasks([{"num_fewshot": 1}])
    with pytest.raises(InputError, match="generation_kwargs: has no effect with multiple_choice"):
        load(folder, "choice", generation_kwargs={"temperature": 1.0})
    with pytest.raises(InputError, match="fewshot_as_multiturn: has no effect without chat"):
        load(folder, "choice", fewshot_as_multiturn=False)
    with pytest.raises(InputError, match="limit: found 0; allowed: 1 or more"):
        load(folder, "choice", limit=0)
    with pytest.raises(InputError, match="split: found 'dev'; allowed: development, test"):
        load(folder, "choice", "dev")
    place = made(folder, tmp_path, num_fewshot=0)
    with pytest.raises(InputError, match="task odd: num_fewshot: found 2; allowed: 0, as the task"):
        load(place, "odd", num_fewshot=2)
    with pytest.raises(InputError, match=r"task choice_shots: document 0: .*[Ss]ample larger"):
        load(folder, "choice_shots", num_fewshot=40).requests(0, 1)
    [long] = load_tasks(
        [
            {
                "include_path": folder,
                "names": ["generation"],
                "generation_kwargs": {"max_gen_toks": 128},
            }
        ]
    )
    with pytest.raises(InputError, match="max_gen_toks: found 128; allowed: up to 127, as the mod"):
        evaluate(engine, [long])


def test_a_model_without_a_chat_template_is_one_line(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.text.tokenizer, "chat_template", None)
    line = "task choice: chat: model .*: its tokenizer has no chat template; allowed: a model with"
    with pytest.raises(InputError, match=line):
        evaluate(engine, [load(folder, "choice", chat=True)])


def test_metadata_may_ask_for_a_chat(folder: Path, engine: Engine, tmp_path: Path) -> None:
    place = made(folder, tmp_path, metadata={"chat": True})
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


def test_numbers_are_finite(folder: Path, engine: Engine) -> None:
    found = evaluate(engine, [load(folder, "rolling", limit=2)])["rolling"].metrics
    assert all(math.isfinite(metric.value) for metric in found.values())
