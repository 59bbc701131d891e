"""Several merges in one file, and tensors that not every model has.

Oracle: the same steps as merges of their own, and values written by hand.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from operators.merging import merge_tensor
from operators.merging.mixup import draw_mixup_lambda
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, load_merge_config, merge, plan_merge
from pipelines.merge.worker import MergeWorker
from tests.pipelines.merge.conftest import Family, make_family, save_weights, weights_of


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_an_intermediate_is_used_unrounded(tmp_path: Path, method: str) -> None:
    """In bf16 checkpoints, whose rounding would show."""
    family = make_family(tmp_path / "inputs", torch.bfloat16)
    parameters = {"density": 0.4} if method == "ties" else {}
    first = family.config(method, parameters=parameters, models=family.config()["models"][:2])
    config = {
        "merges": {"first": first},
        "merge_method": "task_arithmetic",
        "models": [{"model": "first"}, {"model": str(family.models[2])}],
        "base_model": str(family.base),
        "parameters": {"weight": 0.5},
        "out_dtype": "float32",
    }
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "out"]
    base, models = weights_of(family.base), [weights_of(path) for path in family.models]
    for name, values in weights_of(out).items():
        origin = None if method == "linear" else base[name]
        one = merge_tensor(
            method, [model[name] for model in models[:2]], origin, name=name, **parameters
        )
        expected = merge_tensor(
            "task_arithmetic", [one, models[2][name]], base[name], name=name, weight=0.5
        )
        assert torch.equal(values, expected), name


def test_steps_do_not_show_in_a_chain(family: Family, tmp_path: Path, monkeypatch) -> None:
    first = family.config("ties", parameters={"density": 0.4})
    second = family.config("della", parameters={"density": 0.5, "epsilon": 0.2})
    config = family.config("model_stock") | {
        "merges": {"first": first, "second": second},
        "models": [{"model": "first"}, {"model": "second"}],
    }
    whole = weights_of(merge(MergeConfig.model_validate(config), tmp_path / "whole"))
    monkeypatch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 96)
    monkeypatch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 300)
    out = merge(MergeConfig.model_validate(config), tmp_path / "steps")
    assert all(torch.equal(values, whole[name]) for name, values in weights_of(out).items())


def test_a_plan_travels_to_other_processes(own_family: Family, tmp_path: Path) -> None:
    """With everything that a source can be: a named merge, and rows by token."""
    first = own_family.config("ties", parameters={"density": 0.4})
    config = own_family.config("linear", tokenizer="union") | {
        "merges": {"first": first},
        "models": [{"model": "first"}, {"model": str(own_family.models[0])}],
    }
    plan = plan_merge(MergeConfig.model_validate(config))
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder, own in zip(folders, (plan, pickle.loads(pickle.dumps(plan))), strict=True):
        folder.mkdir()
        own.layout.create(folder)
        worker = MergeWorker(own, folder)
        for item in range(len(own.items)):
            worker.run(item)
    here, there = (weights_of(folder) for folder in folders)
    assert all(torch.equal(values, there[name]) for name, values in here.items())


def test_a_file_of_several_documents(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    a, b, c = family.models
    written = tmp_path / "soup"
    file.write_text(
        f"name: soup\nmerge_method: linear\nout: {written}\n"
        f"models: [{{model: {a}}}, {{model: {b}}}]\n"
        f"---\nmerge_method: linear\nmodels: [{{model: soup}}, {{model: {c}}}]\n"
    )
    config = load_merge_config(file, ["merges.soup.parameters.weight=2", "seed=4"])
    assert config.seed == 4
    assert config.merges["soup"].parameters == {"weight": 2}
    out = merge(config, tmp_path / "out")
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == [str(a), str(b), str(c)]
    result = weights_of(out)
    one, two, three = (weights_of(path) for path in family.models)
    for name, values in result.items():
        torch.testing.assert_close(values, (one[name] + two[name]) / 4 + three[name] / 2)
    for name, values in weights_of(written).items():
        torch.testing.assert_close(values, (one[name] + two[name]) / 2)
    file.write_text(file.read_text().replace("name: soup\n", ""))
    with pytest.raises(InputError, match="document 1: name: required, not given"):
        load_merge_config(file)


def test_a_named_merge_that_nobody_uses(family: Family) -> None:
    config = family.config() | {"merges": {"idle": family.config()}}
    with pytest.raises(ValueError, match="merges: idle: has no effect: no model refers to it"):
        MergeConfig.model_validate(config)


def test_allow_nonfinite(own_family: Family, tmp_path: Path) -> None:
    norm = "model.norm.weight"
    model = own_family.models[0]
    values = weights_of(model)[norm]
    values[5] = float("inf")
    save_weights(model, weights_of(model) | {norm: values})
    config = MergeConfig.model_validate(own_family.config(allow_nonfinite=True))
    result = weights_of(merge(config, tmp_path / "out"))[norm]
    assert result[5] == float("inf")
    assert torch.isfinite(result).sum() == 31


def test_what_a_named_merge_draws_is_recorded(family: Family, tmp_path: Path) -> None:
    mixed = family.config("m3_average", models=family.config()["models"][:2])
    mixed["parameters"] = {"mixup_alpha": 0.5}
    config = family.config("linear", models=[{"model": "mixed"}, {"model": str(family.models[2])}])
    out = merge(MergeConfig.model_validate(config | {"merges": {"mixed": mixed}}), tmp_path / "out")
    drawn = json.loads((out / "poise.json").read_text())["drawn"]
    assert drawn == {"mixed.mixup_lambda": draw_mixup_lambda(0.5, 0)}


def test_a_named_merge_is_held_to_the_files_budget(family: Family, tmp_path: Path) -> None:
    first = family.config("tsvm")
    config = family.config("linear", models=[{"model": "first"}], merges={"first": first})
    with pytest.raises(ValueError, match="merges: first: num_workers: is one for the whole file"):
        MergeConfig.model_validate(config | {"merges": {"first": first | {"num_workers": 1}}})
    if not torch.cuda.is_available():
        on_gpu = MergeConfig.model_validate(
            config | {"merges": {"first": first | {"device": "cuda"}}}
        )
        with pytest.raises(InputError, match="device: found cuda; allowed: cpu"):
            merge(on_gpu, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
