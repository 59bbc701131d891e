"""Attacked tasks in an evaluation. Oracle: a model whose answers are a function of the prompt: it
is right while no more words are unknown to it than the document bears, so scores under any attack
are known; errors by the formula on single documents.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.engines.interface import Completion
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from pipelines.evaluate import EvaluateConfig, evaluate, plan_evaluation
from pipelines.evaluate import store as storing
from pipelines.evaluate.estimate import estimates
from pipelines.evaluate.opened import open_tasks
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.statistics import make_sheet, means
from pipelines.robustness.drops import drop
from pipelines.robustness.task import AttackedTask
from tests.pipelines.engines.references import save_chatty
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")

LETTERS = "abcdefghijkl"
BEARS = {letter: place % 6 for place, letter in enumerate(LETTERS)}  # unknown words, less one
TASK = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "training_split": "train",
    "validation_split": "train",
    "test_split": "test",
    "output_type": "generate_until",
    "description": "hello hello ",
    "doc_to_text": "sorry yes . {{letter}}",
    "doc_to_target": "{{answer}}",
    "fewshot_delimiter": " z ",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 2, "do_sample": False},
    "metadata": {"version": 1.0, "grader": {"name": "contains"}},
}


class KilledError(BaseException):
    """The end of a process, for a test."""


class Fake:
    """Answers in place of a model's, counted; `kill_at` ends the process at a call."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.calls, self.kill_at = 0, math.inf

    def __call__(self, engine: Any, prompts: Sequence[Any], *rest: Any) -> list[Completion]:
        self.calls += 1
        if self.calls > self.kill_at:
            raise KilledError
        texts = [engine.text.tokenizer.decode(prompt) for prompt in prompts]
        self.prompts += texts
        return [Completion(self.answer(text), (), "stop", None, "") for text in texts]

    @staticmethod
    def answer(text: str) -> str:
        """Right, `yes`, while the document bears the words that are unknown in its prompt."""
        letter = [token for token in text.split() if token in BEARS][-1]
        return "yes" if text.count("<unk>") < BEARS[letter] else "no"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda self, *rest: found(self, *rest), raising=True
    )
    monkeypatch.setattr(storing, "BLOCK_DOCUMENTS", 5)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attacked")
    (root / "tasks").mkdir()
    save_task(root, "plain")
    save_task(root, "shots", num_fewshot=2)
    save_task(root, "column", doc_to_text="letter")
    save_task(root, "labels", doc_to_text="hello {{letter}}", doc_to_target="hello", description="")
    rows = "".join(json.dumps({"letter": each, "answer": "yes"}) + "\n" for each in LETTERS)
    for split in ("train", "test"):
        (root / "tasks" / f"{split}.jsonl").write_text(rows)
    save_chatty(root / "m", 5, max_position_embeddings=128)
    return root


def save_task(root: Path, name: str, **fields: Any) -> None:
    (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **TASK, **fields}))


def config_of(world: Path, *attacks: dict[str, Any], tasks: Sequence[str] = ("plain",)) -> Any:
    return EvaluateConfig(
        models={"m": world / "m"},
        tasks=[{"include_path": world / "tasks", "names": list(tasks)}],
        attacks=[{"attack": "deepwordbug", "task": tasks[0], **each} for each in attacks],
    )


def test_scores_and_drops_are_those_of_the_known_model(
    world: Path,
    tmp_path: Path,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(world, {}, {"attack": "stresstest"}, {"words": 1, "name": "one"})
    found = evaluate(config, tmp_path / "out", executor="local")
    own, attacks = found["models"]["m"]["tasks"], found["models"]["m"]["attacks"]
    bears = np.array([BEARS[each] for each in LETTERS])
    for name, unknown in (("plain", 0), ("plain+deepwordbug", 3), ("one", 1)):
        assert own[name]["contains"]["value"] == pytest.approx(np.mean(bears > unknown))
        if name == "plain":
            continue
        before, after = (bears > 0).astype(float), (bears > unknown).astype(float)
        m, a = before.mean(), after.mean()
        line = attacks[name]["drops"]["contains"]
        parts = 100 * (a / m**2 * before - after / m)
        assert line["drop_rate"] == pytest.approx(100 * (m - a) / m)
        assert line["stderr"] == pytest.approx(parts.std(ddof=1) / math.sqrt(len(parts)))
        assert len(attacks[name]["changed"]) == unknown
        assert attacks[name]["unattacked"] == m and attacks[name]["attacked"] == a
    assert own["plain+stresstest"]["contains"]["value"] == 0  # of five unknown words
    assert attacks["plain+stresstest"]["drops"]["contains"]["drop_rate"] == 100
    assert len(attacks["plain+stresstest"]["queries"]) == 3
    asked = len(fake.prompts)
    assert evaluate(config, tmp_path / "out", executor="local") == found
    assert len(fake.prompts) == asked  # all is in the store
    rows = {(row.task, row.metric): row.value for row in Evaluation(tmp_path / "out").drops()}
    assert rows["plain+stresstest", "contains drop_rate"] == 100
    assert poise(monkeypatch, "results", tmp_path / "out", "--task", "one") == 0
    assert "one contains drop_rate" in " ".join(capsys.readouterr().out.split())


def test_a_killed_attack_goes_on_where_it_was(world: Path, tmp_path: Path, fake: Fake) -> None:
    config = config_of(world, {"ranking": "delete"})
    whole = evaluate(config, tmp_path / "whole", executor="local")
    asked, calls = len(fake.prompts), fake.calls
    attack = whole["models"]["m"]["attacks"]["plain+deepwordbug"]
    assert asked == 12 * (1 + len(attack["queries"]))  # the unattacked prompt is asked once
    fake.prompts.clear()
    fake.calls, fake.kill_at = 0, calls // 2
    with pytest.raises(KilledError):
        evaluate(config, tmp_path / "cut", executor="local")
    fake.kill_at = math.inf
    assert evaluate(config, tmp_path / "cut", executor="local") == whole
    assert len(fake.prompts) == asked
    for path in (tmp_path / "whole").rglob("*.parquet"):
        other = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()
    for about in (tmp_path / "cut" / "samples" / "plain%2Bdeepwordbug").glob("*/cell.json"):
        if "attack" in json.loads(about.read_text()):  # the cell itself, not a prompt it asked
            for block in about.parent.glob("*.parquet"):
                block.unlink()
        else:
            (about.parent / "00002.parquet").write_bytes(b"PAR1")
    fake.prompts.clear()
    assert evaluate(config, tmp_path / "cut", executor="local") == whole
    assert len(fake.prompts) == 2 * len(attack["queries"])  # the damaged blocks of two documents
    fake.prompts.clear()
    assert evaluate(config, tmp_path / "cut", executor="local", force=True) == whole
    assert len(fake.prompts) == asked


def test_an_attack_in_an_object_store(world: Path, tmp_path: Path, fake: Fake) -> None:
    """It asks what it asks in a folder, and a run after it nothing; --force forgets all."""
    config, address = config_of(world, {"words": 1}), "memory://attacked/out"
    found = evaluate(config, address, executor="local")
    asked = len(fake.prompts)
    assert evaluate(config, address, executor="local") == found
    assert len(fake.prompts) == asked
    assert evaluate(config, tmp_path / "out", executor="local") == found
    assert len(fake.prompts) == 2 * asked
    for task in ("plain", "plain+deepwordbug"):
        there, here = (Evaluation(each).samples("m", task) for each in (address, tmp_path / "out"))
        assert there == here
    assert evaluate(config, address, executor="local", force=True) == found
    assert len(fake.prompts) == 3 * asked


def test_a_prompt_that_no_disk_keeps_fails_its_cell(
    world: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, name = storing.Store.write, "plain+deepwordbug"

    def half(self: storing.Store, cell: storing.Cell, block: int, *rest: Any) -> None:
        plain(self, cell, block, *rest)
        if cell.task == name and block == 1:
            path = tmp_path / "out" / self.name(cell, block)
            path.write_bytes(path.read_bytes()[:-50])

    monkeypatch.setattr(storing.Store, "write", half)
    summary = evaluate(config_of(world, {"words": 1}), tmp_path / "out", executor="local")
    [failed] = summary["failed"]
    assert failed["task"] == name and failed["reason"].startswith("DamagedBlockError: ")
    assert list(summary["models"]["m"]["tasks"]) == ["plain"]


def test_examples_labels_and_rows_stay(world: Path, tmp_path: Path, fake: Fake) -> None:
    config = config_of(world, {"words": 9}, tasks=["shots"])
    evaluate(config, tmp_path, executor="local")
    found = Evaluation(tmp_path)
    pairs = zip(found.samples("m", "shots"), found.samples("m", "shots+deepwordbug"), strict=True)
    for plain, attacked in pairs:
        before, after = (each.requests[0]["context"] for each in (plain, attacked))
        assert before.split(" z ")[1:-1] == after.split(" z ")[1:-1] != []
        assert before.split(" z ")[-1] != after.split(" z ")[-1]
        assert before[-4:] == after[-4:]
        assert (plain.id, plain.cluster) == (attacked.id, attacked.cluster)
        assert plain.requests[0]["seed"] == attacked.requests[0]["seed"]


def test_settings_are_part_of_a_tasks_identity(world: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    table.write_text('{"e": ["3"]}')
    prints = []
    for fields in (
        {}, {"seed": 2}, {"words": 2}, {"protect": ["sorry"]}, {"source": str(table)}, {}
    ):  # fmt: skip
        plain, attacked = open_tasks(config_of(world, fields))
        prints.append(attacked.fingerprint)
    assert len(set(prints)) == 5 and prints[0] == prints[-1] and plain.fingerprint not in prints
    assert isinstance(attacked, AttackedTask) and attacked.remark == "12 attacked prompts at most"


def test_a_plan_counts_the_queries(world: Path, tmp_path: Path) -> None:
    plan = plan_evaluation(config_of(world, {"max_queries": 5}), tmp_path / "none")
    plain, attacked = estimates(plan)
    assert attacked.tokens == 5 * plain.tokens and attacked.task == "plain+deepwordbug"
    assert not (tmp_path / "none").exists()


def test_a_drop_of_nothing_is_not_defined() -> None:
    values = {"unattacked": {"1": 0.0, "2": 0.0}, "attacked": {"1": 1.0, "2": 0.0}}
    found = drop(means(make_sheet("t", values, {})))
    assert found.rate is None and (found.unattacked, found.attacked) == (0, 0.5)
    swapped = {"unattacked": values["attacked"], "attacked": {"1": 1.0, "2": 1.0}}
    assert drop(means(make_sheet("t", swapped, {}))).rate.value == -100  # type: ignore


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({"task": "plane"}, "plain", "attacks.0.task: found 'plane'; allowed: plain"),
        ({}, "column", "the prompt of column is the column 'letter' of its rows"),
        ({}, "labels", r"attacks.0: labels\+deepwordbug: no word of the prompt may be changed"),
        ({"metric": "acc"}, "plain", "metric: found 'acc'; allowed: contains"),
        ({"name": "plain"}, "plain", "attacks.0: plain is there twice"),
        ({"source": "no.json"}, "plain", "source: no.json: No such file"),
    ],
)
def test_bad_attacks(world: Path, fields: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_tasks(config_of(world, fields, tasks=[task]))


def test_attacks_need_templates(world: Path) -> None:
    with pytest.raises(ValueError, match=r"attacks: a tasks.yaml has no templates"):
        EvaluateConfig(
            models={"m": world},
            tasks=world / "t.yaml",
            attacks=[{"attack": "stresstest", "task": "t"}],
        )
