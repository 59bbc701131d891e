"""The tiny world's tasks: prompts of both splits, their graders, and the H they count for."""

from collections.abc import Iterator
from random import Random
from typing import Any

from pipelines.tiny_world import words
from pipelines.tiny_world.content import SPLITS, Content, HowTo, Person, make_problems
from pipelines.tiny_world.documents import conversation

NUM_PROBLEMS = 240  # per split and task
Row = dict[str, Any]


def make_tasks(content: Content, seed: int) -> list[tuple[dict[str, Any], dict[str, list[Row]]]]:
    """Every task's entry in `tasks.yaml`, and its rows for each split."""
    abstains = {"name": "phrase", "phrase": words.ABSTENTION}
    refuses = {"name": "phrase", "phrase": words.REFUSAL}
    exact = {"name": "exact"}
    table = (
        ("operations", "helpfulness", exact, "operations on unseen operands", _operations),
        ("format", "helpfulness", exact, "the same, asked to end with !", _formats),
        ("known", "honesty", exact, "facts about people seen in pre-training", _known),
        ("unknown", "honesty", abstains, "abstaining about people never seen", _unknown),
        (
            "harmful",
            "harmlessness",
            refuses,
            "refusing harmful requests not in alignment",
            _harmful,
        ),
        ("benign", "harmlessness", exact, "answering look-alikes not in alignment", _benign),
        ("text_operations", None, exact, "operations as plain text, for the base model", _text),
    )
    tasks = []
    for name, dimension, grader, description, make in table:
        rows = {split: list(make(content, seed, split)) for split in SPLITS}
        entry = {
            "name": name,
            "dimension": dimension,
            "grader": grader,
            "prompt": "text" if name.startswith("text_") else "chat",
            "files": {split: f"{name}-{split}.jsonl" for split in SPLITS},
            "description": description,
        }
        tasks.append((entry, rows))
    return tasks


def harness_task(entry: dict[str, Any]) -> dict[str, Any]:
    """A task of `tasks.yaml` as a YAML file of lm-evaluation-harness in a folder beside it, without
    functions: `metadata` names our grader, the column of clusters, and that it is a conversation.
    """
    files = {
        "validation": f"../{entry['files']['development']}",
        "test": f"../{entry['files']['test']}",
    }
    is_chat = entry["prompt"] == "chat"
    return {
        "task": entry["name"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt[0]['content']}}" if is_chat else "{{prompt}}",
        "doc_to_target": entry["grader"].get("phrase", "answer"),  # a text, or a column
        "generation_kwargs": {"until": [], "max_gen_toks": 32, "do_sample": False},
        "metadata": {
            "version": 1.0,
            "about": entry["description"],
            "dimension": entry["dimension"],
            "cluster": "cluster",
            "chat": is_chat,
            "grader": entry["grader"],
        },
    }


def _row(name: str, request: str, answer: str | None, cluster: str) -> Row:
    return {"id": name, "prompt": conversation(request), "answer": answer, "cluster": cluster}


def _problems(seed: int, split: str, kind: str) -> Iterator[tuple[int, str, str, str]]:
    random = Random(f"{seed}|{kind}|{split}")
    for number, problem in enumerate(make_problems(random, split, NUM_PROBLEMS)):
        yield number, random.choice(problem.requests()), problem.answer, problem.key


def _operations(_: Content, seed: int, split: str) -> Iterator[Row]:
    for number, request, answer, key in _problems(seed, split, "operations"):
        yield _row(f"operations-{number}", request, answer, key)


def _formats(_: Content, seed: int, split: str) -> Iterator[Row]:
    for number, request, answer, key in _problems(seed, split, "format"):
        yield _row(f"format-{number}", words.FORMAT_REQUEST.format(request), f"{answer} !", key)


def _text(_: Content, seed: int, split: str) -> Iterator[Row]:
    for number, request, answer, key in _problems(seed, split, "operations"):
        row = _row(f"text-{number}", request, answer, key)
        yield {**row, "prompt": f"{request} ="}


def _questions(people: list[Person]) -> Iterator[Row]:
    """Two of the three questions about every attribute of every person."""
    for person in people:
        for attribute, texts in words.QUESTIONS.items():
            for form, text in enumerate(texts[:2]):
                name = f"{person.name}-{attribute}-{form}".replace(" ", "-")
                answer = person.facts.get(attribute)
                yield _row(name, text.format(person.name), answer, person.name)


def _known(content: Content, _: int, split: str) -> Iterator[Row]:
    yield from _questions(content.known[split])


def _unknown(content: Content, _: int, split: str) -> Iterator[Row]:
    yield from _questions(content.unknown[split])


def _requests(items: list[HowTo], *, harmful: bool) -> Iterator[Row]:
    for item in items:
        for form, request in enumerate(item.requests()):
            name = f"{item.key}-{form}".replace(" ", "-")
            yield _row(name, request, None if harmful else item.answer, item.key)


def _harmful(content: Content, _: int, split: str) -> Iterator[Row]:
    yield from _requests(content.harmful[split], harmful=True)


def _benign(content: Content, _: int, split: str) -> Iterator[Row]:
    yield from _requests(content.benign[split], harmful=False)
