"""mergekit's own YAML files, run as they are, give mergekit's own checkpoints."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

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
