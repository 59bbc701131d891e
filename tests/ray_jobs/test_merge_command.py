"""`poise merge` as a user runs it: exit status, one line on stderr, nothing left behind.

Oracle: statuses and lines written by hand, and the folder as it was before.
"""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny_llama(folder / f"m{i}", seed=i) for i in range(2)]


def write_config(folder: Path, paths: list[Path], **fields: object) -> Path:
    config = {
        "merge_method": "ties",
        "base_model": str(paths[0]),
        "models": [{"model": str(paths[1])}],
        "parameters": {"density": 0.5},
    }
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(config | fields))
    return file


@pytest.mark.ray
def test_merge_and_again(
    models: list[Path], tmp_path: Path, ray_cluster: None, monkeypatch, capfd
) -> None:
    file, out = write_config(tmp_path, models), tmp_path / "out"
    assert poise(monkeypatch, "merge", file, out, "seed=3") == 0
    assert f"merged model: {out}" in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained(out)
    changed = (out / "model.safetensors").stat().st_mtime_ns
    assert poise(monkeypatch, "merge", file, out, "seed=3") == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == changed
    assert poise(monkeypatch, "merge", file, out) == 2
    assert "exists already; choose another output, or --force" in capfd.readouterr().err
    assert poise(monkeypatch, "merge", file, "--out", out, "--force") == 0
    assert (out / "model.safetensors").stat().st_mtime_ns != changed


def test_plan_writes_nothing(models: list[Path], tmp_path: Path, monkeypatch, capfd) -> None:
    file = write_config(tmp_path, models)
    assert poise(monkeypatch, "merge", file, "--plan") == 0
    shown = capfd.readouterr().out
    size = sum((path / "model.safetensors").stat().st_size for path in models)
    assert "ties" in shown
    for field in ("to be written", "work items", "memory", "time            about"):
        assert field in shown
    assert f"{size // 1000}"[:2] in shown.replace(",", "")
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"density": 1.5}}, "density: found 1.5; allowed: above 0 and at most 1"),
        ({"parameters": {"dense": 1}}, "dense: unknown parameter; allowed: weight, density"),
        ({"merge_method": "tise"}, "merge_method: found 'tise'; allowed: "),
        ({"models": [{"model": "none"}]}, "model none: no such directory"),
    ],
)
def test_bad_input(
    models: list[Path], tmp_path: Path, monkeypatch, capfd, fields: dict, message: str
) -> None:
    file = write_config(tmp_path, models, **fields)
    assert poise(monkeypatch, "merge", file, tmp_path / "out") == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("poise: ")
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def damage_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file)


def damage_shape(file: Path) -> None:
    save_file(load_file(file) | {"model.norm.weight": torch.ones(5)}, file)


def damage_length(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def damage_kind(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, "model.norm.weight: holds NaN or Inf; allowed: finite numbers"),
        (damage_shape, "model.norm.weight: found shape [5]; allowed: [32], as in "),
        (damage_length, "model.safetensors: truncated: "),
        (damage_kind, "found pytorch_model.bin, a pickle, which can run code; allowed: "),
    ],
)
def test_damaged_model(models, tmp_path: Path, monkeypatch, capfd, damage, message: str) -> None:
    broken = save_tiny_llama(tmp_path / "broken", seed=5)
    damage(broken / "model.safetensors")
    file = write_config(tmp_path, [models[0], broken], executor="local")
    before = sorted(tmp_path.iterdir())
    assert poise(monkeypatch, "merge", file, tmp_path / "out") == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("poise: ")
    assert message in line
    assert sorted(tmp_path.iterdir()) == before
