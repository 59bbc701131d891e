"""Programs as answers: rows shaped as HumanEval's and MBPP's, run in a sandbox, and pass@k.

A row has `prompt`, `test` (which defines `check`) and `entry_point` as in HumanEval and HumanEval+,
or `test` or `test_list`, with `test_imports`, as in MBPP and MBPP+.
"""

import ast
import builtins
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from pipelines.config import Config, check
from pipelines.errors import InputError
from pipelines.sandbox.runner import Limits, Program, run_program

_FENCE = re.compile(r"```[ \t]*(?:python|Python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class ProgramRow(Config):
    """What a data set says of one problem; further fields are not read."""

    model_config = Config.model_config | {"extra": "ignore"}
    prompt: str = Field(
        "", description="the beginning of the program, where `entry_point` is given"
    )
    entry_point: str | None = None
    test: str | None = None
    test_list: list[str] = Field([])
    test_imports: list[str] = Field([])
    test_setup_code: str = ""

    @model_validator(mode="after")
    def _whole(self) -> "ProgramRow":
        if self.test is None and not self.test_list:
            raise ValueError("found neither test nor test_list; one is required")
        if self.entry_point is not None and not (self.prompt and self.test):
            raise ValueError("entry_point: needs prompt and test beside it, as in HumanEval")
        return self


def program_of(row: ProgramRow, completion: str) -> Program:
    """The program that a completion makes of a problem, with its tests.

    The code is the completion's fenced block that defines the function, else its first one, else
    the whole text. With an `entry_point`, code that does not define it goes on from the prompt.

    Raises:
        InputError: the row's own code is no Python, or its tests call no function.
    """
    before = "\n".join([*row.test_imports, row.test_setup_code])
    tests = row.test if row.test is not None else "\n".join(row.test_list)
    if row.entry_point is None:
        functions = _unknown_names(before, tests)
        if not functions:
            raise InputError("programs: the row's tests call no function of the program")
        return Program(_code_of(completion, functions[0]), tests, functions, before)
    name = row.entry_point
    before = f"{before}\n{row.prompt}"
    _names_in(before, "prompt")
    code = _code_of(completion, name)
    if _defines(code, name):
        solution = f"{_preamble(row.prompt, name)}\n{code}"
    else:
        solution = row.prompt + code
    return Program(solution, f"{tests}\ncheck({name})", [name], before)


def _code_of(completion: str, name: str) -> str:
    """The code of an answer in words."""
    blocks = _FENCE.findall(completion)
    defining = [block for block in blocks if _defines(block, name)]
    return str((defining or blocks or [completion])[0])


def _defines(code: str, name: str) -> bool:
    pattern = rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*="
    return re.search(pattern, code, re.MULTILINE) is not None


def _preamble(prompt: str, name: str) -> str:
    """What stands in a prompt before the function: imports and helpers."""
    found = re.search(rf"^def[ \t]+{re.escape(name)}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else ""


def _names_in(code: str, what: str) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"programs: the row's {what} is not Python: {error}") from None


def _unknown_names(before: str, tests: str) -> list[str]:
    """The names that tests read and nobody defines, in their order: the program's."""
    used: dict[str, None] = {}
    known = set(dir(builtins))
    for node in (*_names_in(before, "test_imports"), *_names_in(tests, "test")):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                known.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
    return [name for name in used if name not in known]


def programs(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion's program passes the tests of the row, which is the answer, as JSON.

    Raises:
        InputError: the answer is no such row, or this machine gives no sandbox.
    """
    try:
        values = json.loads(answers[0])
    except ValueError:
        raise InputError("programs: the answer is not JSON; expected the data set's row") from None
    row = check(values, ProgramRow, "programs: the answer")
    return run_program(program_of(row, completion), Limits(**parameters)).passed


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k programs passes, from n of which `correct` did, without bias:
    `1 - C(n - correct, k) / C(n, k)` (Chen et al. 2021, equation 1).

    Raises:
        ValueError: not `0 <= correct <= n` and `1 <= k <= n`.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@k: found n={n}, correct={correct}, k={k}; expected k <= n")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
