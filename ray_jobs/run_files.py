"""The files of a long run of several steps, and its configs, made from those of this checkout."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines.commit import write_atomically
from pipelines.config import apply_overrides, parse_yaml
from ray_jobs.session import PROJECT_ROOT


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The places of a run's files.

    Attributes:
        out: its folder.
        name: of its configs' folder, configs/NAME, whose paths begin with runs/NAME.
    """

    out: Path
    name: str

    @property
    def configs(self) -> Path:
        """The folder of its configs: in this package if installed, else in the checkout."""
        installed = Path(__file__).with_name("configs")
        return (installed if installed.is_dir() else PROJECT_ROOT / "configs") / self.name

    def model(self, name: str) -> Path:
        """The place of a model."""
        return self.out / "models" / name

    def config(self, name: str) -> Path:
        """The place of a step's config."""
        return self.out / "configs" / f"{name}.yaml"

    def result(self, name: str) -> Path:
        """The place of an evaluation or a sweep."""
        return self.out / "results" / name

    def write_config(self, name: str, seed: int, overrides: Sequence[str] = ()) -> Path:
        """Write a step's config: a file of `configs` with this run's folder and seed."""
        text = (self.configs / f"{name}.yaml").read_text()
        comment = text.splitlines()[0]
        places = {
            f"configs/{self.name}/": f"{self.out}/configs/",
            f"runs/{self.name}": str(self.out),
        }
        text = re.sub("|".join(places), lambda found: places[found[0]], text)
        values = parse_yaml(text)
        if "seed" in values:
            values["seed"] = seed
        values = apply_overrides(values, overrides)
        path = self.config(name)
        write_atomically(path, f"{comment}\n{yaml.safe_dump(values, sort_keys=False)}")
        return path
