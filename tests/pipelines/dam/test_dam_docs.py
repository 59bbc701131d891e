"""docs/dam.md: its configs and commands, in their order, by the command line: the first training on
Ray, the second one in this process.

Oracle: the mean of two files by hand, and the coefficients' own mean and signs.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic.fields import FieldInfo
from safetensors.torch import load_file

from pipelines.dam import DamConfig
from pipelines.merge.coefficients import mean_of_files
from tests.pipelines.dam.conftest import make_experts, train_here
from tests.ray_jobs.command_line import poise

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "dam.md").read_text()
BLOCKS = re.findall(r"```(yaml)?\n(.*?)```", TEXT, re.S)


def test_every_field_is_in_the_table() -> None:
    section = TEXT.split("## The config")[1].split("| loss |")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.M)
    found = {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    fields: dict[str, FieldInfo] = DamConfig.model_fields
    assert found == fields.keys()


@pytest.mark.slow
def test_from_three_models_to_a_look_at_their_coefficients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, ray_cluster: None
) -> None:
    experts = make_experts(tmp_path / "made")
    experts.base.rename(tmp_path / "base")
    third = tmp_path / "chat"
    for place, name in enumerate(("math", "code")):
        experts.models[place].rename(tmp_path / name)
        experts.data[place].rename(tmp_path / f"{name}.jsonl")
    third.mkdir()
    for file in (tmp_path / "math").iterdir():
        (third / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat.jsonl").write_bytes((tmp_path / "code.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind:
            [file] = re.findall(r"^# (.*)\n", text)
            Path(file).write_text(text)
            continue
        for line in text.strip().splitlines():
            if "seed=1" in line:
                monkeypatch.setattr("pipelines.dam.run.run_workers", train_here)
            assert poise(monkeypatch, *shlex.split(line)[1:]) == 0, line
    # Of each model: 240 columns in each of two layers, and 32 of the head.
    assert "coefficients    1,536" in capfd.readouterr().out
    assert Path("coefficients.png").read_bytes().startswith(b"\x89PNG")

    files = [f"{name}/coefficients/dam.safetensors" for name in ("merged", "merged-1")]
    one, two = (load_file(file) for file in files)
    assert any((one[name] != two[name]).any() for name in one)  # another order of rows
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (mean_of_files(files).tensors[name] * 2 - one[name] - two[name]).abs().max() < 1e-6
    record = json.loads(Path("averaged/poise.json").read_text())
    assert list(record["coefficients"]) == files
    assert yaml.safe_load(Path("mean.yaml").read_text())["coefficients"] == files

    assert poise(monkeypatch, "diff", "--coefficients", files[0], "--json") == 0
    looks = json.loads(capfd.readouterr().out)
    own = [each for each in looks if each["tensor"] == name]
    assert [each["expert"] for each in own] == ["math", "code", "chat"]
    for each, values in zip(own, one[name], strict=True):
        assert each["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert each["deviation"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)
        assert each["negative"] == (values < 0).double().mean().item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A, B: give two models, or --coefficients FILE"),
        (("a", "--coefficients", "x"), "--coefficients: found with A, B or --base; allowed: alone"),
        (("a", "b", "--plot", "x.png"), "--plot: has no effect without --coefficients"),
        (("--coefficients", "x"), "coefficients: x: cannot be read: "),
    ],
)
def test_what_diff_does_not_take(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    assert poise(monkeypatch, "diff", *arguments) == 2
    assert capfd.readouterr().err.startswith(f"poise: {message}")
