"""Rows of problems as programs, and pass@k. Oracle: answers judged by hand, and brute force over
all choices of k programs.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import yaml

from pipelines.config import check, parse_yaml
from pipelines.errors import InputError
from pipelines.evaluate.graders import grade, require_code
from pipelines.evaluate.harness import Answer, load_tasks
from pipelines.evaluate.programs import ProgramRow, pass_at_k, program_of
from pipelines.evaluate.tasks import Task
from pipelines.sandbox.runner import refusal

# Made up, in the shapes of HumanEval's and MBPP+'s rows.
PROMPT = '''import math

def area(radius):
    return math.pi * radius ** 2

def ring(outer: float, inner: float) -> float:
    """The area between two circles.
    >>> ring(1, 1)
    0.0
    """
'''
CHECK = """
METADATA = {"author": "nobody"}

def check(candidate):
    assert abs(candidate(2, 1) - (area(2) - area(1))) < 1e-9
    assert candidate(1, 1) == 0
"""
HUMAN = {"task_id": "x/0", "prompt": PROMPT, "test": CHECK, "entry_point": "ring"}
MBPP = {
    "task_id": 1,
    "prompt": "Write a function to add the numbers of a list that are larger than a bound.",
    "test_imports": ["import math"],
    "test_list": ["assert add_larger([1, 2, 3], 1) == 5", "assert add_larger([], 0) == 0"],
    "test": "inputs = [[[1, 2, 3], 1], [[], 0]]\nresults = [5, 0]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
    "    assert math.isclose(add_larger(*inp), exp)\n",
}
ADD = "def add_larger(numbers, bound):\n    return sum(n for n in numbers if n > bound)\n"

CASES = [
    (HUMAN, "    return area(outer) - area(inner)\n", 1),
    (HUMAN, "    return area(outer)\n", 0),
    (HUMAN, "So:\n```python\ndef ring(a, b):\n    return area(a) - math.pi * b * b\n```\nEnd.", 1),
    (HUMAN, "```\nx = 1\n```\n```py\ndef ring(a, b):\n    return 0\n```", 0),
    (HUMAN, "    area = lambda r: 0\n    return 0\n", 0),
    (HUMAN, "    return 0\n\ndef area(radius):\n    return 0\n", 0),  # the tests have their own
    (HUMAN, "nonsense", 0),
    (MBPP, ADD, 1),
    (MBPP, f"```python\n{ADD}```", 1),
    (MBPP, ADD.replace(">", ">="), 0),
    ({**MBPP, "test": None}, ADD, 1),
    ({**MBPP, "test": None}, ADD.replace(">", ">="), 0),
    ({**MBPP, "test": None}, "", 0),
]  # fmt: skip


@pytest.mark.parametrize(("row", "completion", "expected"), CASES)
def test_programs(row: dict, completion: str, expected: int) -> None:
    if refusal() is not None:
        pytest.skip(str(refusal()))
    limits = {"seconds": 20}
    assert grade("programs", completion, [json.dumps(row)], limits, allow_code=True) == expected


def test_code_is_found_in_words() -> None:
    row = check(MBPP, ProgramRow, "row")
    for text in (
        f"```python\n{ADD}```",
        f"a\n```\nx\n```\nb\n```py\n{ADD}```",
        f"```python\n{ADD}",
    ):
        assert program_of(row, text).solution == ADD
    assert program_of(row, ADD).functions == ["add_larger"]
    assert program_of(row, "no code").solution == "no code"


def test_nothing_runs_without_leave() -> None:
    message = (
        "grader 'programs': runs programs that a model wrote; allowed only with allow_code: true"
    )
    for act in (
        lambda: require_code("programs", False),
        lambda: grade("programs", "import os", [json.dumps(MBPP)], {}),
        lambda: grade("programs", "import os", ["no row"], {}),
    ):
        with pytest.raises(InputError) as error:
            act()
        assert str(error.value) == message
    require_code("exact", False)
    task = {"name": "t", "grader": {"name": "programs"}, "files": {"test": "x.jsonl"}}
    with pytest.raises(
        InputError, match=r"^t: grader 'programs': runs programs; allowed only where"
    ):
        check(task, Task, "t")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "found neither test nor test_list; one is required"),
        ({"entry_point": "f", "test": "x"}, "entry_point: needs prompt and test beside it"),
        ({"test_list": "x"}, "test_list: found 'x'"),
    ],
)
def test_rows_that_are_refused(row: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^row: {message}"):
        check(row, ProgramRow, "row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"test": "assert 1 == len('x')"}, "programs: the row's tests call no function of the"),
        ({"test": "assert f(1"}, "programs: the row's test is not Python: "),
        ({**HUMAN, "prompt": "def ring("}, "programs: the row's prompt is not Python: "),
    ],
)
def test_rows_without_tests(row: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        program_of(check(row, ProgramRow, "row"), "x")


def test_names_of_the_program_are_those_that_nobody_defines() -> None:
    tests = (
        "import math as m\nfrom os import path\n\n"
        "def helper(a, *b, **c):\n    return [a, b, c, m]\n\n"
        "class Own: pass\ntry:\n    first(helper(1), len, Own, path)\nexcept ValueError as e:\n"
        "    print(e)\nassert (lambda q: q)(second.attribute)\n"
        "with open('x') as file: file\nassert [z for z in range(3)] and first"
    )
    row = check({"test": tests}, ProgramRow, "row")
    assert program_of(row, "x").functions == ["first", "second"]


def test_pass_at_k_is_the_mean_over_all_choices() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                choices = list(itertools.combinations(range(n), k))
                expected = sum(min(each) < correct for each in choices) / len(choices)
                assert pass_at_k(n, correct, k) == pytest.approx(expected)
    assert math.isclose(pass_at_k(200, 20, 1), 0.1)
    for bad in ((1, 2, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected k <= n"):
            pass_at_k(*bad)


def documented_target(project_root: Path) -> str:
    """The line of the docs that makes a row the answer."""
    text = (project_root / "docs" / "evaluation.md").read_text()
    section = text.split("\n## Programs\n")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith("doc_to_target:"))
    return str(parse_yaml(line)["doc_to_target"])


def test_a_task_of_the_library_has_programs(tmp_path: Path, project_root: Path) -> None:
    (tmp_path / "rings.jsonl").write_text(json.dumps(HUMAN) + "\n")
    task = {
        "task": "rings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rings.jsonl", "validation": "rings.jsonl"}},
        "validation_split": "validation",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": documented_target(project_root),
        "generation_kwargs": {"until": ["\ndef"], "max_gen_toks": 64, "do_sample": False},
        "metadata": {"version": 1.0, "grader": {"name": "programs", "seconds": 20}},
    }
    (tmp_path / "rings.yaml").write_text(yaml.safe_dump(task))
    chosen = [{"include_path": str(tmp_path), "names": ["rings"]}]
    with pytest.raises(InputError) as error:
        load_tasks(chosen)
    assert str(error.value) == (
        "task rings: metadata.grader: grader 'programs': runs programs that a model wrote; allowed "
        "only with allow_code: true"
    )
    if refusal() is not None:
        pytest.skip(str(refusal()))
    [loaded] = load_tasks(chosen, allow_code=True)
    for text, expected in (("    return area(outer) - area(inner)\n", 1), ("    return 0\n", 0)):
        [score] = loaded.score(0, 1, [Answer(0, 0, 0, text=text)])
        assert score.metrics == {"programs": expected}
