"""The tiny world's files: the same bytes from a seed, disjoint splits, exact answers.

Oracle: a second build, the rows' own texts, and what evaluation and alignment read of them.
"""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config import load_yaml
from pipelines.evaluate.graders import grade
from pipelines.evaluate.tasks import load_rows, load_tasks
from pipelines.fingerprint import fingerprint_directory
from pipelines.tiny_world import build_world, words
from pipelines.tiny_world.content import make_content, make_problem, part_of
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.data.tokens import tokenize
from pipelines.train.loop import train_worker
from pipelines.train.row_kinds import ROW_KINDS
from pipelines.train.rows.columns import Reading
from pipelines.train.rows.source import RowSource
from pipelines.train.run import worker_settings

SEED = 7
HEADLINE = ("operations", "format", "known", "unknown", "harmful", "benign")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world") / "world", SEED, "smoke")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    world: Path, tmp_path: Path
) -> None:
    again = build_world(tmp_path / "again", SEED, "smoke")
    other = build_world(tmp_path / "other", SEED + 1, "smoke")
    assert fingerprint_directory(world) == fingerprint_directory(again)
    assert fingerprint_directory(world) != fingerprint_directory(other)


def test_every_headline_task_has_two_hundred_prompts_in_each_split(world: Path) -> None:
    tasks = {task.name: task for task in load_tasks(world / "tasks" / "tasks.yaml")}
    for name in HEADLINE:
        for split in ("development", "test"):
            assert len(load_rows(tasks[name], split)) >= 200, (name, split)


def test_splits_share_no_person_object_or_problem(world: Path) -> None:
    for task in load_tasks(world / "tasks" / "tasks.yaml"):
        clusters = [
            {row.cluster for row in load_rows(task, split)} for split in ("development", "test")
        ]
        assert not clusters[0] & clusters[1], task.name


def test_alignment_sees_none_of_what_is_measured(world: Path) -> None:
    prompts = {
        row["prompt"][0]["content"]
        for row in rows_of(world / "data" / "preferences" / "mixture.jsonl")
    }
    for task in load_tasks(world / "tasks" / "tasks.yaml"):
        for split in ("development", "test"):
            for row in load_rows(task, split):
                if not isinstance(row.prompt, str):
                    assert row.prompt[0]["content"] not in prompts


def test_strangers_are_in_no_fact_and_no_training_problem_is_measured(world: Path) -> None:
    content = make_content(SEED, 150)
    known = {person.name for part in content.known.values() for person in part}
    unknown = {person.name for part in content.unknown.values() for person in part}
    assert not known & unknown
    random = Random(0)
    parts = {part_of(make_problem(random)) for _ in range(200)}
    assert parts == {"training", "development", "test"}


def test_align_learns_the_answers_of_sft_alone(world: Path) -> None:
    """The demo's SFT reads these rows: what it learns of one is the answer and the end token."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model", local_files_only=True)
    source = RowSource(ROW_KINDS["texts"], Reading())
    for row in rows_of(world / "data" / "sft.jsonl")[:200]:
        (example,) = source.examples(*source.rows(row))
        (sequence,) = tokenize(example, tokenizer).sequences
        marked = zip(sequence.ids, sequence.response, strict=True)
        learned = [token for token, mark in marked if mark]
        assert tokenizer.decode(learned).strip() == row["messages"][1]["content"] + "</s>"


def test_the_base_model_learns_the_text(world: Path, tmp_path: Path, project_root: Path) -> None:
    """The demo's own config, shortened, on some of the text: an ordinary checkpoint."""
    values = load_yaml(project_root / "configs" / "demo" / "align" / "base.yaml")
    texts = pyarrow.parquet.read_table(world / "data" / "pretrain.parquet").slice(0, 3000)
    pyarrow.parquet.write_table(texts, tmp_path / "texts.parquet")
    values |= {"model": world / "model", "data": tmp_path / "texts.parquet", "num_steps": 30}
    config = AlignConfig(**values | {"strategy": "single", "num_workers": 1})
    cache, run = tmp_path / "cache", tmp_path / "run"
    run.mkdir()
    settings = worker_settings(config, plan_alignment(config, cache), run, cache)
    train_worker({"runs": [settings]})
    model = AutoModelForCausalLM.from_pretrained(run / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "model", local_files_only=True)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.chat_template
    rows = texts["text"].to_pylist()
    assert rows[0].startswith("<s> ")
    ids = tokenizer("</s>".join(rows[:10]), return_tensors="pt").input_ids
    chance = math.log(len(tokenizer))
    assert model(input_ids=ids, labels=ids).loss < chance - 0.5


def test_chosen_answers_grade_right_and_rejected_ones_wrong(world: Path) -> None:
    """The graders and the preferences agree on what is good, where both know the request."""
    for row in rows_of(world / "data" / "preferences" / "honest.jsonl"):
        chosen, rejected = (row[key][0]["content"] for key in ("chosen", "rejected"))
        assert words.ABSTENTION in (chosen, rejected)
        grader = {"phrase": words.ABSTENTION}
        assert grade("phrase", chosen, [], grader) != grade("phrase", rejected, [], grader)


def test_the_mixture_is_the_three_together(world: Path) -> None:
    folder = world / "data" / "preferences"
    parts = [rows_of(folder / f"{kind}.jsonl") for kind in ("helpful", "honest", "harmless")]
    key = json.dumps
    assert sorted(map(key, rows_of(folder / "mixture.jsonl"))) == sorted(
        key(row) for part in parts for row in part
    )


def test_the_tokenizer_loads_and_returns_any_text(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model", local_files_only=True)
    assert 470 <= len(tokenizer) <= 520
    for text in ("reverse b d a", "Grüße, 你好 \n\t!", "i do not know ."):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).strip() == text
    chat = [{"role": "user", "content": "reverse b d a"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    pieces = tokenizer.convert_ids_to_tokens(getattr(ids, "input_ids", ids))
    assert pieces[:2] == ["<s>", "<user>"]
    assert pieces[-1] == "<assistant>"
    assert len(pieces) == 7  # every word of the world is one token
