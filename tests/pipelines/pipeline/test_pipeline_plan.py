"""Plans of pipelines: order from paths and names, and every mistake in a line.

Oracle: orders and lines written by hand.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.errors import InputError
from tests.pipelines.pipeline.toy_stages import Toys


def after(folder: Path, stages: dict[str, Any], **fields: Any) -> dict[str, tuple[str, ...]]:
    plan = Toys().plan(folder, stages, **fields)
    return {name: stage.after for name, stage in plan.stages.items()}


def reading(*paths: object) -> dict[str, Any]:
    return {"config": {"reads": list(map(str, paths))}}


def test_a_path_and_a_name_are_the_same_dependency(tmp_path: Path) -> None:
    """As are files in an output, both parts of MODEL+ADAPTER, and a path with dots."""
    runs = tmp_path / "runs"
    stages = {
        "path": reading(runs / "a"),
        "name": reading("${stages.a}"),
        "inside": reading("${stages.a}/merge.yaml"),
        "both": reading("${stages.name}+${stages.path}"),
        "dots": reading(runs / "x" / ".." / "a"),
        "last": {"after": ["dots"]},
        "a": {"out": "a"},
        "ab": {"out": "ab"},
        "alike": reading(runs / "ab"),
    }
    assert after(tmp_path, stages) == {
        "path": ("a",),
        "name": ("a",),
        "inside": ("a",),
        "both": ("path", "name"),
        "dots": ("a",),
        "last": ("dots",),
        "a": (),
        "ab": (),
        "alike": ("ab",),
    }


def test_relative_paths_are_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = after(tmp_path, {"b": reading("runs/a"), "a": {}}, storage="runs")
    assert found == {"b": ("a",), "a": ()}


def test_a_file_says_what_it_reads_and_overrides_say_more(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"reads": ["${stages.a}"], "text": "x"}))
    more = {"config": str(tmp_path / "b.yaml"), "overrides": {"text": "${stages.c}"}}
    plan = Toys().plan(tmp_path, {"a": {}, "b": more, "c": {}})
    assert plan.stages["b"].after == ("a", "c")
    assert plan.stages["b"].config.text == str(tmp_path / "runs" / "c")
    assert [stage.name for stage in plan.ordered()][-1] == "b"


def test_a_config_may_be_another_stages_result(tmp_path: Path) -> None:
    made = {"config": "${stages.a}/b.yaml", "overrides": {"text": "${stages.c}"}}
    plan = Toys().plan(tmp_path, {"a": {}, "b": made, "c": {}})
    assert plan.stages["b"].after == ("a", "c")
    assert not plan.stages["b"].is_known
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "b.yaml").write_text("need: 2")
    assert plan.stages["b"].config.need == 2


def test_the_nearest_stages_are_those_not_before_another(tmp_path: Path) -> None:
    plan = Toys().plan(tmp_path, {"a": {}, "b": reading("${stages.a}"), "c": {"after": ["a", "b"]}})
    assert plan.nearest(plan.stages["c"]) == ["b"]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"a": {"kind": "tyo"}}, "stages.a.kind: found 'tyo'; allowed: toy, noted, store; did you me"),
    ({"a": {"knid": "toy"}}, "stages.a.knid: unknown field; allowed: after, config, expected_s"),
    ({"a/b": {}}, "stages: found {'a/b': {'kind': 'toy'}}: stage name 'a/b': must be a plain fil"),
    (
        {"merge": {}, "b": reading("${stages.mrge}")},
        "stages.b.reads.0: found stage 'mrge'; allowed: merge, b; did you mean merge?",
    ),
    ({"a": {}, "b": {"after": ["c"]}}, "stages.b.after: found stage 'c'; allowed: a, b"),
    (
        {"b": {"config": "${stages.z}/merge.yaml"}},
        "stages.b.config: found stage 'z'; allowed: b",
    ),
    (
        {"a": reading("${stages.b}"), "b": {"after": ["c"]}, "c": reading("${stages.a}")},
        "stages: a cycle, in which each waits for the one before it: a -> c -> b -> a",
    ),
    ({"a": {"out": "x"}, "b": {"out": "y/../x"}}, "stages.a.out: found {runs}/x, which is or li"),
    ({"a": {"out": "x"}, "b": {"out": "x/y"}}, "stages.b.out: found {runs}/x/y, which is or lie"),
    ({"a": {"config": {"txet": "b"}}}, "stages.a: txet: unknown field; allowed: fails, group, n"),
    ({"a": {"config": "none.yaml"}}, "none.yaml: no such file"),
    ({"a": reading("/nowhere/rows")}, "stages.a: reads.0: /nowhere/rows: no such file, and no st"),
    ({"a": {"overrides": {"text.x": 1}}, "b": {}}, "stages.a: text: found {'x': 1}; allowed: a v"),
    ({"a": {"out": "s3://b/c"}}, "stages.a.out: found the address s3://b/c; allowed: a folder (s"),
    ({}, "stages: found {}: Dictionary should have at least 1 item"),
]


@pytest.mark.parametrize(("stages", "line"), MISTAKES)
def test_mistakes_are_lines(tmp_path: Path, stages: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        Toys().plan(tmp_path, stages)
    assert line.replace("{runs}", str(tmp_path / "runs")) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
