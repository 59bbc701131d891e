"""Tasks of lm-evaluation-harness in pieces: names, splits, ranges, graders, files, bad input.

Oracles: lm-evaluation-harness's own index, its own requests and evaluation on chosen documents; a
task done whole against the same task in ranges; definitions written out.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engines import Engine, Sampling
from pipelines.errors import InputError
from pipelines.evaluate.harness import (
    Answer,
    Score,
    answered,
    chat_template_of,
    load_tasks,
    measure_tasks,
    write_harness_json,
)
from pipelines.evaluate.harness.requests import sampling_of
from pipelines.evaluate.harness.splits import half
from tests.pipelines.evaluate.made_up_tasks import (
    SEED,
    SIZES,
    TASKS,
    load,
    made,
    rows,
    save_tasks,
)
from tests.tiny_models import tiny_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")

# Splits


def test_validation_is_development_and_test_is_test(made_up_tasks: Path) -> None:
    for split, own in (("development", "validation"), ("test", "test")):
        task = load(made_up_tasks, "choice", split)
        assert [dict(task.document(i)) for i in range(len(task))] == rows(own)
        assert task.remark == own and task.ids == tuple(range(SIZES[own]))


def test_one_split_is_halved_by_clusters_and_says_so(made_up_tasks: Path) -> None:
    parts = {split: load(made_up_tasks, "one_split", split) for split in ("development", "test")}
    ids = {split: set(task.ids) for split, task in parts.items()}
    assert not ids["development"] & ids["test"]
    assert ids["development"] | ids["test"] == set(range(SIZES["validation"]))
    topics = {split: set(task.clusters) for split, task in parts.items()}
    assert not topics["development"] & topics["test"]
    assert parts["test"].remark == "half of validation, by a hash of clusters with seed 77"
    other = load(made_up_tasks, "one_split", "test", seed=1)
    assert set(other.ids) != ids["test"]  # five clusters: one seed in ten would give the same


def test_the_same_split_twice_is_one(made_up_tasks: Path, tmp_path: Path) -> None:
    place = made(made_up_tasks, tmp_path, validation_split="test")
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


def test_on_development_no_document_is_its_own_example(made_up_tasks: Path, tmp_path: Path) -> None:
    """Without training data examples come from the validation split, which is evaluated here."""
    for number, fields in enumerate(({}, {"fewshot_split": "validation"})):
        place = made(
            made_up_tasks, tmp_path / str(number), training_split=None, num_fewshot=8, **fields
        )
        task = load(place, "odd", "development")
        for request in task.requests(0, len(task)):
            *examples, question = request.context.split("\n\n")
            assert len(examples) == 8
            assert not [each for each in examples if each.startswith(question)]


# Ranges


@pytest.mark.parametrize("name", ["choice_shots", "generation_corpus", "one_split"])
def test_requests_of_ranges_are_those_of_the_whole(made_up_tasks: Path, name: str) -> None:
    whole = load(made_up_tasks, name).requests(0, len(load(made_up_tasks, name)))
    task = load(made_up_tasks, name)
    size = len(task)
    for cuts in ([0, 3, 4, size], [0, size]):
        ranges = list(pairwise(cuts))
        for order in (ranges, ranges[::-1]):
            parts = {each: task.requests(*each) for each in order}
            assert [request for each in ranges for request in parts[each]] == whole


def test_scores_of_ranges_are_those_of_the_whole(made_up_tasks: Path, engine: Engine) -> None:
    """Answers and scores pass through JSON, as through any store, in between."""
    for name in ("choice_shots", "rolling", "generation", "generation_votes", "generation_corpus"):
        task = load(made_up_tasks, name)
        requests = task.requests(0, len(task))
        answers = answered(engine, requests, name)
        whole = task.aggregate(task.score(0, len(task), answers))
        parts: list[Score] = []
        for first, last in ((0, 2), (2, len(task))):
            own = [each for each in answers if first <= each.document < last]
            stored = [Answer(**json.loads(json.dumps(asdict(each)))) for each in own]
            parts += task.score(first, last, stored)
        again = [Score(**json.loads(json.dumps(asdict(each)))) for each in parts]
        fresh = load(made_up_tasks, name)  # another process would have another object
        assert fresh.aggregate(again) == whole, name


def test_answers_depend_on_the_seed_alone(
    made_up_tasks: Path, engine: Engine, tmp_path: Path
) -> None:
    drawn = {"temperature": 1.5, "do_sample": True, "max_gen_toks": 8, "until": []}
    fields = {**TASKS["generation_votes"], "doc_to_choice": None, "generation_kwargs": drawn}
    place = made(made_up_tasks, tmp_path, **fields)
    task = load(place, "odd")
    requests = task.requests(0, 4)
    assert len(requests) == 12 == len({request.seed for request in requests})
    answers = answered(engine, requests, "odd")
    assert answers == [answered(engine, [request], "odd")[0] for request in requests]
    assert len({answer.text for answer in answers[:3]}) > 1
    other = load(place, "odd", seed=SEED + 1).requests(0, 4)
    assert not {r.seed for r in other} & {r.seed for r in requests}


# Fingerprints


def test_fingerprints_know_what_numbers_depend_on(made_up_tasks: Path, tmp_path: Path) -> None:
    same = save_tasks(tmp_path / "elsewhere")
    base = load(made_up_tasks, "choice_shots").fingerprint
    assert load(same, "choice_shots").fingerprint == base
    lines = (same / "train.jsonl").read_text()
    (same / "train.jsonl").write_text(lines.replace('"truth": 0', '"truth": 1', 1))
    different = [
        load(same, "choice_shots"),
        load(made_up_tasks, "choice_shots", "development"),
        load(made_up_tasks, "choice_shots", limit=3),
        load(made_up_tasks, "choice_shots", seed=SEED + 1),
        load(made_up_tasks, "choice_shots", num_fewshot=3),
        load(made_up_tasks, "choice_shots", chat=True),
        load(made_up_tasks, "choice_shots", system_instruction="a"),
        load(made_up_tasks, "choice_delimiter"),
    ]
    assert len({base, *(task.fingerprint for task in different)}) == 1 + len(different)
    assert (
        load(same, "choice").fingerprint == load(made_up_tasks, "choice").fingerprint
    )  # no examples


# Graders


def test_graders_by_name_are_metrics(made_up_tasks: Path, tmp_path: Path) -> None:
    fields = {**TASKS["generation"], "doc_to_target": "choices", "filter_list": None}
    fields["doc_to_choice"] = None
    grader = {"grader": {"name": "contains"}}
    place = made(made_up_tasks, tmp_path, **fields, metadata=grader)
    task = load(place, "odd")
    documents = [task.document(number) for number in range(3)]
    texts = [f"z {documents[0]['choices'][2]} z", "", f" {documents[2]['choices'][0]} "]
    answers = [Answer(number, 0, 0, text=text) for number, text in enumerate(texts)]
    scores = task.score(0, 3, answers)
    assert [score.metrics["contains"] for score in scores] == [1.0, 0.0, 1.0]
    assert "exact_match" in scores[0].metrics  # as metric_list says
    value = task.aggregate(scores)["contains,none"]
    assert value.value == 2 / 3 and value.is_mean and value.higher_is_better
    alone = made(
        made_up_tasks, tmp_path / "alone", **{**fields, "metric_list": None}, metadata=grader
    )
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


def test_long_prompts_are_counted_or_refused(made_up_tasks: Path, engine: Engine) -> None:
    task = load(made_up_tasks, "too_long")
    found = measure_tasks(engine, [task])["too_long"]
    length = {place: len(engine.encode(r.context)) for place, r in enumerate(found.requests)}
    room = engine.context - 12
    assert [a.num_cut for a in found.answers] == [max(0, n - room) for n in length.values()]
    assert 0 < found.num_cut < len(task)
    line = f"task too_long: {found.num_cut} of 14 prompts are longer than the context: that of "
    with pytest.raises(InputError, match=line + r"document 0 has 154 tokens; allowed: up to 116,"):
        measure_tasks(engine, [task], long_prompts="refuse")


# Files


def test_files_are_those_of_the_library(
    made_up_tasks: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the library's tracker writes what an evaluation by the library gave, whose answers
    are taken from ours.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    names = ["choice", "choice_shots", "rolling", "generation", "generation_votes", "continuation"]
    tasks = load_tasks([{"include_path": made_up_tasks, "names": names}], seed=SEED, limit=5)
    ours = measure_tasks(engine, tasks)
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

    monkeypatch.chdir(made_up_tasks)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs = simple_evaluate(
        model=Told(),
        tasks=list(names),
        task_manager=TaskManager(include_path=str(made_up_tasks), include_defaults=False),
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
