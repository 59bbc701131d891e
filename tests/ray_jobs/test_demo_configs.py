"""The demo's configs: made from configs/demo/ for any folder, the default one among them.

Oracle: the folder of the run, which every path has to begin with.
"""

from pathlib import Path

import pytest

from pipelines.config import load_yaml
from pipelines.errors import InputError
from ray_jobs.demo import _check_run, demo_configs, write_configs
from ray_jobs.demo_results import ALIGNED, MERGES, SPLITS, SWEPT
from ray_jobs.pipeline import load_pipeline

CONFIGS = demo_configs()
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("folder", ["runs/demo", "elsewhere"])
def test_every_path_leads_into_the_run(tmp_path: Path, folder: str) -> None:
    out = tmp_path / folder
    write_configs(out, 5, "smoke")
    for name in NAMES:
        text = (out / "configs" / f"{name}.yaml").read_text()
        assert load_yaml(out / "configs" / f"{name}.yaml").get("seed", 5) == 5
        paths = [word.strip("',}") for word in text.split() if "/" in word and "${" not in word]
        assert paths
        inside = ("models/", "results/")  # an output below the pipeline's storage
        for path in paths:
            if name == "pipeline" and path.startswith(inside):
                continue
            assert path.startswith(str(out)), path
            assert path.count(str(tmp_path)) == 1


def test_the_pipeline_of_a_run_is_in_order(tmp_path: Path) -> None:
    """By the paths alone: models behind the world, merges behind models, numbers behind all."""
    write_configs(tmp_path / "run", 5, "smoke")
    plan = load_pipeline(tmp_path / "run" / "configs" / "pipeline.yaml")
    after = {name: set(stage.after) for name, stage in plan.stages.items()}
    assert after["world"] == set()
    assert after["base"] == {"world"}
    assert after["sft"] == {"world", "base"}
    for name in ALIGNED:
        assert {"world", "sft"} <= after[name] <= {"world", "sft", "base"}
    for name in SWEPT:
        assert {"world", "sft"} < after[f"sweep-{name}"]
        assert after[name] == {f"sweep-{name}"}
    for split in SPLITS:
        assert after[f"evaluate-{split}"] == {"world", "base", "sft", *ALIGNED, *MERGES}
    world = plan.stages["world"].config
    assert (world.seed, world.size, plan.stages["results"].config.seed) == (5, "smoke", 5)
    base = plan.stages["base"].config
    assert (base.num_steps, base.seed) == (1200, 5)


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Also one of earlier versions, and a folder that is no run."""
    write_configs(tmp_path / "run", 5, "smoke")
    _check_run(tmp_path / "run", {"seed": 5, "size": "smoke"})
    with pytest.raises(InputError, match="run: holds a run with seed=5, size=smoke; use another"):
        _check_run(tmp_path / "run", {"seed": 5, "size": "default"})
    (tmp_path / "steps.json").write_text('{"settings": {"seed": 1, "size": "smoke"}}')
    with pytest.raises(InputError, match="holds a run with seed=1"):
        _check_run(tmp_path, {"seed": 0, "size": "smoke"})
    (tmp_path / "steps.json").unlink()
    with pytest.raises(InputError, match="exists and is no run of this command"):
        _check_run(tmp_path, {"seed": 0, "size": "smoke"})
