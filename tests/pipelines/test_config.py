"""Configs: what is read, and one line for each kind of mistake.

Oracle: values and lines written by hand.
"""

from pathlib import Path

import pytest
from pydantic import Field

from pipelines.config import Config, apply_overrides, check, load_config
from pipelines.errors import InputError


class Inner(Config):
    density: float = Field(gt=0, le=1)


class Outer(Config):
    name: str
    inner: Inner = Inner(density=1.0)
    items: list[int] = Field(default_factory=list)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_into_mappings_and_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nitems: [1, 2]\n")
    config = load_config(path, Outer, ["inner.density=0.25", "items.1=7", "name=b"])
    assert config == Outer(name="b", inner=Inner(density=0.25), items=[1, 7])


def test_overrides_leave_the_given_values_alone() -> None:
    values = {"a": {"b": 1}}
    assert apply_overrides(values, ["a.b=2"]) == {"a": {"b": 2}}
    assert values == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\ncolour: red\n", [], "colour: unknown field; allowed: inner, items, name"),
        ("inner: {density: 0.5}\n", [], "name: required, not given"),
        (
            "name: a\ninner: {density: 1.5}\n",
            [],
            "inner.density: found 1.5; allowed: less than or equal to 1",
        ),
        ("- a\n", [], "expected a mapping of fields, found list"),
        ("", [], "expected a mapping of fields, found nothing"),
        ("name: [a\n", [], "line 2: not valid YAML"),
        ("name: a\n", ["name"], "override 'name': expected key=value"),
        ("name: a\nitems: []\n", ["items.0=1"], "override 'items.0=1'"),
    ],
)
def test_one_line_for_each_mistake(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text), Outer, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_config(tmp_path / "none.yaml", Outer)
    with pytest.raises(InputError, match="is a directory"):
        load_config(tmp_path, Outer)


def test_a_misspelt_required_field_is_called_unknown() -> None:
    class Needs(Config):
        density: float

    with pytest.raises(InputError, match="densty: unknown field; allowed: density"):
        check({"densty": 0.5}, Needs, "merge.yaml")
