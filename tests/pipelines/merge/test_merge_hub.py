"""Merges of models on the hub.

Oracle: the merge of the same models in folders.
"""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from pipelines.checkpoints.hub import folder_of
from pipelines.config import check
from pipelines.errors import InputError
from pipelines.extract import ExtractConfig, extract
from pipelines.merge import MergeConfig, load_merge_config, merge, plan_merge
from pipelines.merge.executors import _Actor
from pipelines.merge.verify import verify
from pipelines.provenance import read_record
from tests.hub_stub import Stub
from tests.pipelines.merge.conftest import Family
from tests.ray_jobs.command_line import poise

NAMES = ("org/one", "org/two", "org/three")


@pytest.fixture
def commits(hub: Stub, family: Family) -> dict[str, str]:
    """The family on the hub, with the commits."""
    found = dict(zip(NAMES, family.models, strict=True)) | {"org/base": family.base}
    return {name: hub.add(name, path) for name, path in found.items()}


def config_of(names: dict[str, str] | None = None, **fields: object) -> MergeConfig:
    """A merge by TIES, as a published recipe has it."""
    names = names or {}
    values = {
        "merge_method": "ties",
        "base_model": names.get("org/base", "org/base"),
        "models": [{"model": names.get(name, name)} for name in NAMES],
        "parameters": {"density": 0.4},
    }
    return check(values | fields, MergeConfig, "merge")


def test_the_result_is_that_of_folders_and_the_record_names_commits(
    commits: dict[str, str], family: Family, tmp_path: Path
) -> None:
    out = Path(merge(config_of(), tmp_path / "hub"))
    paths = dict(zip(NAMES, map(str, family.models), strict=True)) | {"org/base": str(family.base)}
    same = read_record(Path(merge(config_of(paths), tmp_path / "folders")))
    record = read_record(out)
    assert record is not None and same is not None
    assert (record["weights"], record["companions"]) == (same["weights"], same["companions"])
    pinned = {name: f"{name}@{commit}" for name, commit in commits.items()}
    assert record["config"]["base_model"] == pinned["org/base"]
    assert [each["model"] for each in record["config"]["models"]] == [pinned[n] for n in NAMES]
    assert record["inputs"].keys() == set(pinned.values())
    assert {each["id"]: each["commit"] for each in record["hub"]} == commits
    assert "hub" not in same
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["org/base", *NAMES]
    assert constants.HF_HUB_CACHE not in (out / "README.md").read_text()


def test_it_is_finished_verified_and_made_again_at_its_commit(
    hub: Stub, commits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(merge(config_of(), tmp_path / "out"))
    before = (out / "poise.json").stat().st_mtime_ns
    assert Path(merge(config_of(), out)) == out
    assert (out / "poise.json").stat().st_mtime_ns == before
    hub.models["org/one"]["main"] = {"config.json": b"{}"} | hub.models["org/two"]["main"]
    with pytest.raises(InputError, match="exists already"):  # main is another commit now
        merge(config_of(), out)
    hub.models["org/one"]["old"] = dict(hub.files("org/two", "main"))
    again = verify(out, again=True)
    assert (again.output, again.again, set(again.inputs.values())) == ("same", True, {"same"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert set(verify(out).inputs.values()) == {"missing"}


def test_all_forms_of_a_name_are_the_same_model(
    hub: Stub, commits: dict[str, str], tmp_path: Path
) -> None:
    short = plan_merge(config_of())
    forms = {
        "org/one": "hf://org/one",
        "org/two": f"org/two@{commits['org/two']}",
        "org/three": {"model": {"path": "org/three", "revision": "main"}},
        "org/base": "org/base@main",
    }
    assert plan_merge(config_of(forms)).config == short.config  # type: ignore[arg-type]


def test_a_tokenizer_and_a_template_come_without_weights(
    hub: Stub, commits: dict[str, str], family: Family, tmp_path: Path
) -> None:
    commit = hub.add("org/chat", family.base, **{"chat_template.jinja": b"{{ 'of chat' }}"})
    hub.asked.clear()
    out = Path(merge(config_of(tokenizer="org/chat", chat_template="org/chat"), tmp_path / "out"))
    assert (out / "chat_template.jinja").read_text() == "{{ 'of chat' }}"
    record = json.loads((out / "poise.json").read_text())
    assert (
        record["config"]["tokenizer"] == record["config"]["chat_template"] == f"org/chat@{commit}"
    )
    weights = [p for _, p, _, _ in hub.asked if "org--chat" in p or "org/chat/resolve" in p]
    assert weights and not any("safetensors" in path for path in weights)


def test_an_adapter_finds_its_base_on_the_hub(
    hub: Stub, commits: dict[str, str], family: Family, tmp_path: Path
) -> None:
    settings = {"base": "org/base", "tuned": "org/one", "rank": 4}
    adapter = extract(check(settings, ExtractConfig, "test"), tmp_path / "adapter")
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/base"
    assert written["revision"] == commits["org/base"]
    lora = hub.add("org/lora", adapter)
    values = {"merge_method": "linear", "models": [{"model": "org/lora"}]}
    values["parameters"] = {"weight": 1.0}
    record = read_record(Path(merge(check(values, MergeConfig, "test"), tmp_path / "merged")))
    assert record is not None
    whole = f"org/base@{commits['org/base']}+org/lora@{lora}"
    assert record["config"]["models"] == [{"model": whole}]
    front = yaml.safe_load((tmp_path / "merged" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["org/base", "org/lora"]
    values["models"] = [{"model": f"{family.base}+{adapter}"}]
    same = read_record(Path(merge(check(values, MergeConfig, "test"), tmp_path / "folders")))
    assert same is not None and record["weights"] == same["weights"]


def test_named_merges_are_pinned_too(commits: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(
        "merges:\n  soup: {merge_method: linear, models: [{model: org/one}, {model: org/two}],"
        " parameters: {weight: 1}}\n"
        "merge_method: slerp\nbase_model: org/base\nmodels: [{model: soup}]\nparameters: {t: 0.5}\n"
    )
    plan = plan_merge(load_merge_config(file))
    assert [each.model for each in plan.config.merges["soup"].models] == [
        f"{name}@{commits[name]}" for name in NAMES[:2]
    ]
    assert plan.config.merged_models == ["soup"]


def test_a_worker_on_another_node_fetches_for_itself(
    hub: Stub, commits: dict[str, str], tmp_path: Path
) -> None:
    """Its disk lacks the driver's cache, which stands for the node's own, empty one."""
    plan = plan_merge(config_of())
    plan.layout.create(tmp_path)
    cache = Path(constants.HF_HUB_CACHE)
    cache.rename(tmp_path / "elsewhere")
    arguments = (plan, str(tmp_path), {}, str(tmp_path))
    told = _Actor(*arguments, True)({"item": 0})
    assert "HF_HUB_OFFLINE" in told["error"] and not told["digests"]
    assert not _Actor(*arguments, False)({"item": 0})["error"]
    assert folder_of("org/one").is_relative_to(cache)


def test_the_command_merges_a_recipe_and_diffs(
    commits: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config_of().model_dump(mode="json", exclude_unset=True)))
    assert poise(monkeypatch, "merge", file, tmp_path / "out", "executor=local") == 0
    assert "org/one@" in capsys.readouterr().err
    assert poise(monkeypatch, "diff", "org/one", "org/two", "--base", "org/base", "--json") == 0
    assert json.loads(capsys.readouterr().out)[-1]["name"] == "all"
    assert poise(monkeypatch, "diff", "org/one", "org/none") == 2
    assert "poise: model org/none: no such directory here, and" in capsys.readouterr().err


def test_python_files_come_if_the_user_brings_them(
    hub: Stub, commits: dict[str, str], family: Family
) -> None:
    settings = json.loads((family.base / "config.json").read_text())
    named = json.dumps(settings | {"auto_map": {"AutoConfig": "own.Config"}}).encode()
    hub.add("org/coded", family.base, **{"config.json": named, "own.py": b"raise SystemExit"})
    config = config_of({"org/base": "org/coded"})
    [line] = [each for each in plan_merge(config).notices() if "auto_map" in each]
    assert line.endswith("; hf download org/coded --include '*.py' brings it")
    assert "own.py" not in hub.fetched()
    (folder_of("org/coded") / "own.py").write_bytes(b"raise SystemExit")
    plan = plan_merge(config)
    assert not any("auto_map" in each for each in plan.notices())
    assert "own.py" in plan.files.copied
