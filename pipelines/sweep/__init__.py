"""Choose a merge's parameters by measuring: Ray Tune runs merges and evaluates each of them."""

from pipelines.sweep.config import SweepConfig
from pipelines.sweep.run import plan_sweep, sweep, sweep_planned

__all__ = ["SweepConfig", "plan_sweep", "sweep", "sweep_planned"]
