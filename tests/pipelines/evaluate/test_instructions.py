"""The grader of checkable instructions. Oracle: made-up checkers; where the real ones are installed
(`pip install if-verifiable`), answers judged by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.evaluate.graders import grade, require_code
from tests.made_up_packages import ifbench_row, importable


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with importable(tmp_path / "packages", monkeypatch):
        yield


def graded(completion: str, row: Any, **parameters: str) -> float:
    return grade("instructions", completion, [json.dumps(row)], parameters)


def test_an_answer_is_right_if_it_follows_all_instructions(made_up: None) -> None:
    row = {**ifbench_row(0), "kwargs": [{"last": "m"}]}
    assert [graded(text, row) for text in ("b c", "z", "break")] == [1.0, 0.0, 0.0]
    require_code("instructions", allow_code=False)


def test_rows_that_cannot_be_checked(made_up: None) -> None:
    row = {"prompt": "a", "instruction_id_list": ["count:sentences"], "kwargs": [{}]}
    with pytest.raises(InputError, match="count:sentences need NLTK's data, which are not here"):
        graded("a", row)
    with pytest.raises(InputError, match="unknown instruction 'x:y' of ifbench"):
        graded("a", {**row, "instruction_id_list": ["x:y"]})
    with pytest.raises(InputError, match="instructions: the answer: prompt: required, not given"):
        graded("a", {"instruction_id_list": ["x"], "kwargs": []})
    with pytest.raises(InputError, match="the answer is not JSON"):
        grade("instructions", "a", ["{"], {})


def test_the_package_is_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluate.graders.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        require_code("instructions", allow_code=False)
    expected = "grader 'instructions': needs the package if-verifiable: pip install if-verifiable"
    assert str(error.value) == expected


def test_the_real_checkers() -> None:
    pytest.importorskip("if_verifiable")
    names = ["keywords:existence", "change_case:english_lowercase"]
    kwargs: list[dict[str, Any]] = [{"keywords": ["river", "stone"]}, {}]
    row = {"prompt": "Write.", "instruction_id_list": names, "kwargs": kwargs}
    texts = ["the river wears the stone away", "The river wears the stone away", "the river"]
    assert [graded(text, row, benchmark="ifeval") for text in texts] == [1.0, 0.0, 0.0]
