"""`poise diff` and `poise verify` on small models.

Oracle: norms and cosines in float64, and a tensor that is changed by hand.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pipelines.merge import MergeConfig, merge
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny_llama(folder / f"m{i}", seed=i) for i in range(3)]


@pytest.fixture
def merged(models: list[Path], tmp_path: Path) -> Path:
    config = {"merge_method": "dare_ties", "base_model": str(models[0]), "seed": 5}
    config["models"] = [{"model": str(path)} for path in models[1:]]
    config["parameters"] = {"density": 0.5}
    return merge(MergeConfig.model_validate(config), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "num_models", "parameters"),
    [
        ("nuslerp", 2, {"weight": 1}),
        ("multislerp", 2, {}),
        ("karcher", 3, {}),
        ("nearswap", 1, {"t": 0.01}),
        ("arcee_fusion", 1, {}),
        ("sce", 2, {"select_topk": 0.5}),
    ],
)
def test_methods_that_mergekits_files_name(
    method: str, num_models: int, parameters, models: list[Path], tmp_path: Path, monkeypatch
) -> None:
    """From a file to a model that can be verified, by the command line."""
    config: dict[str, object] = {"merge_method": method, "parameters": parameters}
    config["models"] = [{"model": str(path)} for path in models[-num_models:]]
    if num_models < 3:
        config["base_model"] = str(models[0])
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    place = [tmp_path / "merge.yaml", tmp_path / "out"]
    assert poise(monkeypatch, "merge", *place, "executor=local") == 0  # whoever has started Ray
    assert poise(monkeypatch, "verify", tmp_path / "out") == 0
    assert poise(monkeypatch, "methods", method) == 0


def test_diff(models: list[Path], monkeypatch, capfd) -> None:
    a, b, base = models[1], models[2], models[0]
    assert poise(monkeypatch, "diff", a, b, "--base", base, "--json") == 0
    found = {each["name"]: each for each in json.loads(capfd.readouterr().out)}
    name = "model.layers.0.mlp.up_proj.weight"
    x, y, origin = (load_file(path / "model.safetensors")[name].double() for path in (a, b, base))
    x, y = (x - origin).flatten(), (y - origin).flatten()
    assert found[name]["norms"] == pytest.approx([float(x.norm()), float(y.norm())])
    assert found[name]["delta"] == pytest.approx(float((x - y).norm()))
    assert found[name]["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)))
    assert found[name]["conflict"] == pytest.approx(float((x * y < 0).double().mean()))
    assert found["all"]["num_elements"] == sum(
        tensor.numel() for tensor in load_file(a / "model.safetensors").values()
    )
    assert poise(monkeypatch, "diff", a, a) == 0
    shown = capfd.readouterr().out
    assert "0.00%" in shown
    assert "+1.0000" in shown
    assert poise(monkeypatch, "diff", a, "none") == 2
    assert capfd.readouterr().err == "poise: model none: no such directory\n"


def test_verify(merged: Path, models: list[Path], monkeypatch, capfd) -> None:
    before = sorted(merged.parent.iterdir())
    assert poise(monkeypatch, "verify", merged, "--again", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found == {
        "output": "same",
        "changed": [],
        "inputs": {str(path): "same" for path in [*models[1:], models[0]]},
        "again": True,
    }
    assert sorted(merged.parent.iterdir()) == before


def test_verify_finds_what_changed(merged: Path, monkeypatch, capfd) -> None:
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, file)
    assert poise(monkeypatch, "verify", merged) == 2
    captured = capfd.readouterr()
    assert captured.out.startswith("changed")
    assert captured.err == (
        f"poise: {merged}: its weights are not those that its record describes\n"
    )
    (merged / "poise.json").unlink()
    assert poise(monkeypatch, "verify", merged) == 2
    assert "no poise.json; allowed: the output of poise merge" in capfd.readouterr().err
