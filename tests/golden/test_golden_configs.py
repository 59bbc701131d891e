"""mergekit's own YAML files, run as they are, give mergekit's own checkpoints.

Oracle: mergekit 0.1.5's own output, stored beside this file; for the examples, docs/methods.md.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from operators.merging import METHODS
from pipelines.merge import load_merge_config, merge

HERE = Path(__file__).parent
CONFIGS = sorted((HERE / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_of_mergekit(config: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(HERE / "models")
    out = merge(load_merge_config(config), tmp_path / "out")
    found: dict = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    wanted = load_file(HERE / "merged" / f"{config.stem}.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=2e-6, err_msg=name)


def documented() -> dict[str, str]:
    """docs/methods.md: every method's section."""
    text = (HERE.parents[1] / "docs" / "methods.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    return {name: section for name, section in sections.items() if name in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_documented_config_runs(method: str, tmp_path: Path, monkeypatch) -> None:
    [config] = re.findall(r"^```yaml\n(.*?)^```", documented()[method], re.MULTILINE | re.DOTALL)
    example = HERE.parents[1] / "configs" / "merge" / f"{method}.yaml"
    assert config == re.sub(r"^#.*\n", "", example.read_text(), flags=re.MULTILINE)
    monkeypatch.chdir(HERE / "models")
    loaded = load_merge_config(example)
    assert loaded.merge_method == method
    out = merge(loaded, tmp_path / "out")
    base = load_file(HERE / "models" / "base" / "model.safetensors")
    for file in out.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert np.isfinite(tensor.numpy()).all()
            # Every tensor of the tiny models differs between them, so none stays the base's.
            assert name not in base or not np.array_equal(tensor, base[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_documented_parameters_are_the_methods_own(method: str) -> None:
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \|$", documented()[method], re.M)
    own = METHODS[method].parameters
    assert [row[0] for row in rows] == list(own)
    for name, default, allowed, meaning in rows:
        parameter = own[name]
        assert allowed == parameter.allowed and meaning.startswith(parameter.meaning)
        assert default.split(" ")[0] == shown(parameter.default), name


def shown(value) -> str:
    """A default as the documentation writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:g}"
    return "open" if value is None else value
