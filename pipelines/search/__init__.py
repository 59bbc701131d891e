"""Search: candidates are merged in memory, measured by a warm engine, and raced."""

from pipelines.search.measurement import Measurement, Measurer
from pipelines.search.racing import Bound, Objective, Race

__all__ = ["Bound", "Measurement", "Measurer", "Objective", "Race"]
