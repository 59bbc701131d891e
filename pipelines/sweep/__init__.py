"""Choose a merge's parameters by measuring: Ray Tune over merges, on the development split."""

from pipelines.sweep.config import SweepConfig
from pipelines.sweep.run import check_sweep, sweep

__all__ = ["SweepConfig", "check_sweep", "sweep"]
