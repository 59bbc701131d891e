"""Graders of gold words, numbers, languages, calls and schemas. Oracle: answers judged by hand,
Python's json for equality, jsonschema's own draft.
"""

import json
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import check, parse_yaml
from pipelines.errors import InputError
from pipelines.evaluate.graders import GRADERS, _last_number, grade
from pipelines.evaluate.languages import code_of, is_in_language, words_of
from pipelines.evaluate.structured import equal_json, find_calls, parse_json
from pipelines.evaluate.tasks import GraderConfig


@pytest.mark.parametrize(
    ("completion", "answers", "expected"),
    [
        ("The cat sat.", ["a cat"], 1),
        ("the dog", ["a cat"], 0),
        ("in New York", ["New York City"], 2 / 3),
        ("it was Paris, France", ["London", "paris"], 1),
        ("yes", ["yes yes"], 0.5),
        ("5 dollars", ["$5"], 1),
        ("the", ["the"], 1),  # an article that is all there is
        ("", ["word"], 0),
    ],
)
def test_gold_words(completion: str, answers: list[str], expected: float) -> None:
    assert grade("gold_words", completion, answers, {}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 72", "72"),
        ("It is 1,234,567.50 dollars.", "1234567.5"),
        ("so $1,200", "1200"),
        ("he lost -$5.", "-5"),
        ("−3 degrees", "-3"),
        ("5-3", "3"),
        ("x = -2", "-2"),
        ("from 3 to 4 m^2", "4"),
        ("12 m2", "12"),
        ("80%", "80"),
        ("The end: .5", "0.5"),
        ("3.", "3"),
        ("1, 2, 3", "3"),
        ("1,2", "2"),
        ("3/4 of it", "3/4"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"-\dfrac{1}{2}", "-1/2"),
        ("1.5e3 units", "1500"),
        ("10 km/h", "10"),
        ("1/0", None),
        ("no number", None),
        ("9" * 5000, None),
        ("1e999999", "1"),  # a power that long is no number's
    ],
)
def test_the_last_number(text: str, expected: str | None) -> None:
    assert _last_number(text) == (None if expected is None else Fraction(expected))


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_numbers_are_read_as_python_writes_them(number: int, digits: int) -> None:
    value = Fraction(number, 10**digits)
    for written in (f"{number / 10**digits:.{digits}f}", f"{number / 10**digits:,.{digits}f}"):
        assert _last_number(f"The answer is {written} euros.") == Fraction(written.replace(",", ""))
        assert abs(Fraction(written.replace(",", "")) - value) < Fraction(1, 1000)


def test_a_tolerance_is_relative() -> None:
    for completion, tolerance, expected in (
        ("100.1", 0.0011, 1.0), ("100.2", 0.0011, 0.0), ("100.1", 0.0, 0.0), ("100.0", 0.0, 1.0),
    ):  # fmt: skip
        assert grade("last_number", completion, ["100"], {"tolerance": tolerance}) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Das ist gut.", "de", True),
        ("这是很好的。", "zh", True),
        ("这是 very good 的。", "zh", False),
        ("これは良いテストです。コーヒー", "ja", True),
        ("これは良いтестです", "japanese", False),
        ("이것은 좋습니다 100%.", "ko", True),
        ("Это хорошо", "Russian", True),
        ("Это good", "ru", False),
        ("これはいい", "zh", False),
        ("The angle α is 30° or 5 µm.", "en", True),
        ("令 x = 5，见 https://example.com/page 与 `print` 。", "zh", True),
        ("```python\nprint('hello')\n```\n结果是五。", "zh", True),
        ("```python\nprint('hello')\n```", "zh", False),
        ("42", "en", False),
        ("", "en", False),
        ("हिन्दी में लिखा", "hi", True),
        ("مرحبا بكم", "ar", True),
        ("ＦＵＬＬ width", "en", True),
        ("naïve café, don't", "fr", True),
    ],
)
def test_one_language(text: str, language: str, expected: bool) -> None:
    assert is_in_language(text, language) is expected
    assert grade("one_language", text, [language], {}) == expected


def test_words_of_the_question_may_be_repeated() -> None:
    assert grade("one_language", "Python 很好", ["zh", "What is Python?"], {}) == 1
    assert grade("one_language", "Python rocks 很好", ["zh", "What is Python?"], {}) == 0
    assert grade("one_language", "What is Python", ["zh", "What is Python?"], {}) == 0


def test_a_list_of_words_tells_languages_of_one_script_apart() -> None:
    words = {"words": {"de": ["das", "ist", "gut", "größe"]}}
    assert grade("one_language", "Das ist gut", ["de"], words) == 1
    assert grade("one_language", "Das ist GRÖSSE", ["de"], words) == 1
    assert grade("one_language", "Das is good", ["de"], words) == 0
    assert grade("one_language", "Das is good", ["German"], words) == 0
    assert grade("one_language", "This is good", ["en"], words) == 1


def test_words_of_many_scripts() -> None:
    assert list(words_of("Don't, ΑΒ中文 e\u0301te\u0301 x2y")) == [
        "don", "t", "αβ", "中文", "été", "x", "y",
    ]  # fmt: skip
    assert code_of(" German ") == code_of("de") == "de"
    with pytest.raises(InputError, match=r"language: found 'germann'; .*did you mean german\?"):
        code_of("germann")


ARGUMENTS = '{"a": 1, "b": [2, "x  y"]}'
CALL = f'{{"name": "add", "arguments": {ARGUMENTS}}}'


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (CALL, True),
        (f" <tool_call>\n{CALL}\n</tool_call> ", True),
        (f"Sure!\n```json\n{CALL}\n```\nDone.", True),
        (f"[{CALL}]", True),
        ('{"arguments": {"b": [2.0, "x  y"], "a": 1}, "name": "add"}', True),
        (json.dumps({"function": {"name": "add", "arguments": ARGUMENTS}}), True),
        ('{"name": "add", "arguments": {"a": 1, "b": [2, "x y"]}}', False),
        ('{"name": "add", "arguments": {"a": true, "b": [2, "x  y"]}}', False),
        ('{"name": "add", "arguments": {"a": "1", "b": [2, "x  y"]}}', False),
        ('{"name": "sub", "arguments": {"a": 1, "b": [2, "x  y"]}}', False),
        ('{"name": "add", "arguments": {"a": 1, "a": 1, "b": [2, "x  y"]}}', False),
        (f"{CALL} and so on", False),
        (f"[{CALL}, {CALL}]", False),
        ("{'name': 'add'}", False),
        ("[]", False),
        ("[" * 100_000, False),
        ("9" * 5000, False),
        ("", False),
    ],
)  # fmt: skip
def test_function_calls(completion: str, expected: bool) -> None:
    assert grade("function_calls", completion, [CALL], {}) == expected


def test_several_calls_come_in_any_order() -> None:
    other = '{"name": "stop"}'
    tagged = f"<tool_call>{other}</tool_call><tool_call>{CALL}</tool_call>"
    assert grade("function_calls", tagged, [f"[{CALL}, {other}]"], {}) == 1
    assert grade("function_calls", tagged, [CALL, f"[{CALL}, {other}]"], {}) == 1
    assert grade("function_calls", tagged, [f"[{CALL}, {CALL}]"], {}) == 0
    assert find_calls(other) == [("stop", {})]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=2), inner, max_size=3), max_leaves=6)  # fmt: skip


def marked(value: Any) -> Any:
    """A value that Python compares as JSON does: true is not 1."""
    if isinstance(value, dict):
        return {key: marked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [marked(each) for each in value]
    return (type(value) is bool, value)


@given(JSON, JSON)
def test_equality_of_json(first: Any, second: Any) -> None:
    assert equal_json(first, second) == (marked(first) == marked(second))
    assert equal_json(first, parse_json(json.dumps(first)))


SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"n": 1}', True),
        ('```json\n{"n": 1}\n```', True),
        ('{"n": "1"}', False),
        ("{}", False),
        ('{"n": NaN}', False),
        ("n: 1", False),
        ("[" * 100_000, False),
    ],
)
def test_json_schema(completion: str, expected: bool) -> None:
    assert grade("json_schema", completion, [SCHEMA], {}) == expected


def test_the_draft_is_the_schemas_own() -> None:
    """`items` with a list is a tuple in draft 7 and no schema in 2020-12."""
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}]}
    assert grade("json_schema", '["x"]', [json.dumps(old)], {}) == 0
    assert grade("json_schema", '[1, "x"]', [json.dumps(old)], {}) == 1


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("gold_words", "?!", "gold_words: answer '?!': holds no words"),
        ("last_number", "none", "last_number: answer 'none': holds no number"),
        ("one_language", "xx", "language: found 'xx'; allowed: such as en, english or zh"),
        ("function_calls", "add(1)", "function_calls: an answer is no call: Expecting value"),
        ("json_schema", "{", "json_schema: an answer is not JSON: Expecting property name"),
        ("json_schema", '{"type": "numbr"}', "json_schema: an answer is no schema: 'numbr' is not"),
        ("json_schema", '{"$ref": "http://localhost:9/x"}',
         "json_schema: an answer names another schema: "),
    ],
)  # fmt: skip
def test_bad_answers_are_named(name: str, answer: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        grade(name, '{"n": 1}', [answer], {})
    assert str(error.value).startswith(message)


def test_a_row_without_an_answer() -> None:
    with pytest.raises(InputError, match="grader 'last_number': needs an answer in each row"):
        grade("last_number", "1", [], {})


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ({"name": "last_number", "tolerance": -1},
         "t: grader 'last_number': tolerance: found -1; allowed: greater than or equal to 0"),
        ({"name": "last_number", "tol": 1},
         "t: grader 'last_number' takes the parameters ['tolerance'], found ['tol']"),
        ({"name": "one_language", "words": {"xx": ["a"]}},
         "t: grader 'one_language': words: found {'xx': ['a']}: language: found 'xx'; allowed: "),
        ({"name": "phrase"}, "t: grader 'phrase' takes the parameters ['phrase'], found []"),
        ({"name": "phrase", "phrase": 3}, "t: grader 'phrase': phrase: found 3; allowed: "),
        ({"name": "exact", "x": 3}, "t: grader 'exact' takes the parameters [], found ['x']"),
    ],
)  # fmt: skip
def test_parameters_that_are_refused(grader: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        check(grader, GraderConfig, "t")
    assert str(error.value).startswith(message)


def test_the_documented_graders(project_root: Any) -> None:
    """Each grader has its row, and each row's example is right."""
    text = (project_root / "docs" / "evaluation.md").read_text()
    section = text.split("\n## Graders\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.*?)` \|.*\| `(.*?)` \| `(.*?)` \|$", section, re.M)
    apart = {"programs", "instructions"}  # what they need is not on every machine
    assert {parse_yaml(config)["name"] for config, *_ in rows} == set(GRADERS) - apart
    assert all(f"name: {name}" in text for name in apart)
    for config, completion, answers in rows:
        grader = check(parse_yaml(config), GraderConfig, config)
        assert grade(grader.name, completion, parse_yaml(answers), grader.parameters) == 1, config
