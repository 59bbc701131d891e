"""The demo's configs: made from configs/demo/ for any folder, the default one among them.

Oracle: the folder of the run, which every path has to begin with.
"""

from pathlib import Path

import pytest

from pipelines.config import load_yaml
from ray_jobs.demo import Demo, demo_configs

CONFIGS = demo_configs()
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("folder", ["runs/demo", "elsewhere"])
@pytest.mark.parametrize("name", NAMES)
def test_every_path_leads_into_the_run(tmp_path: Path, folder: str, name: str) -> None:
    out = tmp_path / folder
    written = load_yaml(Demo(out, 5, "smoke")._write_config(name))
    assert written.get("seed", 5) == 5
    text = (out / "configs" / f"{name}.yaml").read_text()
    paths = [word.strip("',}") for word in text.split() if "/" in word]
    assert paths
    for path in paths:
        assert path.startswith(str(out)), path
        assert path.count(str(tmp_path)) == 1
