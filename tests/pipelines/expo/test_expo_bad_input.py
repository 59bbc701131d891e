"""What `poise expo` refuses, before anything is written. Oracle: the exact line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.errors import InputError
from pipelines.expo import expo
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.expo.worlds import fields_of, plan_of
from tests.pipelines.rewards.reward_models import HEADS, save_reward_model
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"values": [0.3]}, "values: found 0.3; allowed: two or more different numbers"),
    ({"values": []}, "values: found none; allowed: two or more different numbers"),
    ({"values": [0.1, 0.1]}, "values: found 0.1, 0.1; allowed: two or more different numbers"),
    ({"values": 0.3}, "values: found 0.3: a list of numbers, or low, high and step"),
    (
        {"values": ["a", True]},
        "values: found ['a', True]: a list of numbers, or low, high and step",
    ),
    ({"values": {"low": 0.1, "step": 0.1}}, "values.high: required, not given"),
    (
        {"values": {"low": 0.5, "high": 0.1, "step": 0.1}},
        "values: found low 0.5, high 0.1; allowed: rising",
    ),
    (
        {"values": {"low": 0, "high": 0.5, "step": 0.2}},
        "values: found 0 to 0.5 by 0.2; allowed: a range of whole steps",
    ),
    ({"values": {"low": 0, "high": 1, "step": 0}}, "values.step: found 0; allowed: greater than 0"),
    ({"alphas": [0.1, 0.2]}, "alphas: unknown field; allowed: "),
    (
        {"search": "bracket"},
        "search: bracket: found 4 values; allowed: 12 or more, as of fewer it would measure more",
    ),
    ({"values": [-0.2, 0.5]}, "expo.yaml: alpha: found -0.2; allowed: above 0"),
    (
        {"parameter": "parameters.alhpa"},
        "alhpa: unknown parameter; allowed: alpha",
    ),
    (
        {"parameter": "parameters.densty", "merge": "TIES", "values": [0.1, 0.2]},
        "parameter: found 'parameters.densty'; ties has no parameter densty; allowed: ",
    ),
    (
        {"parameter": "parameters.normalize", "merge": "TIES", "values": [0, 1]},
        "parameter: normalize: is no number; allowed: true, false",
    ),
    (
        {"parameter": "parameters.density", "merge": "TIES", "values": [0, 0.5]},
        "ties.yaml: density: found 0.0; allowed: ",
    ),
    (
        {"parameter": "seed"},
        "parameter: found 'seed'; allowed: the field of one of the method's parameters, as",
    ),
    ({"merge": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ({"reward": "nowhere"}, "nowhere"),
    ({"reward": "THREE"}, f"found 3 labels ({', '.join(HEADS)}); allowed: 1 in a reward model, or"),
    ({"reward": "THREE", "head": "honestly"}, "head: found 'honestly'; allowed: 0 to 2, or"),
    ({"reward": "SFT"}, "found LlamaForCausalLM; allowed: a sequence classification model"),
    ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ({"data": "EMPTY"}, "holds no rows"),
    ({"columns": {"prompt": "question"}}, "has no column 'question'; found: prompt"),
    ({"choose_on": "test"}, "data: has no test split; found: development"),
    (
        {"split": "test"},
        "split: found test, choose_on: development; allowed: development for both, or test for",
    ),
    (
        {"data": {"development": "x.jsonl", "test": "x.jsonl"}},
        "data: development and test: found one path; allowed: other prompts",
    ),
    ({"seed": 3}, "seed: has no effect at temperature 0"),
    ({"decoding": {"temperature": -1}}, "temperature: found -1"),
    ({"decoding": {"temperature": 0, "top_p": 0.5}}, "top_p: has no effect at temperature 0"),
    ({"decoding": {"top_q": 0.5}}, "decoding.top_q: unknown field; allowed: "),
    ({"engine": {"kind": "reward"}}, "engine.kind: found reward; allowed: generate"),
    ({"reward_engine": {"kind": "generate"}}, "kind: found generate; allowed: reward"),
]


@pytest.fixture(scope="module")
def places(expo_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for."""
    root = tmp_path_factory.mktemp("bad")
    names = dict(enumerate(HEADS))
    numbers = {name: number for number, name in names.items()}
    three = save_reward_model(
        root / "three", num_labels=3, id2label=names, label2id=numbers, max_position_embeddings=512
    )
    (root / "empty.jsonl").write_text("")
    return {
        "TIES": str(expo_world / "ties.yaml"),
        "SFT": str(expo_world / "sft"),
        "THREE": str(three),
        "EMPTY": str(root / "empty.jsonl"),
    }


@pytest.mark.parametrize(("changes", "line"), BAD, ids=lambda each: str(each)[:60])
def test_it_is_named_and_nothing_is_written(
    expo_world: Path, places: dict[str, str], changes: dict[str, Any], line: str
) -> None:
    changes = {
        name: places.get(value, value) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError) as error:
        plan_of(expo_world, **changes)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_nearly_right_is_shown(expo_world: Path, places: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"did you mean density\?$"):
        plan_of(expo_world, merge=places["TIES"], parameter="parameters.densty", values=[0.1, 0.2])


def test_an_output_that_is_an_input_or_holds_other_files_is_refused(
    expo_world: Path, tmp_path: Path
) -> None:
    plan = plan_of(expo_world)
    for name in ("dpo", "sft", "reward"):
        with pytest.raises(InputError, match="is or holds an input of the choice; choose another"):
            expo(plan, expo_world / name)
    for names in (["mine"], ["evaluation.json", "store.json"]):  # another's evaluation, too
        out = tmp_path / names[0]
        out.mkdir()
        for name in names:
            (out / name).write_text("kept")
        for force in (False, True):
            with pytest.raises(InputError, match="holds other files; choose a new or empty folder"):
                expo(plan, out, force=force)
        assert {each.name: each.read_text() for each in out.iterdir()} == dict.fromkeys(
            names, "kept"
        )


def test_models_of_other_shapes_are_named(expo_world: Path, tmp_path: Path) -> None:
    save_chatty(tmp_path / "wide", 0, intermediate_size=64)
    merge = yaml.safe_load((expo_world / "expo.yaml").read_text())
    merge["models"] = [{"model": str(tmp_path / "wide")}]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    with pytest.raises(InputError, match="shape"):
        plan_of(expo_world, merge=str(tmp_path / "merge.yaml"), values=[0.1, 0.2])


def test_the_command_ends_with_2_and_shows_a_plan(
    expo_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(yaml.safe_dump(fields_of(expo_world)))
    assert poise(monkeypatch, "expo", "study.yaml", "values=[0.1]") == 2
    assert capsys.readouterr().err.startswith("poise: study.yaml: values: found 0.1; allowed: two")
    assert poise(monkeypatch, "expo", "study.yaml", "--out", "out", "--plan", "--smoke") == 0
    shown = capsys.readouterr().out
    assert "0, 0.5, 1.5, 3; compared with 0" in shown and "8 of development" in shown
    assert "32 at most, up to 16 tokens each" in shown and "parameters.alpha of expo" in shown
    assert [each.name for each in tmp_path.iterdir()] == ["study.yaml"]
