"""Configs: what is read, and one line for each kind of mistake.

Oracle: values and lines written by hand.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from pipelines.config import Config, NamedIn, apply_overrides, check, load_config, parse_yaml
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


def test_a_key_that_is_taken_over_may_be_there_again() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


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
        ("name: a\nname: b\n", [], "line 2: not valid YAML: found the key 'name' twice"),
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


def test_an_old_name_beside_the_new_one() -> None:
    """It cannot be said which one is meant."""

    class Renamed(Config):
        section: ClassVar = "part."
        old_fields: ClassVar = {"before": "after"}
        after: int = 0

    assert check({"before": 3}, Renamed, "x.yaml").after == 3
    with pytest.raises(
        InputError, match=r"^x.yaml: part.before: is called part.after now; found b"
    ):
        check({"before": 3, "after": 3}, Renamed, "x.yaml")


def test_names_come_from_a_table() -> None:
    """Also those that were put into it later; an error reads as pydantic's own of a Literal."""
    table = {"one": 1, "two": 2}

    class Named(Config):
        name: Annotated[str, NamedIn(table)] = "one"

    class Literally(Config):
        name: Literal["one", "two"] = "one"

    for value in ("three", 3, ["one"]):
        lines = []
        for model in (Named, Literally):
            with pytest.raises(InputError) as error:
                check({"name": value}, model, "x.yaml")
            lines.append(str(error.value))
        assert lines[0] == lines[1]
    table["three"] = 3
    assert check({"name": "three"}, Named, "x.yaml").name == "three"
    assert Named.model_json_schema()["properties"]["name"]["enum"] == ["one", "two", "three"]
