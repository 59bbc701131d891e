"""Parsers and templates. Oracle: replies written by hand; the invariants of a preference."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.judges.parsers import Reply, parser_of
from pipelines.judges.templates import load_templates

RATING = {"kind": "rating"}
JSON = {"kind": "rating", "json_field": "grade"}
CHOICE = {"kind": "choice"}
LABEL = {"kind": "label", "labels": {"unsafe": "unsafe", "safe": "safe"}}
AFTER = {**LABEL, "after": "[RESULT]"}
FIRST = {**LABEL, "precedence": True}


@pytest.mark.parametrize(
    ("parser", "text", "value"),
    [
        (RATING, "because [1]. Rating: [[7]]", 7.0),
        (RATING, "Rating: [6.5]", 6.5),
        (RATING, "[[11]]", None),
        (RATING, "[[0]]", None),
        (RATING, "[[-3]] or [[ 4 ]]", None),
        (RATING, "7", None),
        (RATING, "[[seven]]", None),
        (JSON, '```json\n{"grade": 3, "why": "x"}\n```', 3.0),
        (JSON, '{"grade": 3', None),
        (JSON, '{"grade": true}', None),
        (JSON, '{"grade": "3"}', None),
        (JSON, '[{"grade": 3}]', 3.0),
        (JSON, "{}", None),
        (CHOICE, "so [[A]] it is", 1.0),
        (CHOICE, "[[B]]", 0.0),
        (CHOICE, "[[C]]", 0.5),
        (CHOICE, "[[A]] or [[B]]", None),
        (CHOICE, "A", None),
        (LABEL, "It is Unsafe.", "unsafe"),
        (LABEL, "safe", "safe"),
        (LABEL, "unsafely", None),
        (LABEL, "safe, not unsafe", None),
        (FIRST, "safe, not unsafe", "unsafe"),
        (AFTER, "unsafe words [RESULT] safe", "safe"),
        (AFTER, "safe", None),
        (AFTER, "[RESULT] unsafe [RESULT]", None),
        ({**LABEL, "json_field": "v"}, '{"v": "safe", "w": "unsafe"}', "safe"),
        ({**LABEL, "json_field": "v"}, '{"v": 1}', None),
    ],
)
def test_what_words_mean(parser: dict[str, Any], text: str, value: float | str | None) -> None:
    assert parser_of(parser, "here").read(Reply(text)) == value


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_probabilities_of_two_tokens(first: float, second: float) -> None:
    parser = parser_of({"kind": "probabilities", "tokens": ["m", "M"]}, "here")
    other = parser_of({"kind": "probabilities", "tokens": ["M", "m"]}, "here")
    reply = Reply("m", {"m": first, "M": second, "x": -0.1})
    one, two = parser.read(reply), other.read(reply)
    assert isinstance(one, float) and isinstance(two, float)
    assert one + two == pytest.approx(1.0)
    assert one == pytest.approx(math.exp(first) / (math.exp(first) + math.exp(second)))


def test_a_token_that_is_not_among_the_best() -> None:
    parser = parser_of({"kind": "probabilities", "tokens": ["m", "M"]}, "here")
    assert parser.read(Reply("m", {"m": -0.1})) == 1.0
    assert parser.read(Reply("M", {"M": -0.1})) == pytest.approx(0.0, abs=1e-300)
    assert parser.read(Reply("m", {"x": -0.1})) is None
    assert parser.read(Reply("m")) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "rating", "low": 1}, "here: low: unknown field"),
        ({"kind": "rating", "lowest": 9, "highest": 2}, "lowest, highest: must be in this order"),
        ({"kind": "label", "labels": {"a": "b"}}, "here: labels:"),
        ({"kind": "probabilities", "tokens": ["a"]}, "here: tokens"),
        (None, "here: kind: found None; allowed: rating, choice, label, probabilities"),
    ],
)
def test_a_parser_that_cannot_be(values: Any, said: str) -> None:
    with pytest.raises(InputError) as error:
        parser_of(values, "here")
    assert said in str(error.value)


def test_fastchats_and_chatml_files(tmp_path: Path) -> None:
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    path = tmp_path / "judge_prompts.jsonl"
    rows = [
        {"name": name, "system_prompt": f"S {name}", "prompt_template": "{answer_2}"}
        for name in names
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ways = {
        way: {"answer_2"}
        for way in ("first", "first_with_reference", "second", "second_with_reference")
    }
    found = load_templates(str(path), "mt_bench", ways, None)
    assert found["second_with_reference"][0].system == "S single-math-v1-multi-turn"
    assert found["first"][1].read(Reply("[[3]]")) == 3.0
    text = tmp_path / "t.txt"
    text.write_text("<|im_start|>system\nbe fair\n<|im_end|>\n<|im_start|>user\n{a}?\n<|im_end|>")
    template, _ = load_templates(str(text), "x", {"prompt": {"a"}}, RATING)["prompt"]
    assert template.filled({"a": "{b}"}) == [
        {"role": "system", "content": "be fair"},
        {"role": "user", "content": "{b}?"},
    ]
    with pytest.raises(InputError, match="No such file"):
        load_templates(str(tmp_path / "none.txt"), "x", {"prompt": {"a"}}, RATING)
    with pytest.raises(InputError, match=r"is not installed|No such file"):
        load_templates("alpaca-eval:none.txt", "x", {"prompt": {"a"}}, RATING)
