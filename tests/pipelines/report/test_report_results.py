"""Reading results.json: what is right, and one line for each thing that is wrong.

Oracle: the made-up run, with one field changed at a time, and lines written by hand.
"""

import json

import pytest

from pipelines.errors import InputError
from pipelines.report import load_results


def test_reads_what_is_there(make_run, content) -> None:
    results = load_results(make_run("a", content))
    assert results.seed == 7
    assert results.sft_name == "sft"
    assert results.sft.honesty.value == 60.0
    assert list(results.of_kind("merge")) == ["linear", "task_arithmetic", "expo"]
    assert results.models["expo"].chosen == {"alpha": 0.3}


def test_a_field_of_a_later_program_does_no_harm(make_run, content) -> None:
    content["models"]["sft"]["margins"] = {"refusal": 1.5}
    assert load_results(make_run("a", content)).sft.kind == "sft"


def change(content, path, value) -> None:
    """Put `value` at a dotted path (model names hold no dots here); `...` removes the field."""
    *parents, last = path.split("|")
    for key in parents:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema: found 2; allowed: 1"),
        ("schema", ..., "schema: required, not given"),
        ("split", "development", "split: found 'development'; allowed: 'test'"),
        ("models|sft|honesty", ..., "models.sft.honesty: required, not given"),
        ("models|sft|honesty|value", 101.0, "models.sft.honesty.value: found 101.0"),
        ("models|sft|honesty|value", "60", "models.sft.honesty.value: found '60'"),
        ("models|sft|honesty|stderr", -1.0, "models.sft.honesty.stderr: found -1.0"),
        ("models|sft|honesty|stderr", float("nan"), "models.sft.honesty.stderr: found nan"),
        ("models|sft|tasks|known|n", 0, "models.sft.tasks.known.n: found 0"),
        ("models|sft|kind", "tuned", "models.sft.kind: found 'tuned'"),
        ("models|sft|config", "/etc/passwd", "models.sft.config: found '/etc/passwd': expected"),
        ("models|sft|path", "../x", "models.sft.path: found '../x': expected a path relative"),
        ("timings_s|world", -1.0, "timings_s.world: found -1.0"),
        ("models|sft|kind", "base", "models: found 0 of kind 'sft', expected exactly one"),
        ("best_merge", "sft", "best_merge: found 'sft', allowed: ['linear', 'task_arithmetic'"),
        ("models|expo|parents", ["gone"], "models.expo.parents: found 'gone', which is no model"),
        ("models|expo|tasks|known", ..., "models.expo.tasks: 'known' is measured for some models"),
        ("models|expo|average|value", 90.0, "models.expo.average.value: found 90.00, but the mean"),
    ],
)
def test_one_line_with_file_and_field(make_run, content, path, value, message) -> None:
    change(content, path, value)
    folder = make_run("a", content)
    with pytest.raises(InputError) as error:
        load_results(folder)
    text = str(error.value)
    assert text.startswith(f"{folder / 'results.json'}: {message}")
    assert "\n" not in text


def test_a_name_with_control_characters_is_refused(make_run, content) -> None:
    content["models"]["\x1b[31mred"] = content["models"].pop("expo")
    with pytest.raises(InputError, match="String should match pattern"):
        load_results(make_run("a", content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1,\n oops', "line 2: not valid JSON"),
        ("[1]", "expected a mapping of fields, found list"),
        ("null", "expected a mapping of fields, found nothing"),
    ],
)
def test_no_results_in_the_file(make_run, text, message) -> None:
    with pytest.raises(InputError, match=message):
        load_results(make_run("a", text))


def test_no_results_at_all(make_run, content, tmp_path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no results\.json"):
        load_results(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        load_results(make_run("a", content) / "results.json")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load_results(tmp_path)


def test_an_average_rounded_to_a_decimal_is_accepted(make_run, content) -> None:
    average = content["models"]["expo"]["average"]
    average["value"] = round(average["value"], 1)
    folder = make_run("a", json.dumps(content))
    assert load_results(folder).models["expo"].average.value == 74.0
