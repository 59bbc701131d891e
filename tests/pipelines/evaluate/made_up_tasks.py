"""Made-up tasks of lm-evaluation-harness with local data: all kinds of requests, metrics, filters.

Their texts are words of the tests' tokenizer. Columns: `words`, `next`, `choices`, `label`, ...
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from pipelines.evaluate.harness import Task, load_tasks
from pipelines.evaluate.store import BLOCK_DOCUMENTS

SEED = 77
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"train": 12, "validation": 10, "test": 14}

_SPLITS = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {split: f"{split}.jsonl" for split in SIZES}},
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
}
_TEXT = {"doc_to_text": "{{words}}", "doc_to_target": "{{next}}"}
_GREEDY = {"until": [" z", "q"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
_MEAN = {"aggregation": "mean", "higher_is_better": True}


def _metrics(**aggregations: str) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": each, "higher_is_better": True}
        for name, each in aggregations.items()
    ]


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{words}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
}
_GENERATE = {"output_type": "generate_until", **_TEXT, "generation_kwargs": _GREEDY}

TASKS: dict[str, dict[str, Any]] = {
    "choice": _CHOICE | {"metric_list": _metrics(acc="mean", acc_norm="mean", acc_bytes="mean")},
    "choice_shots": {
        **_CHOICE,
        "description": "yes no {{label}} .\n",
        "num_fewshot": 2,
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "{{truth}}",
        "metric_list": _metrics(
            acc="mean",
            f1="f1",
            mcc="matthews_corrcoef",
            brier_score="brier_score",
            acc_mutual_info="mean",
            exact_match="mean",
        ),
    },
    "choice_inputs": {
        "output_type": "multiple_choice",
        "doc_to_text": "label",
        "doc_to_choice": "{{[words + ' ' + choices[0], words + ' ' + choices[1]]}}",
        "doc_to_target": "{{next}}",
        "num_fewshot": 1,
        "metric_list": _metrics(acc="mean"),
    },
    "choice_targets": _CHOICE
    | {"doc_to_target": "{{labels}}", "metric_list": _metrics(acc="mean")},
    "choice_delimiter": {
        **_CHOICE,
        "target_delimiter": "\n",
        "fewshot_delimiter": " . ",
        "gen_prefix": "sorry",
        "num_fewshot": 3,
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n", "doc_to_text": "hello {{words}}"},
        "metric_list": _metrics(acc="mean", acc_norm="mean"),
    },
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{words}}",
        "doc_to_target": " {{next}}",
        "num_fewshot": 1,
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **_MEAN},
        ],
    },
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "long"},
    "generation": {
        **_GENERATE,
        "metric_list": [
            {"metric": "exact_match", **_MEAN, "ignore_case": True, "regexes_to_ignore": [","]}
        ],
        "filter_list": [
            {
                "name": "first",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-m])"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "last",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z])", "group_select": -1},
                    {"function": "uppercase"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "generation_votes": {
        **_GENERATE,
        "repeats": 3,
        "metric_list": [{"metric": "exact_match", **_MEAN}],
        "filter_list": [
            {
                "name": "vote",
                "filter": [
                    {"function": "take_first_k", "k": 3},
                    {"function": "remove_whitespace"},
                    {"function": "majority_vote"},
                    {"function": "take_first"},
                ],
            }
        ],
    },
    "generation_corpus": {
        **_GENERATE,
        "doc_to_target": "{{long[:40]}}",
        "num_fewshot": 2,
        "metric_list": _metrics(bleu="bleu", chrf="chrf", ter="ter"),
    },
    "generation_targets": {
        **_GENERATE,
        "doc_to_target": "choices",
        "filter_list": [
            {
                "name": "one",
                "filter": [
                    {"function": "regex", "regex_pattern": "([a-z])"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
    "generation_prefix": {
        **_GENERATE,
        "gen_prefix": "hello {{next}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
    "one_split": {
        **_CHOICE,
        "training_split": None,
        "test_split": None,
        "num_fewshot": 2,
        "metric_list": _metrics(acc="mean"),
        "metadata": {"version": 3, "cluster": "topic"},
    },
    "too_long": {
        **_GENERATE,
        "doc_to_text": "{{long}} {{words}}",
        "metric_list": _metrics(chrf="chrf"),
    },
    "too_long_choice": {
        **_CHOICE,
        "doc_to_text": "{{long}} {{words}}",
        "metric_list": _metrics(acc="mean", brier_score="brier_score"),
    },
}


def rows(split: str) -> list[dict[str, Any]]:
    """The documents of a split."""
    random = Random(split)
    found = []
    for number in range(SIZES[split]):
        letters = random.sample(LETTERS, 8)
        found.append(
            {
                "words": " ".join(letters[:4]),
                "next": letters[4],
                "choices": letters[4:8],
                "label": random.randrange(2),
                "labels": sorted(random.sample(range(4), 2)),
                "truth": random.randrange(2),
                "long": " ".join(random.choices(LETTERS, k=150 if number % 3 == 0 else 30)),
                "topic": f"topic {number // 2}",
            }
        )
    return found


def save_tasks(folder: Path, **more: dict[str, Any]) -> Path:
    """Write the tasks and their data, or other fields in place of some of theirs."""
    folder.mkdir(parents=True)
    for split in SIZES:
        lines = [json.dumps(row) + "\n" for row in rows(split)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    for name, fields in {**TASKS, **more}.items():
        save_task(folder, name, **fields)
    return folder


def save_task(folder: Path, name: str, **fields: Any) -> Path:
    """Write one task on the same data."""
    values = {"task": name, **_SPLITS, "metadata": {"version": 1.0}, **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def load(folder: Path, name: str, split: Any = "test", **options: Any) -> Task:
    """One task of a folder, with fields of its set and arguments of `load_tasks`."""
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


def save_letters(folder: Path, num_blocks: int) -> Path:
    """Write a `tasks.yaml` with a task of so many blocks of a store, the last not full."""
    rows = [
        {"id": str(i), "prompt": f"{chr(97 + i % 26)} b", "cluster": str(i)}
        for i in range(num_blocks * BLOCK_DOCUMENTS - 9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "words",
        "prompt": "text",
        "grader": {"name": "ends_with", "text": "a"},
        "files": {"test": "rows.jsonl"},
    }
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump([task]))
    return path
