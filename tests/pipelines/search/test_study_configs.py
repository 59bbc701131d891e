"""The studies in `configs/studies/`: their spaces and every config in them are checked, all but the
models and tasks, which `poise demo` makes. Oracle: the numbers of points of the papers' grids.
"""

from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.merge import load_merge_config
from pipelines.search import StudyConfig
from pipelines.search.samplers import GridSampler, make_sampler
from pipelines.search.space import Space
from pipelines.search.trainings import load_training

POINTS = {
    "alpha": 2 * 7,
    "alpha_density": 2 * 5 * 3,
    "batch": 3,
    "beta": 6,
    "beta_optimizers": 3 * 2,
    "child_tuning": 6,
    "density": 2 * 10,
    "ema": 6,
    "evolution": 100,
    "m3": 3 * 7 * 3,
    "merge_every": 2 * 7,
    "objectives": 2 * 3,
    "offline": 2 * 3 * 5,
    "plus_tau": 5,
    "random_methods": 2 * 5 * 5 + 1,
    "rate": 6,
    "rewarded_soup": 66,
}


def test_all_studies_are_known(project_root: Path) -> None:
    found = {path.stem for path in (project_root / "configs" / "studies").glob("*.yaml")}
    assert found == POINTS.keys() | {"expo"}  # that is of `poise expo`


@pytest.mark.parametrize("name", POINTS)
def test_every_config_of_a_study_is_one(
    name: str, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root)
    pytest.importorskip("cmaes" if name == "evolution" else "yaml")
    config = load_config(Path("configs/studies") / f"{name}.yaml", StudyConfig)
    space = Space(config.space)
    sampler = make_sampler(config.sampler, space, config.seed, len(config.objectives), 0)
    count = len(sampler) if isinstance(sampler, GridSampler) else config.num_trials
    assert count == POINTS[name]
    for fields in space.ends():
        for smoke in (False, True):
            if config.align is not None:
                load_training(config.align, fields, smoke=smoke)
            else:
                assert config.merge is not None
                load_merge_config(config.merge, [f"{k}={v!r}" for k, v in fields.items()])
